"""A run in progress: what is opened at its start, restored, and saved on its way."""

import contextlib
import dataclasses
import io
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import jax
import numpy as np

from oapl_jax.build import policy
from oapl_jax.build.advice import advice
from oapl_jax.build.assembly import Assembly
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.distributed.chips import peak_bytes, peak_flops
from oapl_jax.distributed.memory import trim_heap
from oapl_jax.distributed.messages import forward_preemption
from oapl_jax.distributed.sharding import num_processes
from oapl_jax.io import run_dir, storage, trackers
from oapl_jax.io.json_lines import LineFile, open_lines
from oapl_jax.io.lease import Lease, Leases
from oapl_jax.io.metrics import MetricsWriter
from oapl_jax.io.preemption import StopSignals
from oapl_jax.io.progress_bar import ProgressBar
from oapl_jax.io.storage import SharedPath
from oapl_jax.io.trackers import Distributions
from oapl_jax.learner import batch as batches
from oapl_jax.learner import divergence
from oapl_jax.learner.state import TrainState
from oapl_jax.model import hf, lora
from oapl_jax.rollouts import diagnostics
from oapl_jax.rollouts.buffer import Consumption, GroupBuffer, Window
from oapl_jax.rollouts.checks import GroupCheck, ShardCheck
from oapl_jax.rollouts.log import BatchRecord, RolloutLog, digest
from oapl_jax.rollouts.source import GroupSource, Taken, Weights, WindowPlan
from oapl_jax.rollouts.stops import Stops
from oapl_jax.rollouts.surface import SurfaceWatch
from oapl_jax.run.evaluator import Evaluator, StepLog
from oapl_jax.run.parity import check_parity
from oapl_jax.run.profile import Profiler, traced_as
from oapl_jax.run.progress import RunProgress
from oapl_jax.run.start import load, make_warm_start, model_path
from oapl_jax.run.summary import pass_at
from oapl_jax.sources.cluster import Cluster
from oapl_jax.sources.follower import POLICY_FOLDER, LogFollower, Published
from oapl_jax.sources.imported import ImportedWindows
from oapl_jax.sources.local import LocalSource
from oapl_jax.sources.offline import OfflineRounds
from oapl_jax.sources.setup import Drawn, SamplingSetup, acceptance, make_setup
from oapl_jax.types import Metrics, PreemptedError, RolloutGroup, TrainBatch, Verdict
from oapl_jax.weights.checkpoints import Checkpoints
from oapl_jax.weights.policies import PolicyStore

MakeSource = Callable[[SamplingSetup], GroupSource]

PEER_SECONDS = 1800.0
"""Longest wait for an answer of another process of the job."""
EPOCHS_FOLDER = "epochs"


@dataclasses.dataclass
class Run:
    """Everything that the loop reads from and writes to; opened by ``open_run``."""

    assembly: Assembly
    setup: SamplingSetup
    progress: RunProgress
    state: TrainState
    sampler_weights: Any
    """The lagged weights that the sampler holds: version ``progress.policy_version``."""
    reference: Any
    """The weights that the run started from, where the objective needs a copy of them; else None."""
    source: GroupSource
    evaluator: Evaluator
    checkpoints: Checkpoints
    log: StepLog
    record: BatchRecord | None
    """None in a process that another one leads, as are ``token_logprobs`` and ``lease``."""
    token_logprobs: LineFile | None
    bar: ProgressBar
    lease: Lease | None
    """On the run directory: one trainer at a time."""
    poll: Callable[[], bool]
    """Looks after what runs beside the learner; returns whether a process of the run has to stop."""
    stop: StopSignals
    profiler: Profiler
    peak_flops: float | None
    """A second, of the trainer's devices together; None where it is not known."""
    started: float
    """Time up to which ``progress.seconds`` has counted."""
    num_dropped_before: int
    """Groups that were dropped before this process started."""
    plan: WindowPlan | None = None
    """Of the window that is open."""
    has_trained: bool = False
    """Whether this process has compiled the train step."""
    surface: SurfaceWatch = dataclasses.field(default_factory=SurfaceWatch)
    """Watches the responses that were trained on."""
    has_said_invalid: bool = False
    """Whether it was said that rollouts have no verdict."""
    distributions: Distributions | None = None
    """Of the last batch, where it ended a window: for the tracker."""
    save_seconds: float = 0.0
    """Seconds that saving took since the last report."""

    @property
    def config(self) -> TrainConfig:
        """The run's."""
        return self.assembly.config

    @property
    def directory(self) -> SharedPath:
        """The run directory."""
        return storage.shared_path(self.config.run.dir)

    @property
    def trainer_lock(self) -> AbstractContextManager:
        """Held while a program runs on the trainer's mesh: the sampler's lock where the two share their devices."""
        return self.setup.device_lock if self.assembly.is_colocated else contextlib.nullcontext()

    @property
    def last_step(self) -> int:
        """Where the run ends; an offline run ends with its rounds, if these come first."""
        steps, plan = self.config.run.steps, self.plan
        return steps if plan is None or not plan.is_last else min(steps, self.progress.window_step + plan.num_steps)

    @property
    def is_over(self) -> bool:
        """Whether the last step was made, or ``checkpoint.patience`` is spent."""
        patience = self.config.checkpoint.patience
        is_spent = bool(patience) and self.progress.best.get("misses", 0) >= patience
        return is_spent or self.progress.step >= self.last_step

    @property
    def ends_window(self) -> bool:
        """Whether the sync is due after the last step that was made."""
        assert self.plan is not None
        return self.progress.step - self.progress.window_step == self.plan.num_steps

    @property
    def ends_epoch(self) -> bool:
        """Whether an epoch over a round's data ended with the last step."""
        return self.plan is not None and self.plan.ends_epoch(self.progress.step - self.progress.window_step)

    def begin(self, scored: Sequence[Drawn]) -> None:
        """Before step 1: the parity gate, pass@k of the start, the first checkpoint."""
        scoring = "compiling learner program 1 of 2: log-probabilities, for the parity gate"
        with self.trainer_lock, self.bar.stage(scoring):
            parity = check_parity(self.config, self.assembly.learner, self.state.params, scored)
        trim_heap()
        self.bar.note(f"parity gate: sampler and learner differ by {parity:.2g} nats a token")
        self.progress.before = self._evaluate_now(self.sampler_weights)
        self.is_best(self.progress.before)
        self.log.add(0, self.progress.before)
        self.save()
        self.checkpoints.wait()  # before the first group is logged: a checkpoint ties the log to this config

    def open_window(self) -> None:
        """Opens the window where the run stands; groups of its version that a killed run has logged are used again."""
        progress, window = self.progress, self.config.window
        self.stop.takes_interrupts = True  # from here to the last step
        steps = min(window.sync_every, self.config.run.steps - progress.window_step, window.sync_every // window.epochs)
        left = self.config.run.steps - progress.window_step - steps
        ahead = min(window.sync_every, left) * window.max_version_lag  # steps of the next window
        wanted = Window(
            progress.policy_version,
            progress.window_position,
            (steps + ahead) * self.setup.groups_per_batch,
            tuple(progress.asked_again),
        )
        try:
            self.plan = self.source.open_window(wanted, Weights(self.state.params, self.sampler_weights), self._taken())
        except PreemptedError:
            self._save_preempted()
        if (opened := self.plan.window) is not None:
            progress.window_position, progress.asked_again = opened.start_position, list(opened.asked_again)
        if self.plan.expected_steps is not None:
            self.bar.expect(min(self.config.run.steps, progress.window_step + self.plan.expected_steps))

    @traced_as("wait")
    def take(self) -> list[RolloutGroup]:
        """The groups of the next step's batch, recorded. Of several processes the leader chooses.

        Raises:
            PreemptedError: SIGTERM came; the state is saved.
            TimeoutError, RuntimeError, ValueError: as ``GroupSource.take``; the groups of two processes differ.
        """
        step = self.progress.step + 1
        chosen: list[Taken] = []

        def choose() -> dict[str, Any] | None:
            assert self.record is not None
            recorded = self.record.indices(step)  # by a run that was killed after this step
            taken = self.source.take(self.setup.groups_per_batch, self.poll, recorded)
            if taken is None or self.poll():
                return None
            if self.lease is not None and not self.lease.is_held:
                raise RuntimeError(
                    "this trainer could not show that it is alive for window.lease_seconds="
                    f"{self.config.window.lease_seconds:g} (frozen, or run.dir cannot be written), and another may have"
                    " taken over its run; start it again"
                )
            digests = {group.id: digest(group) for group in taken.groups}
            self.record.record(step, self.progress.policy_version, digests)
            chosen.append(taken)
            return {"indices": [group.index for group in taken.groups], "digests": list(digests.values())}

        batch = self.setup.trainers.agree(choose, self.config.window.deadline + PEER_SECONDS, self.poll)
        if batch is None:
            self._save_preempted()
        if not chosen:
            chosen.append(self._take_chosen(step, batch))
        taken = chosen[0]
        self.progress.cursor, self.progress.left_over = taken.cursor, taken.left_over
        return taken.groups

    @traced_as("train")
    def train(self, groups: list[RolloutGroup]) -> tuple[Metrics, float]:
        """The updates of one batch of groups (paper Eq. 3); their metrics, and the number of response tokens."""
        start, learner, of_updates = time.perf_counter(), self.assembly.learner, []
        parts = learner.mini_batches(groups)
        with self.trainer_lock:
            placed = [learner.prepare(part, self.state.params, self.reference) for part in parts]
            if not self.has_trained:
                with self.bar.stage("compiling learner program 2 of 2: the train step"):
                    learner.train_step.lower(self.state, placed[0]).compile()  # the call below finds it
                trim_heap()  # before the temporaries of the step are there too
            with contextlib.nullcontext() if self.has_trained else self.bar.stage("making the first step"):
                for part in placed:
                    self.state, *on_device = learner.train_step(self.state, part)
                    of_updates.append(jax.device_get(on_device))
                jax.block_until_ready(self.state)  # on all devices, before the lock is left
            self.has_trained = True
        speed = self._speed(parts, time.perf_counter() - start)
        self.progress.step += 1
        self.progress.num_rollouts += sum(int(part.segment_mask.sum()) for part in parts)
        if not self.has_said_invalid and (text := without_verdict(groups)):
            self.has_said_invalid = True
            self.bar.note(f"step {self.progress.step}: {text}; the metric rollouts/invalid counts further ones")
        on_surface, signs = self.surface.add(groups)
        for sign in signs:
            self.bar.note(sign)
        numbers, scores = zip(*of_updates, strict=True)
        metrics = {name: float(np.mean([update[name] for update in numbers])) for name in numbers[0]}
        metrics |= divergence.measure(list(zip(parts, scores, strict=True)), learner.beta2)
        metrics |= batches.describe(groups, self.config.data.sets) | on_surface | speed
        self.distributions = None
        is_recorded = self.is_over or (self.ends_window and diagnostics.is_recorded(self.progress.policy_version))
        if self.token_logprobs is not None and is_recorded:
            learned = learner.of_groups(groups, parts, [score.logprobs for score in scores])
            order = sorted(range(len(groups)), key=lambda i: batches.has_equal_rewards(groups[i]))
            chosen = order[: diagnostics.NUM_GROUPS]
            line = diagnostics.line(self.progress.step, groups, learned, chosen, self.setup.tokenizer.decode)
            self.token_logprobs.append(line)
            self.distributions = diagnostics.distributions(groups, learned, chosen)
        metrics["learner/padding"] = float(np.mean([batches.padding(part, learner.rows) for part in parts]))
        return metrics, float(sum(part.response_mask.sum() for part in parts))

    def _speed(self, parts: list[TrainBatch], seconds: float) -> Metrics:
        """How fast the updates on mini-batches were, and what memory a device has had in use at most."""
        mesh = self.assembly.trainer_mesh
        num_tokens = sum(batches.work(part)[0] for part in parts)
        metrics = {
            "learner/train_seconds": seconds,
            "learner/chip_tokens_per_second": num_tokens / seconds / mesh.size,
        }
        if self.peak_flops is not None:
            metrics["learner/mfu"] = self.assembly.learner.flops(parts) / seconds / self.peak_flops
        if (used := peak_bytes(mesh)) is not None:
            metrics["learner/peak_bytes"] = used
        return metrics

    @traced_as("sync")
    def sync(self) -> Metrics:
        """New weights for the sampler, and a new version; the next window is to be opened."""
        self.sampler_weights, metrics = self._copy()
        self.progress.next_window(self.progress.policy_version + 1)
        self.plan = None
        return metrics

    @traced_as("evaluate")
    def evaluate(self, num_samples: int) -> "Future[Metrics]":
        """Begins to evaluate the learner's weights of now."""
        is_synced = self.progress.step == self.progress.window_step
        return self.evaluator.start(
            self.sampler_weights if is_synced else self._copy()[0], num_samples, self.progress.step
        )

    def is_best(self, metrics: Metrics) -> bool:
        """Whether an evaluation of this step is the best so far, by ``checkpoint.keep_best``.

        Raises:
            ValueError: it has no such metric.
        """
        name, best, step = self.config.checkpoint.keep_best, self.progress.best, self.progress.step
        if name is None or not metrics:
            return False
        if name not in metrics:
            raise ValueError(f"checkpoint.keep_best={name!r}: an evaluation has {', '.join(sorted(metrics))}")
        if metrics[name] > best.get("value", -math.inf):
            self.progress.best = {"step": step, "value": metrics[name], "misses": 0}
            return True
        self.progress.best = {**best, "misses": best["misses"] + 1}
        if self.progress.best["misses"] == self.config.checkpoint.patience:
            self.bar.note(f"no higher {name} than {best['value']:.3f}, of step {best['step']}: the run ends (patience)")
        return False

    def report(self) -> Metrics:
        """Metrics of the source, and what saving took; dropped groups are counted over all restarts."""
        metrics = self.source.report()
        self.progress.num_dropped = self.num_dropped_before + int(metrics.get("window/dropped_groups", 0))
        seconds, self.save_seconds = self.save_seconds, 0.0
        return {**metrics, "window/dropped_groups": self.progress.num_dropped, "checkpoint/seconds": seconds}

    def end_epoch(self) -> Metrics:
        """Offline: evaluates the model after an epoch, writes it as a folder, and notes both."""
        assert self.plan is not None
        assert self.plan.epoch_steps is not None
        progress = self.progress
        metrics = self.evaluator.start(self._copy()[0], self.config.evaluation.samples, self.progress.step).result()
        number, epoch = progress.policy_version, (progress.step - progress.window_step) // self.plan.epoch_steps
        folder = self.directory / EPOCHS_FOLDER / f"{number:02}-{epoch:02}"
        with storage.folder_for(folder) as written:
            self.save_folder(written)
        done = {"round": number, "epoch": epoch, "step": progress.step, "folder": str(folder)}
        progress.epochs.append({**done, **pass_at(metrics)})
        score = f": pass@1 {metrics['evaluation/pass@1']:.3f}" if metrics else ""
        self.bar.note(f"round {number}, epoch {epoch}{score}")
        return metrics

    def save_folder(self, folder: pathlib.Path) -> None:
        """Writes the learner's model as a Hugging Face folder; of a run in a store each trainer its part of it."""
        hf.save_folder(
            folder,
            self.assembly.architecture,
            lora.merged(self.state.params),
            self.setup.tokenizer,
            writers=self.setup.trainers,
            is_shared=storage.is_local(self.directory),
        )

    @traced_as("save")
    def save(self) -> None:
        """Begins to save the arrays and the progress, when all metrics up to here are written."""
        self.log.flush()
        start = time.perf_counter()
        self.count_seconds()
        progress, checkpoint = self.progress, self.config.checkpoint
        progress.saved_versions = [*progress.saved_versions, progress.policy_version][-checkpoint.keep :]
        self.checkpoints.best_step = progress.best.get("step")
        with self.setup.device_lock:
            meta = {**dataclasses.asdict(progress), "config": run_dir.identity(self.config)}
            self.checkpoints.save(progress.step, (self.state.stored, self.sampler_weights), meta)
        if checkpoint.keep_rollouts and self.setup.trainers.is_leader:
            oldest = min(progress.policy_version + 1 - checkpoint.keep_rollouts, *progress.saved_versions)
            RolloutLog(self.setup.root / "rollouts").remove_before(oldest - self.config.window.max_version_lag)
        self.save_seconds += time.perf_counter() - start

    def finish(self) -> Metrics:
        """Ends the sampling, and evaluates the trained model.

        Raises:
            PreemptedError: a signal came in the last step; the state is saved.
        """
        if self.setup.trainers.agree(self.poll, PEER_SECONDS):
            self._save_preempted()
        self.stop.takes_interrupts = False
        self.source.finish()
        self.log.flush()
        self.checkpoints.wait()
        self.sampler_weights = None
        after = self._evaluate_now(self._copy()[0])
        self.is_best(after)
        self.count_seconds()
        return after

    def count_seconds(self) -> None:
        """Adds the time since the last call to the run's."""
        now = time.perf_counter()
        self.progress.seconds, self.started = self.progress.seconds + now - self.started, now

    def _evaluate_now(self, weights: Any) -> Metrics:
        """Before and after the run."""
        num_prompts, num_samples = len(self.setup.held_out), self.config.evaluation.final_samples
        if not num_prompts:
            return {}
        with self.bar.stage(f"evaluating: {num_prompts:,} held-out prompts, {num_samples} samples each"):
            return self.evaluator.start(weights, num_samples, self.progress.step).result()

    def _copy(self) -> tuple[Any, Metrics]:
        """The learner's weights of now, as the sampler takes them."""
        with self.setup.device_lock:
            return self.assembly.sync(self.state.params)

    def _taken(self) -> list[list[int]]:
        """Indices of the groups of each batch that the window has given already."""

        def read() -> list[list[int]]:
            assert self.record is not None
            steps = range(self.progress.window_step + 1, self.progress.step + 1)
            return [self.record.indices(step) or [] for step in steps]

        return self.setup.trainers.agree(read, PEER_SECONDS)

    def _take_chosen(self, step: int, batch: dict[str, Any]) -> Taken:
        """In a process that follows: the groups that the leader has chosen."""

        def never() -> bool:
            self.poll()
            return False

        taken = self.source.take(self.setup.groups_per_batch, never, batch["indices"])
        if taken is None or list(map(digest, taken.groups)) != batch["digests"]:
            raise RuntimeError(
                f"step {step}: the rollout log here has not the groups that the first trainer reads in it; do all"
                f" processes see the same run.dir={self.config.run.dir!r}?"
            )
        return taken

    def _save_preempted(self) -> NoReturn:
        if self.checkpoints.latest_step != self.progress.step:
            self.save()
        name = "Ctrl-C" if self.stop.received is signal.SIGINT else "SIGTERM"
        self.bar.note(f"{name}: saved at step {self.progress.step}; the same command again goes on from here")
        raise PreemptedError(self.stop.received)


def without_verdict(groups: Sequence[RolloutGroup]) -> str:
    """What a batch has lost to invalid verdicts, in words: no reward shows it. Empty where it has lost nothing."""
    rollouts = [item for group in groups for item in group.rollouts]
    invalid = [item.grade.detail for item in rollouts if item.grade.verdict is Verdict.INVALID]
    if not invalid:
        return ""
    return f"{len(invalid)} of {len(rollouts)} rollouts have no verdict and are left out ({invalid[0]})"


@contextlib.contextmanager
def open_run(config: TrainConfig, make_source: MakeSource | None = None) -> Iterator[Run]:
    """Loads what the config names, opens files and threads, and restores the newest checkpoint, where there is one.

    Raises:
        ValueError: what the config got wrong; the message names it.
    """
    started = time.perf_counter()
    bar = ProgressBar(config.run.steps, enabled=config.logging.progress)
    with bar.stage("reading what the config names: model, data, graders, devices"):
        assembly, inputs = load(config)
    directory = storage.shared_path(config.run.dir)
    is_leader = assembly.trainers.is_leader
    if not is_leader:
        bar = ProgressBar(config.run.steps, enabled=False, stream=io.StringIO())
    for name, text in inputs.describe(config).items():
        bar.note(f"{name}: {text}")
    for text in advice(config):
        bar.note(f"advice: {text}")
    with contextlib.ExitStack() as stack:
        setup = make_setup(assembly, inputs, bar.note)
        stack.callback(setup.grading.close)
        make_warm_start(config)
        lease = None
        if is_leader:
            run_dir.open_run(config)
            lease = _claim_run(stack, setup)
            storage.remove(directory / run_dir.SUMMARY_FILE)  # of a run that goes on
        setup.trainers.wait()  # until the leader has the run
        stack.enter_context(bar)
        stop = stack.enter_context(StopSignals())
        is_preempted = forward_preemption(stop.is_set)
        keep_every = [config.checkpoint.keep_every, config.window.sync_every * config.window.keep_checkpoints]
        checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint.keep, keep_every, setup.trainers)
        stack.callback(checkpoints.close)
        rollouts = RolloutLog(setup.root / "rollouts", dataclasses.asdict(setup.distribution))
        cluster = None
        if num_processes() > 1:
            cluster = stack.enter_context(Cluster(setup, rollouts, is_preempted))
        poll = is_preempted if cluster is None else cluster.poll
        with bar.stage(f"loading {'the weights' if checkpoints.latest_step is None else 'the newest checkpoint'}"):
            progress, state, weights, is_changed = _restore(assembly, setup, checkpoints, rollouts, bar)
            reference = _load_params(assembly) if assembly.learner.keeps_reference else None
        is_new = checkpoints.latest_step is None
        record = writer = evaluations = token_logprobs = None
        if is_leader:
            record = BatchRecord(directory / run_dir.BATCHES_FILE, delete_after=progress.step if is_changed else None)
            resume_step = -1 if is_new else progress.step
            tracker = trackers.start(directory, config.run, resume_step + 1, config_file.written(config))
            writer = stack.enter_context(MetricsWriter(directory, tracker, resume_step=resume_step))
            evaluations, token_logprobs = (
                open_lines(directory / name, lambda step: step <= resume_step)[0]
                for name in (run_dir.EVALUATIONS_FILE, diagnostics.TOKEN_LOGPROBS_FILE)
            )
            starts, _ = open_lines(directory / run_dir.STARTS_FILE, lambda step: True)
            starts.append({"step": progress.step})
        if cluster is None and setup.turns is not None and config.mode == "online":
            start = time.perf_counter()
            with bar.stage("compiling the sampler"):
                setup.warm_up(weights)
            trim_heap()
            bar.note(f"sampler: compiled in {time.perf_counter() - start:.1f} s")
        if make_source is None:
            source = _make_source(assembly, setup, rollouts, cluster, record, poll, bar.note, stack)
        else:
            source = make_source(setup)
        if config.window.imports is not None:
            source = ImportedWindows(source, setup, directory, rollouts, bar.note)
        count = setup.count_held_out if cluster is None else cluster.evaluate
        profiler = Profiler(directory, config.profile.steps if is_leader else None, bar.note)
        stack.callback(profiler.close)
        evaluator = Evaluator(count, setup.held_out, evaluations, has_thread=cluster is None)
        stack.callback(source.close)
        stack.callback(evaluator.close)
        run = Run(
            assembly,
            setup,
            progress,
            state,
            weights,
            reference,
            source,
            evaluator,
            checkpoints,
            StepLog(writer),
            record,
            token_logprobs,
            bar,
            lease,
            poll,
            stop,
            profiler,
            peak_flops(assembly.trainer_mesh),
            started,
            progress.num_dropped,
        )
        del state, weights  # the run has them, and gives them up one after the other
        stack.callback(run.log.flush)
        if is_new:
            run.begin((setup.draw if cluster is None else cluster.draw)(run.sampler_weights))
        yield run


def _restore(
    assembly: Assembly, setup: SamplingSetup, checkpoints: Checkpoints, rollouts: RolloutLog, bar: ProgressBar
) -> tuple[RunProgress, TrainState, Any, bool]:
    """Progress, state and sampler weights, of the newest checkpoint or of the start; whether the config was changed."""
    config, learner = assembly.config, assembly.learner
    state, weights, progress, is_changed = None, None, RunProgress(), False
    if config.lora.rank or checkpoints.latest_step is None:  # else a checkpoint holds all of it
        state = learner.init(_load_params(assembly))
    restored = checkpoints.restore((learner.shapes.stored, assembly.sampler_shapes), bar.note)
    if restored is not None:
        _, (stored, weights), meta = restored
        state = stored if state is None else state.restored(stored)
        names = {field.name for field in dataclasses.fields(RunProgress)} & meta.keys()
        progress = RunProgress(**{name: meta[name] for name in names})
        is_changed = meta["config"] != run_dir.identity(config)
        bar.note(f"resumed at step {progress.step}, policy version {progress.policy_version}")
    assert state is not None  # ``restore`` raises where there are checkpoints and none can be loaded
    if is_changed and config.mode == "offline":
        raise ValueError(f"run.dir={config.run.dir!r}: the config of an offline run cannot be changed on its way")
    if weights is None or is_changed:
        with setup.device_lock:
            weights, _ = assembly.sync(state.params)
    if is_changed:
        # Groups of the old config must not meet the new one's: a new window, under a version of its own.
        policies = PolicyStore(setup.root / POLICY_FOLDER)
        newest = setup.trainers.agree(lambda: max([0, *rollouts.versions(), *policies.versions()]), PEER_SECONDS)
        progress.next_window(max(progress.policy_version, newest) + 1)
    return progress, state, weights, is_changed


def _load_params(assembly: Assembly) -> Any:
    """The weights that the run starts from, with new adapters where it trains some."""
    config, mesh = assembly.config, assembly.trainer_mesh
    path = model_path(config.model)
    return policy.load_params(config.model, path, assembly.architecture, mesh, config.run.seed, config.lora)


def serve(config: TrainConfig) -> int:
    """A process of the job that only samples, until the trainers dismiss it; returns its exit code."""
    setup = make_setup(*load(config))
    rollouts = RolloutLog(setup.root / "rollouts", dataclasses.asdict(setup.distribution))
    with contextlib.closing(setup.grading), StopSignals() as stop:
        return Cluster(setup, rollouts, forward_preemption(stop.is_set)).serve()


def _make_source(
    assembly: Assembly,
    setup: SamplingSetup,
    rollouts: RolloutLog,
    cluster: Cluster | None,
    record: BatchRecord | None,
    poll: Callable[[], bool],
    note: Callable[[str], None],
    stack: contextlib.ExitStack,
) -> GroupSource:
    """Who fills the windows, by ``config.mode``."""
    config = assembly.config
    window = config.window
    if config.mode == "offline":
        return OfflineRounds(setup, assembly.learner, storage.shared_path(config.run.dir), rollouts, poll, note)
    consumption = Consumption(window.order, window.epochs, window.max_uses, window.min_groups, seed=config.run.seed)
    buffer = GroupBuffer(acceptance(config), window.max_groups_ahead, consumption)
    if config.mode == "online" and cluster is None:
        loop = setup.make_loop(buffer, rollouts)
        return LocalSource(loop, buffer, rollouts, window)
    samplers = cluster
    if config.mode == "detached":
        samplers = stack.enter_context(contextlib.closing(Published(assembly, setup)))
        note(f"samplers: oapl-jax sample --run {setup.root}")
    assert samplers is not None
    groups = GroupCheck(config, Stops(setup.tokenizer, setup.distribution), setup.grading.advantages, record)
    check, is_leader = ShardCheck(groups, setup.prompts), setup.trainers.is_leader
    return LogFollower(setup.root, rollouts, buffer, samplers, check, note, is_leader)


def _claim_run(stack: contextlib.ExitStack, setup: SamplingSetup) -> Lease:
    """Makes this process the run's one trainer, until it ends, whatever samplers write into ``run.dir``."""
    folder = storage.shared_path(setup.config.run.dir) / "leases"
    leases = stack.enter_context(Leases(folder, setup.config.window.lease_seconds))
    lease = leases.claim_from_the_dead("trainer")
    if lease is None:
        raise ValueError(
            f"run.dir={setup.config.run.dir!r}: another trainer works on it, and shows that it is alive by {folder}."
            " Two would overwrite each other: stop it, or choose another run.dir"
        )
    return lease

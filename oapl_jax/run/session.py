"""A run in progress: what is opened at its start, restored, and saved on its way."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from oapl_jax.build.job import Job, make_sampler_job
from oapl_jax.config import config_file
from oapl_jax.config.schema import TrainConfig
from oapl_jax.distributed.processes import forward_preemption
from oapl_jax.evaluation.held_out import summarize
from oapl_jax.io import run_dir, storage
from oapl_jax.io.console import ExitCode
from oapl_jax.io.lease import Lease, Leases
from oapl_jax.io.metrics import MetricsWriter, Progress
from oapl_jax.io.preemption import catch_sigterm
from oapl_jax.learner.state import TrainState
from oapl_jax.rollouts.buffer import GroupBuffer, Window
from oapl_jax.rollouts.log import BatchRecord, RolloutLog
from oapl_jax.sources.cluster import Crew
from oapl_jax.sources.follower import LogFollower, Published
from oapl_jax.sources.local import Worker
from oapl_jax.sources.offline import Rounds, StoppedError
from oapl_jax.types import Metrics, PreemptedError, RolloutGroup
from oapl_jax.weights.checkpoints import Checkpoints
from oapl_jax.weights.policies import Manifest, PolicyStore, VersionLeases


@dataclasses.dataclass
class Place:
    """Where a run stands besides its arrays; saved with every checkpoint."""

    step: int = 0
    policy_version: int = 0
    window_step: int = 0
    """Learner step at which the window opened."""
    window_position: int = 0
    """Place in the prompt stream of the window's first group."""
    asked_again: list[int] = dataclasses.field(default_factory=list)
    """Places in the prompt stream of the window's first groups, where an earlier window passed them by."""
    cursor: int = 0
    """Index in the window after the last group that was consumed."""
    left_over: list[int] = dataclasses.field(default_factory=list)
    """What the next window has to ask again: see ``GroupBuffer.left_over``."""
    num_dropped: int = 0
    """Groups dropped at syncs."""
    num_rollouts: int = 0
    """Rollouts trained on."""
    seconds: float = 0.0
    """Time spent, all restarts together."""
    before: dict[str, float] = dataclasses.field(default_factory=dict)
    """pass@k before step 1."""
    epochs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Offline: round, epoch, step, folder of the model and evaluation of each epoch that is over."""

    def next_window(self, policy_version: int) -> None:
        """Opens a window here, after the last group that was consumed."""
        self.policy_version, self.window_step = policy_version, self.step
        self.window_position += max(0, self.cursor - len(self.asked_again))
        self.asked_again, self.left_over, self.cursor = self.left_over, [], 0


PEER_SECONDS = 1800.0
"""For how long another process of the job may take to say what it has at hand."""


@dataclasses.dataclass
class Session:
    """A run in progress: its place and arrays, and everything that the loop reads from and writes to."""

    job: Job
    place: Place
    state: TrainState
    sampler_params: Any
    """The lagged weights that the sampler holds: version ``place.policy_version``."""
    checkpoints: Checkpoints
    log: RolloutLog
    record: BatchRecord | None
    """None, as the writer and the lease, in a process that another one leads."""
    writer: MetricsWriter | None
    progress: Progress
    buffer: GroupBuffer
    lease: Lease | None
    """On the run directory: one trainer at a time."""
    source: Worker | LogFollower | Rounds
    """Fills the buffer."""
    crew: Crew | None
    """The processes of this run, if there are several."""
    is_preempted: Callable[[], bool]
    started: float
    """Time up to which ``place.seconds`` does not count yet."""
    is_open: bool = False
    """The window of ``place`` is."""

    @property
    def window_steps(self) -> int:
        """Learner steps of the window that is open: the paper's L, or an offline round."""
        return self.source.num_steps if isinstance(self.source, Rounds) else self.job.config.window.sync_every

    @property
    def last_step(self) -> int:
        """Where the run ends; an offline run ends with its rounds, if these come first."""
        steps = self.job.config.run.steps
        is_known = isinstance(self.source, Rounds) and self.source.is_last
        return min(steps, self.place.window_step + self.window_steps) if is_known else steps

    def open_window(self) -> None:
        """Opens the window at ``place``; groups of its version that a killed run has logged are used again."""
        self.is_open = True
        if isinstance(self.source, Rounds):
            self._open_round(self.source)
            return
        place, config, window = self.place, self.job.config, self.job.config.window
        last_step = min(place.window_step + window.sync_every, config.run.steps)
        steps_of_new = min(last_step - place.window_step, window.sync_every // window.epochs)
        opened = Window(
            place.policy_version,
            place.window_position,
            steps_of_new * self.job.groups_per_batch,
            tuple(place.asked_again),
        )
        self.source.begin(opened, self.sampler_params)
        self.buffer.open_window(
            **opened._asdict(),
            logged=self.log.read(place.policy_version),
            batches=self._taken(),
        )

    def take(self, step: int) -> list[RolloutGroup] | None:
        """The groups of a step's batch, recorded; None after SIGTERM. Of several processes the leader chooses.

        Raises:
            TimeoutError, RuntimeError, ValueError: as ``GroupBuffer.take``; the groups of two processes differ.
        """
        chosen: list[RolloutGroup] = []

        def choose() -> dict[str, Any] | None:
            assert self.record is not None
            recorded = indices(self.record.groups(step))  # by a run that was killed after this step
            chosen.extend(self._take(recorded, may_end=True))
            if self.is_preempted():
                return None
            self._check_lease()
            self.record.record(step, self.place.policy_version, [group.id for group in chosen])
            return {"indices": [group.index for group in chosen], "digest": self.crew and _digest(chosen)}

        deadline = self.job.config.window.deadline + PEER_SECONDS
        batch = self.job.trainers.agree(choose, deadline, self.look)
        if batch is None:
            return None
        if not chosen:
            chosen = self._take(batch["indices"], may_end=False)
            if _digest(chosen) != batch["digest"]:
                raise RuntimeError(
                    f"step {step}: the rollout log here has not the groups that the first trainer reads in it; do all"
                    f" processes see the same run.dir={self.job.config.run.dir!r}?"
                )
        return chosen

    def look(self) -> bool:
        """What a process does while it waits for others; whether SIGTERM came to one of them."""
        if self.crew is not None:
            self.crew.look()
        return self.is_preempted()

    def evaluate(self, params: Any, num_samples: int) -> Metrics:
        """``evaluation/*`` of the sampler's copy of some weights."""
        if self.crew is not None:
            return self.crew.evaluate(params, num_samples)
        return summarize(self.job.count_held_out(params, num_samples), self.job.held_out)

    def _take(self, recorded: list[int] | None, *, may_end: bool) -> list[RolloutGroup]:
        deadline = self.job.config.window.deadline
        return self.buffer.take(self.job.groups_per_batch, deadline, lambda: self.look() and may_end, recorded)

    def _taken(self) -> list[list[int]]:
        """Indices of the groups of each batch that the window has given already."""

        def read() -> list[list[int]]:
            assert self.record is not None
            steps = range(self.place.window_step + 1, self.place.step + 1)
            return [indices(self.record.groups(step)) or [] for step in steps]

        return self.job.trainers.agree(read, PEER_SECONDS)

    def _open_round(self, rounds: Rounds) -> None:
        """Opens a window whose groups are all there before its first step."""
        place, is_begun = self.place, self.place.step > self.place.window_step
        try:
            groups = rounds.open(place.policy_version, self.state.params, self.sampler_params, is_begun=is_begun)
        except StoppedError:
            self.progress.note(f"SIGTERM: saved at step {place.step}; the same command again goes on from here")
            raise PreemptedError from None
        self.progress.expect(min(self.job.config.run.steps, place.window_step + rounds.expected_steps))
        self.buffer.open_window(
            place.policy_version,
            start_position=0,
            num_groups=rounds.steps_per_epoch * self.job.groups_per_batch,
            logged=groups,
            batches=self._taken(),
        )

    def sampler_copy(self) -> Any:
        """The learner's weights of now, as the sampler would have them."""
        with self.job.sampler_lock:
            return self.job.sync(self.state.params)[0]

    def write(self, step: int, metrics: Metrics) -> None:
        """Adds a line of metrics."""
        if self.writer is not None:
            self.writer.write(step, metrics)

    def save(self) -> None:
        """Begins to save the arrays and the place."""
        self.count_seconds()
        with self.job.sampler_lock:
            meta = {**dataclasses.asdict(self.place), "config": run_dir.identity(self.job.config)}
            self.checkpoints.save(self.place.step, (self.state.stored, self.sampler_params), meta)

    def count_seconds(self) -> None:
        """Adds the time since the last call to the run's."""
        now = time.perf_counter()
        self.place.seconds, self.started = self.place.seconds + now - self.started, now

    def _check_lease(self) -> None:
        """Stops a trainer that was frozen for so long that another may have taken its run."""
        if self.lease is not None and not self.lease.is_held:
            raise RuntimeError(
                "this trainer could not show that it is alive for window.lease_seconds="
                f"{self.job.config.window.lease_seconds:g} (frozen, or run.dir cannot be written), and another may have"
                " taken over its run; start it again"
            )


def open_session(
    stack: contextlib.ExitStack, job: Job, state: TrainState, directory: pathlib.Path, started: float
) -> Session:
    """Opens files and threads, and restores the newest checkpoint that can be read, where there is one."""
    config, is_leader = job.config, job.trainers.is_leader
    root = storage.shared_path(config.run.shared_dir or directory)
    lease = _claim_run(stack, root, config) if is_leader else None
    job.trainers.wait()  # until the leader has the run
    is_shown, stream = is_leader and config.logging.progress, None if is_leader else io.StringIO()
    progress = stack.enter_context(Progress(config.run.steps, enabled=is_shown, stream=stream))
    is_preempted = forward_preemption(stack.enter_context(catch_sigterm()))
    stack.callback(job.grader.close)
    keep_every = [config.checkpoint.keep_every, config.window.sync_every * config.window.keep_checkpoints]
    checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint.keep, keep_every, job.trainers)
    stack.callback(checkpoints.close)
    log, policies = RolloutLog(root / "rollouts", dataclasses.asdict(job.sampling)), PolicyStore(root / "policy")
    crew = None
    if jax.process_count() > 1:
        crew = Crew(job, root, log, is_preempted)
        stack.push(functools.partial(_dismiss, crew))

    place, sampler_params, is_changed = Place(), None, False
    restored = checkpoints.restore(_abstract(job, state), progress.note)
    if restored is not None:
        _, (stored, sampler_params), meta = restored
        state = state.restored(stored)
        place = Place(**{field.name: meta[field.name] for field in dataclasses.fields(Place)})
        is_changed = meta["config"] != run_dir.identity(config)
        progress.note(f"resumed at step {place.step}, policy version {place.policy_version}")
    if is_changed:
        # Groups of the old config must not meet the new one's: a new window, under a version of its own.
        with job.sampler_lock:
            sampler_params, _ = job.sync(state.params)
        newest = job.trainers.agree(lambda: max([0, *log.versions(), *policies.versions()]), PEER_SECONDS)
        place.next_window(max(place.policy_version, newest) + 1)

    record = writer = None
    if is_leader:
        record = BatchRecord(directory / "batches.jsonl", forget_after=place.step if is_changed else None)
        writer = stack.enter_context(_open_writer(config, directory, None if restored is None else place.step))
    buffer = job.make_buffer()
    if config.mode == "offline":
        if is_changed:
            raise ValueError(f"run.dir={config.run.dir!r}: the config of an offline run cannot be changed on its way")
        source = Rounds(job, directory, log, is_preempted, progress.note)
        buffer = source.make_buffer()
    elif config.mode == "detached":
        published = _publish_policies(stack, job, root, policies, progress.note)
        source = LogFollower(root, log, buffer, published, progress.note, is_leader=is_leader)
    elif crew is not None:
        source = LogFollower(root, log, buffer, crew, progress.note, is_leader=is_leader)
    else:
        source = job.make_worker(buffer, log)
    stack.callback(source.stop)
    return Session(
        job,
        place,
        state,
        sampler_params,
        checkpoints,
        log,
        record,
        writer,
        progress,
        buffer,
        lease,
        source,
        crew,
        is_preempted,
        started,
    )


def _open_writer(config: TrainConfig, directory: pathlib.Path, resume_step: int | None) -> MetricsWriter:
    return MetricsWriter(
        directory,
        resume_step=resume_step,
        tensorboard=config.logging.tensorboard,
        wandb_project=config.logging.wandb_project,
        config=config.model_dump(),
    )


def serve(config: TrainConfig) -> int:
    """A process of the job that only samples, until the trainers dismiss it; returns its exit code."""
    job, root = make_sampler_job(config), pathlib.Path(config.run.dir)
    log = RolloutLog(root / "rollouts", dataclasses.asdict(job.sampling))
    with contextlib.ExitStack() as stack:
        stack.callback(job.grader.close)
        is_preempted = forward_preemption(stack.enter_context(catch_sigterm()))
        return Crew(job, root, log, is_preempted).serve()


def _dismiss(crew: Crew, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
    """Ends the processes that sample as this one ends."""
    if error is None:
        crew.dismiss(0)
    elif isinstance(error, PreemptedError):
        crew.dismiss(ExitCode.PREEMPTED)
    else:
        crew.close()


def _claim_run(stack: contextlib.ExitStack, root: storage.SharedPath, config: TrainConfig) -> Lease:
    """Makes this process the run's one trainer, until it ends."""
    leases = stack.enter_context(Leases(root / "leases", config.window.lease_seconds))
    lease = leases.claim_from_the_dead("trainer")
    if lease is None:
        raise ValueError(
            f"run.dir={config.run.dir!r}: another trainer works on it, and shows that it is alive by {root / 'leases'}."
            " Two would overwrite each other: stop it, or choose another run.dir"
        )
    return lease


def _publish_policies(
    stack: contextlib.ExitStack,
    job: Job,
    root: storage.SharedPath,
    policies: PolicyStore,
    note: Callable[[str], None],
) -> Published:
    """For samplers that read the config and the policies in ``root``."""
    config = job.config
    if job.trainers.is_leader:
        storage.replace(root / run_dir.CONFIG_FILE, config_file.to_yaml(config).encode())
    digest = run_dir.digest(config)

    def publish(window: Window, params: Any) -> Metrics:
        manifest = Manifest(window, config.window.shard_groups, digest, {})
        return policies.publish(manifest, job.model_config, params, job.tokenizer, writers=job.trainers)

    leases = VersionLeases(root / "leases" / "policies", config.window.lease_seconds)
    stack.callback(leases.close)
    note(f"samplers: python -m oapl_jax sample --run {root}")
    return Published(publish, policies, leases)


def indices(group_ids: list[str] | None) -> list[int] | None:
    """Places in their window of groups by id."""
    return None if group_ids is None else [int(group_id.rpartition("-")[2]) for group_id in group_ids]


def _digest(groups: Sequence[RolloutGroup]) -> str:
    """Of what a train step reads of groups."""
    digest = hashlib.sha256()
    for group in groups:
        for item in group.rollouts:
            digest.update(item.rollout.token_ids.tobytes() + item.rollout.logprobs.tobytes())
            digest.update(f"{group.id} {item.advantage!r} {item.grade.verdict}".encode())
    return digest.hexdigest()


def _abstract(job: Job, state: TrainState) -> Any:
    """What a checkpoint holds: the learner's state and the lagged sampler weights."""
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, job.state_shardings)
    return abstract.stored, job.sync.abstract(state.params)

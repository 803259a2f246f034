"""Windows that other processes fill: the trainer hands them weights, and follows the rollout log.

The samplers are processes of ``oapl-jax sample``, of any other engine, or other processes of the same JAX job.
"""

import contextlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from oapl_jax.build.assembly import Assembly
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.distributed.team import Team
from oapl_jax.io import run_dir, storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.model import hf, qwen
from oapl_jax.rollouts.buffer import GroupBuffer, Window
from oapl_jax.rollouts.checks import ShardCheck
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.source import Weights, WindowPlan
from oapl_jax.sources.local import BufferedSource
from oapl_jax.sources.sampling_loop import SamplingLoop
from oapl_jax.sources.setup import SamplingSetup
from oapl_jax.types import Metrics, RolloutGroup
from oapl_jax.weights.policies import Manifest, PolicyStore, VersionLeases

STOP_DEADLINE = 60.0
DAMAGED_SECONDS = 0.5
"""For how long a file is damaged before it is moved away: without hard links it is seen while it is written."""
UNREADABLE_SECONDS = 30.0
"""For how long the file system refuses a file before it is moved away."""
MOST_REPORTED = 1e15

REPORT_SECONDS = 1.0

SAMPLERS_FOLDER = "samplers"
LEASES_FOLDER = "leases/shards"
VERSION_LEASES_FOLDER = "leases/policies"
POLICY_FOLDER = "policy"
SHARED_FOLDERS = (POLICY_FOLDER, SAMPLERS_FOLDER, "leases", LEASES_FOLDER, VERSION_LEASES_FOLDER)


@runtime_checkable
class Samplers(Protocol):
    """Samplers in other processes, as their trainer sees them."""

    def open_window(self, window: Window, weights: Weights) -> Metrics:
        """Has a window sampled with these weights."""
        ...

    def tidy(self) -> None:
        """Removes what older windows have left; called once a window, in another thread."""
        ...

    def finish(self) -> None:
        """No other window comes."""
        ...


class Published:
    """Samplers that read the config and the policies in the run's shared folder, and come and go as they like."""

    def __init__(self, assembly: Assembly, setup: SamplingSetup):
        config, self._assembly, self._setup, self._version = setup.config, assembly, setup, 0
        if setup.trainers.is_leader:
            storage.check_creates_once(setup.root)
            run_dir.save_config(setup.root, config)
        self._digest = run_dir.digest(config)
        self._store = PolicyStore(setup.root / POLICY_FOLDER)
        self._leases = VersionLeases(setup.root / VERSION_LEASES_FOLDER, config.window.lease_seconds)

    def open_window(self, window: Window, weights: Weights) -> Metrics:
        """Publishes the weights."""
        self._version, setup = window.policy_version, self._setup
        manifest = Manifest(window, setup.config.window.shard_groups, self._digest, {})
        params, save = weights.sampler, cast(Callable[..., Any], hf.save_folder)
        if setup.config.window.publish == "adapters":
            params, save = weights.learner, self._save_adapters
        architecture, writers = self._assembly.architecture, setup.trainers
        return self._store.publish(manifest, architecture, params, setup.tokenizer, writers=writers, save=save)

    def _save_adapters(
        self,
        folder: pathlib.Path,
        config: qwen.QwenConfig,
        params: Any,
        tokenizer: Tokenizer,
        writers: Team,
        is_shared: bool,
    ) -> None:
        """Takes what ``hf.save_folder`` takes; of one writer alone, for which every folder is its own."""
        base = self._setup.config.model.path
        if base is None or writers.size > 1:
            raise ValueError("window.publish=adapters needs a model in model.path and a single training process")
        if params is None:
            raise ValueError(f"{folder} is gone, and no checkpoint has its adapters now that its window has begun")
        hf.save_adapter(folder, config, params, self._setup.config.lora, base)
        tokenizer.save(folder)

    def tidy(self) -> None:
        """Removes versions that nobody uses any longer."""
        config = self._setup.config
        self._store.collect(self._leases, config.checkpoint.keep_policies, config.window.deadline)

    def finish(self) -> None:
        """Marks the newest version as the last."""
        self._store.finish(self._version)

    def close(self) -> None:
        """Gives the leases back."""
        self._leases.close()


class LogFollower(BufferedSource):
    """A ``GroupSource``: puts what appears in the log into the buffer; owns a thread.

    ``check`` reads the files; one that does not pass is moved away, by the leader where several processes follow the log.
    ``note`` prints a sentence for the user.
    """

    def __init__(
        self,
        root: SharedPath,
        log: RolloutLog,
        buffer: GroupBuffer,
        samplers: Samplers,
        check: ShardCheck,
        note: Callable[[str], None],
        is_leader: bool = True,
    ):
        super().__init__(buffer, check.groups.config.window)
        self._root, self._log, self._samplers = root, log, samplers
        self._check, self._note, self._is_leader = check, note, is_leader
        self._window: Window | None = None
        self._version = -1
        self._untidy = -1
        """Version before which leases and policies are to be removed; -1: done."""
        self._known: set[int] = set()
        self._failures: dict[SharedPath, float] = {}
        """Files of the version that could not be read, and when that was seen first."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._guard, name="follower", daemon=True)
        self._num_damaged = 0
        self._published: Metrics = {}
        self._reports: dict[str, Report] = {}
        self._next_reports = 0.0
        self._last_report: dict[str, Report] = {}
        self._last_time = time.perf_counter()

    def open_window(self, window: Window, weights: Weights, taken: Sequence[Sequence[int]]) -> WindowPlan:
        """Hands the weights to the samplers.

        Files of the version from before a restart that do not pass are moved away, as are files from before anybody had
        its weights. The thread that follows removes what is left of older versions, while samplers and learner work.
        """
        version = window.policy_version
        self._free_folders(version)
        before = self._log.parts(version)
        if taken:  # the learner has gone on since the version was published
            weights = weights._replace(learner=None)
        self._published = self._samplers.open_window(window, weights)
        record = self._check.groups.record
        is_new = record is None or not record.has_version(version)
        if is_new and self._published.get("sync/publish_bytes", 0):
            for part in before:
                self._move_away(self._log.path(version, part), "was written before this version was published")
        if self._is_leader:
            self._untidy = version
        parts = self._log.parts(version)
        logged = [group for part in parts for group in self._read_part(window, part, patience=0.0) or ()]
        self._buffer.open_window(window, logged=logged, batches=taken)
        self._window = window
        if self._thread.ident is None:
            self._thread.start()
        return WindowPlan(self._limits.sync_every)

    def report(self) -> Metrics:
        """Metrics since the last report, summed over the samplers that have reported since."""
        now, reports, nothing = time.perf_counter(), self._reports, Report(-1.0, 0.0, 0.0)
        pairs = [(report, self._last_report.get(name, nothing)) for name, report in reports.items()]
        live = [(new, old) for new, old in pairs if new.beat != old.beat]
        seconds = max(now - self._last_time, 1e-9)
        self._last_report, self._last_time = reports, now
        published, self._published = self._published, {}
        return {
            "sampler/processes": len(live),
            "sampler/tokens_per_second": sum(new.tokens - old.tokens for new, old in live) / seconds,
            "sampler/idle_seconds": sum(new.idle_seconds - old.idle_seconds for new, old in live),
            "window/damaged_files": self._num_damaged,
            **super().report(),
            **published,
        }

    def finish(self) -> None:
        """Tells the samplers that the run is over."""
        self._samplers.finish()

    def close(self) -> None:
        """Ends the thread.

        Raises:
            TimeoutError: it does not end.
        """
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_DEADLINE)
        if self._thread.is_alive():
            raise TimeoutError(f"the follower of the rollout log did not end within {STOP_DEADLINE:g} s")

    def _guard(self) -> None:
        try:
            last_news, delay = time.monotonic(), 0.0
            while not self._stopping.wait(delay):
                start = time.monotonic()
                if self._follow():
                    last_news, delay = time.monotonic(), storage.SHORTEST_POLL
                    continue
                now = time.monotonic()
                delay = storage.next_poll(now - start, now - last_news)
                if now >= self._next_reports:
                    self._free_folders(self._version)
                    self._reports = _read_reports(self._root / SAMPLERS_FOLDER)
                    self._next_reports = time.monotonic() + REPORT_SECONDS
                self._tidy()
            self._tidy()
        except BaseException as error:
            self._buffer.fail(error)

    def _tidy(self) -> None:
        """Once a window: removes policies that nobody uses, and leases of shards, of versions before the last one."""
        version, self._untidy = self._untidy, -1
        if version < 0:
            return
        with contextlib.suppress(OSError):  # what stays is in nobody's way
            self._samplers.tidy()
            shards = self._root / LEASES_FOLDER
            for name in storage.names(shards):
                if name.lstrip(".").partition("-")[0] < f"{version - 1:06d}":  # a dot: it is being written
                    storage.remove(shards / name)

    def _follow(self) -> bool:
        """Puts new files into the buffer; whether there was something new."""
        window = self._window
        if window is None or window.policy_version != self._buffer.policy_version:  # the next one is being opened
            return False
        version = window.policy_version
        is_news = version != self._version
        if is_news:
            self._version, self._known, self._failures = version, set(), {}
        parts = self._log.parts(version)
        self._known.intersection_update(parts)  # a file that was moved away may come again
        for part in parts:
            if part not in self._known and (groups := self._read_part(window, part, DAMAGED_SECONDS)) is not None:
                self._known.add(part)
                is_news = True
                for group in groups:
                    self._buffer.put(group)
        return is_news

    def _free_folders(self, version: int) -> None:
        """Moves away what has the place of a folder that trainer and samplers share."""
        if not storage.is_local(self._root):
            return
        for name in ("rollouts", f"rollouts/{version:06d}", *SHARED_FOLDERS):
            folder = pathlib.Path(str(self._root / name))
            if os.path.lexists(folder) and not folder.is_dir():
                self._move_away(folder, "is no folder")

    def _read_part(self, window: Window, part: int, patience: float) -> list[RolloutGroup] | None:
        """The groups of a file; None where it does not pass: after ``patience`` seconds of that it is moved away."""
        path = self._log.path(window.policy_version, part)
        try:
            return self._check.read(self._log, window, part)
        except FileNotFoundError:  # moved away, and still listed by an object store
            return None
        except (OSError, ValueError, MemoryError) as error:
            now, patience = time.monotonic(), patience if isinstance(error, ValueError) else UNREADABLE_SECONDS
            if now - self._failures.setdefault(path, now) >= patience:
                self._move_away(path, str(error).removeprefix(f"{path}: "))
                self._failures.pop(path, None)
            return None

    def _move_away(self, path: SharedPath, problem: str) -> None:
        """Frees the place of what does not pass; a disk that cannot be written is tried again."""
        with contextlib.suppress(OSError):  # or somebody was first
            if self._is_leader:
                aside = storage.move_aside(path)
                self._num_damaged += 1
                again = ", its groups are sampled again" if path.name.endswith(".parquet") else ""
                self._note(f"{path}: {problem}; moved to {aside.name}{again}")


class Report(NamedTuple):
    """What a sampler has done since it started."""

    beat: float
    tokens: float
    idle_seconds: float


class Reporter:
    """Writes a sampler's report now and then, for the trainer's metrics and for people."""

    def __init__(self, root: SharedPath, name: str):
        self._path, self._beat, self._next = root / SAMPLERS_FOLDER / f"{name}.json", 0, 0.0

    def report(self, loop: SamplingLoop) -> None:
        """Writes, where it is time."""
        if time.monotonic() >= self._next:
            self._next, self._beat = time.monotonic() + REPORT_SECONDS, self._beat + 1
            values = {"beat": self._beat, "tokens": loop.sums[0], "idle_seconds": round(loop.sums[1], 3)}
            with contextlib.suppress(OSError):  # a full disk must not end the sampling
                storage.replace(self._path, json.dumps(values).encode() + b"\n", is_durable=False)


def _read_reports(folder: SharedPath) -> dict[str, Report]:
    reports = {}
    for name in storage.names(folder):
        if name.endswith(".json") and not name.startswith("."):
            # It may be replaced, or written by another program.
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, OverflowError):
                found = storage.read_object(folder / name)
                report = Report(*(float(found[key]) for key in Report._fields))
                if all(0 <= number < MOST_REPORTED for number in report):
                    reports[name] = report
    return reports

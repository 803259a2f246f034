"""The trainer's side of samplers in other processes: it hands them policies, and follows the rollout log.

To ``train.py`` this is what ``Worker`` is: something that fills the buffer with graded groups of the version
that it was given. The samplers are processes of ``oapl_jax.sample``, or of any other engine.
"""

import collections
import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from oapl_jax import storage
from oapl_jax.policy_store import Holds, PolicyStore
from oapl_jax.rollouts.buffer import GroupBuffer, Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.storage import SharedPath
from oapl_jax.types import Metrics, RolloutGroup

POLL_SECONDS = 0.2
STOP_DEADLINE = 60.0
ATTEMPTS = 3
"""Looks at a file that cannot be read before it is moved away."""

SAMPLERS_FOLDER = "samplers"
LEASES_FOLDER = "leases/shards"


class Samplers(Protocol):
    """Samplers in other processes, as their trainer sees them."""

    def open_window(self, window: Window, params: Any) -> Metrics:
        """Has a window sampled with these weights."""
        ...

    def finish(self, policy_version: int) -> None:
        """Tells them that no other window comes."""
        ...


class Published:
    """Samplers that read policies from a store, and come and go as they like.

    Args:
        publish: writes a version for a window.
        store: where to.
        holds: who uses which version.
    """

    def __init__(self, publish: Callable[[Window, Any], Metrics], store: PolicyStore, holds: Holds):
        self._publish, self._store, self._holds = publish, store, holds

    def open_window(self, window: Window, params: Any) -> Metrics:
        """Publishes the weights, and removes versions that nobody uses any longer."""
        metrics = self._publish(window, params)
        self._store.collect(self._holds)
        return metrics

    def finish(self, policy_version: int) -> None:
        """The run is over."""
        self._store.finish(policy_version)


class LogFollower:
    """Opens windows for samplers, and puts what appears in the log into the buffer; owns a thread.

    Args:
        root: the shared folder of the run.
        log: of the run.
        buffer: takes what is finished.
        samplers: who sample.
        note: takes a sentence for the user.
        is_leader: False: another process does the same, and it is the one that moves damaged files away.
    """

    def __init__(
        self,
        root: SharedPath,
        log: RolloutLog,
        buffer: GroupBuffer,
        samplers: Samplers,
        note: Callable[[str], None],
        *,
        is_leader: bool = True,
    ):
        self._root, self._log, self._buffer, self._samplers = root, log, buffer, samplers
        self._note, self._is_leader = note, is_leader
        self._version = -1
        self._known: set[int] = set()
        self._failures: collections.Counter[SharedPath] = collections.Counter()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._guard, name="follower", daemon=True)
        self._num_damaged = 0
        self._published: Metrics = {}
        self._last_report: dict[str, dict[str, float]] = {}
        self._last_time = time.perf_counter()

    def begin(self, window: Window, params: Any) -> None:
        """Hands the weights of a window to the samplers; call before the buffer's ``open_window``.

        Files of its version that cannot be read, from before a restart, are moved away and said.
        """
        self._published = self._samplers.open_window(window, params)
        if not self._is_leader:
            return
        shards = self._root / LEASES_FOLDER
        for name in storage.names(shards):
            if name.partition("-")[0] < f"{window.policy_version - 1:06d}":
                storage.remove(shards / name)
        for part in self._log.parts(window.policy_version):
            self._read_part(window.policy_version, part, attempts=1)

    def start(self) -> None:
        """Begins to follow."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread.

        Raises:
            TimeoutError: it does not end.
        """
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_DEADLINE)
        if self._thread.is_alive():
            raise TimeoutError(f"the follower of the rollout log did not end within {STOP_DEADLINE:g} s")

    def finish(self, policy_version: int) -> None:
        """Tells the samplers that the run is over."""
        self._samplers.finish(policy_version)

    def report(self) -> Metrics:
        """Metrics since the last report, summed over the samplers that have said something since."""
        now, seconds = time.perf_counter(), max(time.perf_counter() - self._last_time, 1e-9)
        reports = _read_reports(self._root / SAMPLERS_FOLDER)
        none = {"beat": -1.0, "tokens": 0.0, "idle_seconds": 0.0}
        before = {name: self._last_report.get(name, none) for name in reports}
        live = [name for name in reports if reports[name]["beat"] != before[name]["beat"]]

        def total(key: str) -> float:
            return sum(reports[name][key] - before[name][key] for name in live)

        self._last_report, self._last_time = reports, now
        published, self._published = self._published, {}
        return {
            "sampler/processes": len(live),
            "sampler/tokens_per_second": total("tokens") / seconds,
            "sampler/idle_seconds": total("idle_seconds"),
            "window/damaged_files": self._num_damaged,
            **published,
        }

    def _guard(self) -> None:
        try:
            while not self._stopping.wait(POLL_SECONDS):
                self._follow()
        except BaseException as error:
            self._buffer.fail(error)

    def _follow(self) -> None:
        version = self._buffer.policy_version  # not what ``begin`` was given: the buffer takes no other's groups
        if version != self._version:
            self._version, self._known = version, set()
        parts = self._log.parts(version)
        self._known.intersection_update(parts)  # a file that was moved away may come again
        for part in parts:
            if part not in self._known and (groups := self._read_part(version, part, ATTEMPTS)) is not None:
                self._known.add(part)
                for group in groups:
                    self._buffer.put(group)

    def _read_part(self, version: int, part: int, attempts: int) -> list[RolloutGroup] | None:
        """The groups of a file; None where it cannot be read, and was moved away after some attempts."""
        path = self._log.path(version, part)
        try:
            return self._log.read_part(version, part)
        except ValueError as error:
            self._failures[path] += self._is_leader
            if self._failures[path] >= attempts:
                with contextlib.suppress(FileNotFoundError):  # the other thread was first
                    aside = storage.move_aside(path, ".damaged")
                    self._num_damaged += 1
                    self._note(f"{error}; moved to {aside.name}, its groups are sampled again")
                del self._failures[path]
            return None


def write_report(root: SharedPath, name: str, beat: int, tokens: int, idle_seconds: float) -> None:
    """A sampler's sums since it started, for the trainer's metrics and for people."""
    values = {"beat": beat, "tokens": tokens, "idle_seconds": round(idle_seconds, 3)}
    storage.replace(root / SAMPLERS_FOLDER / f"{name}.json", json.dumps(values).encode() + b"\n")


def _read_reports(folder: SharedPath) -> dict[str, dict[str, float]]:
    reports = {}
    for name in storage.names(folder):
        if name.endswith(".json") and not name.startswith("."):
            try:
                found = json.loads(storage.read(folder / name))
                reports[name] = {key: float(found[key]) for key in ("beat", "tokens", "idle_seconds")}
            except (OSError, ValueError, KeyError):
                continue  # it is being replaced, or of another program
    return reports

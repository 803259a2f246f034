"""A run over several processes of one JAX job: the trainers give orders, the processes that sample carry them out.

All trainers run the same loop, step by step; the first of them decides and the others follow (``Team.agree``).
Processes that sample carry out orders: take these weights and sample this window, count held-out prompts, draw for the
parity gate. A process may be both, with one mesh for the two. Weights travel from devices to devices; rollouts go
through the log, which all processes see, in shards that are leased as by detached samplers.
"""

import contextlib
import hashlib
import io
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from oapl_jax.distributed.messages import check_peers, delete, put, wait_for
from oapl_jax.distributed.team import KEPT_KEYS, Team
from oapl_jax.evaluation.held_out import Counts
from oapl_jax.io import storage
from oapl_jax.io.console import ExitCode
from oapl_jax.io.lease import Leases
from oapl_jax.rollouts.buffer import Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.rollouts.source import Weights
from oapl_jax.sources import follower
from oapl_jax.sources.setup import Drawn, SamplingSetup, acceptance
from oapl_jax.types import Metrics, PreemptedError

ORDER_DEADLINE = 4 * 3600.0
"""How long a process that samples waits for the next order, and a trainer for the result of one."""
DRAIN_SECONDS = 3.0
PARITY_FILE = "parity.npz"
FILE_SECONDS = 120.0
"""How long a file that another process has written may take to be seen."""


class Cluster:
    """This process's part in a run of several; owns its sampling loop, where it samples."""

    def __init__(self, setup: SamplingSetup, log: RolloutLog, is_preempted: Callable[[], bool]):
        self._setup, self._root, self._is_preempted = setup, setup.root, is_preempted
        self._num_orders = 0
        self._reporter = follower.Reporter(self._root, f"{socket.gethostname()}-{os.getpid()}")
        window = setup.config.window
        self._leases = Leases(self._root / follower.LEASES_FOLDER, window.lease_seconds)
        self._shards = ShardQueue(log, self._leases, acceptance(setup.config), window.shard_groups)
        self._loop = setup.make_loop(self._shards, self._shards) if setup.turns is not None else None

    def open_window(self, window: Window, weights: Weights) -> Metrics:
        """Trainers: has a window sampled with these weights, of ``WeightSync``; ``sync/transfer_seconds``."""
        start = time.perf_counter()
        self._order("window", weights.sampler, window._asdict())
        return {"sync/transfer_seconds": time.perf_counter() - start}

    def evaluate(self, weights: Any, num_samples: int) -> Counts:
        """Trainers: counts of the held-out prompts, which the samplers share."""
        parts = self._order("evaluate", weights, {"num_samples": num_samples})
        return Counts(*(np.sum([part[name] for part in parts], axis=0) for name in Counts._fields))

    def draw(self, weights: Any) -> list[Drawn]:
        """Trainers: rollouts for the parity gate, drawn by the first sampler."""
        digest, *_ = self._order("draw", weights, {})
        arrays = np.load(io.BytesIO(self._read(PARITY_FILE, digest)))
        self._setup.trainers.wait()  # all have read it
        if self._setup.trainers.is_leader:
            storage.remove(self._root / PARITY_FILE)
        count = len(Drawn._fields)
        return [Drawn(*(arrays[f"arr_{i + k}"] for k in range(count))) for i in range(0, len(arrays.files), count)]

    def tidy(self) -> None:
        """Nothing is left: each version's weights took the place of the last one's."""

    def finish(self) -> None:
        """Trainers: has nothing sampled any longer."""
        self._order("finish", None, {})

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        """Trainers: ends the processes that sample as this one ends; those see for themselves that it has failed."""
        if error is None or isinstance(error, PreemptedError):
            code = ExitCode.DONE if error is None else ExitCode.PREEMPTED
            self._order("stop", None, {"exit_code": code})
        self.close()

    def serve(self) -> int:
        """A process that only samples: carries out orders until it is dismissed; returns the exit code.

        Raises:
            TimeoutError: no order came.
            PeerError: another process has failed.
        """
        with contextlib.closing(self):
            while True:
                self._num_orders += 1
                order = wait_for(self._key("order"), ORDER_DEADLINE, self.poll)
                weights = None
                if order["has_weights"]:
                    assert self._setup.transfer is not None
                    with self._setup.device_lock:
                        weights = self._setup.transfer.receive()
                self._carry_out(order, weights)
                if order["kind"] == "stop":
                    return order["values"]["exit_code"]

    def poll(self) -> bool:
        """Reports on this process's sampler, and raises what its threads have raised; whether SIGTERM came."""
        is_preempted = self._is_preempted()
        check_peers()
        if self._shards.failure is not None:
            raise self._shards.failure
        if self._loop is not None and self._loop.is_running:
            self._reporter.report(self._loop)
        return is_preempted

    def close(self) -> None:
        """Ends the threads of the sampler, and gives its shards back."""
        loop, self._loop = self._loop, None
        if loop is not None and loop.is_running:
            self._shards.open_window(None)
            loop.stop(DRAIN_SECONDS)
        self._leases.close()

    def _order(self, kind: str, weights: Any, values: dict[str, Any]) -> list[Any]:
        """Gives an order, and carries it out where this process samples; returns the result of each sampler."""
        self._num_orders += 1
        order = {"kind": kind, "values": values, "has_weights": weights is not None}
        if self._setup.trainers.is_leader:
            put(self._key("order"), order)
            delete(self._key("order", self._num_orders - KEPT_KEYS))
            delete(self._key("result", self._num_orders - KEPT_KEYS))
        if weights is not None and self._setup.transfer is not None:
            self._setup.transfer.send(weights)
        if self._loop is not None:
            self._carry_out(order, weights)
        if kind not in ("evaluate", "draw"):
            return []
        samplers: Team = self._setup.samplers
        members = samplers.members if kind == "evaluate" else samplers.members[:1]
        return [wait_for(f"{self._key('result')}/{process}", ORDER_DEADLINE, self.poll) for process in members]

    def _carry_out(self, order: dict[str, Any], weights: Any) -> None:
        kind, values, samplers = order["kind"], order["values"], self._setup.samplers
        if kind == "window":
            self._sample(Window(**{**values, "asked_again": tuple(values["asked_again"])}), weights)
        elif kind == "evaluate":
            counts = self._setup.count_held_out(weights, values["num_samples"], samplers.rank, samplers.size)
            self._put_result({name: column.tolist() for name, column in counts._asdict().items()})
        elif kind == "draw" and samplers.is_leader:
            content = io.BytesIO()
            np.savez(content, *(array for drawn in self._setup.draw(weights) for array in drawn))
            storage.replace(self._root / PARITY_FILE, content.getvalue())
            self._put_result(hashlib.sha256(content.getvalue()).hexdigest())
        elif kind == "finish":
            self._shards.open_window(None)

    def _sample(self, window: Window, weights: Any) -> None:
        assert self._loop is not None
        self._shards.open_window(None)
        if not self._loop.is_running:
            self._setup.warm_up(weights)
        self._loop.set_weights(window.policy_version, weights)
        self._loop.start()
        self._shards.open_window(window)

    def _put_result(self, result: Any) -> None:
        put(f"{self._key('result')}/{self._setup.samplers.members[self._setup.samplers.rank]}", result)

    def _key(self, kind: str, number: int | None = None) -> str:
        return f"{kind}/{self._num_orders if number is None else number}"

    def _read(self, name: str, digest: str) -> bytes:
        end = time.monotonic() + FILE_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(FileNotFoundError):
                content = storage.read(self._root / name)
                if hashlib.sha256(content).hexdigest() == digest:
                    return content
            time.sleep(0.1)
        raise TimeoutError(f"{self._root / name} is not what another process wrote; do all see the same folder?")

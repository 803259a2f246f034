"""A run over several processes of one JAX job: the trainers give orders, the processes that sample carry them out.

All trainers run the learner's loop, step by step the same; the first of them decides and the others hear of it
(``Processes.agree``). Processes that sample follow its orders: take these weights and sample this window, count
held-out prompts, draw for the parity gate. A process may be both, with one mesh for the two. Weights travel from
devices to devices; rollouts through the log, which all processes see, in shards that are leased as by detached samplers.
"""

import contextlib
import hashlib
import io
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from oapl_jax.build.job import SamplerJob, acceptance
from oapl_jax.distributed.processes import KEPT_KEYS, check_peers, forget, hear, tell
from oapl_jax.evaluation.held_out import Counts, summarize
from oapl_jax.io import storage
from oapl_jax.io.lease import Leases
from oapl_jax.io.storage import SharedPath
from oapl_jax.rollouts.buffer import Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.run.parity import Drawn, draw
from oapl_jax.sources import follower
from oapl_jax.types import Metrics

ORDER_DEADLINE = 4 * 3600.0
"""For how long a process that samples waits for the next order, and a trainer for what an order brings."""
REPORT_SECONDS = 1.0
DRAIN_SECONDS = 3.0
PARITY_FILE = "parity.npz"
FILE_SECONDS = 120.0
"""For how long a file that another process has written may take to be seen."""


class Crew:
    """This process's part in a run of several; owns the threads of its sampler, where it has one.

    Args:
        job: of this process.
        root: folder of the run, which all processes see.
        log: of the run.
        look: called again and again while this process waits.
    """

    def __init__(self, job: SamplerJob, root: SharedPath, log: RolloutLog, look: Callable[[], object]):
        self._job, self._root, self._look = job, root, look
        self._num_orders = 0
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        self._beat, self._next_report = 0, 0.0
        self._leases = Leases(root / follower.LEASES_FOLDER, job.config.window.lease_seconds)
        self._shards = ShardQueue(log, self._leases, acceptance(job.config), job.config.window.shard_groups)
        self._worker = job.make_worker(self._shards, self._shards) if job.engines else None
        self._is_started = False

    def open_window(self, window: Window, params: Any) -> Metrics:
        """Trainers: has a window sampled with these weights.

        Args:
            window: which.
            params: the sampler's copy, as ``Job.sync`` makes it.

        Returns:
            ``sync/transfer_seconds``.
        """
        start = time.perf_counter()
        self._order("window", params, window._asdict())
        return {"sync/transfer_seconds": time.perf_counter() - start}

    def evaluate(self, params: Any, num_samples: int) -> Metrics:
        """Trainers: counts of the held-out prompts, which the samplers share, summed up."""
        parts = self._order("evaluate", params, {"num_samples": num_samples})
        counts = Counts(*(np.sum([part[name] for part in parts], axis=0) for name in Counts._fields))
        return summarize(counts, self._job.held_out)

    def draw(self, params: Any) -> list[Drawn]:
        """Trainers: rollouts for the parity gate, drawn by the first sampler."""
        digest, *_ = self._order("draw", params, {})
        arrays = np.load(io.BytesIO(self._read(PARITY_FILE, digest)))
        self._job.trainers.wait()  # all have read it
        if self._job.trainers.is_leader:
            storage.remove(self._root / PARITY_FILE)
        count = len(Drawn._fields)
        return [Drawn(*(arrays[f"arr_{i + k}"] for k in range(count))) for i in range(0, len(arrays.files), count)]

    def tidy(self) -> None:
        """Trainers: nothing; each version's weights took the place of the last one's."""

    def finish(self, policy_version: int) -> None:
        """Trainers: has nothing sampled any longer."""
        self._order("finish", None, {"policy_version": policy_version})

    def dismiss(self, exit_code: int) -> None:
        """Trainers: ends the processes that sample, with this code."""
        self._order("stop", None, {"exit_code": exit_code})
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
                order = hear(self._key("order"), ORDER_DEADLINE, self.look)
                params = None
                if order["has_params"]:
                    assert self._job.transfer is not None
                    with self._job.sampler_lock:
                        params = self._job.transfer.receive()
                self._carry_out(order, params)
                if order["kind"] == "stop":
                    return order["values"]["exit_code"]

    def look(self) -> None:
        """Sees to this process's sampler: reports, and raises what its threads have raised."""
        self._look()
        check_peers()
        if self._shards.failure is not None:
            raise self._shards.failure
        if self._is_started and self._worker is not None and time.monotonic() >= self._next_report:
            self._next_report, self._beat = time.monotonic() + REPORT_SECONDS, self._beat + 1
            tokens, idle_seconds = self._worker.sums
            with contextlib.suppress(OSError):  # for people; a full disk must not end the sampling
                follower.write_report(self._root, self._name, self._beat, tokens, idle_seconds)

    def close(self) -> None:
        """Ends the threads of the sampler, and gives its shards back."""
        worker, self._worker = self._worker, None
        if worker is not None and self._is_started:
            self._shards.open_window(None)
            worker.stop(DRAIN_SECONDS)
        self._leases.close()

    def _order(self, kind: str, params: Any, values: dict[str, Any]) -> list[Any]:
        """Gives an order, and carries it out where this process samples; returns what each sampler tells."""
        self._num_orders += 1
        order = {"kind": kind, "values": values, "has_params": params is not None}
        if self._job.trainers.is_leader:
            tell(self._key("order"), order)
            forget(self._key("order", self._num_orders - KEPT_KEYS))
            forget(self._key("result", self._num_orders - KEPT_KEYS))
        if params is not None and self._job.transfer is not None:
            self._job.transfer.send(params)
        if self._worker is not None:
            self._carry_out(order, params)
        if kind not in ("evaluate", "draw"):
            return []
        tellers = self._job.samplers.members if kind == "evaluate" else self._job.samplers.members[:1]
        return [hear(f"{self._key('result')}/{process}", ORDER_DEADLINE, self.look) for process in tellers]

    def _carry_out(self, order: dict[str, Any], params: Any) -> None:
        kind, values, samplers = order["kind"], order["values"], self._job.samplers
        if kind == "window":
            window = Window(**{**values, "asked_again": tuple(values["asked_again"])})
            self._sample(window, params)
        elif kind == "evaluate":
            counts = self._job.count_held_out(params, values["num_samples"], samplers.rank, len(samplers.members))
            self._tell({name: column.tolist() for name, column in counts._asdict().items()})
        elif kind == "draw" and samplers.is_leader:
            content = io.BytesIO()
            np.savez(content, *(array for drawn in draw(self._job, params) for array in drawn))
            storage.replace(self._root / PARITY_FILE, content.getvalue())
            self._tell(hashlib.sha256(content.getvalue()).hexdigest())
        elif kind == "finish":
            self._shards.open_window(None)

    def _sample(self, window: Window, params: Any) -> None:
        assert self._worker is not None
        self._shards.open_window(None)
        self._worker.set_weights(window.policy_version, params)
        if not self._is_started:
            self._is_started = True
            self._worker.warm_up(params, self._job.first_lengths)
            self._worker.start()
        self._shards.open_window(window)

    def _tell(self, result: Any) -> None:
        tell(f"{self._key('result')}/{jax.process_index()}", result)

    def _key(self, kind: str, number: int | None = None) -> str:
        return f"{kind}/{self._num_orders if number is None else number}"

    def _read(self, name: str, digest: str) -> bytes:
        end = time.monotonic() + FILE_SECONDS
        while True:
            with contextlib.suppress(FileNotFoundError):
                content = storage.read(self._root / name)
                if hashlib.sha256(content).hexdigest() == digest:
                    return content
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{self._root / name} is not what another process wrote; do all see the same folder?"
                )
            time.sleep(0.1)

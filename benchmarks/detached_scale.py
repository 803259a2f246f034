"""Detached samplers by the thousand: a discrete-event model of one window of a 70B run over an object store.

    PYTHONPATH=. .venv/bin/python benchmarks/detached_scale.py --json

Each sampler claims a shard of the window's groups, samples it, and writes it as one file, as ``rollouts/shards.py`` does;
the trainer follows the log as ``sources/follower.py`` does. Requests queue at the store by its limits. What is counted
is in ``Design.claim`` and ``Design.background``, from the code. The costs of the file operations are measured here in a
folder and in moto's S3 server; real stores have their published figures (``STORES``). Batches grow with the samplers, so
that learner and samplers would both be busy if files cost nothing.
"""

import argparse
import contextlib
import dataclasses
import heapq
import json
import pathlib
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Generator
from typing import Any

from oapl_jax.io import storage

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import stores  # moto, as the tests start it

# The job, by Qwen2.5-72B's config.json: 80 layers, width 8,192, keys and values 1,024, feed-forward 29,568.
POLICY_BYTES = {"full": 72.7e9 * 2, "adapters": 32 * 80 * (4 * 8192 + 2 * (8192 + 1024) + 3 * (8192 + 29568)) * 4}
"""bfloat16 weights; float32 adapters of rank 32 on all seven matrices."""
STEPS, STEP_SECONDS = 400, 60.0
GROUP_SIZE, TOKENS, SHARD_GROUPS = 8, 4700, 8
TOKEN_BYTES = 5.0
"""Of a token id and its log-probability in zstd-compressed Parquet."""
TOKENS_PER_SECOND = 2500.0
"""Assumed of a sampler, which is a node of 8 accelerators with a 70B model."""
CLIENT_BYTES_PER_SECOND = 10e9 / 8
"""Assumed of one process."""
RESTART_SECONDS = 300.0
"""Assumed from a preemption until the process on a new node is ready to load the policy."""
PREEMPTIONS_PER_HOUR = 0.05

# The protocol.
LEASE_SECONDS, BEATS_PER_EXPIRY, REPORT_SECONDS = 30.0, 4, 1.0
LIST_PAGE = 1000
CHUNK_BYTES = 2**30

Process = Generator[float, float, None]
"""Yields the time at which it goes on."""


@dataclasses.dataclass(frozen=True)
class StoreLimits:
    """What a store does for one bucket or prefix before it has scaled itself up."""

    reads_per_second: float
    writes_per_second: float
    seconds: float
    """Until a small request is answered."""
    bytes_per_second: float
    """Of all readers together."""


STORES = {
    # Rates: cloud.google.com/storage/docs/request-rate (initial capacity of a bucket; listings are reads). Bandwidth:
    # cloud.google.com/storage/quotas (200 Gb/s out of a region for a project, unless raised). Google publishes no latency;
    # this is half of what Amazon says.
    "gs": StoreLimits(5000, 1000, 0.05, 200e9 / 8),
    # docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html: 3,500 writes and 5,500 reads a second for
    # a prefix, small requests in 100 to 200 ms. No bandwidth is published; Google's is taken.
    "s3": StoreLimits(5500, 3500, 0.15, 200e9 / 8),
}


@dataclasses.dataclass(frozen=True)
class Design:
    """How samplers and trainer find work: as the program does it today, or as it would have to with a thousand."""

    is_indexed: bool
    """The trainer writes one file that says which shards are written, and samplers begin at a place of their own."""
    report_seconds: float
    num_readers: int
    """Files that the trainer reads at once."""

    def claim(self, num_files: int, num_unseen: int, num_held: int) -> tuple[int, int]:
        """Reads and writes, one after the other, until a sampler has the next shard.

        Today: the list of the window's files, each file that was not seen before, three requests for each shard that
        another holds (is generation 0 there, is 1, what is in 0), then the own lease and whether the file is there.
        """
        if self.is_indexed:
            return 3, 1
        return -(-max(1, num_files) // LIST_PAGE) + num_unseen + 3 * num_held + 2, 1

    def read_bytes(self, num_unseen: int, shard_bytes: float) -> float:
        """Of the files that a claim reads."""
        return 0.0 if self.is_indexed else num_unseen * shard_bytes

    def background(self, store: StoreLimits) -> tuple[float, float]:
        """Reads and writes a second of a sampler that samples: pointer, heartbeats of two leases, reports."""
        beats = 2 * BEATS_PER_EXPIRY / LEASE_SECONDS
        pointer = 1 / (store.seconds + storage.next_poll(store.seconds, 1e3))
        return pointer + beats, beats + 1 / self.report_seconds


DESIGNS = {"today": Design(False, REPORT_SECONDS, 1), "changed": Design(True, LEASE_SECONDS, 32)}


class Store:
    """Queues requests: each kind is served in the order of arrival at its rate."""

    def __init__(self, limits: StoreLimits):
        self.limits = limits
        self.reads = self.writes = self.bytes_out = self.bytes_in = 0.0
        self._free = {"reads": 0.0, "writes": 0.0, "bytes": 0.0}

    def serial(
        self, now: float, reads: float, writes: float, bytes_out: float = 0.0, bytes_in: float = 0.0, at_once: int = 1
    ) -> float:
        """When a client that sends these one after the other, or some at once, has the last answer."""
        limits = self.limits
        self.reads, self.writes = self.reads + reads, self.writes + writes
        self.bytes_out, self.bytes_in = self.bytes_out + bytes_out, self.bytes_in + bytes_in
        own = now + -(-(reads + writes) // at_once) * limits.seconds + (bytes_out + bytes_in) / CLIENT_BYTES_PER_SECOND
        served = [
            self._serve("reads", now, reads / limits.reads_per_second),
            self._serve("writes", now, writes / limits.writes_per_second),
            self._serve("bytes", now, bytes_out / limits.bytes_per_second),
        ]
        return max(own, *served)

    def _serve(self, kind: str, now: float, seconds: float) -> float:
        if seconds:
            self._free[kind] = max(self._free[kind], now) + seconds
            return self._free[kind]
        return now


class Window:
    """One window: the policy is published and fetched, the shards are sampled, the trainer follows."""

    def __init__(self, store: StoreLimits, design: Design, policy_bytes: float, num_samplers: int):
        self.store, self.design, self.policy_bytes, self.num_samplers = Store(store), design, policy_bytes, num_samplers
        self.shard_seconds = SHARD_GROUPS * GROUP_SIZE * TOKENS / TOKENS_PER_SECOND
        self.shard_bytes = SHARD_GROUPS * GROUP_SIZE * TOKENS * TOKEN_BYTES
        self.num_shards = num_samplers * round(STEPS * STEP_SECONDS / self.shard_seconds)
        self.num_claimed = self.num_written = self.num_held = 0
        self.fetched: list[float] = []
        self.claiming = self.lost = self.down = self.busy = 0.0
        self.written: list[float] = []
        self.delays: list[float] = []
        self._random = random.Random(0)

    def run(self) -> dict[str, Any]:
        """Plays the window; returns what is reported of it."""
        published = self.policy_bytes / CLIENT_BYTES_PER_SECOND
        self.store.bytes_in += self.policy_bytes
        processes = [self._sampler(published) for _ in range(self.num_samplers)] + [self._trainer()]
        queue = [(next(process), i) for i, process in enumerate(processes)]
        heapq.heapify(queue)
        while queue:
            now, i = heapq.heappop(queue)
            with contextlib.suppress(StopIteration):
                heapq.heappush(queue, (processes[i].send(now), i))
        return self._summary(published, self.written[-1])

    def _sampler(self, now: float) -> Process:
        now = yield now
        now = yield from self._fetch(now)
        self.fetched.append(now)
        next_preemption, seen, own = now + self._lifetime(), 0, 0
        reads, writes = self.design.background(self.store.limits)
        while self.num_claimed < self.num_shards:
            begin, num_unseen = now, self.num_written - seen - own
            seen, own = self.num_written, 0
            requests = self.design.claim(seen, num_unseen, self.num_held)
            self.num_claimed, self.num_held = self.num_claimed + 1, self.num_held + 1
            now = yield self.store.serial(
                now, *requests, bytes_out=self.design.read_bytes(num_unseen, self.shard_bytes)
            )
            self.claiming += now - begin
            end = now + self.shard_seconds
            if end > next_preemption:
                self.lost += max(0.0, next_preemption - now)
                self.num_claimed, self.num_held = self.num_claimed - 1, self.num_held - 1  # another samples it
                now = yield next_preemption + RESTART_SECONDS
                back = yield from self._fetch(now)
                self.down += back - next_preemption
                now, next_preemption = back, back + self._lifetime()
                continue
            now = yield end
            self.store.serial(now, reads * self.shard_seconds, writes * self.shard_seconds)
            now = yield self.store.serial(now, 2, 2, bytes_in=self.shard_bytes)  # the file, and the lease is finished
            self.busy += self.shard_seconds
            self.num_held, self.num_written, own = self.num_held - 1, self.num_written + 1, 1
            self.written.append(now)

    def _trainer(self) -> Process:
        """Lists the files, reads the new ones, and now and then the reports of all samplers."""
        seen, next_report = 0, 0.0
        now = yield 0.0
        while seen < self.num_shards:
            found = self.num_written
            pages = 1 if self.design.is_indexed else -(-max(1, found) // LIST_PAGE)
            now = yield self.store.serial(now, pages, 0)
            at_once = self.design.num_readers
            for i in range(seen, found, at_once):
                some = self.written[i : min(i + at_once, found)]
                now = yield self.store.serial(now, len(some), 0, len(some) * self.shard_bytes, at_once=at_once)
                self.delays += [now - written for written in some]
            seen = found
            if now >= next_report:
                now = yield self.store.serial(now, 1 + self.num_samplers, 0, at_once=at_once)
                next_report = now + self.design.report_seconds
            now = yield now + storage.next_poll(self.store.limits.seconds * pages, 10.0)

    def _fetch(self, now: float) -> Generator[float, float, float]:
        left = self.policy_bytes
        while left > 0:
            now = yield self.store.serial(now, 1, 0, bytes_out=min(left, CHUNK_BYTES))
            left -= CHUNK_BYTES
        return now

    def _lifetime(self) -> float:
        return self._random.expovariate(PREEMPTIONS_PER_HOUR / 3600)

    def _summary(self, published: float, end: float) -> dict[str, Any]:
        store, whole = self.store, self.num_samplers * end
        return {
            "window_hours": end / 3600,
            "published_seconds": published,
            "all_have_it_seconds": max(self.fetched),
            "reads_per_second": store.reads / end,
            "writes_per_second": store.writes / end,
            "read_terabytes": store.bytes_out / 1e12,
            "written_terabytes": store.bytes_in / 1e12,
            "sampling_share": self.busy / whole,
            "claiming_share": self.claiming / whole,
            "preempted_share": (self.lost + self.down) / whole,
            "seconds_until_seen": statistics.median(self.delays),
        }


def measure(folder: Any, times: int = 20, megabytes: int = 64) -> dict[str, float]:
    """Milliseconds of each file operation, medians, and megabytes a second of a large file."""
    content = b"x" * 300

    def milliseconds(call: Any) -> float:
        seconds = []
        for i in range(times):
            start = time.perf_counter()
            call(i)
            seconds.append(time.perf_counter() - start)
        return 1e3 * statistics.median(seconds)

    found = {
        "create": milliseconds(lambda i: storage.create(folder / "leases" / f"{i}", content)),
        "replace": milliseconds(lambda i: storage.replace(folder / "leases" / "0", content)),
        "read": milliseconds(lambda i: storage.read(folder / "leases" / "0")),
        "exists": milliseconds(lambda i: storage.exists(folder / "leases" / f"{i + times - 2}")),
        f"list of {times}": milliseconds(lambda i: storage.names(folder / "leases")),
    }
    large = folder / "large"
    start = time.perf_counter()
    storage.replace(large, bytes(megabytes * 10**6))
    found["written MB/s"] = megabytes / (time.perf_counter() - start)
    start = time.perf_counter()
    storage.read(large)
    found["read MB/s"] = megabytes / (time.perf_counter() - start)
    return found


def measured_limits(costs: dict[str, float]) -> StoreLimits:
    """A store that does one request after the other, each as it was measured."""
    read, create = costs["read"] / 1e3, costs["create"] / 1e3
    return StoreLimits(1 / read, 1 / create, (read + create) / 2, costs["read MB/s"] * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--samplers", type=int, nargs="+", default=[1, 64, 1000])
    parser.add_argument("--store", choices=[*STORES, "folder", "moto"], default="gs", help="folder, moto: as measured")
    parser.add_argument("--json", action="store_true", help="one JSON object, and no table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = {"folder": measure(pathlib.Path(folder))}
    with stores.s3() as address:
        measured["moto"] = measure(storage.shared_path(f"{address}/{uuid.uuid4().hex}"))
    limits = STORES | {name: measured_limits(costs) for name, costs in measured.items()}
    rows = [
        {"samplers": number, "policy": policy, "design": design}
        | Window(limits[arguments.store], DESIGNS[design], POLICY_BYTES[policy], number).run()
        for policy in POLICY_BYTES
        for design in DESIGNS
        for number in arguments.samplers
    ]
    if arguments.json:
        print(json.dumps({"store": arguments.store, "measured": measured, "windows": rows}, indent=1))
        return
    for name, costs in measured.items():
        print(f"{name}: " + ", ".join(f"{what} {value:.3g}" for what, value in costs.items()))
    for row in rows:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))


if __name__ == "__main__":
    main()

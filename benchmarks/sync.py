"""The weight sync in seconds and bytes: from the trainer's mesh to the sampler's, and as a published folder.

    python benchmarks/sync.py --json

Random float32 weights of Qwen3's shape with about 0.2 and 0.6 billion parameters, on 8 CPU devices of one process:
trainer ``fsdp=4``, sampler ``tensor=4`` in bfloat16. Each figure stands beside the machine's own rate in the same run, and
they take turns: a copy of as many bytes in memory by NumPy, and a file of as many bytes written and flushed to the disk.

* ``reshard_fraction``: bytes that the sync reads and writes a second, over those of NumPy's copy.
* ``publish_fraction``: bytes of the published folder a second, over those of the plain file.
* ``peak_extra_bytes``: the largest resident memory during a sync, less that before it and the new copy.
"""

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from oapl_jax.config.mesh import MeshConfig
from oapl_jax.data import tokenizer as tokenizers
from oapl_jax.distributed.sharding import TRAINER_RULES, make_meshes, shardings
from oapl_jax.distributed.team import Team
from oapl_jax.model import qwen
from oapl_jax.rollouts.buffer import Window
from oapl_jax.types import Metrics
from oapl_jax.weights.policies import Manifest, PolicyStore
from oapl_jax.weights.sync import WeightSync
from sampler import machine

SIZES = {"0.2B": (768, 2048, 20), "0.6B": (1024, 3072, 40)}
"""Width, ffn width and layers of each model."""

VOCAB = 32768


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5, help="turns of each measurement")
    parser.add_argument("--chunk-mib", type=int, default=64, help="window.sync_chunk_mib")
    arguments = parser.parse_args(argv)
    cases = {name: measure(name, arguments.repeats, arguments.chunk_mib) for name in arguments.sizes}
    last = cases[arguments.sizes[-1]]
    headline = {key: last[key] for key in ("reshard_fraction", "publish_fraction", "peak_extra_bytes")}
    result = {**headline, **cases, "machine": machine(os.cpu_count() or 1)}
    if arguments.json:
        print(json.dumps(result, indent=2))


def measure(size: str, repeats: int, chunk_mib: int) -> dict[str, Any]:
    """Medians for a model of this size."""
    width, ffn, layers = SIZES[size]
    values = {"model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": width, "intermediate_size": ffn}
    values |= {"num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    config, tokenizer = qwen.QwenConfig.from_hf(values), tokenizers.load("characters")
    trainer, sampler = make_meshes(MeshConfig(trainer="fsdp=4", sampler="tensor=4"))
    abstract = qwen.abstract(config)[1]
    params = qwen.initialize(config, jax.random.key(0), shardings(abstract, trainer, TRAINER_RULES))
    jax.block_until_ready(params)
    sync = WeightSync(abstract, sampler, "bfloat16", chunk_mib)
    held = [sync(params)[0]]  # compiles
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    written = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    extra: list[float] = []
    block = np.ones(written // 2, np.uint16)
    rates: dict[str, list[float]] = {"reshard": [], "memcpy": [], "publish": [], "disk": []}

    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)

        def reshard() -> float:
            held.clear()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed counts as resident otherwise
            before = resident_bytes()
            with Peak() as peak:
                held.append(sync(params)[0])
            extra.append(peak.value - before - written)
            return read + written

        def memcpy() -> float:
            block.copy()
            return 2 * block.nbytes

        def publish() -> float:
            version = len(rates["publish"])
            store = PolicyStore(directory / f"policy-{version}")
            manifest = Manifest(Window(version, 0, 0), 1, "", {})
            report: Metrics = store.publish(manifest, config, held[0], tokenizer, Team.alone())
            return report["sync/publish_bytes"]

        def disk() -> float:
            with (directory / f"plain-{len(rates['disk'])}").open("wb") as file:
                file.write(block.data)
                file.flush()
                os.fsync(file.fileno())
            return block.nbytes

        for _ in range(repeats):
            for function in (reshard, memcpy, publish, disk):
                rates[function.__name__].append(rate(function))
            print(size, {name: f"{turns[-1] / 2**30:.2f} GiB/s" for name, turns in rates.items()}, flush=True)
    medians = {name: statistics.median(turns) for name, turns in rates.items()}
    return {
        "parameters": config.num_params,
        "reshard_seconds": (read + written) / medians["reshard"],
        "publish_seconds": written / medians["publish"],
        "reshard_fraction": medians["reshard"] / medians["memcpy"],
        "publish_fraction": medians["publish"] / medians["disk"],
        "peak_extra_bytes": max(extra),
        "bytes_per_second": medians,
    }


def rate(function: Callable[[], float]) -> float:
    """Bytes a second of a function that returns bytes."""
    start = time.perf_counter()
    num_bytes = function()
    return num_bytes / (time.perf_counter() - start)


class Peak:
    """The largest resident memory of the process while it is open, looked at every 2 ms."""

    def __enter__(self) -> "Peak":
        self.value, self._is_over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join(10)

    def _watch(self) -> None:
        while not self._is_over.wait(0.002):
            self.value = max(self.value, resident_bytes())


def resident_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(sys.argv[1:])

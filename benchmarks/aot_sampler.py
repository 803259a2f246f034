"""What the sampler's decode program takes of a TPU's memory, compiled for TPU topologies without a TPU.

    PYTHONPATH=. ../tpu/bin/python benchmarks/aot_sampler.py --json

libtpu compiles for devices that are only described; nothing runs. It needs an environment with it:

    python3 -m venv ../tpu && ../tpu/bin/pip install -r requirements.txt "jax[tpu]==0.10.2"

The program is ``Engine.generate``: 32 steps of 128 sequences of up to 32,768 tokens, bfloat16 weights in
their default layouts, a bfloat16 cache of pages of 64 tokens that is donated. A case's cache leaves ``work_gib``
of a device's memory. The peak is predicted as weights, pages and the other arguments. What the compiler adds
are temporaries (``temp_gib``): nearly all of it copies of weight stacks in layouts that it prefers
(``copied_weights_gib``), which it makes once a call, before the steps. Sizes are GiB per device.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import time
from typing import Any

# Read by libtpu and jax when they are loaded: do not look for a TPU, and share the library between processes.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import SAMPLER_RULES, make_meshes, replicated, shardings
from oapl_jax.model import qwen
from oapl_jax.sampler.engine import DecodeState, Engine

GIB = 2**30
NUM_ROWS, PAGE_SIZE, MAX_TOKENS, DECODE_STEPS = 128, 64, 32768, 32
PAGES_MULTIPLE = 64
LARGE_WEIGHT = 2**20
"""Bytes per device from which the copy of a weight is counted: norms and biases are smaller."""

QWEN2_5_14B = qwen.QwenConfig("qwen2", 152064, 5120, 13824, 48, 40, 8, 128, 1e6, 1e-6, False)
QWEN3_4B = qwen.QwenConfig("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, 1e6, 1e-6, True)
VOCAB_SIZE = 151665
"""Of Qwen2.5's tokenizer; Qwen3's has four more. The models' other rows are padding."""

STOP_IDS = (151643, 151645)
"""<|endoftext|> and <|im_end|> of both tokenizers."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on all devices of a topology, split over ``tensor``."""

    name: str
    config: qwen.QwenConfig
    topology: str
    usable_gib: float
    """Memory of a device that a program may use, as the compiler's own error says when it is exceeded."""
    work_gib: float
    """What weights and cache leave of it; with 0.1 less the 14B case does not compile any more."""


CASES = (
    Case("Qwen2.5-14B", QWEN2_5_14B, "v5e:2x4", 15.75, 2.7),
    Case("Qwen3-4B", QWEN3_4B, "v5e:2x2", 15.75, 0.4),
    Case("Qwen3-4B", QWEN3_4B, "v6e:2x2", 31.25, 0.4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    arguments = parser.parse_args()
    results = []
    for case in CASES:
        result = measure(case)
        results.append(result)
        print("  ".join(f"{name}={_text(value)}" for name, value in result.items()), flush=True)
    if arguments.json:
        print(json.dumps({"jax": jax.__version__, "rows": NUM_ROWS, "steps": DECODE_STEPS, "cases": results}, indent=2))


def measure(case: Case) -> dict[str, Any]:
    """Compiles one case and returns what is printed."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    mesh, _ = make_meshes(MeshConfig(trainer=f"tensor={len(devices)}"), devices)
    graphdef, params = qwen.abstract(case.config, param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    params = _placed(params, shardings(params, mesh, SAMPLER_RULES))
    weights = sum(map(_device_bytes, jax.tree.leaves(params)))

    def make_engine(num_pages: int) -> Engine:
        return Engine(
            graphdef,
            case.config,
            vocab_size=VOCAB_SIZE,
            stop_ids=STOP_IDS,
            num_rows=NUM_ROWS,
            num_pages=num_pages,
            max_prompt_tokens=MAX_TOKENS // 2,
            max_response_tokens=MAX_TOKENS // 2,
            decode_steps=DECODE_STEPS,
            mesh=mesh,
            page_size=PAGE_SIZE,
            cache_dtype=jnp.bfloat16,
            can_truncate=False,
        )

    one = make_engine(MAX_TOKENS // PAGE_SIZE)
    page_bytes = one.cache_bytes // one.num_pages // mesh.size
    free = (case.usable_gib - case.work_gib) * GIB - weights
    engine = make_engine(int(free / page_bytes) // PAGES_MULTIPLE * PAGES_MULTIPLE)
    cache = engine.cache_bytes // mesh.size

    state = jax.eval_shape(engine.init_decode_state)
    state = DecodeState(*[_placed(part, place) for part, place in zip(state, engine._shardings(), strict=True)])

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated(mesh))

    # The arguments of Engine.generate's call.
    inputs = engine.prepare(params), integers(NUM_ROWS), integers(NUM_ROWS, engine.max_pages)
    lowered = engine._generate.lower(*inputs, state=state)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start

    rest = sum(map(_device_bytes, jax.tree.leaves((inputs[1:], state._replace(pages=None)))))
    memory = compiled.memory_analysis()
    copies = find_copies(compiled.as_text())
    large = {size for size in map(_device_bytes, jax.tree.leaves(params)) if size >= LARGE_WEIGHT}
    pools = set(map(_device_bytes, state.pages))
    copied_weights = [copy for copy in copies if copy.num_bytes in large]
    return {
        "model": case.name,
        "topology": case.topology,
        "attention": engine.attention,
        "compile_seconds": seconds,
        "weights_gib": weights / GIB,
        "pages_gib": cache / GIB,
        "argument_gib": memory.argument_size_in_bytes / GIB,
        "alias_gib": memory.alias_size_in_bytes / GIB,
        "temp_gib": memory.temp_size_in_bytes / GIB,
        "predicted_peak_gib": (weights + cache + rest) / GIB,
        "peak_gib": memory.peak_memory_in_bytes / GIB,
        "usable_gib": case.usable_gib,
        "pool_copies": sum(copy.num_bytes in pools for copy in copies),
        "weight_copies_per_call": sum(not copy.is_in_loop for copy in copied_weights),
        "weight_copies_in_loops": sum(copy.is_in_loop for copy in copied_weights),
        "copied_weights_gib": sum(copy.num_bytes for copy in copied_weights if copy.is_temporary) / GIB,
        "kv_tokens": engine.num_pages * PAGE_SIZE,
    }


@dataclasses.dataclass(frozen=True)
class Copy:
    """A ``copy`` in a compiled program, waited for or not."""

    num_bytes: int
    """Of one device, as the compiler may reshape what it copies; its padding is not counted."""
    is_in_loop: bool
    """Not in the entry computation, which runs once a call."""
    is_temporary: bool
    """Made once, and in the main memory: one in a loop may reuse its source's place."""


def find_copies(program: str) -> list[Copy]:
    """All copies in the text of an optimized HLO module."""
    copies, is_entry = [], False
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            is_entry = line.startswith("ENTRY")
        # An asynchronous copy returns a tuple, its target first; S(1) is the fast memory.
        found = re.match(r"\s+(?:ROOT )?%\S+ = \(?[a-z]+(\d+)\[([\d,]+)\]\{(.*?)\}.* copy(?:-start)?\(", line)
        if found:
            bits, shape, layout = found.groups()
            num_bytes = math.prod(map(int, shape.split(","))) * int(bits) // 8
            copies.append(Copy(num_bytes, not is_entry, is_entry and "S(" not in layout))
    return copies


def _placed(tree: Any, places: Any) -> Any:
    """Shapes of a tree with shardings, of which one may stand for a whole subtree."""
    return jax.tree.map(
        lambda place, part: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), part),
        places,
        tree,
    )


def _device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's part."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()

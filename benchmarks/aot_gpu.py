"""What XLA makes of the train step and of decoding on an NVIDIA H200, compiled without one.

    PYTHONPATH=. ../cuda/bin/python benchmarks/aot_gpu.py --json

XLA compiles for a card that is only described; nothing runs. It needs an environment with its CUDA plugin (5 GB):

    python3 -m venv ../cuda && ../cuda/bin/pip install -r requirements.txt "jax[cuda12]==0.10.2"

A train step is 65,536 tokens of which three quarters are response; decoding is one step of the sampler's loop of 32 at
full length, and of the card's roofline it reads each weight and all keys and values once. ``moved_gb`` is what the
program's instructions read and write in the card's memory (``oapl_jax/preflight/hlo.py``), with a kernel's keys and values added,
so it says which of two programs is better and not how long either takes. Without a card nothing is tuned: the products
are Triton's, where a card would choose cuBLAS for some.
"""

import argparse
import dataclasses
import json
import os
import time
from typing import Any, get_args

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from gpu_sampler import read_model
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import Mesh

from oapl_jax.config.learner import LearnerConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.config.model import SavedName
from oapl_jax.distributed.sharding import SAMPLER_RULES, TRAINER_RULES, make_meshes, placed, shardings
from oapl_jax.learner import batch as batches
from oapl_jax.learner.batch import RowLayout
from oapl_jax.learner.state import abstract_state, make_optimizer, make_schedule
from oapl_jax.learner.step import make_train_step
from oapl_jax.model.logprob import chunk_tokens
from oapl_jax.model.qwen import Remat, abstract
from oapl_jax.objectives import oapl
from oapl_jax.preflight import hlo
from oapl_jax.preflight.programs import forward_flops
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.kv_cache import page_bytes

H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
  l2_cache_size: 62914560
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
"""What XLA asks of a card, in the text form of its ``GpuTargetConfigProto``."""

STEP_TOKENS = 65536
REMATS = {"layer": Remat(True), "names": Remat(True, get_args(SavedName)), "none": Remat()}
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class TrainCase:
    """A train step of rollouts of one length."""

    model: str
    length: int
    micro_batch_rows: int
    remat: str
    is_packed: bool = False
    """Rows say where their rollouts are, and could hold others."""


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """Sequences of one length; see ``Engine`` for the rest."""

    model: str
    rows: int
    length: int
    attention: str
    join_layers: bool = True


CASES = (
    TrainCase("qwen2.5_0.5b", 4096, 1, "layer"),
    TrainCase("qwen2.5_0.5b", 4096, 4, "layer"),
    TrainCase("qwen2.5_0.5b", 4096, 4, "names"),
    TrainCase("qwen2.5_0.5b", 4096, 4, "none"),
    TrainCase("qwen2.5_0.5b", 16384, 1, "names"),
    TrainCase("qwen2.5_0.5b", 16384, 1, "names", is_packed=True),
    TrainCase("qwen2.5_1.5b", 4096, 4, "names"),
    TrainCase("qwen2.5_1.5b", 16384, 1, "layer"),
    TrainCase("qwen2.5_1.5b", 16384, 1, "names"),
    *(
        DecodeCase(model, rows, 2048, *how)
        for model in ("qwen2.5_0.5b", "qwen2.5_1.5b", "qwen2.5_7b")
        for rows in (64, 512)
        for how in (("xla", False), ("gpu", False), ("gpu",))
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    arguments = parser.parse_args()
    # What cuDNN's attention asks of the card that is there, before it is lowered.
    fused_attention_stablehlo.check_compute_capability = lambda capability: float(capability) <= 9.0
    fused_attention_stablehlo.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh, _ = make_meshes(MeshConfig(trainer="fsdp=1"), topology.devices)
    results = []
    for case in CASES:
        result = dataclasses.asdict(case) | (train if isinstance(case, TrainCase) else decode)(case, mesh)
        results.append(result)
        print("  ".join(f"{name}={_text(value)}" for name, value in result.items()), flush=True)
    if arguments.json:
        print(json.dumps({"jax": jax.__version__, "cases": results}, indent=2))


def train(case: TrainCase, mesh: Mesh) -> dict[str, Any]:
    """Compiles a train step."""
    config = read_model(case.model)
    graphdef, params = abstract(config, mesh=mesh, remat=REMATS[case.remat], compute_dtype="bfloat16")
    learner = LearnerConfig(learning_rate=1e-6)
    schedule = make_schedule(learner, 1000)
    optimizer = make_optimizer(learner, schedule)
    shapes = abstract_state(params, optimizer)
    places = shardings(shapes, mesh, TRAINER_RULES)
    step = make_train_step(
        graphdef,
        optimizer,
        schedule,
        oapl.OBJECTIVE,
        oapl.OaplOptions(),
        temperature=1.0,
        vocab_size=config.vocab_size,
        mesh=mesh,
        shardings=places,
    )
    num_rollouts = STEP_TOKENS // case.length
    row_tokens = case.length if case.is_packed else None
    layout = RowLayout(num_rollouts, case.length, row_tokens, case.micro_batch_rows, mesh)
    num_micro_batches = num_rollouts // case.micro_batch_rows
    rows = (num_micro_batches, case.micro_batch_rows)
    batch = placed(batches.make_batch(jax.ShapeDtypeStruct, rows, case.length, layout), batches.shardings(layout))
    scored = 0.75 * case.micro_batch_rows * case.length
    chunks = scored / chunk_tokens(config.vocab_size, "gpu")
    trips = (num_micro_batches, chunks) if num_micro_batches > 1 else (chunks,)
    result = _compile(step.lower(placed(shapes, places), batch), trips)
    pairs = num_rollouts * case.length * (case.length + 1) / 2
    flops, attention = forward_flops(config, STEP_TOKENS, pairs, 0.75 * STEP_TOKENS)
    return result | {"model_tflops": 3 * flops / 1e12, "attention_tflops": 3 * attention / 1e12}


def decode(case: DecodeCase, mesh: Mesh) -> dict[str, Any]:
    """Compiles the sampler's ``generate``; the figures are of one of its steps."""
    config, steps = read_model(case.model), 32
    graphdef, params = abstract(config, param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    engine = Engine(
        graphdef,
        config,
        vocab_size=config.vocab_size,
        stop_ids=[0],
        num_rows=case.rows,
        max_prompt_tokens=case.length // 2,
        max_response_tokens=case.length // 2,
        decode_steps=steps,
        mesh=mesh,
        page_size=16,
        cache_dtype=jnp.bfloat16,
        attention=case.attention,  # pyright: ignore[reportArgumentType]
        join_layers=case.join_layers,
        can_truncate=False,
    )
    result = _compile(engine.lower_generate(placed(params, shardings(params, mesh, SAMPLER_RULES))), (steps,))
    read_once = config.vocab_size * config.hidden_size * (not config.tie_word_embeddings)
    weights, cache = 2 * (config.num_params - read_once), case.rows * case.length * page_bytes(config, 1, "bfloat16")
    moved = result["moved_gb"] / steps + (cache / 1e9 if case.attention == "gpu" else 0)
    return result | {"moved_gb": moved, "roofline_gb": (weights + cache) / 1e9}


def _compile(lowered: Any, expected_trips: tuple[float, ...]) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    return {
        "compile_seconds": seconds,
        "argument_gib": memory.argument_size_in_bytes / GIB,
        "temp_gib": memory.temp_size_in_bytes / GIB,
        "moved_gb": hlo.analyze(compiled.as_text(), expected_trips=expected_trips).hbm_bytes / 1e9,
    }


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()

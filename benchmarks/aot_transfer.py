"""What the way of the weights between the processes of one job takes of a TPU's memory, compiled without a TPU.

    PYTHONPATH=. .venv/bin/python benchmarks/aot_transfer.py --json

A slice of 32 v5e chips, half of which train (fsdp=16) and half of which sample (data=4, tensor=4), bfloat16. For each
model the programs of its largest parameter without layers and of the largest piece of one with layers: ``pack`` on
trainers, ``move`` from these to those, ``unpack`` on samplers (``oapl_jax/distributed/transfer.py``). GiB of a device:
``arguments``, and ``temporaries`` beside them. No program holds more of the model than its piece.
"""

import argparse
import json
import math
import pathlib
import sys
from typing import Any

from oapl_jax.build import policy
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import SAMPLER_RULES, TRAINER_RULES, make_meshes, shardings
from oapl_jax.distributed.transfer import Piece, Transfer
from oapl_jax.model import qwen
from oapl_jax.preflight import topology
from oapl_jax.weights.sync import WeightSync
from sampler import ROOT, machine

GIB = 2**30
MODELS = {
    "qwen3_4b": "configs/models/qwen3_4b.json",
    "r1_distill_qwen_14b": "configs/models/deepseek_r1_distill_qwen_14b.json",
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--chunk-mib", type=int, default=1024, help="window.sync_chunk_mib")
    arguments = parser.parse_args(argv)
    result = {name: measure(ROOT / path, arguments.chunk_mib) for name, path in MODELS.items()}
    if arguments.json:
        print(json.dumps({"models": result, "chunk_mib": arguments.chunk_mib, "machine": machine(1)}, indent=2))


def measure(path: pathlib.Path, chunk_mib: int) -> list[dict[str, Any]]:
    """Memory of the programs of a model's largest pieces."""
    config = policy.read_config(path)
    slice_devices = topology.devices(topology.parse("v5e-4x8"))
    # libtpu compiles for whole slices only: what runs on a half of it is compiled for a slice of that size.
    half = topology.devices(topology.parse("v5e-4x4"))
    moving = make_transfer(config, slice_devices[:16], slice_devices[16:], chunk_mib)
    standing = make_transfer(config, half, half, chunk_mib)
    rows = []
    for is_stacked in (False, True):
        pieces = [piece for _, piece in moving.pieces if piece.is_stacked == is_stacked]
        piece = max(pieces, key=num_bytes)
        for name in ("pack", "move", "unpack"):
            program, shapes = (moving if name == "move" else standing).programs(piece)[name]
            memory = program.lower(*shapes).compile().memory_analysis()
            rows.append(
                {
                    "program": name,
                    "piece": list(piece.shape),
                    "piece_gib": round(num_bytes(piece) / GIB, 3),
                    "arguments_gib": round(memory.argument_size_in_bytes / GIB, 3),
                    "temporaries_gib": round(memory.temp_size_in_bytes / GIB, 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


def make_transfer(config: qwen.QwenConfig, sources: Any, targets: Any, chunk_mib: int) -> Transfer:
    """From trainers to samplers, on described devices."""
    params = qwen.abstract(config)[1]
    trainer_mesh, _ = make_meshes(MeshConfig(trainer="fsdp=16"), sources)
    sampler_mesh, _ = make_meshes(MeshConfig(trainer="data=4,tensor=4"), targets)
    copy = WeightSync(params, trainer_mesh, "bfloat16", rules=TRAINER_RULES).abstract(params)
    target = shardings(copy, sampler_mesh, SAMPLER_RULES)
    return Transfer(copy, target, chunk_mib * 2**20, lambda: None)


def num_bytes(piece: Piece) -> int:
    return math.prod(piece.shape) * piece.dtype.itemsize


if __name__ == "__main__":
    main(sys.argv[1:])

"""One of four processes of ``test_transfer.py``: two have the weights, two get them; prints each case, and what went wrong."""

import argparse
import json
import pathlib
import sys

import jax
import numpy as np

from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed import messages, start
from oapl_jax.distributed.sharding import SAMPLER_RULES, TRAINER_RULES, make_meshes, processes_of, shardings, to_devices
from oapl_jax.distributed.team import Team
from oapl_jax.distributed.transfer import Transfer
from oapl_jax.model import qwen
from oapl_jax.weights.sync import WeightSync

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = {
    **json.loads((ROOT / "configs/toy_qwen3.json").read_text()),
    "vocab_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def main(argv):
    parser = argparse.ArgumentParser()
    start.add_options(parser)
    parser.add_argument("--case", nargs=4, action="append", metavar=("TRAINER", "SAMPLER", "DTYPE", "CHUNK"))
    arguments = parser.parse_args(argv)
    start.initialize(arguments)
    everyone = Team("all", range(jax.process_count()))
    for trainer, sampler, dtype, chunk in arguments.case:
        print(f"from {trainer} to {sampler} in {dtype}", flush=True)
        check(MeshConfig(trainer=trainer, sampler=sampler), dtype, int(chunk), everyone)


def check(mesh, dtype, chunk, everyone):
    trainer_mesh, sampler_mesh = make_meshes(mesh)
    abstract = qwen.abstract(qwen.QwenConfig.from_hf(CONFIG))[1]
    sync = WeightSync(abstract, trainer_mesh, dtype, rules=TRAINER_RULES)
    source = sync.abstract(abstract)
    transfer = Transfer(source, shardings(source, sampler_mesh, SAMPLER_RULES), chunk, everyone.wait)
    # Every process knows the weights: all bits at random, NaNs and minus zeros among them.
    bits = np.random.default_rng(0)
    values = [
        np.frombuffer(bits.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape)
        for leaf in jax.tree.leaves(source)
    ]
    assert any(np.isnan(value.astype(np.float32)).any() for value in values) or dtype == "int8"
    for _ in range(2):  # the second with compiled programs
        if jax.process_index() in processes_of(trainer_mesh):
            leaves = [to_devices(v, s.sharding) for v, s in zip(values, jax.tree.leaves(source), strict=True)]
            transfer.send(jax.tree.unflatten(jax.tree.structure(source), leaves))
        else:
            received = transfer.receive()
            for value, leaf in zip(values, jax.tree.leaves(received), strict=True):
                for shard in leaf.addressable_shards:
                    got, wanted = np.asarray(shard.data), np.ascontiguousarray(value[shard.index])
                    assert got.dtype == wanted.dtype
                    assert got.tobytes() == wanted.tobytes()
    everyone.wait()


if __name__ == "__main__":
    with messages.reporting_failures():
        main(sys.argv[1:])

"""One of two processes of ``test_stored_checkpoints.py``: they save in a store, restore from it, publish in it."""

import argparse
import json
import os
import pathlib
import signal
import sys
import tempfile

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oapl_jax.config.mesh import MeshConfig
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.distributed import start
from oapl_jax.distributed.sharding import TRAINER_RULES, make_meshes, shardings
from oapl_jax.distributed.team import Team
from oapl_jax.io.storage import shared_path
from oapl_jax.model import qwen
from oapl_jax.rollouts.buffer import Window
from oapl_jax.weights.checkpoint_store import CheckpointStore
from oapl_jax.weights.checkpoints import Checkpoints
from oapl_jax.weights.policies import Manifest, PolicyStore

TOY = pathlib.Path(__file__).parents[2] / "configs/toy_qwen3.json"


class Dying(Team):
    """A team of which this member dies as soon as it has nothing to do but wait for the others."""

    def wait(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)


def values(seed):
    rng = np.random.default_rng(seed)
    return {"count": np.int32(seed), "split": rng.normal(size=(4, 512)), "whole": rng.normal(size=(3, 5))}


def make_tree(seed):
    """An array that is split between the processes, and two that both have."""
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def place(name, value):
        value = np.asarray(value, np.int32 if name == "count" else np.float32)
        sharding = NamedSharding(mesh, P("data") if name == "split" else P())
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return {name: place(name, value) for name, value in values(seed).items()}


def make_policy(mesh):
    """Architecture and weights."""
    config = qwen.QwenConfig.from_hf(json.loads(TOY.read_text()))
    placed = shardings(qwen.abstract(config, param_dtype="float32")[1], make_meshes(mesh)[0], TRAINER_RULES)
    return config, qwen.initialize(config, jax.random.key(7), placed, param_dtype="float32")


def save(directory, team):
    """Steps 1 to 3, of which the newest two are kept; of step 4 process 1 copies its files and dies."""
    checkpoints = Checkpoints(directory, 2, team=team)
    for step in range(1, 4):
        checkpoints.save(step, make_tree(step), {"step": step})
    checkpoints.close()
    print("saved", flush=True)
    members = range(jax.process_count())
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / f"of-{jax.process_index()}").write_bytes(b"x")
        CheckpointStore(directory).put(4, pathlib.Path(folder), [Team, Dying][jax.process_index()]("last", members))


def restore(directory, team):
    """Prints which step was restored, and that it has the values that were saved."""
    checkpoints = Checkpoints(directory, 2, team=team)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_tree(0))
    step, tree, meta = checkpoints.restore(abstract, print)
    assert meta["step"] == step == checkpoints.latest_step
    expected = make_tree(step)
    for name, leaf in tree.items():
        for shard, other in zip(leaf.addressable_shards, expected[name].addressable_shards, strict=True):
            assert np.asarray(shard.data).tobytes() == np.asarray(other.data).tobytes(), name
    checkpoints.save(5, tree, meta)
    checkpoints.close()
    print(f"restored {step}", flush=True)


def publish(directory, team):
    """Version 0."""
    manifest = Manifest(Window(0, 0, 8, ()), 2, "digest", {})
    config, params = make_policy(MeshConfig(trainer="fsdp=2"))
    PolicyStore(directory.parent / "policy").publish(manifest, config, params, CharacterTokenizer(), team)


TASKS = {"save": save, "restore": restore, "publish": publish}


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=shared_path)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    start.add_options(parser)
    arguments = parser.parse_args(argv)
    start.initialize(arguments)
    team = Team.job()  # one: two would count their messages under the same keys
    for task in arguments.tasks:
        TASKS[task](arguments.directory, team)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Checkpoints and policies of several processes in a store: whole or not there, whoever dies on the way."""

import signal

import jax
import pytest

import stores
from jobs import finish_job, start_job
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import TRAINER_RULES, make_meshes
from oapl_jax.io import storage
from oapl_jax.model import hf
from oapl_jax.weights.checkpoint_store import CheckpointStore
from oapl_jax.weights.checkpoints import fingerprint
from oapl_jax.weights.policies import PolicyStore
from weights.store_job import make_policy

pytestmark = pytest.mark.slow

JOB, MESH = "tests/weights/store_job.py", MeshConfig(trainer="fsdp=1")


def files_of(folder):
    """The names of the files in a folder of a store, and in the folders in it."""
    found = set()
    for name in storage.names(folder):
        below = {f"{name}/{file}" for file in files_of(folder / name)} if not storage.exists(folder / name) else {name}
        found |= below
    return found


def test_two_processes_save_and_publish_in_a_store_and_one_that_dies_leaves_no_checkpoint(tmp_path):
    with stores.s3() as address:
        directory = storage.shared_path(f"{address}/run/checkpoints")
        store, job = CheckpointStore(directory), start_job([JOB, str(directory), "save"], 2, 1)
        try:
            assert job[1].wait(300) == -signal.SIGKILL, finish_job(job)[1]
            assert store.steps() == [2, 3], "process 1 has copied its files of step 4 and is dead"
        finally:
            job[0].kill()
            _, outputs = finish_job(job)
        assert all("saved" in output for output in outputs), outputs
        assert files_of(directory / "4") == {"of-0", "of-1"}
        assert store.steps() == [2, 3]
        assert storage.names(directory) == ["2", "2.json", "3", "3.json", "4"]
        named = storage.read_object(directory / "3.json")["files"]
        assert files_of(directory / "3") == set(named)
        parts = [name for name in named if name.startswith("arrays/split/") and not name.endswith(".zarray")]
        assert len(parts) == 2, "one of each process"
        for part in parts[:1]:  # as long as it was: only the arrays show it
            content = storage.read(directory / "3" / part)
            storage.replace(directory / "3" / part, bytes(len(content)))
        codes, outputs = finish_job(start_job([JOB, str(directory), "restore", "publish"], 2, 1))
        assert codes == [0, 0], "\n".join(outputs)
        for output in outputs:
            assert "checkpoint 3 cannot be loaded" in output
            assert "restored 2" in output
        assert store.steps() == [2, 5]
        assert storage.exists(directory / "3.json.damaged")
        policies = PolicyStore(directory.parent / "policy")
        shards = [name for name in policies.manifest(0).files if name.endswith(".safetensors")]
        assert len(shards) >= 2, "at least one of each process"
        _, params = hf.load_params(policies.fetch(0, tmp_path), make_meshes(MESH)[0], TRAINER_RULES, "float32")
        assert fingerprint(jax.tree.leaves(params)) == fingerprint(jax.tree.leaves(make_policy(MESH)[1]))

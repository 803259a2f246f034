"""Checkpoints of several processes in a store: whole or not there, whoever dies on the way."""

import signal

import pytest

import stores
from jobs import finish_job, start_job
from oapl_jax.io import storage
from oapl_jax.weights.checkpoint_store import CheckpointStore

pytestmark = pytest.mark.slow

JOB = "tests/weights/store_job.py"


def files_of(folder):
    """The names of the files in a folder of a store, and in the folders in it."""
    found = set()
    for name in storage.names(folder):
        below = {f"{name}/{file}" for file in files_of(folder / name)} if not storage.exists(folder / name) else {name}
        found |= below
    return found


def test_two_processes_save_in_a_store_and_one_that_dies_leaves_no_checkpoint():
    with stores.s3() as address:
        directory = storage.shared_path(f"{address}/run/checkpoints")
        store, job = CheckpointStore(directory), start_job([JOB, "save", str(directory)], 2, 1)
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
        codes, outputs = finish_job(start_job([JOB, "restore", str(directory)], 2, 1))
        assert codes == [0, 0], "\n".join(outputs)
        for output in outputs:
            assert "checkpoint 3 cannot be loaded" in output
            assert "restored 2" in output
        assert store.steps() == [2, 5]
        assert storage.exists(directory / "3.json.damaged")

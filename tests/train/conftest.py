"""The model that the runs of this folder start from."""

import fcntl
import os

import pytest

import runs
from oapl_jax.config import config_file
from oapl_jax.config.commands import SftConfig
from oapl_jax.sft import sft


@pytest.fixture(scope="session", autouse=True)
def toy_model(request, tmp_path_factory):
    """A toy model that has learned the form of an answer and guesses its digits: about one in ten is right.

    The workers of a session share it. It is trained for slow tests only.
    """
    if not any(item.get_closest_marker("slow") for item in request.session.items):
        return
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    folder = session / "toy_model"
    with (session / "toy_model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            train(session / "toy_model_run").rename(folder)
    runs.BASE["model"] = {"path": str(folder)}


def train(run_dir):
    config = config_file.load(
        SftConfig,
        runs.ROOT / "configs/chain_sft.yaml",
        [
            f"run.dir={run_dir}",
            "run.steps=60",
            f"model.config={runs.ROOT / 'configs/toy_qwen3.json'}",
            "learner.warmup_steps=10",
            "mesh.trainer=fsdp=1",
            "logging.tensorboard=false",
            "logging.progress=false",
        ],
    )
    return sft.run(config)

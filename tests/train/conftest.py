"""The model that the runs of this folder start from."""

import pytest

import runs
from oapl_jax.config import config_file
from oapl_jax.config.commands import SftConfig
from oapl_jax.sft import sft


@pytest.fixture(scope="session", autouse=True)
def toy_model(tmp_path_factory):
    """A toy model that has learned the form of an answer and guesses its digits: about one in ten is right."""
    config = config_file.load(
        SftConfig,
        runs.ROOT / "configs/chain_sft.yaml",
        [
            f"run.dir={tmp_path_factory.mktemp('sft') / 'run'}",
            "run.steps=60",
            f"model.config={runs.ROOT / 'configs/toy_qwen3.json'}",
            "learner.warmup_steps=10",
            "mesh.trainer=fsdp=1",
            "logging.tensorboard=false",
            "logging.progress=false",
        ],
    )
    runs.BASE["model"] = {"path": str(sft.run(config))}

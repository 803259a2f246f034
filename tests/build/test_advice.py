"""Warnings at the start of a run: in the regions that failed in docs/tuning.md, and in no config that is shipped."""

import pathlib

import pytest

from oapl_jax.build.advice import advice
from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
ONLINE = sorted(path for path in CONFIGS.glob("*.yaml") if "\nwindow:" in path.read_text())


def advice_of(name: str, *overrides: str) -> list[str]:
    return list(advice(config_file.load(TrainConfig, CONFIGS / name, list(overrides), CHECKS)))


def test_a_beta2_that_does_not_hold_short_responses():
    (text,) = advice_of("quickstart.yaml", "objective.beta2=0.001")
    assert text.startswith(
        "objective.beta2=0.001 with responses of at most 6 tokens asks for log-ratios of up to 167 nats"
    )
    assert "raise it to 0.008 or more" in text
    assert advice_of("quickstart.yaml", "objective.beta2=0.03") == []
    assert advice_of("quickstart.yaml", "objective.beta2=0.001", "sampler.max_response_tokens=1000") == []


def test_importance_weights_over_a_long_and_fast_window():
    fast = ("window.sync_every=100", "window.max_version_lag=0", "learner.learning_rate=1e-3")
    (text,) = advice_of("quickstart_grpo.yaml", *fast, "learner.updates_per_batch=1")
    assert "objective.name=grpo rests on importance weights, and 100 updates" in text
    assert "may move a parameter by 0.1" in text
    (text,) = advice_of("quickstart_grpo.yaml", *fast[:2], "learner.learning_rate=3e-4")
    assert "200 updates" in text
    assert (
        advice_of("quickstart_grpo.yaml", *fast[:2], "learner.learning_rate=3e-4", "learner.updates_per_batch=1") == []
    )
    assert advice_of("quickstart.yaml", "window.sync_every=100", "learner.learning_rate=1e-3") == []


@pytest.mark.parametrize("path", ONLINE, ids=lambda path: path.stem)
def test_no_shipped_config_has_any(path):
    assert advice_of(path.name) == []

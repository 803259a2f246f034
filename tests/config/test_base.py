"""A config that stands on another one: its key ``base``."""

import pytest

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig

BELOW = """
run: {dir: runs/below, steps: 7}
model: {config: toy.json, tokenizer: characters}
data: {task: chain, max_prompt_tokens: 12}
sampler: {group_size: 8, max_response_tokens: 6}
objective: {beta2: 0.1}
"""


def write(folder, text, name="above.yaml"):
    (folder / "below.yaml").write_text(BELOW)
    (folder / name).write_text(text)
    return folder / name


def load(path, *overrides):
    return config_file.load(TrainConfig, path, list(overrides), CHECKS)


def test_its_keys_are_put_over_those_of_the_base_and_overrides_over_both(tmp_path):
    config = load(write(tmp_path, "base: below.yaml\nrun: {dir: runs/above}\n"), "run.seed=4")
    assert (config.run.dir, config.run.steps, config.run.seed) == ("runs/above", 7, 4)
    assert config.objective.model_extra == {"beta1": 1.0, "beta2": 0.1}


def test_another_objective_does_not_inherit_options(tmp_path):
    config = load(write(tmp_path, "base: below.yaml\nobjective: {name: grpo, clip_high: 0.28}\n"))
    assert config.objective.name == "grpo"
    assert config.objective.model_extra == {
        "normalise_by": "response",
        "scale_advantages": True,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "importance_limit": None,
    }


@pytest.mark.parametrize(
    ("base", "message"),
    [("nowhere.yaml", "nowhere.yaml"), ("../below.yaml", "Invalid name"), ("above.yaml", "has a base itself")],
)
def test_a_base_that_cannot_be_read_is_an_error(tmp_path, base, message):
    with pytest.raises(config_file.ConfigError, match=f"above.yaml.* cannot be read: .*{message}"):
        load(write(tmp_path, f"base: {base}\n"))

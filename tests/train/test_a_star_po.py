"""A*-PO from its two stages: values from samples of the reference, then a run, which the audit proves."""

import pytest

from oapl_jax import train
from oapl_jax.build.checks import CHECKS
from oapl_jax.cli import generate
from oapl_jax.config import config_file
from oapl_jax.config.commands import GenerateConfig
from oapl_jax.rollouts import audit
from oapl_jax.rollouts.log import RolloutLog
from runs import BASE, make_config, read_lines

pytestmark = pytest.mark.slow


def test_values_of_the_reference_are_the_values_of_the_groups(tmp_path):
    sections = {name: BASE[name] for name in ("model", "data", "sampler")}
    raw = {"run": {"dir": str(tmp_path / "values"), "seed": 3}, "generation": {"prompts": 32}, **sections}
    generated = config_file.validate(GenerateConfig, raw | {"logging": {"progress": False}}, "tests", CHECKS)
    assert generate.run(generated)["groups"] == 32
    config = make_config(
        tmp_path / "run",
        run={"steps": 2, "seed": 3},
        objective={"name": "a_star_po", "values": str(tmp_path / "values"), "beta2": 0.1},
        window={"sync_every": 1},
        evaluation={"every": 0, "prompts": 0},
    )
    train.run(config)
    audit.audit(tmp_path / "run")
    first = {group.prompt.id: group.value for group in RolloutLog(tmp_path / "run/rollouts").read(0)}
    second = {group.prompt.id: group.value for group in RolloutLog(tmp_path / "run/rollouts").read(1)}
    assert len(set(first.values()) | set(second.values())) > 1
    assert not first.keys() & second.keys()
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    assert rows[1]["learner/reference_kl"] == pytest.approx(0, abs=1e-7)
    assert rows[2]["learner/reference_kl"] > 1e-7

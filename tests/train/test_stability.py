"""The claim that OAPL is stable where the sampler lags, and GRPO with importance sampling is not (docs/results.md)."""

import pathlib

import pytest

from experiments import grid as grids
from experiments import report
from experiments.runner import Runner

ROOT = pathlib.Path(__file__).parents[2]
OURS, THEIRS = "oapl_100_chain_fast", "grpo_100_chain_fast"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3000)
def test_oapl_learns_at_a_lag_and_a_rate_at_which_grpo_collapses(tmp_path):
    grid = grids.load(ROOT / "experiments/paper.yaml")
    grid = grid.model_copy(update={"pairs": grid.pairs[:2], "tasks": {"chain": grid.tasks["chain"]}})
    runner = Runner(tmp_path, 2)
    runner.run(grids.warm_starts(grid, tmp_path))
    runner.run([run for name in (OURS, THEIRS) for run in grids.arm_runs(grid, name, {}, tmp_path).values()])
    ours, theirs = (report.records(grid, name, tmp_path) for name in (OURS, THEIRS))
    assert len(ours) == len(theirs) == 2
    for pair in ours:
        assert ours[pair].value("pass@1", "final") > ours[pair].value("pass@1", "start") + 0.3
        assert ours[pair].value("pass@1", "final") > theirs[pair].value("pass@1", "final") + 0.3

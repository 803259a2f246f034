"""Grids of experiments: their runs, the configs of these, and mistakes in a grid."""

import pathlib

import pytest

from experiments import grid as grids
from oapl_jax.build.checks import CHECKS
from oapl_jax.config.commands import SftConfig, TrainConfig
from oapl_jax.config.config_file import ConfigError, validate

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "experiments").glob("*.yaml"))
OUT = pathlib.Path("runs/anywhere")


def runs_of(grid: grids.Grid) -> list[grids.Run]:
    searches = [run for name in grid.searches for _, run in grids.search_runs(grid, name, OUT)]
    arms = []
    for name, arm in grid.arms.items():
        chosen = {key: values[-1] for key, values in grid.searches[arm.search].values.items()} if arm.search else {}
        arms += grids.arm_runs(grid, name, chosen, OUT).values()
    return [*grids.warm_starts(grid, OUT), *searches, *arms]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_run_of_a_shipped_grid_has_a_valid_config_and_a_folder_of_its_own(path):
    runs = runs_of(grids.load(path))
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        schema = SftConfig if run.command == "sft" else TrainConfig
        config = validate(schema, run.config, run.name, CHECKS)
        assert config.run.dir == str(OUT / run.name)


def test_the_methods_that_are_compared_are_searched_with_the_same_budget():
    grid = grids.load(ROOT / "experiments/paper.yaml")
    sizes = {name: len(grids.search_runs(grid, name, OUT)) for name in grid.searches}
    assert len(sizes) == 4
    assert set(sizes.values()) == {6}


def test_claims_are_judged_on_prompts_that_no_search_has_seen():
    grid = grids.load(ROOT / "experiments/paper.yaml")
    _, search = grids.search_runs(grid, "chain_oapl", OUT)[0]
    arm = grids.arm_runs(grid, "oapl_100_chain", {}, OUT)[grid.pairs[0]]
    assert search.config["evaluation"]["prompts"] == grid.search_prompts
    assert arm.config["evaluation"]["prompts"] == grid.search_prompts + grid.test_prompts


def test_pairs_have_their_own_seed_and_warm_start():
    grid = grids.load(ROOT / "experiments/paper.yaml")
    runs = grids.arm_runs(grid, "oapl_50", {"learner.learning_rate": 0.5}, OUT)
    assert list(runs) == grid.pairs
    for (warm, seed), run in runs.items():
        assert run.config["run"]["seed"] == seed
        assert run.config["model"]["warm_start"].endswith(f"countdown_sft-{warm}.yaml")
        assert run.config["learner"]["learning_rate"] == 0.5
        assert run.config["window"]["sync_every"] == 50


def test_an_objective_of_a_method_takes_the_place_of_that_of_the_task():
    grid = grids.load(ROOT / "experiments/paper.yaml")
    (run, *_) = grids.arm_runs(grid, "grpo_50_chain", {}, OUT).values()
    assert run.config["objective"] == {"name": "grpo"}


def test_a_name_that_nothing_has_is_refused_with_those_that_there_are(tmp_path):
    text = (ROOT / "experiments/paper.yaml").read_text().replace("left: {arm: oapl_rounds}", "left: {arm: oapl_round}")
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"there is no 'oapl_round'; there are oapl_50, grpo_1"):
        grids.load(tmp_path / "wrong.yaml")


def test_two_tasks_cannot_give_one_warm_start_different_settings(tmp_path):
    text = (ROOT / "experiments/paper.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(
        text.replace("warm_settings: {run.steps: 400", "warm_settings: {run.steps: 401", 1)
    )
    with pytest.raises(ConfigError, match="another task has other ones"):
        grids.load(tmp_path / "wrong.yaml")

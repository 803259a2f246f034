"""Every file in configs/ is a config that works, headed by its own command."""

import pathlib
import shlex

import pytest
import yaml

from oapl_jax.build.checks import CHECKS
from oapl_jax.cli import commands
from oapl_jax.config import config_file
from oapl_jax.config.commands import EvaluateConfig, GenerateConfig, SftConfig, TrainConfig
from oapl_jax.io.console import ExitCode

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
SCHEMAS = {
    "train": TrainConfig,
    "sft": SftConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
}


def command_of(path):
    """The command that a file is for, by the sections that only it has."""
    sections = yaml.safe_load(path.read_text())
    if "generation" in sections:
        return "generate"
    if "benchmarks" in sections:
        return "evaluate"
    return "train" if sections.keys() & {"sampler", "base"} else "sft"


def schema_of(path):
    return SCHEMAS[command_of(path)]


TRAIN_FILES = [path for path in FILES if command_of(path) == "train"]


def names(paths):
    return {"argvalues": paths, "ids": [path.stem for path in paths]}


def is_offline(config):
    """The model and the data come with this checkout."""
    sources = [config.model.path, config.data.path]
    return all(source is None or (ROOT / source).exists() for source in sources)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_there_are_configs_of_both_commands():
    assert ROOT / "configs/quickstart.yaml" in TRAIN_FILES
    assert len(TRAIN_FILES) < len(FILES)


@pytest.mark.parametrize("path", **names(FILES))
def test_it_loads_and_names_files_that_exist(path):
    config = config_file.load(schema_of(path), path, checks=CHECKS)
    for source in (config.model.config, config.model.warm_start):
        assert source is None or (ROOT / source).is_file()
    assert not pathlib.Path(config.run.dir).is_absolute()


@pytest.mark.parametrize("path", **names(FILES))
def test_it_begins_with_a_comment_that_names_its_command(path):
    lines = path.read_text().splitlines()
    header = [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
    commands = [line[line.index("python -m") :] for line in header if "python -m oapl_jax" in line]
    assert commands, f"{path.name}: no command in its header"
    words = shlex.split(commands[0].strip("`.,;").replace("oapl_jax.train", "oapl_jax train"))
    assert words[:6] == ["python", "-m", "oapl_jax", command_of(path), "--config", f"configs/{path.name}"]
    config_file.load(schema_of(path), path, [word for word in words[6:] if "=" in word], CHECKS)


@pytest.mark.parametrize("path", **names([path for path in TRAIN_FILES if path.stem.endswith("_grpo")]))
def test_a_grpo_config_differs_from_its_oapl_config_in_the_method_alone(path):
    """Same model, data, sampler, evaluations and optimizer."""
    grpo, other = (
        config_file.load(TrainConfig, file, checks=CHECKS).model_dump()
        for file in (path, path.with_name(path.name.replace("_grpo", "")))
    )
    assert (grpo["objective"]["name"], other["objective"]["name"]) == ("grpo", "oapl")
    changed = {
        f"{name}.{key}"
        for name in grpo.keys() - {"mode", "offline", "objective"}
        for key, value in grpo[name].items()
        if other[name][key] != value
    }
    assert changed == {"run.dir", "learner.updates_per_batch", "window.sync_every", "window.max_version_lag"}


def test_every_online_oapl_config_has_a_grpo_config_beside_it():
    oapl = [
        path
        for path in TRAIN_FILES
        if (config := config_file.load(TrainConfig, path, checks=CHECKS)).objective.name == "oapl"
        and config.mode != "offline"
    ]
    assert [path.stem for path in oapl if not path.with_name(f"{path.stem}_grpo.yaml").exists()] == []


def test_run_directories_differ():
    directories = [config_file.load(schema_of(path), path).run.dir for path in FILES]
    assert len(set(directories)) == len(directories)


@pytest.mark.slow
@pytest.mark.parametrize("path", **names(TRAIN_FILES))
def test_a_dry_run_prints_the_plan_and_makes_nothing(path, tmp_path, capsys):
    config = config_file.load(TrainConfig, path)
    if not is_offline(config):
        pytest.skip(f"its model or data is not here: {config.model.path}, {config.data.path}")
    directory = tmp_path / "run"
    assert commands.main(["train", "--config", str(path), "--dry-run", f"run.dir={directory}"]) == ExitCode.DONE
    printed = capsys.readouterr().out
    assert f"batch_rollouts: {config.learner.batch_rollouts}" in printed, "the resolved config"
    plan = printed[printed.index("  model  ") :]
    for word in ("parameters", "trainer mesh", "sampler mesh", "tokens a step", "weights", "KV cache", "optimizer"):
        assert word in plan
    assert f"{config.run.steps:,} steps" in plan
    assert not directory.exists()


@pytest.mark.slow
def test_the_plan_of_the_quickstart_has_the_right_numbers(capsys, tmp_path):
    config = ["--config", "configs/quickstart.yaml", f"run.dir={tmp_path / 'run'}", "mesh.trainer=fsdp=1"]
    assert commands.main(["train", *config, "--dry-run"]) == ExitCode.DONE
    plan = {line[:14].strip(): line[16:] for line in capsys.readouterr().out.splitlines() if line[14:16] == "  "}
    num_parameters = 18 * 80 + 3 * (2 * 80 * 64 + 2 * 80 * 32 + 2 * 32 + 3 * 80 * 208 + 2 * 80) + 80
    assert f"qwen3, {num_parameters:,} parameters" in plan["model"]
    assert "200 steps in 4 windows of 50" in plan["run"]
    assert "128 rollouts = 16 prompts x G=8, at most 2,304 tokens a step" in plan["batch"]
    assert f"weights {4 * num_parameters / 2**10:.2f} KiB, optimizer " in plan["trainer bytes"]
    rows, layers, length, width = 16 * 8, 3, 2 * 16, 32  # two pages hold the 12 + 6 tokens
    cache = 2 * 4 * rows * layers * length * width
    assert f"weights {4 * num_parameters / 2**10:.2f} KiB, KV cache {cache / 2**20:.2f} MiB" in plan["sampler bytes"]


def test_a_supervised_dry_run_prints_the_config(capsys):
    assert commands.main(["sft", "--config", "configs/chain_sft.yaml", "--dry-run"]) == ExitCode.DONE
    assert "task: chain" in capsys.readouterr().out

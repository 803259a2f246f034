"""Every command that reads a run directory refuses that of another release, before it does anything else."""

import pathlib

import pytest

from oapl_jax.cli import commands
from oapl_jax.io.console import ExitCode

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "words",
    [
        "train --config configs/quickstart.yaml run.dir={run}",
        "sft --config configs/chain_sft.yaml run.dir={run}",
        "generate --config configs/countdown_generate.yaml run.dir={run}",
        "evaluate --config configs/evaluate_math.yaml run.dir={run}",
        "evaluate --config configs/evaluate_math.yaml run.dir={run}-evaluated model.path={run}",
        "evaluate --config configs/evaluate_math.yaml run.dir={run}-evaluated model.path={run} --dry-run",
        "generate --config configs/countdown_generate.yaml run.dir={run}-generated model.path={run} model.warm_start=null",
        "sample --run {run} --mesh data=1",
        "export {run}",
        "audit {run}",
        "report {run}",
    ],
)
def test_the_directory_of_another_release_is_refused(words, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    (run / "policy").mkdir(parents=True)
    for name, text in {
        "config.yaml": "unknown: 1\n",
        "metrics.jsonl": "",
        "policy/current.json": '{"policy_version": 0, "is_finished": false}',
    }.items():
        (run / name).write_text(text)
    monkeypatch.chdir(ROOT)
    assert commands.main(words.format(run=run).split()) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: '{run}' was written by oapl_jax 0.1.0 (commit 29ded25 or before), layout 1, and this is"
    )
    assert (run / "metrics.jsonl").read_text() == ""

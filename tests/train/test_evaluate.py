"""``python -m oapl_jax evaluate``: agrees with the evaluation in training, follows a run, survives kills."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import runs
from oapl_jax import train
from oapl_jax.cli import evaluate
from oapl_jax.config import config_file
from oapl_jax.config.commands import EvaluateConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.distributed.sharding import TRAINER_RULES, make_meshes
from oapl_jax.distributed.team import Team
from oapl_jax.evaluation import tally
from oapl_jax.io import run_dir
from oapl_jax.model import hf
from oapl_jax.rollouts.buffer import Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.weights.policies import Manifest, PolicyStore

SECTIONS = {
    "data": {"task": "chain", "max_prompt_tokens": 12},
    "benchmarks": {"problems": 8},
    "sampler": {
        "samples": 8,
        "max_response_tokens": 6,
        "temperature": 1.0,
        "top_p": 1.0,
        "rows": 32,
        "decode_steps": 3,
    },
    "mesh": {"trainer": "fsdp=1"},
    "logging": {"progress": False},
}


def make_config(directory, model, **run):
    raw = {**SECTIONS, "run": {"dir": str(directory), "seed": 3, **run}, "model": model}
    return config_file.validate(EvaluateConfig, raw, source="tests")


def tokens(directory, version=0):
    groups = RolloutLog(directory / "rollouts").read(version)
    return {group.prompt.id: [item.rollout.token_ids.tolist() for item in group.rollouts] for group in groups}


@pytest.mark.slow
def test_a_run_is_followed_and_its_end_agrees_with_its_summary(tmp_path):
    config = runs.make_config(tmp_path / "run", run={"steps": 6}, checkpoint={"every": 3, "keep": 3})
    summary = train.run(config)
    directory = tmp_path / "evaluation"
    evaluate.evaluate(make_config(directory, {"path": str(tmp_path / "run")}), watch=True)
    assert tally.versions(directory / "rollouts") == [0, 3, 6]
    assert (directory / "versions.png").exists()
    assert not list(directory.glob("policy-*"))
    scores = json.loads((directory / "results.json").read_text())["scores"]
    for label, when in (("run@0", "before"), ("run@6", "after")):
        (values,) = [item["values"] for item in scores if item["label"] == label]
        for name, expected in summary[when].items():
            assert values[name]["value"] == pytest.approx(expected, abs=1e-12), (label, name)
    before = (directory / "results.json").read_bytes()
    evaluate.evaluate(make_config(directory, {"path": str(tmp_path / "run")}), watch=True)  # nothing is left to sample
    assert (directory / "results.json").read_bytes() == before


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_has_each_problem_once(tmp_path):
    sampler = {**SECTIONS["sampler"], "rows": 8, "samples": 4}
    raw = {**SECTIONS, "benchmarks": {"problems": 60}, "model": runs.BASE["model"], "sampler": sampler}
    killed, whole = (
        config_file.validate(EvaluateConfig, {**raw, "run": {"dir": str(tmp_path / name)}}, source="tests")
        for name in ("killed", "whole")
    )
    path = runs.write_config(tmp_path / "killed.yaml", killed)
    process = subprocess.Popen(
        [sys.executable, "-m", "oapl_jax", "evaluate", "--config", str(path)],
        env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
        stdout=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("rollouts/*/*.parquet"))) < 5 and process.poll() is None:
        assert time.monotonic() < end, "no samples within 120 s"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, "it was over before the kill"
    assert 5 <= len(list((tmp_path / "killed").glob("rollouts/*/*.parquet"))) < 60
    evaluate.evaluate(killed)
    evaluate.evaluate(whole)
    goes_on = tokens(tmp_path / "killed")  # reading refuses a group that is there twice
    assert len(goes_on) == 60
    assert goes_on == tokens(tmp_path / "whole")


@pytest.mark.slow
def test_published_policies_are_evaluated_and_half_of_one_is_not(tmp_path):
    """A run whose samplers are elsewhere: two whole versions, and one that is being written."""
    directory = tmp_path / "run"
    store = PolicyStore(directory / "policy")
    mesh = make_meshes(MeshConfig(trainer="fsdp=1"))[0]
    config, params = hf.load_params(runs.BASE["model"]["path"], mesh, TRAINER_RULES, "float32")
    for version in (0, 1):
        manifest = Manifest(Window(version, 0, 4), 4, "digest", {})
        store.publish(manifest, config, params, CharacterTokenizer(), Team.alone())
    (directory / "policy" / "000002").mkdir()
    run_dir.save_config(directory, runs.make_config(directory))
    (directory / "summary.json").write_text("{}")
    evaluate.evaluate(make_config(tmp_path / "e", {"path": str(directory)}), watch=True)
    assert tally.versions(tmp_path / "e" / "rollouts") == [0, 1]
    assert tokens(tmp_path / "e", 0) == tokens(tmp_path / "e", 1)  # the same weights and random numbers


def test_a_run_without_news_is_an_error_after_the_deadline(tmp_path):
    config = runs.make_config(tmp_path / "run")
    run_dir.save_config(tmp_path / "run", config)
    watching = make_config(tmp_path / "e", {"path": str(tmp_path / "run")}, watch_deadline=0.1)
    with pytest.raises(TimeoutError, match=r"no new version within run\.watch_deadline=0\.1 s"):
        evaluate.evaluate(watching, watch=True)


@pytest.mark.slow
def test_what_does_not_fit_is_named(tmp_path):
    model = {"config": str(runs.ROOT / "configs/toy_qwen3.json"), "tokenizer": "characters"}
    with pytest.raises(ValueError, match="--watch needs a run directory"):
        evaluate.evaluate(make_config(tmp_path, model), watch=True)
    with pytest.raises(ValueError, match=r"run\.step needs a run directory"):
        evaluate.evaluate(make_config(tmp_path, model, step=3))
    raw = {"run": {"dir": "x"}, "model": model, "benchmarks": {"names": ["math500"], "folder": str(tmp_path)}}
    config = config_file.validate(EvaluateConfig, raw, source="tests")
    with pytest.raises(ValueError, match=r"has no copy of math500; put math500\.jsonl"):
        evaluate.evaluate(config)
    with pytest.raises(config_file.ConfigError, match=r"exactly one of benchmarks\.names and the section data"):
        config_file.validate(EvaluateConfig, {**raw, "data": {"task": "chain"}}, source="tests")


def test_settings_of_the_paper_are_the_configs_of_the_benchmarks():
    for name, samples, limit in (("math", 10, 16_384), ("code", 20, 65_536)):
        sampler = config_file.load(EvaluateConfig, runs.ROOT / f"configs/evaluate_{name}.yaml").sampler
        assert (sampler.samples, sampler.max_response_tokens) == (samples, limit)
        assert (sampler.temperature, sampler.top_p, sampler.top_k) == (0.6, 0.95, 0)

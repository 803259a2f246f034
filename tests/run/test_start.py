"""A start says all mistakes at once, and a finished run is recognised before anything is loaded."""

import json
import pathlib

import pytest

from oapl_jax import train
from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.io import run_dir
from oapl_jax.run import start, summary

ROOT = pathlib.Path(__file__).parents[2]


def raw_config(directory, **sections):
    raw = {
        "run": {"dir": str(directory / "run"), "steps": 8},
        "model": {"config": str(ROOT / "configs/toy_qwen3.json"), "tokenizer": "characters"},
        "data": {"path": str(directory / "prompts.jsonl"), "max_prompt_tokens": 16},
        "sampler": {"max_response_tokens": 6},
        "reward": {"functions": {"math": 1.0}},
        "evaluation": {"prompts": 0},
        "mesh": {"trainer": "fsdp=1"},
    }
    return {name: raw.get(name, {}) | sections.get(name, {}) for name in raw | sections}


def find_mistakes(raw):
    """As ``train.main`` does."""
    known = None
    try:
        config = config_file.validate(TrainConfig, raw, "test", CHECKS)
    except config_file.ConfigError as error:
        config, known = error.rest, error
    with pytest.raises(config_file.ConfigError) as caught:
        start.load(config, known)
    return str(caught.value)


ROWS = [{"prompt": "1+1=", "answer": "2"}]
DEVICES, FUNCTION, SCHEMA = "mesh.trainer", "no_such_module", "learner.learning_rat: unknown key"
WRONG = {
    "schema": ("learner", {"learning_rat": 1.0}, SCHEMA),
    "data": ("data", {"answer_column": "gold"}, "no column"),
    "held out": ("evaluation", {"prompts": 4, "path": "held_out.jsonl"}, "held_out.jsonl"),
    "reward": ("reward", {"functions": {"no_such_module:f": 1.0}}, FUNCTION),
    "devices": ("mesh", {"trainer": "fsdp=77"}, "77"),
    "model": ("model", {"config": "no_model.json"}, "no_model.json"),
}


@pytest.mark.parametrize("without", [None, *WRONG])
def test_mistakes_of_every_kind_come_together(tmp_path, without):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    wrong = {kind: mistake for kind, mistake in WRONG.items() if kind != without}
    sections = {}
    for section, values, _ in wrong.values():
        sections[section] = sections.get(section, {}) | values
    message = find_mistakes(raw_config(tmp_path, **sections))
    assert message.startswith(f"{len(wrong)} mistakes"), message
    for kind, (_, _, text) in WRONG.items():
        assert (text in message) == (kind in wrong), (kind, message)
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_alone_is_one_line(tmp_path):
    message = find_mistakes(raw_config(tmp_path))
    assert "prompts.jsonl" in message
    assert "\n" not in message
    assert "mistake" not in message


@pytest.mark.parametrize(
    ("planned", "steps", "changes", "is_over"),
    [
        (8, 8, {}, True),
        (8, 4, {}, True),
        (8, 9, {}, False),
        (None, 8, {}, False),  # killed while it wrote its results
        (8, 8, {"learner": {"learning_rate": 0.5}, "run": {"allow_config_change": True}}, False),
    ],
)
def test_a_finished_run_is_recognised_by_its_summary(tmp_path, planned, steps, changes, is_over):
    config = config_file.validate(TrainConfig, raw_config(tmp_path), "test", CHECKS)
    run_dir.open_run(config)
    found = {"steps": 8, "before": {}, "after": {}} | ({"planned_steps": planned} if planned else {})
    (tmp_path / "run/summary.json").write_text(json.dumps(found))
    changes["run"] = changes.get("run", {}) | {"steps": steps}
    config = config_file.validate(TrainConfig, raw_config(tmp_path, **changes), "test", CHECKS)
    assert summary.finished(config) == (found if is_over else None)


def test_a_finished_run_says_how_it_goes_on(tmp_path, capsys):
    raw = raw_config(tmp_path)
    run_dir.open_run(config_file.validate(TrainConfig, raw, "test", CHECKS))
    found = {"steps": 8, "planned_steps": 8, "seconds": 1.0, "rollouts": 64, "before": {}, "after": {}}
    (tmp_path / "run/summary.json").write_text(json.dumps(found))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert train.main(["--config", str(tmp_path / "config.json")]) is None
    printed = capsys.readouterr().out
    assert "has ended; with run.steps above 8 it goes on" in printed
    assert "8 steps, 64 rollouts" in printed


def test_the_summary_says_what_was_left_out_and_which_checkpoint_is_best(tmp_path):
    found = {"steps": 8, "seconds": 1.0, "rollouts": 64, "before": {}, "after": {}}
    found |= {"dropped_prompts": 3, "dropped_held_out": 2, "best_checkpoint": {"step": 4, "value": 0.5, "misses": 2}}
    text = summary.table(found, tmp_path)
    for part in ("3 prompts were left out", "2 held-out prompts were", f"oapl-jax export {tmp_path} --step 4"):
        assert part in text

"""Online runs end to end: placement on meshes, what is written, what stops a run."""

import json
import pathlib
import re

import numpy as np
import pytest

from oapl_jax import train
from oapl_jax.cli import commands
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.rollouts import diagnostics
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.run import export
from oapl_jax.types import RunError
from runs import BASE, ROOT, make_config, read_lines, write_config

pytestmark = pytest.mark.slow


def test_windows_batches_and_versions_are_what_the_algorithm_says(finished):
    directory, summary = finished
    rows = [row for row in read_lines(directory / "metrics.jsonl") if row["step"] > 0]
    assert [row["window/version"] for row in rows] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert [row["window/lag"] for row in rows] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert [("sync/seconds" in row) for row in rows] == [step in (4, 8) for step in range(1, 11)]
    batches = read_lines(directory / "batches.jsonl")
    trained = [group for row in batches for group in row["groups"]]
    assert len(set(trained)) == len(trained) == 10 * 4, "no group is trained twice"
    for row, batch in zip(rows, batches, strict=True):
        assert {int(group.split("-")[0]) for group in batch["groups"]} == {row["window/version"]}
    logged = {
        g.id: g
        for version in RolloutLog(directory / "rollouts").versions()
        for g in RolloutLog(directory / "rollouts").read(version)
    }
    assert set(trained) <= set(logged)
    for group in logged.values():
        assert len(group.rollouts) == 8
        assert all(np.isfinite(item.rollout.logprobs).all() for item in group.rollouts)
    assert summary == json.loads((directory / "summary.json").read_text())
    assert summary["rollouts"] == 320
    assert set(summary["before"]) == set(summary["after"]) == {"pass@1", "pass@2", "pass@4", "pass@8"}


def test_prompts_follow_the_stream_and_dropped_ones_are_asked_again(finished):
    """Consumed prompts are the stream's first 40, in order, whatever was dropped in between."""
    directory, _ = finished
    log = RolloutLog(directory / "rollouts")
    groups = {g.id: g for version in log.versions() for g in log.read(version)}
    consumed = [groups[i].prompt.id for row in read_lines(directory / "batches.jsonl") for i in row["groups"]]
    assert consumed == [f"chain/train/{i}" for i in range(40)]


def test_metrics_are_those_of_the_page(finished):
    directory, _ = finished
    page = (ROOT / "docs/metrics.md").read_text()
    documented = set(re.findall(r"^\| `([a-z]+/[a-z0-9_@]+)`", page, re.MULTILINE))
    written = {name for row in read_lines(directory / "metrics.jsonl") for name in row} - {"step"}
    assert written <= documented
    of_others = set(
        re.findall(r"^\| `([a-z]+/[a-z0-9_@]+)` \| (?:mode detached|several processes|with `)", page, re.MULTILINE)
    )
    assert {n for n in documented - of_others if not n.startswith("evaluation/")} <= written


def test_token_logprobs_are_those_of_transformers_with_the_model_before_the_step(finished, tmp_path):
    """Windows end at the steps 4, 8 and 10; a checkpoint has the model before step 10."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    directory, _ = finished
    path = directory / diagnostics.TOKEN_LOGPROBS_FILE
    batches = {row["step"]: row["groups"] for row in read_lines(directory / "batches.jsonl")}
    lines = {row["step"]: row["groups"] for row in read_lines(path)}
    assert {step: len(groups) for step, groups in lines.items()} == {4: 2, 8: 2, 10: 2}
    assert all(set(groups) <= set(batches[step]) for step, groups in lines.items())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        export.export(directory, tmp_path / "model", step=9), dtype=torch.float32
    )
    log = RolloutLog(directory / "rollouts")
    groups = {group.id: group for version in log.versions() for group in log.read(version)}
    found = diagnostics.read(path, 9)
    num_tokens = 0
    for name in lines[10]:
        prompt = groups[name].prompt.token_ids
        for item, of_tokens in zip(groups[name].rollouts, found[name].rollouts, strict=True):
            ids = item.rollout.token_ids
            with torch.no_grad():
                logits = model(torch.tensor(np.concatenate([prompt, ids])[None], dtype=torch.long)).logits[0]
            scores = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].numpy()
            np.testing.assert_allclose(of_tokens.learner, scores[np.arange(len(ids)), ids], atol=1e-4)
            np.testing.assert_allclose(of_tokens.sampler, item.rollout.logprobs, atol=1e-6)
            assert "".join(of_tokens.tokens) == item.text
            num_tokens += len(ids)
        shown = [np.subtract(one.learner, one.sampler) for one in found[name].rollouts]
        assert np.abs(np.concatenate(shown)).max() > 1e-3, "the learner has left the sampler"
    assert num_tokens > 60


def test_the_run_leaves_what_people_look_at(finished):
    directory, summary = finished
    assert read_lines(directory / "starts.jsonl") == [{"step": 0}]
    evaluations = read_lines(directory / "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [0, 5, 10]
    assert [len(line["prompts"]) for line in evaluations] == [8, 8, 8]
    for line, when in ((evaluations[0], "before"), (evaluations[-1], "after")):
        assert summary[when]["pass@1"] == pytest.approx(np.mean(np.divide(line["correct"], line["graded"])))
    assert (directory / "report.html").stat().st_size > 10_000
    assert (directory / "export" / "config.json").exists()
    assert (directory / "config.yaml").exists()


@pytest.mark.parametrize(
    "mesh",
    [
        {"trainer": "fsdp=2"},  # two replicas of the sampler; each device compiles programs of its own
        {"trainer": "fsdp=2,tensor=2", "sampler": "data=2,tensor=2"},
    ],
    ids=["colocated", "disaggregated"],
)
def test_meshes_of_several_devices_train_like_one_device(finished, tmp_path, mesh):
    """Same prompts and draws, so the first step has the same loss and gradient but for the last bits.

    Later steps drift apart: Adam divides tiny gradients by their own size. Five steps include a sync and an evaluation.
    """
    directory, _ = finished
    train.run(make_config(tmp_path / "run", mesh=mesh, run={"steps": 5}, evaluation={"every": 3}))
    one, other = (read_lines(run / "metrics.jsonl") for run in (directory, tmp_path / "run"))
    assert one[1]["rollouts/reward"] > 0, "else the loss of the first step is 0"
    for name in ("rollouts/reward", "learner/loss", "learner/grad_norm", "learner/entropy", "rollouts/response_tokens"):
        assert other[1][name] == pytest.approx(one[1][name], rel=1e-3), name
    assert [row["step"] for row in other] == list(range(6))
    assert "sync/seconds" in other[4]
    assert "evaluation/pass@1" in other[3]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    config = make_config(tmp_path / "run", learner={"learning_rate": 1e30}, checkpoint={"every": 1})
    with pytest.raises(RunError, match=r"learner/(loss|grad_norm).*step 2"):
        train.run(config)
    assert (tmp_path / "run/checkpoints/1").is_dir()


def test_the_parity_gate_stops_a_sampler_of_another_precision(tmp_path):
    config = make_config(tmp_path / "run", sampler={"dtype": "bfloat16"}, window={"parity_tolerance": 1e-6})
    with pytest.raises(RunError, match=r"differ by .* nats a token.*sampler.dtype=bfloat16"):
        train.run(config)


def test_epochs_train_on_each_window_again(tmp_path):
    train.run(make_config(tmp_path, run={"steps": 6}, window={"sync_every": 4, "epochs": 2, "min_groups": 8}))
    batches = [row["groups"] for row in read_lines(tmp_path / "batches.jsonl")]
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3])
    assert len({*batches[4], *batches[5]}) == 8, "the last window is over before its second pass"


def test_grpo_trains_in_bfloat16_in_one_window(tmp_path):
    sections = {
        **BASE,
        "run": {"dir": str(tmp_path), "steps": 5},
        "model": BASE["model"] | {"compute_dtype": "bfloat16", "remat": "layer"},
        "sampler": BASE["sampler"] | {"dtype": "bfloat16"},
        "objective": {"name": "grpo"},
        "window": BASE["window"] | {"parity_tolerance": 0.1, "sync_every": 100},
    }
    assert train.run(config_file.validate(TrainConfig, sections, source="test"))["steps"] == 5
    assert [row["policy_version"] for row in read_lines(tmp_path / "batches.jsonl")] == [0] * 5
    assert [row["window/lag"] for row in read_lines(tmp_path / "metrics.jsonl")[1:]] == list(range(5))


def test_filtered_groups_train(tmp_path):
    config = make_config(
        tmp_path / "run", run={"steps": 3}, objective={"drop_equal_reward_groups": True}, window={"sync_every": 2}
    )
    train.run(config)
    rows = read_lines(tmp_path / "run/metrics.jsonl")[1:]
    assert [row["rollouts/equal_reward_groups"] for row in rows] == [0, 0, 0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.trainer=fsdp=3,tensor=-1", "mesh.trainer"),
        ("mesh.trainer=fsdp=16", "exceed the 8 devices"),
        ("learner.micro_batch_rows=4", "does not divide over the 8 row shards"),
        ("model.path=no/such/folder", "no/such/folder"),
        ("data.max_prompt_tokens=5", "12 tokens"),
        ("sampler.group_size=1", "sampler.group_size"),
    ],
)
def test_mistakes_end_with_a_message_and_exit_code_2(tmp_path, capsys, override, message):
    path = write_config(tmp_path / "config.yaml", make_config(tmp_path / "run", mesh={"trainer": "fsdp=8"}, learner={}))
    assert commands.main(["train", "--config", str(path), override, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, capsys):
    path = write_config(tmp_path / "config.yaml", make_config(tmp_path / "run"))
    assert commands.main(["train", "--config", str(path), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "198,112 parameters" in output or "198,032 parameters" in output
    assert "3 windows of 4" in output
    assert "at most 576 tokens a step" in output
    assert not pathlib.Path(tmp_path / "run").exists()

"""A run on two data sets with rewards of their own, and two held-out sets."""

import json

import pytest

from oapl_jax import train
from oapl_jax.data.prompts import load_prompts
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.rollouts.log import RolloutLog
from runs import make_config, read_lines

pytestmark = pytest.mark.slow


def test_each_data_set_has_its_reward_and_its_metrics(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": 2 * i}) + "\n" for i in range(40)))
    sums = {"path": str(path), "reward": {"functions": {"math": 1.0}, "workers": 1, "length_penalty": 100.0}}
    config = make_config(
        tmp_path / "run",
        run={"steps": 2},
        data={"task": None, "sets": {"chain": {"task": "chain", "weight": 3}, "sums": sums}},
        evaluation={"every": 1, "prompts": 2, "samples": 2, "final_samples": 2}
        | {"sets": {"chain": {"task": "chain"}, "sums": {"path": str(path)}}},
    )
    plan = next(train.describe(config))
    assert "prompts chain  chain task; weight 3, 75.0% of the groups" in plan
    assert "prompts sums  40 (0 overlong or without an answer dropped); weight 1, 25.0% of the groups" in plan
    assert "held out  chain 2, sums 2" in plan
    summary = train.run(config)
    assert {"pass@1", "chain/pass@1", "sums/pass@1"} <= set(summary["after"])
    log = RolloutLog(tmp_path / "run" / "rollouts")
    groups = {group.id: group for version in log.versions() for group in log.read(version)}
    consumed = [groups[i] for row in read_lines(tmp_path / "run" / "batches.jsonl") for i in row["groups"]]
    source = load_prompts(config.data, CharacterTokenizer(), config.run.seed)
    assert [group.prompt.id for group in consumed] == [source[i].id for i in range(8)]
    for group in consumed:
        for item in group.rollouts:  # a finished response to a sum pays for its length, 0.1 a character
            penalty = 0.1 * len(item.text) if group.prompt.id.startswith("sums/") else 0.0
            assert item.grade.reward == pytest.approx((item.grade.verdict == "correct") - penalty)
    for row in read_lines(tmp_path / "run" / "metrics.jsonl")[1:]:
        assert (row["rollouts/chain/groups"], row["rollouts/sums/groups"]) == (3, 1)
        both = (3 * row["rollouts/chain/reward"] + row["rollouts/sums/reward"]) / 4
        assert both == pytest.approx(row["rollouts/reward"])
    assert "evaluation/sums/pass@1" in read_lines(tmp_path / "run" / "metrics.jsonl")[0]

"""A source of groups of one's own trains a model, without a change to the loop."""

import re

import numpy as np
import pytest

from oapl_jax import train
from oapl_jax.rollouts.audit import audit
from oapl_jax.rollouts.buffer import Ticket
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.source import Taken, WindowPlan
from oapl_jax.types import FinishReason, Rollout
from runs import make_config, read_lines

pytestmark = pytest.mark.slow


class Dictated:
    """Responses that a teacher writes: every first rollout of a group is right, the others say 0."""

    def __init__(self, setup):
        self.setup, self.log = setup, RolloutLog(setup.root / "rollouts")

    def open_window(self, window, weights, taken):
        self.window, self.index = window, sum(map(len, taken))
        return WindowPlan(num_steps=4)

    def take(self, num_groups, is_cancelled, recorded=None):
        start, self.index = self.index, self.index + num_groups
        groups = [self.group(index) for index in recorded or range(start, self.index)]
        self.log.append(groups)
        return Taken(groups, cursor=self.index)

    def group(self, index):
        prompt = self.setup.prompts[self.window.position(index)]
        texts = [chain_answer(prompt.text), *["0000"] * (self.setup.config.sampler.group_size - 1)]
        rollouts = [self.rollout(text) for text in texts]
        ticket = Ticket(self.window.policy_version, index, index)
        return self.setup.grading.groups([(ticket, prompt, rollouts)])[0]

    def rollout(self, text):
        tokens = np.array([*self.setup.tokenizer.encode(text), self.setup.tokenizer.eos_id], np.int32)
        return Rollout(tokens, np.full(len(tokens), -2.3, np.float32), FinishReason.STOP)

    def report(self):
        return {"window/dropped_groups": 0}

    def finish(self): ...

    def close(self): ...


def chain_answer(question):
    """The running values of left-to-right arithmetic modulo 10."""
    value, answer = int(question[0]), ""
    for operator, digit in re.findall(r"([-+*])(\d)", question):
        value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[operator] % 10
        answer += str(value)
    return answer


def test_a_source_of_thirty_lines_trains_a_model_without_evaluation(tmp_path):
    config = make_config(tmp_path / "run", evaluation={"prompts": 0, "every": 1})
    summary = train.run(config, make_source=Dictated)
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [row["window/version"] for row in rows] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert summary["steps"] == 10
    assert all(row["rollouts/pass_rate"] >= 1 / 8 for row in rows)
    assert rows[-1]["learner/residual"] < rows[0]["learner/residual"]
    assert "10 steps, 3 windows" in audit(tmp_path / "run")
    assert (summary["before"], summary["after"]) == ({}, {})
    assert not [name for line in read_lines(tmp_path / "run/metrics.jsonl") for name in line if "evaluation" in name]
    assert (tmp_path / "run/report.html").exists()
    assert (tmp_path / "run/export/README.md").exists()

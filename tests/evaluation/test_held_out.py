"""Counts of held-out samples to metrics, of all problems and of each data set."""

import numpy as np
import pytest

from oapl_jax.evaluation.held_out import Counts, by_set, summarize
from oapl_jax.types import Prompt


def prompts(*names):
    return [Prompt(name, np.zeros(1, np.int32), "?", "") for name in names]


def test_metrics_of_each_held_out_set():
    problems = prompts("evaluation.easy/0", "evaluation.easy/1", "evaluation.hard/0")
    counts = Counts(*map(np.array, ([2, 2, 2], [2, 2, 1], [2, 1, 0], [4, 4, 16])))
    assert summarize(counts, problems) == pytest.approx(
        {
            "evaluation/pass@1": 1.5 / 3,
            "evaluation/response_tokens": 4.0,
            "evaluation/easy/pass@1": 0.75,
            "evaluation/easy/pass@2": 1.0,
            "evaluation/easy/response_tokens": 2.0,
            "evaluation/hard/pass@1": 0.0,
            "evaluation/hard/response_tokens": 8.0,
        }
    )
    assert by_set(problems) == {"easy": [0, 1], "hard": [2]}


def test_a_lone_held_out_set_has_no_name():
    counts = Counts(*map(np.array, ([1], [1], [1], [4])))
    assert set(summarize(counts, prompts("gsm8k/test/0"))) == {"evaluation/pass@1", "evaluation/response_tokens"}

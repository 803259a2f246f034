"""Ends of responses: which tokens belong to one, what text is graded, what a truncated one counts."""

import math

import numpy as np
import pytest

import groups
from oapl_jax.config import config_file
from oapl_jax.config.evaluation import EvaluationConfig
from oapl_jax.config.sampling import SamplerConfig
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.rollouts.buffer import Ticket
from oapl_jax.rollouts.grading import Advantages, Grading
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.stops import MARGIN, Stops, stop_length
from oapl_jax.types import FinishReason, Grade, Rollout, Verdict


def decode(ids):
    """Bytes, where ids from 300 on are special tokens, which no text shows, and 400 is two newlines."""
    pieces = (b"\n\n" if i == 400 else bytes([i]) if i < 256 else b"" for i in ids)
    return b"".join(pieces).decode(errors="replace")


def ids(text):
    return list(text.encode())


@pytest.mark.parametrize(
    ("response", "strings", "expected"),
    [
        (ids("64\n65"), ("\n",), 3),
        (ids("64\n"), ("\n",), 3),
        (ids("64"), ("\n",), None),
        ([], ("\n",), None),
        ([54, 52, 400, 65], ("\n",), 3),  # the token that completes it may say more
        (ids("a stop word"), ("word", "stop"), 6),
        (ids("a STOP word"), ("stop",), None),
        ([54, 300, 10], ("6\n",), 3),  # a special token within it
        (ids("prix 3 € net"), ("€",), 10),  # a character of three tokens is whole with the last
        (ids("ééé"), ("é",), 2),
    ],
)
def test_a_response_ends_with_the_token_that_completes_a_stop_string(response, strings, expected):
    for step in range(1, len(response) + 1):  # however many tokens come at once
        found, num_before = None, 0
        while found is None and num_before < len(response):
            count = min(num_before + step, len(response))
            found, num_before = stop_length(response[:count], num_before, strings, decode), count
        assert found == expected


def test_only_the_end_of_a_long_response_is_decoded_again():
    seen = []
    stop_length(ids("x" * 5000), 4990, ("stop",), lambda part: seen.append(len(part)) or "")
    assert seen == [10 + MARGIN + 4]


@pytest.mark.parametrize(
    ("distribution", "problem"),
    [
        (SamplingDistribution(stop_token_ids=(18,)), "stop_token_ids: 18 is no id of the tokenizer, which has 0 to 17"),
        (SamplingDistribution(stop_strings=("\n",)), r"stop_strings: '\\n' can never be found"),
    ],
)
def test_a_stop_that_the_tokenizer_cannot_produce_is_refused(distribution, problem):
    with pytest.raises(ValueError, match=problem):
        Stops(CharacterTokenizer(), distribution)


def test_the_text_ends_before_the_first_stop():
    characters = CharacterTokenizer()
    stops = Stops(characters, SamplingDistribution(stop_strings=("=", ":,"), stop_token_ids=(17,)))
    assert stops.ids == (1, 17)
    for text, expected in (("64=", "64"), ("64$", "64"), ("6:4,", "6:4"), ("6:,4=", "6"), ("64", "64"), (",", "")):
        assert stops.text(characters.encode(text)) == expected


@pytest.mark.parametrize(
    ("value", "problem"),
    [("['']", "stop_strings"), (r"['\n']", "double quotes"), ('"\\n"', "stop_strings"), ("[[1]]", "stop_strings")],
)
def test_a_stop_string_that_cannot_be_meant_is_refused(tmp_path, value, problem):
    path = tmp_path / "config.yaml"
    path.write_text(f"max_response_tokens: 8\nstop_strings: {value}\n")
    with pytest.raises(ValueError, match=problem):
        config_file.load(SamplerConfig, path)


def test_the_order_of_stops_means_nothing():
    one, other = (
        SamplerConfig(max_response_tokens=8, stop_strings=strings, stop_token_ids=ids)
        for strings, ids in ((("Q:", "\n"), (9, 10)), (("\n", "Q:"), (10, 9)))
    )
    assert SamplingDistribution.of(one) == SamplingDistribution.of(other)
    drawn = SamplingDistribution.of(one, EvaluationConfig(temperature=0.5))
    assert (drawn.temperature, drawn.stop_strings, drawn.stop_token_ids) == (0.5, ("\n", "Q:"), (9, 10))


def test_stop_strings_survive_the_saved_config(tmp_path):
    path, strings = tmp_path / "config.yaml", ("\n", " \n\n", "\t", "Q:", "\u2028", "</s>")
    path.write_text(config_file.to_yaml(SamplerConfig(max_response_tokens=8, stop_strings=strings)))
    assert config_file.load(SamplerConfig, path).stop_strings == strings


class LengthGrader:
    """Says what it was asked: two characters are right."""

    def __init__(self):
        self.reasons = []

    def check_golds(self, prompts): ...

    def close(self): ...

    def grade(self, items):
        self.reasons += [reason for _, _, reason in items]
        wrong = Grade(Verdict.WRONG, 0.0)
        return [
            Grade(Verdict.CORRECT, 1.0) if len(text) == 2 and reason is FinishReason.STOP else wrong
            for _, text, reason in items
        ]


@pytest.mark.parametrize(
    ("truncated", "verdicts", "usable"),
    [
        ("wrong", ["correct", "wrong", "wrong"], [True, True, True]),
        ("graded", ["correct", "correct", "wrong"], [True, True, True]),
        ("left_out", ["correct", "wrong", "wrong"], [True, False, True]),
    ],
)
def test_what_a_truncated_response_counts_is_an_option(truncated, verdicts, usable):
    lengths, reasons = (2, 2, 3), (FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP)
    rollouts = [
        Rollout(np.arange(2, 2 + n, dtype=np.int32), np.full(n, -1, np.float32), reason)
        for n, reason in zip(lengths, reasons, strict=True)
    ]
    advantages = Advantages(lambda r, _: r - r.mean(), np.mean, truncated)
    grading = Grading(lambda found: "x" * len(found), LengthGrader(), advantages)
    (group,) = grading.groups([(Ticket(0, 0, 0), groups.prompt(0), rollouts)])
    assert [item.grade.verdict for item in group.rollouts] == verdicts
    assert [item.is_usable for item in group.rollouts] == usable
    rewards = [item.grade.reward for item in group.usable]
    assert group.value == pytest.approx(sum(rewards) / len(rewards))
    assert all(math.isnan(item.advantage) != item.is_usable for item in group.rollouts)
    assert [item.rollout.finish_reason for item in group.rollouts] == list(reasons)

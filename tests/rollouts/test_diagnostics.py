import json

import numpy as np
import pytest

from oapl_jax.io.json_lines import LineFile
from oapl_jax.rollouts import diagnostics
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict


def decode(ids):
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode(errors="replace")


def make_group(*advantages, num_tokens=3):
    rollout = Rollout(np.arange(65, 65 + num_tokens, dtype=np.int32), np.full(num_tokens, -0.5), FinishReason.STOP)
    graded = tuple(GradedRollout(rollout, "", Grade(Verdict.WRONG, 0.0), advantage=a) for a in advantages)
    return RolloutGroup(7, 2, Prompt("a/0", np.arange(2, dtype=np.int32), "?", ""), graded, 0.5)


@pytest.mark.parametrize(
    ("text", "texts"),
    [("ab", ["a", "b"]), ("aé", ["a", "", "é"]), ("€b", ["", "", "€", "b"]), ("😀", ["", "", "", "😀"])],
)
def test_the_last_token_of_a_character_has_it(text, texts):
    assert diagnostics.token_texts(list(text.encode()), decode) == texts


def test_bytes_that_are_no_text_are_replaced():
    four = ["", "", "", "\ufffd" * 4]
    assert diagnostics.token_texts([0xFF] * 9, decode) == [*four, *four, "\ufffd"]


def test_what_is_written_is_read_without_rollouts_that_are_not_usable(tmp_path):
    group = make_group(0.5, np.nan, -0.5)
    learned = [np.array([-1, -2, -3.25], np.float32), np.array([-4, -5, -6], np.float32)]
    file = tmp_path / "file.jsonl"
    LineFile(file).append(diagnostics.line(4, [group], [learned], [0], decode))
    first = diagnostics.TokenLogprobs(["A", "B", "C"], [-1.0, -2.0, -3.25], [-0.5, -0.5, -0.5])
    last = diagnostics.TokenLogprobs(["A", "B", "C"], [-4.0, -5.0, -6.0], [-0.5, -0.5, -0.5])
    assert diagnostics.read(file, 1) == {"000002-00000007": diagnostics.GroupLogprobs(4, [first, None, last])}


def test_the_beginning_of_a_long_response_is_written(monkeypatch):
    monkeypatch.setattr(diagnostics, "MOST_TOKENS", 2)
    (written,) = diagnostics.line(1, [make_group(0.5, num_tokens=5)], [[np.zeros(5)]], [0], decode)["groups"].values()
    assert written == [{"tokens": ["A", "B"], "learner": [0.0, 0.0], "sampler": [-0.5, -0.5]}]


def test_later_windows_are_recorded_ever_less_often():
    recorded = [version for version in range(1000) if diagnostics.is_recorded(version)]
    assert recorded[:64] == list(range(64))
    assert recorded[64:96] == list(range(64, 128, 2))
    assert recorded[96:128] == list(range(128, 256, 4))
    assert sum(map(diagnostics.is_recorded, range(100_000))) < 450


def test_a_tracker_gets_the_distributions_of_the_usable_rollouts():
    group = make_group(0.5, np.nan, -0.5)
    learned = [np.array([-1, -2, -3.25], np.float32), np.array([-4, -5, -6], np.float32)]
    shown = diagnostics.distributions([group], [learned], [0])
    assert {name: values.tolist() for name, values in shown.histograms.items()} == {
        "rollouts/reward": [0.0, 0.0],
        "rollouts/response_tokens": [3, 3],
        "learner/token_log_ratio": [-0.5, -1.5, -2.75, -3.5, -4.5, -5.5],
        "learner/log_ratio": [-4.75, -13.5],
    }
    assert shown.samples == [("?", "", "wrong", 0.0)] * 2


def test_of_many_windows_some_at_equal_distances_and_the_newest_are_read(tmp_path):
    file = LineFile(tmp_path / "file.jsonl")
    for step in range(1, 104):
        file.append({"step": step, "groups": {f"group {step}": []}})
    steps = [found.step for found in diagnostics.read(tmp_path / "file.jsonl", 8).values()]
    assert steps == [1, 17, 33, 49, 65, 81, 97, 103]


@pytest.mark.parametrize(
    "groups",
    [
        None,
        [],
        {"a": 3},
        {"a": [{"tokens": ["x"], "learner": [0.0]}]},
        {"a": [{"tokens": ["x"], "learner": [0.0, 1.0], "sampler": [0.0]}]},
        {"a": [{"tokens": ["x"], "learner": ["high"], "sampler": [0.0]}]},
        {"a": [{"tokens": ["x"], "learner": ["inf"], "sampler": [0.0]}]},
    ],
)
def test_a_damaged_line_is_named(tmp_path, groups):
    (tmp_path / "file.jsonl").write_text(json.dumps({"step": 5, "groups": groups}) + "\n")
    with pytest.raises(ValueError, match=r"file\.jsonl: step 5: is damaged"):
        diagnostics.read(tmp_path / "file.jsonl", 1)

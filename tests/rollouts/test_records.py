"""Records of rollouts that others collected: what comes in, and why the others do not."""

import datetime
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import groups
from oapl_jax.rollouts import import_rollouts
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.types import FinishReason, Verdict

EXPECTATIONS = import_rollouts.Expectations(
    vocab_size=40,
    reward_range=(-1.0, 1.0),
    encode_prompt=lambda question, system: [2],
    encode_response=lambda text: [2],
    eos_id=1,
    source_limit=None,
    group_size=4,
    distribution=SamplingDistribution(),
    text=lambda ids: f"text of {[range(40)[i] for i in ids]}",
    needs_logprobs=True,
    most_tokens=(5, 5),
)


def record(*tokens, of=(5, 6), **changes):
    """A rollout, graded by hand."""
    ids = list(tokens) or [7, 1]
    plain = {"prompt_token_ids": list(of), "token_ids": ids, "logprobs": [-0.5] * len(ids), "finish_reason": "stop"}
    return {**plain, "reward": 1.0, **changes}


def read(path, records, action="error"):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records)
    path.write_text(lines, encoding="utf-8", errors="backslashreplace")
    bad = import_rollouts.BadRows(action)
    return import_rollouts.read(path, EXPECTATIONS, bad), bad


def test_records_of_one_prompt_are_a_group(tmp_path):
    rows = [
        record(7, 1, answer=12, prompt="what?"),
        record(8, 1, of=(9,), reward=0.25),
        record(7, 8, 1, answer=12, prompt="what?", reward=-1, finish_reason="length", extra={"model": "m"}),
        record(9, 1, of=(9,), verdict="wrong", reward=None, response="ni\u2028ne"),
    ]
    found, bad = read(tmp_path / "a.jsonl", rows)
    assert not bad.counts
    first, second = found
    assert (first.prompt.text, first.prompt.answer, first.prompt.token_ids.tolist()) == ("what?", "12", [5, 6])
    assert [item.rollout.token_ids.tolist() for item in first.members] == [[7, 1], [7, 8, 1]]
    assert [item.rollout.finish_reason for item in first.members] == [FinishReason.STOP, FinishReason.LENGTH]
    assert [item.grade.reward for item in first.members + second.members] == [1.0, -1.0, 0.25, 0.0]
    verdicts = [item.grade.verdict for item in first.members + second.members]
    assert verdicts == [Verdict.CORRECT, Verdict.WRONG, Verdict.WRONG, Verdict.WRONG]
    assert first.members[1].extra == '{"model": "m"}'
    assert [item.text for item in second.members] == ["text of [8, 1]", "ni\u2028ne"]
    assert first.members[0].rollout.logprobs.dtype == np.float32


def test_a_bad_record_is_named_once(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match="1 log-probabilities for 2 tokens") as caught:
        read(path, [record(logprobs=[-0.5])])
    message = "1 log-probabilities for 2 tokens; mend it, or set offline.bad_rows=drop"
    assert str(caught.value) == f"{path} line 1: {message}"


def test_group_ids_keep_apart_what_was_asked_twice(tmp_path):
    rows = [record(group_id=name, reward=i % 2) for name in "ab" for i in range(2)]
    found, _ = read(tmp_path / "a.jsonl", rows)
    assert [(responses.prompt.id, len(responses.members)) for responses in found] == [
        ("imported/a", 2),
        ("imported/b", 2),
    ]


def test_parquet_records_are_the_same(tmp_path):
    rows = [record(7, 1, reward=0.5), record(8, 9, 1, reward=None)]
    from_lines, _ = read(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    from_table = import_rollouts.read(tmp_path / "b.parquet", EXPECTATIONS, import_rollouts.BadRows("error"))
    for one, other in zip(from_lines[0].members, from_table[0].members, strict=True):
        assert one.rollout.token_ids.tolist() == other.rollout.token_ids.tolist()
        assert one.rollout.logprobs.tolist() == other.rollout.logprobs.tolist()
        assert (one.text, one.extra) == (other.text, other.extra)
    assert [item.grade.reward for item in from_table[0].members[:1]] == [0.5]
    assert from_table[0].members[1].grade is import_rollouts.UNGRADED


COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "model": "m",
    "choices": [
        {
            "index": i,
            "text": f" {i}",
            "token_ids": [7 + i, 1],
            "prompt_token_ids": [5, 6],
            "logprobs": {"token_logprobs": [-0.25, -0.5], "tokens": ["a", "b"], "top_logprobs": None},
            "finish_reason": reason,
        }
        for i, reason in enumerate(["stop", "length"])
    ],
}
CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "prompt_token_ids": [5, 6],
    "choices": [
        {
            "index": i,
            "message": {"role": "assistant", "content": f" {i}"},
            "token_ids": [7 + i, 1],
            "logprobs": {"content": [{"token": "a", "logprob": -0.25}, {"token": "b", "logprob": -0.5}]},
            "finish_reason": reason,
        }
        for i, reason in enumerate(["stop", "length"])
    ],
}


@pytest.mark.parametrize("response", [COMPLETION, CHAT], ids=["completions", "chat"])
def test_a_response_of_vllm_is_a_group(tmp_path, response):
    found, _ = read(tmp_path / "a.jsonl", [response | {"rewards": [1.0, None], "answer": "7", "prompt": "what?"}])
    ((responses,),) = [found]
    assert (responses.prompt.token_ids.tolist(), responses.prompt.answer, responses.prompt.text) == (
        [5, 6],
        "7",
        "what?",
    )
    assert [item.rollout.token_ids.tolist() for item in responses.members] == [[7, 1], [8, 1]]
    assert [item.rollout.logprobs.tolist() for item in responses.members] == [[-0.25, -0.5]] * 2
    assert [item.rollout.finish_reason for item in responses.members] == [FinishReason.STOP, FinishReason.LENGTH]
    assert [item.text for item in responses.members] == [" 0", " 1"]
    assert responses.members[0].grade.reward == 1.0
    assert responses.members[1].grade is import_rollouts.UNGRADED


def test_what_has_no_grade_is_graded(tmp_path):
    """By the run's graders; an invalid verdict costs that rollout."""
    rows = [record(7, 1, prompt="1+2-3*4+5-6=", reward=None), record(8, 1, prompt="1+2-3*4+5-6=", reward=0.5)]
    found, bad = read(tmp_path / "a.jsonl", [*rows, record(9, 1, verdict="invalid", reward=None)])
    ((graded,),) = [import_rollouts.graded(found, groups.GRADING, bad)]
    assert [item.grade.reward for item in graded.members] == [0.0, 0.5]
    assert graded.members[0].grade.verdict is Verdict.WRONG
    assert bad.counts == {"no verdict": 1}


def test_a_prompt_that_cannot_be_graded_costs_its_rollouts_without_a_grade(tmp_path):
    rows = [record(7, 1, reward=None), record(8, 1, reward=0.5)]  # no question of the task
    found, bad = read(tmp_path / "a.jsonl", rows, "drop")
    ((graded,),) = [import_rollouts.graded(found, groups.GRADING, bad)]
    assert [item.grade.reward for item in graded.members] == [0.5]
    assert bad.counts == {"no grader": 1}
    found, bad = read(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"imported/.*'' is no question of the task; mend it"):
        import_rollouts.graded(found, groups.GRADING, bad)


def test_a_reward_beside_the_choices_of_vllm_is_that_of_each(tmp_path):
    found, _ = read(tmp_path / "a.jsonl", [COMPLETION | {"reward": 0.5}])
    assert [item.grade.reward for item in found[0].members] == [0.5, 0.5]


def test_what_parquet_has_and_json_has_not_is_text(tmp_path):
    when = datetime.date(2026, 11, 29)
    pq.write_table(pa.Table.from_pylist([record(answer=when, extra={"when": when})]), tmp_path / "a.parquet")
    (found,) = import_rollouts.read(tmp_path / "a.parquet", EXPECTATIONS, import_rollouts.BadRows("error"))
    assert found.prompt.answer == '"2026-11-29"'
    assert found.members[0].extra == '{"when": "2026-11-29"}'


def test_a_conversation_is_a_prompt(tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    row = record()
    found, _ = read(tmp_path / "a.jsonl", [row | {"prompt": turns}])
    assert found[0].prompt.text == "user: a\n\nassistant: b\n\nuser: c"
    _, bad = read(tmp_path / "a.jsonl", [row | {"prompt": turns[:2]}], "drop")
    assert "ends with a message of the assistant" in bad.examples["unknown prompt"]


BAD = {
    "strings only": ({"prompt": "what?", "response": "that"}, "text without token ids", "collect both"),
    "strings of vLLM": (
        {"choices": [{"text": "that", "finish_reason": "stop", "logprobs": None}]},
        "text without token ids",
        "return_token_ids",
    ),
    "no log-probabilities": (record(logprobs=None), "missing value", "has no logprobs"),
    "no prompt": (record(prompt_token_ids=None), "missing value", "has no prompt_token_ids"),
    "too few log-probabilities": (record(7, 8, 1, logprobs=[-1.0]), "bad log-probabilities", "1 .* for 3 tokens"),
    "a log-probability is NaN": (record(logprobs=[math.nan, -1]), "bad log-probabilities", "not finite"),
    "vLLM had none": (
        {**CHAT, "choices": [{**CHAT["choices"][0], "logprobs": {"content": [{"logprob": -9999.0}, {"logprob": -1}]}}]},
        "wrong type",
        "logprobs is",
    ),
    "text for a token": (record(token_ids=[7, "1"]), "wrong type", "token_ids is"),
    "a fraction of a token": (record(token_ids=[7, 1.5]), "unknown token", "token_ids is"),
    "a huge token": (record(token_ids=[7, 2**70]), "unknown token", "token_ids is"),
    "beyond the vocabulary": (record(token_ids=[7, 40]), "unknown token", "has 40"),
    "below the vocabulary": (record(token_ids=[-50, 1]), "unknown token", "has -50"),
    "another temperature": (record(temperature=0.6), "another distribution", "sampler.temperature is 1"),
    "another top-p": (record(top_p=0.9), "another distribution", "sampler.top_p is 1"),
    "too long": (record(7, 7, 7, 7, 7, 1), "too long", "2 prompt and 6 response tokens; the run has at most 5 and 5"),
    "unknown end": (record(finish_reason="abort"), "unknown word", "finish_reason is 'abort'"),
    "reward is out of range": (record(reward=3), "reward out of range", "3"),
    "reward is text": (record(reward="good"), "wrong type", "reward is 'good', not a number"),
    "rewards of another number": (COMPLETION | {"rewards": [1.0]}, "wrong type", "each of the 2 choices"),
    "no number of a float": (record(logprobs=[-(10**400), -1]), "wrong type", "logprobs is"),
    "half of a surrogate pair": (record(response="\ud800"), "wrong type", "response is .* surrogate"),
    "a message that is text": (
        {**CHAT, "choices": [{**CHAT["choices"][0], "message": "that", "logprobs": None}]},
        "missing value",
        "has no logprobs",
    ),
    "no object": ([1, 2], "no record", "is a JSON list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_refused_with_its_reason_and_costs_no_other(tmp_path, name):
    row, reason, message = BAD[name]
    good = [record(reward=0.0), record(8, 1)]
    with pytest.raises(ValueError, match=rf"a\.jsonl line 2.*: .*{message}.*offline\.bad_rows=drop"):
        read(tmp_path / "a.jsonl", [good[0], row, good[1]])
    found, bad = read(tmp_path / "a.jsonl", [good[0], row, good[1]], "drop")
    assert bad.counts == {reason: 1}
    assert [len(responses.members) for responses in found] == [2]


def test_a_torn_line_and_a_file_that_is_no_text_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record()) + "\n" + json.dumps(record())[:20])
    bad = import_rollouts.BadRows("drop")
    assert len(import_rollouts.read(path, EXPECTATIONS, bad)[0].members) == 1
    assert "line 2: is not JSON" in bad.examples["no record"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.jsonl: byte 0 is not UTF-8"):
        import_rollouts.read(path, EXPECTATIONS, import_rollouts.BadRows("error"))

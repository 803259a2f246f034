"""Rollouts that others collected, as records: JSONL or Parquet with token ids and log-probabilities (docs/offline.md).

A record is one rollout, or a response of vLLM to a request with ``return_token_ids`` and ``logprobs``, which has one for
each choice. It becomes cells of the rollout log, by their names.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from oapl_jax.data import messages
from oapl_jax.rollouts.checks import BadRowError
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.types import Verdict
from oapl_jax.untrusted import reading

SUFFIXES = (".jsonl", ".jsonl.gz")
CORRECT_REWARD = 1.0
"""Least reward of a correct response, where the data have no verdicts."""
NO_LOGPROB = -9999.0
"""What vLLM writes where it has none."""

TEXTS = ("group_id", "prompt_id", "response", "finish_reason", "verdict", "verdict_detail")
LISTS = ("prompt_token_ids", "token_ids", "logprobs")
DRAWN_WITH = ("temperature", "top_k", "top_p", "min_p")
MOST_ID, MOST_NUMBER = 2**31, 2**1000
"""Of a token, and of any number: JSON has larger ones than a float."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: JSON can have it, UTF-8 and so the log cannot."""
KEYS = {*TEXTS, *LISTS, *DRAWN_WITH, "prompt", "answer", "reward", "extra"}


def read_lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:
    """The objects of a JSONL file with where they stand; for a line that has none, the error.

    Raises:
        ValueError: the file cannot be read.
    """
    return _objects(path, reading.read_text(path).split("\n"))  # strings may have U+2028


def _objects(path: pathlib.Path, lines: list[str]) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                yield where, reading.parse_object(line, where)
            except ValueError as error:
                yield where, BadRowError("no record", str(error).removeprefix(f"{where}: "))


def rollouts(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The record of each rollout of a record.

    Raises:
        BadRowError: a response of vLLM is not what it should be.
    """
    if "choices" not in record:
        yield record
        return
    choices, rewards = record["choices"], record.get("rewards")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadRowError("wrong type", "choices is no list of objects")
    if rewards is not None and (not isinstance(rewards, list) or len(rewards) != len(choices)):
        raise BadRowError("wrong type", f"rewards is no list with one number for each of the {len(choices)} choices")
    beside = {name: value for name, value in record.items() if name in KEYS}
    for choice, reward in zip(choices, rewards or [record.get("reward")] * len(choices), strict=True):
        message = choice.get("message")
        found = beside | {
            "token_ids": choice.get("token_ids"),
            "logprobs": _vllm_logprobs(choice.get("logprobs")),
            "finish_reason": choice.get("finish_reason"),
            "response": choice.get("text", message.get("content") if isinstance(message, dict) else None),
            "reward": reward,
        }
        if choice.get("prompt_token_ids") is not None:
            found["prompt_token_ids"] = choice["prompt_token_ids"]
        yield found


def _vllm_logprobs(given: Any) -> list[Any] | None:
    """Of a choice of the completions API, or of the chat API."""
    given = given if isinstance(given, dict) else {}
    content = given.get("content")
    if isinstance(content, list):
        found = [entry.get("logprob") if isinstance(entry, dict) else None for entry in content]
    else:
        found = given.get("token_logprobs")
    return [None if number == NO_LOGPROB else number for number in found] if isinstance(found, list) else found


def cells(record: dict[str, Any], distribution: SamplingDistribution | None) -> dict[str, Any]:
    """The log's cells of a rollout's record; ``response`` is None where the record has none.

    Raises:
        BadRowError: it cannot be used.
    """
    record = {name: value for name, value in record.items() if value is not None}
    if "token_ids" not in record and ("response" in record or "prompt" in record):
        raise BadRowError(
            "text without token ids",
            "has a text and no token_ids: encoded again it may have other tokens than those that were drawn, and their"
            " log-probabilities would be of others; collect both (vLLM: return_token_ids=true, logprobs=0)",
        )
    for name in (*LISTS, "finish_reason"):
        if name not in record:
            raise BadRowError("missing value", f"has no {name}")
    _check_types(record)
    for name in DRAWN_WITH:
        if distribution is not None and record.get(name, wanted := getattr(distribution, name)) != wanted:
            problem = f"was drawn at {name} {record[name]!r:.40}, and sampler.{name} is {wanted:g}"
            raise BadRowError("another distribution", f"{problem}; set it to that of the data")
    prompt, reward, verdict = record.get("prompt", ""), record.get("reward"), record.get("verdict")
    if not isinstance(prompt, str):
        try:
            prompt = messages.text_of(messages.question_cell(prompt, "prompt", "of the record"))
        except ValueError as error:
            raise BadRowError("unknown prompt", str(error)) from None
    if reward is None and verdict in (Verdict.CORRECT, Verdict.WRONG):
        reward = CORRECT_REWARD if verdict == Verdict.CORRECT else 0.0
    elif verdict is None:
        verdict = Verdict.CORRECT if reward is not None and reward >= CORRECT_REWARD else Verdict.WRONG
    key = hashlib.sha256(json.dumps(record["prompt_token_ids"]).encode()).hexdigest()[:16]
    name = record.get("group_id", key)
    found = {
        "group_id": name,
        "prompt_id": record.get("prompt_id", f"imported/{name}"),
        "prompt": prompt,
        "prompt_token_ids": record["prompt_token_ids"],
        "answer": _text(record.get("answer", "")),
        "rollout_index": -1,
        "response": record.get("response"),
        "token_ids": record["token_ids"],
        "logprobs": record["logprobs"],
        "finish_reason": record["finish_reason"],
        "verdict": verdict,
        "verdict_detail": record.get("verdict_detail", ""),
        "reward": reward,
        "extra": _text(record.get("extra", {})),
        "is_graded": reward is not None or verdict == Verdict.INVALID,
    }
    for name, value in found.items():
        if isinstance(value, str) and SURROGATE.search(value):
            raise BadRowError("wrong type", f"{name} is {value!r:.40}, which has half of a surrogate pair")
    return found


def _check_types(record: dict[str, Any]) -> None:
    for name in TEXTS:
        if not isinstance(record.get(name, ""), str):
            raise BadRowError("wrong type", f"{name} is {record[name]!r:.40}, not text")
    for name in LISTS:
        numbers = record[name]
        if not isinstance(numbers, list) or not all(map(_is_number, numbers)):
            raise BadRowError("wrong type", f"{name} is {numbers!r:.40}, not a list of numbers")
        if name != "logprobs" and not all(isinstance(number, int) and abs(number) < MOST_ID for number in numbers):
            raise BadRowError("unknown token", f"{name} is {numbers!r:.40}, not a list of token ids")
    for name in ("reward", *DRAWN_WITH):
        if not _is_number(record.get(name, 0)):
            raise BadRowError("wrong type", f"{name} is {record[name]!r:.40}, not a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < MOST_NUMBER)


def _text(value: Any) -> str:
    """A text as it is, another JSON value as JSON; what Parquet has besides as text."""
    return value if isinstance(value, str) else json.dumps(value, default=str)

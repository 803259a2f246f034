"""Finished rollouts from outside, in either layout: read, checked row by row, and put into groups.

A row that cannot be used is an error that names it, or is counted by reason and left out while the other
rows of its group stay: a mistake in one row says nothing about the next. A file that cannot be read at all
counts as one mistake.
"""

import collections
import dataclasses
import enum
import io
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oapl_jax.rollouts import published, schema
from oapl_jax.types import FinishReason, Grade, Prompt, Rollout, Verdict

CORRECT_REWARD = 1.0
"""Least reward of a correct response, where the data have no verdicts."""

Kind = Callable[[pa.DataType], bool]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _is_list_of(inner: Kind) -> Kind:
    def is_it(kind: pa.DataType) -> bool:
        return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and inner(kind.value_type)

    return is_it


def _is_struct_with(name: str, inner: Kind) -> Kind:
    def is_it(kind: pa.DataType) -> bool:
        return pa.types.is_struct(kind) and kind.get_field_index(name) >= 0 and inner(kind.field(name).type)

    return is_it


_IDS, _NUMBERS, _INTEGER = _is_list_of(pa.types.is_integer), _is_list_of(_is_number), pa.types.is_integer


def _kind_of(column: schema.Column) -> tuple[Kind, str]:
    """What a column of the log may be in data from outside: any width of its type."""
    if pa.types.is_list(column.type):
        is_ids = pa.types.is_integer(column.type.value_type)
        return (_IDS, "a list of integers") if is_ids else (_NUMBERS, "a list of numbers")
    if pa.types.is_integer(column.type):
        return _INTEGER, "an integer"
    return (_is_text, "text") if pa.types.is_string(column.type) else (_is_number, "a number")


NOT_READ = ("group_index", "policy_version", "value", "advantage")
"""Columns of the log that say nothing about rollouts from outside: these form other windows, with other V*."""
LOG_COLUMNS = {name: column for name, column in schema.COLUMNS.items() if name not in NOT_READ}
LOG_REQUIRED = [name for name, column in LOG_COLUMNS.items() if column.is_required and name != "logprobs"]
"""Log-probabilities that data from outside lack are scored, or not needed."""
LOG_KINDS = {name: _kind_of(column) for name, column in LOG_COLUMNS.items()}
PUBLISHED_REQUIRED: dict[str, tuple[Kind, str]] = {
    "prompt": (
        lambda kind: (
            _is_list_of(_is_struct_with("content", _is_text))(kind)
            and _is_struct_with("role", _is_text)(kind.value_type)
        ),
        "a list of messages with role and content",
    ),
    "response": (_is_text, "text"),
    "precomputed_reward": (_is_number, "a number"),
    "response_rewards": (_NUMBERS, "a list of numbers"),
    "reward_model": (_is_struct_with("ground_truth", _is_text), "a struct with the text ground_truth"),
}
PUBLISHED_OPTIONAL: dict[str, tuple[Kind, str]] = {
    "prompt_token_ids": (_IDS, "a list of integers"),
    "response_token_ids": (_IDS, "a list of integers"),
    "response_logprobs": (_NUMBERS, "a list of numbers"),
    "data_source": (_is_text, "text"),
    "extra_info": (pa.types.is_struct, "a struct"),
}
PUBLISHED_KINDS = PUBLISHED_REQUIRED | PUBLISHED_OPTIONAL


@dataclasses.dataclass(frozen=True)
class Expectations:
    """What rows have to meet, and how text becomes tokens where the data have none."""

    vocab_size: int
    reward_range: tuple[float, float] | None
    encode_prompt: Callable[[str, str | None], list[int]]
    """Question and system message to token ids."""
    encode_response: Callable[[str], list[int]]
    eos_id: int
    source_limit: int | None
    """Responses of this many tokens were truncated when they were made."""
    group_size: int
    """The most rollouts that a group may have."""
    temperature: float | None = None
    """The temperature that rollouts must have been drawn at, where the data say it; None: any."""


class BadRows:
    """Rows that cannot be used: raised as errors, or counted."""

    def __init__(self, action: Literal["error", "drop"]):
        self._action = action
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}
        """The first message of each reason."""

    def found(self, reason: str, where: str, message: str, rows: int = 1) -> None:
        """Notes what is wrong.

        Raises:
            ValueError: where bad rows are errors.
        """
        if self._action == "error":
            raise ValueError(f"{where}: {message}; mend it, or set offline.bad_rows=drop")
        self.counts[reason] += rows
        self.examples.setdefault(reason, f"{where}: {message}")


class Response(NamedTuple):
    """One row that can be used; ``rollout.logprobs`` are NaN where the data have none."""

    rollout: Rollout
    text: str
    grade: Grade
    extra: str = "{}"
    """As in ``GradedRollout``."""


@dataclasses.dataclass(frozen=True)
class Responses:
    """The rows of one prompt."""

    prompt: Prompt
    members: list[Response]


class _Row(NamedTuple):
    where: str
    group: str
    index: int
    prompt: Prompt
    response: Response
    siblings: tuple[float, ...] | None
    """Rewards of all rows of the group, where the data say them."""


class BadRowError(ValueError):
    """A row that cannot be used: a reason of a few words, and what is wrong."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read(path: pathlib.Path, expectations: Expectations, bad: BadRows) -> list[Responses]:
    """All groups of a file or folder, in the order of their first row.

    Args:
        path: a Parquet file, or a folder with such files in it or below it.
        expectations: what rows have to meet.
        bad: counts those that do not, or raises.

    Raises:
        ValueError: there is nothing to read; or, as ``bad`` has it, for the first row that cannot be used.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise ValueError(f"{str(path)!r}: has no Parquet file" if path.exists() else f"{str(path)!r} does not exist")
    groups: dict[str, list[_Row]] = {}
    for file in files:
        for row in _read_file(file, expectations, bad):
            groups.setdefault(row.group, []).append(row)
    found = [responses for rows in groups.values() if (responses := _group(rows, expectations, bad)).members]
    _check_sizes(found, groups, bad)
    return found


def _read_file(file: pathlib.Path, expectations: Expectations, bad: BadRows) -> Iterator[_Row]:
    try:
        # Whole in memory: a damaged file cannot fault a mapped page.
        source = pq.ParquetFile(io.BytesIO(file.read_bytes()), page_checksum_verification=True)
        num_rows = source.metadata.num_rows
        table = source.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        bad.found("unreadable file", str(file), f"is not a readable Parquet file ({_first_line(error)})")
        return
    is_ours = "group_id" in table.schema.names
    reader, kinds = (_log_row, LOG_KINDS) if is_ours else (_published_row, PUBLISHED_KINDS)
    problem = _schema_problem(table.schema, is_ours)
    if problem is not None:
        bad.found(problem.reason, str(file), str(problem), num_rows)
        return
    _check_sampling(file, table.schema, expectations)
    columns = {name: _cells(table.column(name)) for name in kinds if name in table.schema.names}
    for number in range(table.num_rows):
        where = f"{file} row {number}"
        try:
            row = reader(where, {name: cells[number] for name, cells in columns.items()}, expectations)
        except BadRowError as error:
            bad.found(error.reason, where, str(error))
        else:
            if row is None:
                bad.counts["no verdict"] += 1  # the grader's failure, which a good log has too
            else:
                yield row


def _schema_problem(found: pa.Schema, is_ours: bool) -> BadRowError | None:
    layout = "a rollout log" if is_ours else "the authors' layout (a rollout log would have group_id)"
    if is_ours and (problem := schema.version_problem(found)) is not None:
        return BadRowError("wrong schema version", problem)
    for name in LOG_REQUIRED if is_ours else PUBLISHED_REQUIRED:
        if name not in found.names:
            return BadRowError("missing column", f"has no column {name!r}, which {layout} has; it has {found.names}")
    for name, (is_right, wanted) in (LOG_KINDS if is_ours else PUBLISHED_KINDS).items():
        if found.names.count(name) > 1:
            return BadRowError("wrong type", f"has two columns {name!r}; it has {found.names}")
        if name in found.names and not is_right(found.field(name).type):
            return BadRowError("wrong type", f"column {name!r} is {found.field(name).type}, not {wanted}")
    return None


def _check_sampling(file: pathlib.Path, found: pa.Schema, expected: Expectations) -> None:
    """The learner's log-probabilities are those of one temperature: data of another are no mistake of a row."""
    temperature = schema.sampling_of(found).get("temperature")
    if temperature is not None and expected.temperature not in (None, temperature):
        raise ValueError(
            f"{file}: was drawn at temperature {temperature:g}, and sampler.temperature is {expected.temperature:g};"
            " set it to that of the data"
        )


def _cells(column: pa.ChunkedArray) -> list[Any]:
    """Values of a column; those of lists of numbers as arrays, None inside of them as NaN."""
    kind = column.type
    if not (_NUMBERS(kind) or _IDS(kind)):
        return column.to_pylist()
    cells: list[Any] = []
    for chunk in column.chunks:
        values, is_null = chunk.values.fill_null(0).to_numpy(), chunk.values.is_null().to_numpy(zero_copy_only=False)
        offsets, is_there = chunk.offsets.to_numpy(), chunk.is_valid().to_numpy(zero_copy_only=False)
        for start, end, there in zip(offsets[:-1], offsets[1:], is_there, strict=True):
            cell = values[start:end]
            has_null = is_null[start:end].any()
            cells.append((np.where(is_null[start:end], np.nan, cell) if has_null else cell) if there else None)
    return cells


def _log_row(where: str, cells: dict[str, Any], expected: Expectations) -> _Row | None:
    cells = {name: column.default for name, column in LOG_COLUMNS.items() if not column.is_required} | cells
    for name, column in LOG_COLUMNS.items():
        if cells.get(name) is None and not column.is_nullable and name != "logprobs":
            raise BadRowError("missing value", f"{name} is null")
    verdict = _one_of(Verdict, "verdict", cells["verdict"])
    if verdict is Verdict.INVALID:
        return None
    prompt = Prompt(
        cells["prompt_id"],
        _ids("prompt_token_ids", cells["prompt_token_ids"], expected),
        cells["prompt"],
        cells["answer"],
    )
    reward = _reward(cells["reward"], expected)
    tokens = _ids("token_ids", cells["token_ids"], expected)
    finish = _one_of(FinishReason, "finish_reason", cells["finish_reason"])
    rollout = Rollout(tokens, _logprobs(cells.get("logprobs"), len(tokens)), finish)
    grade = Grade(verdict, reward, cells["verdict_detail"])
    response = Response(rollout, cells["response"], grade, _extra(cells["extra"]))
    return _Row(where, cells["group_id"], cells["rollout_index"], prompt, response, None)


def _published_row(where: str, cells: dict[str, Any], expected: Expectations) -> _Row:
    for name in PUBLISHED_REQUIRED:
        if cells[name] is None and name != "precomputed_reward":
            raise BadRowError("missing value", f"{name} is null")
    question, system = _messages(cells["prompt"])
    extra = cells.get("extra_info") or {}
    answer = (cells["reward_model"] or {}).get("ground_truth")
    if answer is None:
        raise BadRowError("missing value", "reward_model.ground_truth is null")
    try:
        answer = published.unpack_answer(answer)
    except ValueError as error:
        raise BadRowError("unreadable ground truth", f"reward_model.ground_truth {error}") from None
    given = cells.get("prompt_token_ids")
    prompt_ids = _encoded(lambda: expected.encode_prompt(question, system)) if given is None else given
    name = cells.get("data_source") if given is not None else None
    prompt = Prompt(
        str(name or f"published/{extra.get('index', question[:40])}"),
        _ids("prompt_token_ids", prompt_ids, expected),
        question,
        answer,
    )
    reward = _reward(cells["precomputed_reward"], expected)
    siblings = tuple(float(value) for value in cells["response_rewards"])
    verdict = Verdict.CORRECT if reward >= CORRECT_REWARD else Verdict.WRONG
    if extra.get("verdict") is not None:
        verdict = _one_of(Verdict, "extra_info.verdict", extra["verdict"])
    grade = Grade(verdict, reward, str(extra.get("verdict_detail") or ""))
    rollout = _published_rollout(cells, extra, expected)
    index = extra.get("rollout_index")
    if index is not None and not isinstance(index, int):
        raise BadRowError("wrong type", f"extra_info.rollout_index is {index!r}, not an integer")
    # Their programs know a prompt by its text; a text may be asked twice all the same.
    group = f"{extra.get('policy_version')}/{extra.get('index')}/{question}"
    response = Response(rollout, cells["response"], grade, _extra(extra.get("extra") or "{}"))
    return _Row(where, group, -1 if index is None else index, prompt, response, siblings)


def _encoded(encode: Callable[[], list[int]]) -> list[int]:
    try:
        return encode()
    except (ValueError, KeyError) as error:
        raise BadRowError("no tokens", f"cannot be made into tokens: {_first_line(error)}") from None


def _published_rollout(cells: dict[str, Any], extra: dict[str, Any], expected: Expectations) -> Rollout:
    given = cells.get("response_token_ids")
    if given is not None:
        tokens = _ids("response_token_ids", given, expected)
    elif not cells["response"]:
        raise BadRowError("empty response", "response is empty")
    else:
        tokens = _ids("response", _encoded(lambda: expected.encode_response(cells["response"])), expected)
    finish = extra.get("finish_reason")
    if finish is None:
        is_truncated = expected.source_limit is not None and len(tokens) >= expected.source_limit
        finish = FinishReason.LENGTH if is_truncated else FinishReason.STOP
        if given is None and not is_truncated:  # the text lacks the stop token that was drawn
            tokens = np.append(tokens, np.int32(expected.eos_id))
    logprobs = cells.get("response_logprobs") if given is not None else None
    return Rollout(tokens, _logprobs(logprobs, len(tokens)), _one_of(FinishReason, "extra_info.finish_reason", finish))


def _messages(messages: list[Any]) -> tuple[str, str | None]:
    """The user's question and the system message, where there is one."""
    roles = [message.get("role") if message else None for message in messages]
    contents = [message.get("content") if message else None for message in messages]
    if roles not in (["user"], ["system", "user"]) or None in contents:
        raise BadRowError(
            "unknown prompt", f"prompt has messages of {roles}; one of the user, after a system one, is read"
        )
    return str(contents[-1]), str(contents[0]) if len(contents) > 1 else None


def _ids(name: str, given: Any, expected: Expectations) -> np.ndarray:
    ids = np.asarray(given)
    if len(ids) == 0:
        raise BadRowError("empty prompt" if "prompt" in name else "empty response", f"{name} is empty")
    if not np.issubdtype(ids.dtype, np.integer):  # a null among integers makes them floats
        raise BadRowError("missing value", f"{name} has a null in it")
    if ids.min() < 0 or ids.max() >= expected.vocab_size:
        worst = int(ids.max() if ids.max() >= expected.vocab_size else ids.min())
        raise BadRowError("unknown token", f"{name} has {worst}; the vocabulary has ids 0 to {expected.vocab_size - 1}")
    return ids.astype(np.int32)


def _logprobs(given: Any, length: int) -> np.ndarray:
    """NaN where there are none."""
    if given is None or len(given) == 0:
        return np.full(length, np.nan, np.float32)
    logprobs = np.asarray(given, np.float32)
    if len(logprobs) == length and np.isnan(logprobs).all():
        return logprobs
    if len(logprobs) != length:
        raise BadRowError("bad log-probabilities", f"{len(logprobs)} log-probabilities for {length} tokens")
    if not np.isfinite(logprobs).all():
        raise BadRowError("bad log-probabilities", "a log-probability is not finite")
    if logprobs.max() > 1e-3:
        raise BadRowError("bad log-probabilities", f"a log-probability is {logprobs.max():g}, above 0")
    return logprobs


def _reward(given: Any, expected: Expectations) -> float:
    if given is None or not math.isfinite(given):
        raise BadRowError("no reward", f"its reward is {given}")
    if expected.reward_range is not None and not expected.reward_range[0] <= given <= expected.reward_range[1]:
        low, high = expected.reward_range
        raise BadRowError(
            "reward out of range", f"its reward {given} is outside offline.reward_range [{low:g}, {high:g}]"
        )
    return float(given)


def _extra(given: Any) -> str:
    try:
        is_object = isinstance(json.loads(given), dict)
    except (ValueError, TypeError):
        is_object = False
    if not is_object:
        raise BadRowError("unreadable extra", f"extra is {given!r:.80}, no JSON object")
    return given


def _one_of(kind: type[enum.StrEnum], name: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise BadRowError("unknown word", f"{name} is {value!r}, not one of {', '.join(list(kind))}") from None


def _group(rows: list[_Row], expected: Expectations, bad: BadRows) -> Responses:
    """The rows of a group that have the prompt and answer of most, each once, in the order of their index."""
    usual = _most([(row.prompt.token_ids.tobytes(), row.prompt.answer) for row in rows])
    agreeing = [row for row in rows if (row.prompt.token_ids.tobytes(), row.prompt.answer) == usual]
    first, name = agreeing[0], _most([row.prompt.id for row in agreeing])
    members, seen = [], set()
    if all(row.index >= 0 for row in rows):
        rows = sorted(rows, key=lambda row: row.index)
    for row in rows:
        if (row.prompt.token_ids.tobytes(), row.prompt.answer) != usual:
            bad.found(
                "mixed group", row.where, f"its prompt or answer differs from that of {first.where}, of its group"
            )
        elif row.index >= 0 and row.index in seen:
            bad.found("doubled row", row.where, f"rollout {row.index} of its group is there twice")
        else:
            seen.add(row.index)
            members.append(row.response)
    if len(members) > expected.group_size:
        raise ValueError(
            f"{first.where}: its prompt has {len(members)} responses and sampler.group_size={expected.group_size};"
            f" set sampler.group_size={len(members)}"
        )
    return Responses(dataclasses.replace(first.prompt, id=name), members)


def _most(values: list[Any]) -> Any:
    """The most frequent value, the first of these."""
    return collections.Counter(values).most_common(1)[0][0]


def _check_sizes(found: list[Responses], groups: dict[str, list[_Row]], bad: BadRows) -> None:
    """Groups that have lost rows. What is left of them is used: their V* is that of fewer responses."""
    sizes = collections.Counter(len(responses.members) for responses in found)
    usual = max(sizes, key=lambda size: (sizes[size], size), default=0)
    for rows in groups.values():
        siblings = rows[0].siblings
        rewards = sorted(row.response.grade.reward for row in rows)
        if siblings is not None and sorted(siblings) != rewards:
            message = f"its prompt has the rewards {rewards} in its rows and {sorted(siblings)} in response_rewards"
            bad.found("unequal groups", rows[0].where, message)
        elif siblings is None and len(rows) != usual:
            message = f"its group has {len(rows)} rows, most have {usual}"
            bad.found("unequal groups", rows[0].where, message)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]

"""Finished rollouts from outside, in any of three layouts: read, checked row by row, and put into groups.

A row that cannot be used is an error that names it, or is counted by reason and left out while the other
rows of its group stay: a mistake in one row says nothing about the next. A file that cannot be read at all
counts as one mistake.
"""

import collections
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from oapl_jax.config.commands import TrainConfig
from oapl_jax.data import messages
from oapl_jax.data.messages import Question
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.rollouts import checks, published, records, schema
from oapl_jax.rollouts.checks import BadRowError
from oapl_jax.rollouts.grading import Grading
from oapl_jax.rollouts.records import CORRECT_REWARD
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.stops import Stops
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, Verdict
from oapl_jax.untrusted import parquet

IMPORTS_FOLDER = "imports"
"""Of a run directory: a record for each window of rollouts from outside, by its policy version."""

UNGRADED = Grade(Verdict.INVALID, math.nan, "not graded yet")
"""Of rollouts that ``graded`` is to grade."""

KINDS = {
    "text": pa.string(),
    "an integer": pa.int64(),
    "a number": pa.float64(),
    "a list of integers": pa.list_(pa.int64()),
    "a list of numbers": pa.list_(pa.float64()),
    "a list of messages with role and content": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    "a struct with the text ground_truth": pa.struct({"ground_truth": pa.string()}),
    "a struct": pa.struct([]),
}
"""What a column may be, in words and as a type; data from outside may have any width of it."""


NOT_READ = ("group_index", "policy_version", "value", "advantage")
"""Columns of the log that say nothing about rollouts from outside: these form other windows, with other V*."""
LOG_COLUMNS = {name: column for name, column in schema.COLUMNS.items() if name not in NOT_READ}
LOG_REQUIRED = [name for name, column in LOG_COLUMNS.items() if column.is_required and name != "logprobs"]
"""Log-probabilities that data from outside lack are scored, or not needed."""
LOG_KINDS = {
    name: next(words for words, kind in KINDS.items() if schema.is_kind(column.type, kind))
    for name, column in LOG_COLUMNS.items()
}
PUBLISHED_KINDS = {
    "prompt": "a list of messages with role and content",
    "response": "text",
    "precomputed_reward": "a number",
    "response_rewards": "a list of numbers",
    "reward_model": "a struct with the text ground_truth",
    "prompt_token_ids": "a list of integers",
    "response_token_ids": "a list of integers",
    "response_logprobs": "a list of numbers",
    "data_source": "text",
    "extra_info": "a struct",
}
PUBLISHED_REQUIRED = list(PUBLISHED_KINDS)[:5]


@dataclasses.dataclass(frozen=True)
class Expectations:
    """What rows have to meet, and how text becomes tokens where the data have none."""

    vocab_size: int
    reward_range: tuple[float, float] | None
    encode_prompt: Callable[[Question, str | None], list[int]]
    """Question and system message to token ids."""
    encode_response: Callable[[str], list[int]]
    eos_id: int
    source_limit: int | None
    """Responses of this many tokens were truncated when they were made."""
    group_size: int
    """The most rollouts that a group may have."""
    distribution: SamplingDistribution | None = None
    """Whose temperature and stops rollouts must have been drawn with, where the data say them; None: any."""
    text: Callable[[list[int]], str] = lambda ids: ""
    """Token ids of a response to the text that is graded, for records without it."""
    needs_logprobs: bool = False
    """Whether a rollout without log-probabilities is a bad row."""
    most_tokens: tuple[int, int] | None = None
    """Of a prompt and of a response; None: any number."""
    stops: Stops | None = None
    """Where responses must end; None: anywhere."""

    @classmethod
    def of(cls, config: TrainConfig, tokenizer: Tokenizer) -> "Expectations":
        """Of data that a run of this config may score, and shorten or drop where they are too long."""
        distribution, offline = SamplingDistribution.of(config.sampler), config.offline
        stops = Stops(tokenizer, distribution)
        return cls(
            vocab_size=tokenizer.vocab_size,
            reward_range=None if offline is None else offline.reward_range,
            encode_prompt=tokenizer.encode_prompt,
            encode_response=tokenizer.encode,
            eos_id=tokenizer.eos_id,
            source_limit=None if offline is None else offline.source_limit,
            group_size=config.sampler.group_size,
            distribution=distribution,
            text=stops.text,
            stops=stops,
        )


class BadRows:
    """Rows that cannot be used: raised as errors, or counted. ``option``: what has them counted, for people."""

    def __init__(self, action: Literal["error", "drop"], option: str = "offline.bad_rows=drop"):
        self._action, self._option = action, option
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}
        """The first message of each reason."""

    def found(self, reason: str, where: str, message: str, rows: int = 1) -> None:
        """Notes what is wrong.

        Raises:
            ValueError: where bad rows are errors.
        """
        if self._action == "error":
            raise ValueError(f"{where}: {message}; mend it, or set {self._option}")
        self.counts[reason] += rows
        self.examples.setdefault(reason, f"{where}: {message}")


@dataclasses.dataclass(frozen=True)
class Responses:
    """The rows of one prompt. They have no advantages; ``rollout.logprobs`` are NaN where the data have none."""

    prompt: Prompt
    members: list[GradedRollout]


class _Row(NamedTuple):
    where: str
    group: str
    index: int
    prompt: Prompt
    response: GradedRollout
    siblings: tuple[float, ...] | None
    """Rewards of all rows of the group, where the data say them."""


def read(path: pathlib.Path, expectations: Expectations, bad: BadRows) -> list[Responses]:
    """All groups of a Parquet or JSONL file, or of those in a folder and below it, in the order of their first row.

    Rollouts that the data have no grade for are ``UNGRADED``.

    Raises:
        ValueError: there is nothing to read; or, as ``bad`` has it, for the first row that cannot be used.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    suffixes = (".parquet", *records.SUFFIXES)
    files = [file for file in files if file == path or (file.name.endswith(suffixes) and file.name[0] != ".")]
    if not files:
        has = "has no Parquet or JSONL file"
        raise ValueError(f"{str(path)!r}: {has}" if path.exists() else f"{str(path)!r} does not exist")
    groups: dict[str, list[_Row]] = {}
    for file in files:
        for row in _read_file(file, expectations, bad):
            groups.setdefault(row.group, []).append(row)
    found = [responses for rows in groups.values() if (responses := _group(rows, expectations, bad)).members]
    _check_sizes(found, groups, bad)
    return found


def graded(found: Sequence[Responses], grading: Grading, bad: BadRows) -> list[Responses]:
    """The same with grades for what has none, without prompts that have no rollout left.

    Rollouts whose verdict is invalid are left out and counted. Those whose prompt cannot be graded are bad rows.
    """
    done = []
    for responses in found:
        members = list(responses.members)
        rest = [index for index, member in enumerate(members) if member.grade is UNGRADED]
        if rest:
            try:
                ((_, grades),) = grading.grade([(responses.prompt, [members[index].rollout for index in rest])])
            except ValueError as error:
                bad.found("no grader", responses.prompt.id, str(error), len(rest))
                members = [member for member in members if member.grade is not UNGRADED]
            else:
                for index, grade in zip(rest, grades, strict=True):
                    members[index] = dataclasses.replace(members[index], grade=grade)
        valid = [member for member in members if member.grade.verdict is not Verdict.INVALID]
        bad.counts["no verdict"] += len(members) - len(valid)
        if valid:
            done.append(dataclasses.replace(responses, members=valid))
    bad.counts += collections.Counter()  # drops zeros
    return done


def _read_file(file: pathlib.Path, expectations: Expectations, bad: BadRows) -> Iterator[_Row]:
    try:
        table = records.read_lines(file) if file.name.endswith(records.SUFFIXES) else parquet.read(file, file)
    except (OSError, ValueError) as error:
        bad.found("unreadable file", str(file), str(error).removeprefix(f"{file}: "))
        return
    if isinstance(table, Iterator):
        yield from _read_records(table, expectations, bad)
        return
    if "token_ids" in table.schema.names and "rollout_index" not in table.schema.names:
        rows = ((f"{file} row {number}", row) for number, row in enumerate(table.to_pylist()))
        yield from _read_records(rows, expectations, bad)
        return
    is_ours = "group_id" in table.schema.names
    to_log, kinds = (_log_cells, LOG_KINDS) if is_ours else (_published_cells, PUBLISHED_KINDS)
    problem = _schema_problem(table.schema, is_ours)
    if problem is not None:
        bad.found(problem.reason, str(file), str(problem), table.num_rows)
        return
    _check_sampling(file, table.schema, expectations)
    columns = {}
    for name in set(kinds) & set(table.schema.names):
        column = table.column(name)
        is_list = schema.is_kind(column.type, KINDS["a list of numbers"])
        columns[name] = schema.list_cells(column) if is_list else column.to_pylist()
    for number in range(table.num_rows):
        cells = {name: column[number] for name, column in columns.items()}
        log_cells = functools.partial(to_log, cells, expectations)
        yield from _usable_row(f"{file} row {number}", log_cells, expectations, bad)


def _read_records(
    lines: Iterable[tuple[str, dict[str, Any] | BadRowError]], expected: Expectations, bad: BadRows
) -> Iterator[_Row]:
    for where, record in lines:
        try:
            if isinstance(record, BadRowError):
                raise record
            choices = list(records.rollouts(record))
        except BadRowError as error:
            bad.found(error.reason, where, str(error))
            continue
        for number, choice in enumerate(choices):
            here = f"{where}, choice {number}" if "choices" in record else where
            log_cells = functools.partial(records.cells, choice, expected.distribution)
            yield from _usable_row(here, log_cells, expected, bad)


def _usable_row(
    where: str, log_cells: Callable[[], dict[str, Any]], expected: Expectations, bad: BadRows
) -> Iterator[_Row]:
    """The row of these cells, unless it cannot be used or has no verdict."""
    try:
        row = _row(where, log_cells(), expected)
    except BadRowError as error:
        bad.found(error.reason, where, str(error))
        return
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
    for name, wanted in (LOG_KINDS if is_ours else PUBLISHED_KINDS).items():
        if found.names.count(name) > 1:
            return BadRowError("wrong type", f"has two columns {name!r}; it has {found.names}")
        if name in found.names and not schema.is_kind(found.field(name).type, KINDS[wanted]):
            return BadRowError("wrong type", f"column {name!r} is {found.field(name).type}, not {wanted}")
    return None


def _check_sampling(file: pathlib.Path, found: pa.Schema, expected: Expectations) -> None:
    """The learner scores one temperature, and responses that end in one way: other data are no mistake of a row."""
    given = dataclasses.asdict(expected.distribution) if expected.distribution else {}
    wanted = {name: given[name] for name in ("temperature", "stop_strings", "stop_token_ids") if name in given}
    if (problem := schema.sampling_problem(found, wanted)) is not None:
        raise ValueError(f"{file}: {problem}")


def _row(where: str, cells: dict[str, Any], expected: Expectations) -> _Row | None:
    """The row of the log's cells; None where its verdict is invalid."""
    verdict, is_graded = checks.one_of(Verdict, "verdict", cells["verdict"]), cells.get("is_graded", True)
    if verdict is Verdict.INVALID and is_graded:
        return None
    prompt_ids = checks.token_ids("prompt_token_ids", cells["prompt_token_ids"], expected.vocab_size)
    prompt = Prompt(cells["prompt_id"], prompt_ids, cells["prompt"], cells["answer"])
    grade = UNGRADED
    if is_graded:
        grade = Grade(verdict, checks.reward(cells["reward"], expected.reward_range), cells["verdict_detail"])
    tokens = checks.token_ids("token_ids", cells["token_ids"], expected.vocab_size)
    finish = checks.one_of(FinishReason, "finish_reason", cells["finish_reason"])
    rollout = Rollout(tokens, _logprobs(cells.get("logprobs"), len(tokens)), finish)
    checks.end(rollout, expected.stops)
    if expected.needs_logprobs and np.isnan(rollout.logprobs).any():
        raise BadRowError("no log-probabilities", "has no log-probabilities of its tokens, which OAPL regresses on")
    lengths = len(prompt_ids), len(tokens)
    if expected.most_tokens is not None and (
        lengths[0] > expected.most_tokens[0] or lengths[1] > expected.most_tokens[1]
    ):
        sizes, most = "{} prompt and {} response tokens".format(*lengths), "{} and {}".format(*expected.most_tokens)
        raise BadRowError("too long", f"has {sizes}; the run has at most {most}")
    text = expected.text(tokens.tolist()) if cells["response"] is None else cells["response"]
    response = GradedRollout(rollout, text, grade, extra=checks.extra(cells["extra"]))
    return _Row(where, cells["group_id"], cells["rollout_index"], prompt, response, cells.get("siblings"))


def _log_cells(cells: dict[str, Any], expected: Expectations) -> dict[str, Any]:
    cells = {name: column.default for name, column in LOG_COLUMNS.items() if not column.is_required} | cells
    for name, column in LOG_COLUMNS.items():
        if cells.get(name) is None and not column.is_nullable and name != "logprobs":
            raise BadRowError("missing value", f"{name} is null")
    return cells


def _published_cells(cells: dict[str, Any], expected: Expectations) -> dict[str, Any]:
    for name in PUBLISHED_REQUIRED:
        if cells[name] is None and name != "precomputed_reward":
            raise BadRowError("missing value", f"{name} is null")
    conversation, system = _messages(cells["prompt"])
    question = messages.text_of(conversation)
    extra = cells.get("extra_info") or {}
    answer = cells["reward_model"]["ground_truth"]
    if answer is None:
        raise BadRowError("missing value", "reward_model.ground_truth is null")
    try:
        answer = published.unpack_answer(answer)
    except ValueError as error:
        raise BadRowError("unreadable ground truth", f"reward_model.ground_truth {error}") from None
    prompt_ids, name = cells.get("prompt_token_ids"), cells.get("data_source")
    if prompt_ids is None:
        prompt_ids, name = _encoded(expected.encode_prompt, conversation, system), None
    reward, index = cells["precomputed_reward"], extra.get("rollout_index")
    if index is not None and not isinstance(index, int):
        raise BadRowError("wrong type", f"extra_info.rollout_index is {index!r}, not an integer")
    verdict = extra.get("verdict")
    if verdict is None:
        verdict = Verdict.CORRECT if reward is not None and reward >= CORRECT_REWARD else Verdict.WRONG
    tokens, finish = cells.get("response_token_ids"), extra.get("finish_reason")
    is_text = tokens is None
    if tokens is None:
        tokens = _encoded(expected.encode_response, cells["response"])
        if not tokens:
            raise BadRowError("empty response", "response is empty")
    if finish is None:
        is_truncated = expected.source_limit is not None and len(tokens) >= expected.source_limit
        finish = FinishReason.LENGTH if is_truncated else FinishReason.STOP
        if is_text and not is_truncated:  # the text lacks the stop token that was drawn
            tokens = [*tokens, expected.eos_id]
    return {
        # Their programs know a prompt by its text; a text may be asked twice all the same.
        "group_id": f"{extra.get('policy_version')}/{extra.get('index')}/{question}",
        "prompt_id": str(name or f"published/{extra.get('index', question[:40])}"),
        "prompt": question,
        "prompt_token_ids": prompt_ids,
        "answer": answer,
        "rollout_index": -1 if index is None else index,
        "response": cells["response"],
        "token_ids": tokens,
        "logprobs": None if is_text else cells.get("response_logprobs"),
        "finish_reason": finish,
        "verdict": verdict,
        "verdict_detail": str(extra.get("verdict_detail") or ""),
        "reward": reward,
        "extra": extra.get("extra") or "{}",
        "siblings": tuple(float(value) for value in cells["response_rewards"]),
    }


def _encoded(encode: Callable[..., list[int]], *arguments: Any) -> list[int]:
    try:
        return encode(*arguments)
    except (ValueError, KeyError) as error:
        raise BadRowError("no tokens", f"cannot be made into tokens: {_first_line(error)}") from None


def _messages(cell: list[Any]) -> tuple[Question, str | None]:
    """What is asked, the messages of several turns for example, and the system message, where there is one."""
    try:
        question = messages.question_cell(cell, "prompt", "of this file")
    except ValueError as error:
        raise BadRowError("unknown prompt", str(error)) from None
    assert isinstance(question, list)
    system = question.pop(0)["content"] if question[0]["role"] == "system" else None
    return (question[0]["content"] if len(question) == 1 and question[0]["role"] == "user" else question), system


def _logprobs(given: Any, length: int) -> np.ndarray:
    """NaN where there are none, or none but NaN."""
    if given is None or len(given) == 0 or (len(given) == length and np.isnan(given).all()):
        return np.full(length, np.nan, np.float32)
    return checks.logprobs(given, length)


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

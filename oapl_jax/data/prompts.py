"""The endless, shuffled stream of training prompts, and the held-out prompts."""

import contextlib
import dataclasses
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from oapl_jax.config.applies import changed
from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.data import DataConfig
from oapl_jax.config.evaluation import HELD_OUT
from oapl_jax.config.names import entry
from oapl_jax.data import messages, rows, tasks
from oapl_jax.data.catalogue import DATASETS, Problem
from oapl_jax.data.streams import Made, Mixed, Shuffled
from oapl_jax.data.tokenizer import Tokenizer, warn_of_control_tokens
from oapl_jax.types import Prompt

TASK_PROMPTS = 128
"""Number of held-out prompts of a built-in task, unless the config has one."""

PromptSource = Shuffled[Prompt] | Made[Prompt] | Mixed[Prompt]


class HeldOut(list[Prompt]):
    """Held-out prompts in the order of their sources, and how many rows were dropped, by the names of the data sets."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped: dict[str, int] = {}

    def add(self, name: str, prompts: list[Prompt], num_dropped: int) -> None:
        """Adds the prompts of a data set."""
        self.extend(prompts)
        self.dropped[name] = num_dropped


def load_prompts(data: DataConfig, tokenizer: Tokenizer, seed: int) -> PromptSource:
    """The tokenised training prompts as an endless stream, shuffled by ``seed``; several data sets are mixed by weight.

    Raises:
        ValueError: rows cannot be read (see ``rows.read``); the template lacks ``{prompt}``; a cell is not text; or a
            prompt exceeds the limit and ``data.overlong`` is ``error``.
    """
    if not data.sets:
        return _load(data, tokenizer, seed, "")
    streams = {}
    for name, part in data.sets.items():
        own_seed = zlib.crc32(f"{seed} {name}".encode())
        with _errors_of(f"data.sets.{name}"):
            streams[name] = _load(data.of(part), tokenizer, own_seed, name)
    return Mixed(streams, {name: part.weight for name, part in data.sets.items()})


@contextlib.contextmanager
def _errors_of(where: str) -> Iterator[None]:
    """Puts the name of a data set or a row before an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _load(data: DataConfig, tokenizer: Tokenizer, seed: int, name: str) -> Shuffled[Prompt] | Made[Prompt]:
    """The prompts of one data set."""
    if data.task is not None:
        task, limit = tasks.make_task(data), data.max_prompt_tokens

        def make(position: int) -> Prompt:
            prompt = task.prompt(position, "train", seed, tokenizer)
            if len(prompt.token_ids) > limit:
                raise ValueError(
                    f"prompt {prompt.id} has {len(prompt.token_ids)} tokens, over data.max_prompt_tokens={limit};"
                    " raise the limit (prompts of a built-in task are never dropped)"
                )
            return _named(prompt, name)

        return Made(make)
    prompts, num_dropped = _read_prompts(data, tokenizer)
    return Shuffled([_named(prompt, name) for prompt in prompts], num_dropped, seed)


def _named(prompt: Prompt, name: str) -> Prompt:
    """The prompt under the name of its data set, where it has one: row 17 is ``NAME/17``."""
    return dataclasses.replace(prompt, id=f"{name}/{prompt.id.rpartition('/')[2]}") if name else prompt


def describe(data: DataConfig, source: PromptSource) -> dict[str, str]:
    """How many prompts there are, by the name of the data set ('' for one without), as text."""
    if isinstance(source, Mixed):
        total, described = sum(part.weight for part in data.sets.values()), {}
        for name, part in data.sets.items():
            size = describe(data.of(part), source.streams[name])[""]
            described[name] = f"{size}; weight {part.weight:g}, {part.weight / total:.1%} of the groups"
        return described
    if data.task is not None:
        return {"": f"{data.task} task"}
    return {"": f"{len(source):,} ({dropped(source.num_dropped)})"}


def dropped(number: int) -> str:
    """The number of rows that were left out, as text."""
    return f"{number:,} overlong or without an answer dropped"


def held_out(config: TrainConfig, tokenizer: Tokenizer) -> HeldOut:
    """The first ``evaluation.prompts`` held-out prompts of each data set, or all if there are fewer; the same for every seed.

    Raises:
        ValueError: as ``load_prompts``; or training prompts come from a file and ``evaluation.path`` is missing.
    """
    data, evaluation, found = config.data, config.evaluation, HeldOut()
    if not evaluation.prompts:
        return found
    if data.sets and not evaluation.sets:
        raise ValueError("evaluation.sets: is missing; name the held-out prompts for data.sets there")
    for name, part in evaluation.sets.items():
        with _errors_of(f"evaluation.sets.{name}"):
            found.add(name, *first_prompts(data.of(part), tokenizer, evaluation.prompts, HELD_OUT + name))
    if evaluation.sets:
        return found
    if data.task is None:
        is_file = data.path is not None if data.dataset is not None else data.format in ("jsonl", "parquet")
        if evaluation.path is None and evaluation.dataset is None and is_file:
            raise ValueError(f"evaluation.path: is missing; set it to the held-out prompts for {data.path!r}")
        update: dict[str, Any] = {"path": evaluation.path or data.path, "split": evaluation.split}
        if evaluation.dataset is not None:
            update |= {"dataset": evaluation.dataset, "path": evaluation.path, "name": None}
        data = data.model_copy(update=update)
    found.add("", *first_prompts(data, tokenizer, evaluation.prompts))
    return found


def first_prompts(
    data: DataConfig, tokenizer: Tokenizer, num: int | None, prefix: str = ""
) -> tuple[list[Prompt], int]:
    """The first prompts of a source in its order, of a built-in task the held-out ones, and the number of dropped rows.

    ``num``: at most; None: all, of a task ``TASK_PROMPTS``. Their ids begin with the prefix.
    """
    if data.task is None:
        prompts, num_dropped = _read_prompts(data, tokenizer)
    else:
        task, num_dropped = tasks.make_task(data), 0
        count = range(TASK_PROMPTS if num is None else num)
        prompts = [task.prompt(i, "held_out", tasks.HELD_OUT_SEED, tokenizer) for i in count]
    return [_named(prompt, prefix) for prompt in prompts[:num]], num_dropped


def _read_prompts(data: DataConfig, tokenizer: Tokenizer) -> tuple[list[Prompt], int]:
    """All prompts within the limit, in the order of the source, and the number of rows that were left out."""
    if "{prompt}" not in data.template:
        raise ValueError(f"data.template={data.template!r}: lacks {{prompt}}, which stands for the question")
    problems = list(_read_dataset(data) if data.dataset else _read_columns(data))
    prompts = [_make_prompt(name, problem, data, tokenizer) for name, problem in problems if problem is not None]
    if not prompts:
        raise ValueError(f"{data.path or data.dataset!r}: none of its {len(problems)} rows has an answer or tests")
    limit = data.max_prompt_tokens
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    sizes = {prompt.id: len(prompt.token_ids) for prompt in prompts}
    if data.overlong == "error" and len(kept) < len(prompts):
        longest, first = max(sizes, key=sizes.__getitem__), next(name for name in sizes if sizes[name] > limit)
        raise ValueError(
            f"row {first}: its prompt has {sizes[first]} tokens, over data.max_prompt_tokens={limit}"
            f" ({len(prompts) - len(kept)} such rows; the longest, {longest}, has {sizes[longest]});"
            f" raise the limit or set data.overlong=drop"
        )
    if not kept:
        raise ValueError(
            f"{data.path!r}: all {len(prompts)} prompts exceed data.max_prompt_tokens={limit};"
            f" the shortest has {min(sizes.values())} tokens"
        )
    warn_of_control_tokens(tokenizer, "prompts", {prompt.id: prompt.text for prompt in kept})
    return kept, len(problems) - len(kept)


def _read_columns(data: DataConfig) -> Iterator[tuple[str, Problem]]:
    """The named problems of a table, by the columns that the config names."""
    answers = () if data.answer_column is None else (data.answer_column,)
    columns = (data.prompt_column, *answers, *data.columns)
    table = rows.read(str(data.path), data.format, columns, name=data.name, split=data.split)
    name = _dataset_name(data, table.name)
    for i, (prompt, *cells) in enumerate(table.rows):
        row_name, further = f"{name}/{i}", map(rows.plain_cell, cells[len(answers) :])
        question = messages.question_cell(prompt, data.prompt_column, row_name)
        answer = rows.answer_cell(cells[0], answers[0], row_name) if answers else ""
        yield row_name, Problem(question, answer, dict(zip(data.columns, further, strict=True)))


def _read_dataset(data: DataConfig) -> Iterator[tuple[str, Problem | None]]:
    """The named problems of a published data set, from the hub or from a local copy of any format."""
    assert data.dataset is not None
    dataset = entry(DATASETS, data.dataset, "data.dataset")
    options: dict[str, Any] = {"optional": dataset.optional}
    if data.path is not None:
        path, file_format = data.path, _format_of(pathlib.Path(data.path).expanduser())
        options |= {"split": data.split, "name": data.name}
    elif data.split not in dataset.splits:
        known = ", ".join(dataset.splits)
        raise ValueError(
            f"data.dataset={data.dataset!r} has no split {data.split!r} on the hub; "
            + (f"it has {known}" if known else "the hub does not have it: set data.path to a local copy")
        )
    else:
        source, path, file_format = dataset.splits[data.split], dataset.hub, "datasets"
        options |= {"split": source.split, "name": data.name or source.name, "files": source.files}
    table = rows.read(path, file_format, dataset.columns, **options)
    columns = (*dataset.columns, *dataset.optional)
    for number, row in enumerate(table.rows):
        name = f"{data.dataset}/{data.split}/{number}"
        try:
            problem = dataset.read(dict(zip(columns, row, strict=True)))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"row {name} of {path!r} does not have the layout of {data.dataset} ({type(error).__name__}: {error})"
            ) from error
        yield name, problem


def _format_of(path: pathlib.Path) -> str:
    """Format of a local copy, by the suffix of a file or the content of a folder."""
    if path.is_dir():
        is_saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        return "parquet" if not is_saved and any(path.rglob("*.parquet")) else "datasets"
    return "parquet" if path.suffix == ".parquet" else "jsonl"


def _make_prompt(row_name: str, problem: Problem, data: DataConfig, tokenizer: Tokenizer) -> Prompt:
    template = data.template
    if data.dataset is not None and "template" not in changed(data):
        template = DATASETS[data.dataset].template
    question = messages.fill(template, problem.question)
    with _errors_of(f"row {row_name}"):
        token_ids = np.asarray(tokenizer.encode_prompt(question, data.system), np.int32)
    if not token_ids.size:
        raise ValueError(f"row {row_name}: its prompt has no tokens; remove the row")
    return Prompt(row_name, token_ids, messages.text_of(question), problem.answer, problem.columns or {})


def _dataset_name(data: DataConfig, table_name: str) -> str:
    """The name of a table; for a file such as train.jsonl its folder's name is put before it."""
    if data.format in ("datasets", "tfds"):
        return table_name
    folder = pathlib.Path(str(data.path)).resolve().parent.name
    return f"{folder}/{table_name}" if table_name in ("train", "test", "validation", "dev") else table_name

"""Project CodeNet: people's submissions to contest problems, each with the judge's status.

The published archive has this layout below its folder ``Project_CodeNet``:

    metadata/problem_list.csv                    id, name, dataset, ...; one problem per row
    metadata/p00001.csv                          submission_id, language, status, ...; one submission per row
    data/p00001/Python/s000000001.py             the programs
    problem_descriptions/p00001.html             the statement, if the problem has one
    derived/input_output/data/p00001/input.txt   a sample input with output.txt, if the problem has one
"""

import collections
import csv
import dataclasses
import html.parser
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

LANGUAGE = "Python"
REWARDS: Mapping[str, float] = {
    "Accepted": 1.0,
    "Wrong Answer": -0.1,
    "Time Limit Exceeded": -0.5,
    "Runtime Error": -0.6,
    "Compile Error": -1.0,
}
"""Rewards of the judge's statuses ("Efficient Post-training ... With Offline RL", Eq. 5); others are left out."""
ACCEPTED = "Accepted"


class Submission(NamedTuple):
    """A program and its status."""

    id: str
    source: str
    status: str


class Problem(NamedTuple):
    """A problem that has a statement."""

    id: str
    statement: str
    tests: str
    """Its sample as JSON tests (rewards/code/layouts.py), or an empty string."""


def _option(default: int, meaning: str) -> Any:
    """A field that is an option of ``oapl-jax codenet``, with its help."""
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which submissions are kept, and how they form groups; the first two defaults are the paper's."""

    group_size: int = _option(4, "submissions in a group; at least one is correct and at least one is not")
    max_correct: int = _option(50, "correct submissions kept per problem, drawn at random")
    max_tokens: int = _option(2048, "most tokens of a response; longer programs are left out")
    max_prompt_tokens: int = _option(2048, "most tokens of a prompt; problems with longer ones are left out")
    seed: int = _option(0, "seed of the choice of submissions and of their groups")


def read_problems(root: pathlib.Path, dropped: collections.Counter[str]) -> list[Problem]:
    """All problems with a statement, in the order of the list; ``dropped`` counts what is left out, by reason.

    Raises:
        ValueError: ``root`` is another folder; the message says what it lacks.
    """
    listed = root / "metadata" / "problem_list.csv"
    if not listed.is_file():
        listed = root / "problem_list.csv"
    if not listed.is_file() or not (root / "data").is_dir():
        raise ValueError(f"{str(root)!r} is not a copy of Project CodeNet: it lacks metadata/problem_list.csv or data/")
    problems = []
    for row in _rows(listed, ("id",)):
        page = root / "problem_descriptions" / f"{row['id']}.html"
        statement = text_of(page.read_text(encoding="utf-8", errors="replace")) if page.is_file() else ""
        if statement:
            problems.append(Problem(row["id"], statement, _sample_test(root, row["id"])))
        else:
            dropped["problems without a statement"] += 1
    return problems


def read_submissions(
    root: pathlib.Path, problem: str, keeps: Callable[[str], bool], dropped: collections.Counter[str]
) -> Iterator[Submission]:
    """The Python submissions of a problem whose source ``keeps`` accepts, in the order of their ids.

    Raises:
        ValueError: the metadata lack a column.
    """
    path = root / "metadata" / f"{problem}.csv"
    if not path.is_file():
        dropped["problems without metadata"] += 1
        return
    for row in sorted(_rows(path, ("submission_id", "language", "status")), key=lambda row: row["submission_id"]):
        file = root / "data" / problem / LANGUAGE / f"{row['submission_id']}.py"
        if row["language"] != LANGUAGE:
            dropped["other languages"] += 1
        elif row["status"] not in REWARDS:
            dropped[f"status {row['status'] or 'missing'}"] += 1
        elif not file.is_file():
            dropped["programs without a file"] += 1
        elif not (source := file.read_text(encoding="utf-8", errors="replace").strip()):
            dropped["empty programs"] += 1
        elif not keeps(source):
            dropped["too long"] += 1
        else:
            yield Submission(row["submission_id"], source, row["status"])


def make_groups(problem: str, submissions: list[Submission], rules: Rules) -> Iterator[list[Submission]]:
    """Groups with at least one correct and one incorrect submission; no submission is in two groups.

    It makes as many groups as possible: each gets one correct and one incorrect submission, and the rest fills them up.
    """
    rng = np.random.default_rng((rules.seed, int(problem[1:])))
    correct = [item for item in submissions if item.status == ACCEPTED]
    wrong = [item for item in submissions if item.status != ACCEPTED]
    correct = [correct[i] for i in rng.permutation(len(correct))[: rules.max_correct]]
    wrong = [wrong[i] for i in rng.permutation(len(wrong))]
    num_groups = min(len(correct), len(wrong), (len(correct) + len(wrong)) // rules.group_size)
    rest = [*correct[num_groups:], *wrong[num_groups:]]
    rest = [rest[i] for i in rng.permutation(len(rest))]
    size = rules.group_size - 2
    for i in range(num_groups):
        members = [correct[i], wrong[i], *rest[i * size : (i + 1) * size]]
        yield [members[j] for j in rng.permutation(rules.group_size)]


class _Text(html.parser.HTMLParser):
    """Collects the text of a page: one line for each block, with ``pre`` unchanged."""

    BLOCKS = frozenset(("p", "div", "br", "li", "h1", "h2", "h3", "h4", "tr", "pre", "section", "ul", "ol", "table"))
    SILENT = frozenset(("script", "style", "title", "head"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._num_silent = self._num_pre = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._pass(tag, 1)

    def handle_endtag(self, tag: str) -> None:
        self._pass(tag, -1)

    def _pass(self, tag: str, depth: int) -> None:
        self._num_silent += depth * (tag in self.SILENT)
        self._num_pre += depth * (tag == "pre")
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._num_silent <= 0:
            self.parts.append(data if self._num_pre > 0 else " ".join(data.split("\n")))


def text_of(page: str) -> str:
    """The text of a statement's page, without consecutive blank lines."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = [line.strip() for line in "".join(parser.parts).split("\n")]
    kept = [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]
    return "\n".join(kept).strip()


def _sample_test(root: pathlib.Path, problem: str) -> str:
    folder = root / "derived" / "input_output" / "data" / problem
    given, expected = folder / "input.txt", folder / "output.txt"
    if not given.is_file() or not expected.is_file():
        return ""
    return json.dumps([{"stdin": given.read_text(encoding="utf-8"), "stdout": expected.read_text(encoding="utf-8")}])


def _rows(path: pathlib.Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = reader.fieldnames or ()
        if missing := [column for column in columns if column not in found]:
            raise ValueError(f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(found)}")
        yield from reader

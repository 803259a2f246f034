"""Offline RL for code with a real model, after the second paper's Table 3: four objectives on groups of real programs.

    python -m experiments.offline_code --out runs/offline_code --model MODEL --mbpp mbpp.jsonl [--leetcode train.json]

A group has four programs for one problem of MBPP's training split (or of LeetCode): the reference solution, the reference
with an edit of one line, as the bugs of QuixBugs are, and two more: what the model itself answers, or further edits. Our
sandbox runs them all. A reference that does not pass, and an edit that does, is not used. Each objective trains from the
same model, and each model answers MBPP's test problems greedily.

Every step is a command that a user would give. What has ended is not made again.
"""

import argparse
import ast
import itertools
import json
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from oapl_jax.data.catalogue import DATASETS
from oapl_jax.data.tokenizer import Tokenizer, load
from oapl_jax.io import console
from oapl_jax.types import FinishReason, Verdict

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs/offline_mbpp_qwen2.5_coder_0.5b.yaml"
OBJECTIVES = ("sft", "rloo", "rloo_grpo", "rloo_exp")
TRAINING_TASKS, TEST_TASKS = range(601, 975), range(11, 511)
MAX_PROMPT, MAX_RESPONSE = 320, 128
"""Tokens; a problem beyond them is left out."""
Origin = Literal["reference", "edit", "answer"]
REWARDS = {"accepted": 1.0, "wrong_answer": -0.1, "time_limit": -0.5, "runtime_error": -0.6, "compile_error": -1.0}
GROUP, SAMPLES, EDITS = 4, 2, 6
"""Programs of a group; answers of the model, and edits that are graded, for each problem."""

SWAPS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add},
    **{ast.Mult: ast.Add, ast.Div: ast.FloorDiv, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult},
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def main(argv: list[str]) -> None:
    """Runs what has not ended, and prints the table of differences from the model itself."""
    parser = argparse.ArgumentParser("python -m experiments.offline_code")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of all runs")
    parser.add_argument("--model", required=True, help="folder of Qwen2.5-Coder-0.5B-Instruct, or its name on the hub")
    parser.add_argument("--mbpp", type=pathlib.Path, required=True, help="the file that Google published, all splits")
    parser.add_argument("--leetcode", type=pathlib.Path, help="problems with solutions and functional tests, JSON")
    parser.add_argument("--problems", type=int, default=80, help="of each data set, drawn at random")
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    arguments = parser.parse_args(argv)
    out, model = arguments.out.resolve(), arguments.model
    out.mkdir(parents=True, exist_ok=True)
    groups = out / "groups.parquet"
    if not groups.exists():
        problems = read_problems(arguments.mbpp, arguments.leetcode, load(model), arguments.problems)
        write_groups(groups, make_groups(problems, sample(problems, out, model), out))
    write_lines(out / "mbpp.jsonl", [row for row in read_lines(arguments.mbpp) if row["task_id"] in TEST_TASKS])
    models = {"base": model}
    for name in arguments.objectives:
        models[name] = str(out / name)
        if not (out / name / "summary.json").exists():
            words = [f"model.path={model}", f"run.dir={out / name}", f"objective.name={name}"]
            words += [f"offline.rounds=[{{log: {groups}}}]", f"evaluation.path={out}/mbpp.jsonl"]
            run("train", "--config", CONFIG, *words)
    for name, folder in models.items():
        words = f"model.path={folder}", f"run.dir={out / 'evaluations' / name}", f"benchmarks.folder={out}"
        run("evaluate", "--config", ROOT / "configs/evaluate_mbpp.yaml", *words, "benchmarks.names=[mbpp]")
    logs = [word for name in models for word in ("--log", f"{name}={out / 'evaluations' / name}")]
    run("evaluate", *logs, "--out", out / "comparison")


def run(*words: str | pathlib.Path) -> None:
    """A command of ours, in a process of its own."""
    subprocess.run([sys.executable, "-m", "oapl_jax", *map(str, words)], check=True)


class Problem(NamedTuple):
    """A problem with a program that solves it."""

    id: str
    prompt: str
    tests: str
    """JSON, in a layout of ``rewards/code/layouts.py``."""
    program: str


class Candidate(NamedTuple):
    """A program for a problem, as the response of a model."""

    problem: Problem
    origin: Origin
    response: str


class Member(NamedTuple):
    """A program with its verdict."""

    candidate: Candidate
    verdict: str
    reward: float
    detail: str


def read_problems(mbpp: pathlib.Path, leetcode: pathlib.Path | None, tokenizer: Tokenizer, count: int) -> list[Problem]:
    """Problems that fit, at most ``count`` of each data set, drawn at random."""
    problems, dataset = [], DATASETS["mbpp"]
    for row in read_lines(mbpp):
        problem = dataset.read(dict.fromkeys(dataset.optional) | row)
        if row["task_id"] in TRAINING_TASKS and problem is not None:
            prompt = dataset.template.replace("{prompt}", str(problem.question))
            problems.append(Problem(f"mbpp/{row['task_id']}", prompt, problem.answer, tidied(row["code"])))
    for i, row in enumerate(json.loads(leetcode.read_text(encoding="utf-8")) if leetcode else ()):
        tests = json.dumps(row["tests"])
        problems.append(Problem(f"leetcode/{i}", row["problem"], tests, tidied(row["solutions"])))
    random.Random(0).shuffle(problems)
    found: dict[str, list[Problem]] = {}
    for problem in problems:
        of_set = found.setdefault(problem.id.partition("/")[0], [])
        is_short = (
            len(tokenizer.encode_prompt(problem.prompt)) <= MAX_PROMPT
            and len(tokenizer.encode(fenced(problem.program))) < MAX_RESPONSE
        )
        if len(of_set) < count and is_short and is_python(problem.program):
            of_set.append(problem)
    return list(itertools.chain(*found.values()))


def tidied(source: str) -> str:
    """A program without tabs, carriage returns and trailing spaces."""
    return "\n".join(line.rstrip() for line in source.expandtabs(4).splitlines()).strip()


def sample(problems: Sequence[Problem], out: pathlib.Path, model: str) -> Iterator[Candidate]:
    """Different finished answers of the model to each problem."""
    by_prompt = {problem.prompt: problem for problem in problems}
    write_lines(out / "problems.jsonl", [{"prompt": item.prompt, "answer": item.tests} for item in problems])
    sections = {
        "run": {"dir": str(out / "samples")},
        "model": {"path": model, "param_dtype": "float32"},
        "data": {"path": str(out / "problems.jsonl"), "template": "{prompt}", "max_prompt_tokens": MAX_PROMPT},
        "reward": {"functions": {"code": 1.0}, "workers": 1},
        "sampler": {"group_size": SAMPLES, "max_response_tokens": MAX_RESPONSE, "groups_in_flight": 16},
    }
    (out / "sample.yaml").write_text(json.dumps(sections), encoding="utf-8")  # JSON is YAML
    run("generate", "--config", out / "sample.yaml")
    answers: list[Candidate] = []
    for path in sorted((out / "samples/rollouts").rglob("*.parquet")):
        for row in pq.read_table(path, columns=["prompt", "response", "finish_reason"]).to_pylist():
            if row["finish_reason"] == FinishReason.STOP:
                answers.append(Candidate(by_prompt[row["prompt"]], "answer", row["response"]))
    yield from dict.fromkeys(answers)


def make_groups(problems: Sequence[Problem], answers: Iterable[Candidate], out: pathlib.Path) -> Iterator[list[Member]]:
    """A group of each problem whose reference passes, where enough programs are found, in a random order."""
    draw, candidates = random.Random(1), []
    for problem in problems:
        edits = one_line_edits(problem.program)
        candidates.append(Candidate(problem, "reference", fenced(problem.program)))
        for program in draw.sample(edits, min(EDITS, len(edits))):
            candidates.append(Candidate(problem, "edit", fenced(program)))
    found: dict[str, list[Member]] = {problem.id: [] for problem in problems}
    for member in grade([*candidates, *answers], out):
        found[member.candidate.problem.id].append(member)
    for of_problem in found.values():
        of_origin = {
            origin: [item for item in of_problem if item.candidate.origin == origin] for origin in get_args(Origin)
        }
        reference = of_origin["reference"][0]
        edits = [item for item in of_origin["edit"] if item.verdict == Verdict.WRONG]
        written = [item for item in of_origin["answer"] if item.verdict != Verdict.INVALID]
        members = [reference, *edits[:1], *written, *edits[1:]][:GROUP]
        is_mixed = reference.verdict == Verdict.CORRECT and any(item.verdict == Verdict.WRONG for item in members)
        if is_mixed and len(members) == GROUP:
            draw.shuffle(members)
            yield members


def grade(candidates: Sequence[Candidate], out: pathlib.Path) -> Iterator[Member]:
    """What our sandbox finds, with the rewards of the second paper's Eq. 5."""
    rows = [
        {"id": i, "kind": "code", "response": item.response, "tests": json.loads(item.problem.tests)}
        for i, item in enumerate(candidates)
    ]
    write_lines(out / "programs.jsonl", rows)
    reward = {"functions": {"code": 1.0}, "code_reward": "status", "status_rewards": REWARDS, "cpu_seconds": 2.0}
    (out / "grade.yaml").write_text(json.dumps({"reward": reward}), encoding="utf-8")
    run("grade", out / "programs.jsonl", out / "grades.jsonl", "--config", out / "grade.yaml")
    for candidate, row in zip(candidates, read_lines(out / "grades.jsonl"), strict=True):
        yield Member(candidate, row["status"], row["reward"], row["detail"])


def write_groups(path: pathlib.Path, groups: Iterable[list[Member]]) -> None:
    """In the layout of the first paper's authors (docs/offline.md), which holds text without tokens."""
    rows = []
    for index, members in enumerate(groups):
        for i, (candidate, _, reward, detail) in enumerate(members):
            rows.append(
                {
                    "data_source": candidate.problem.id,
                    "prompt": [{"role": "user", "content": candidate.problem.prompt}],
                    "reward_model": {"ground_truth": candidate.problem.tests},
                    "extra_info": {
                        **{"index": index, "rollout_index": i},
                        "verdict_detail": f"{candidate.origin}: {detail}",
                    },
                    "response": candidate.response,
                    "precomputed_reward": reward,
                    "response_rewards": [member.reward for member in members],
                }
            )
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows), temporary)
    temporary.replace(path)


def one_line_edits(source: str) -> list[str]:
    """The programs that differ from ``source`` in one operator, number or name, in the order of its syntax tree.

    The text around the edit stays as it is, comments included.
    """
    edits = []
    for node in ast.walk(ast.parse(source)):
        for change in changes(node):
            text = replaced(source, node, change)
            if text is not None and text != source and is_python(text):
                edits.append(text)
    return list(dict.fromkeys(edits))


def changes(node: ast.AST) -> Iterator[Callable[[Any], str]]:
    """What may be put in the place of a node, as functions of it."""
    match node:
        case ast.Compare(ops=[op]) | ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            yield with_operator
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            yield lambda node: str(node.value + 1)
            yield lambda node: str(node.value - 1)
        case ast.Constant(value=bool() as value):
            yield lambda node: str(not node.value)
        case ast.Name(id=name) if name in NAMES:
            yield lambda node: NAMES[node.id]
        case ast.UnaryOp(op=ast.Not()):
            yield lambda node: ast.unparse(node.operand)
        case ast.Slice(lower=None, upper=ast.expr()):
            yield lambda node: f"1:{ast.unparse(node.upper)}"


def with_operator(node: Any) -> str:
    """The source of a node whose operator is swapped."""
    swapped = ast.parse(ast.unparse(node), mode="eval").body
    if isinstance(swapped, ast.Compare):
        swapped.ops = [SWAPS[type(node.ops[0])]()]
    else:
        swapped.op = SWAPS[type(node.op)]()  # pyright: ignore[reportAttributeAccessIssue]
    return ast.unparse(swapped)


def replaced(source: str, node: Any, change: Callable[[Any], str]) -> str | None:
    """The source with another text for a node; None where it is longer than a line."""
    if node.lineno != node.end_lineno:
        return None
    lines = source.split("\n")
    line = lines[node.lineno - 1].encode()  # columns are those of UTF-8
    lines[node.lineno - 1] = (line[: node.col_offset] + change(node).encode() + line[node.end_col_offset :]).decode()
    return "\n".join(lines)


def is_python(source: str) -> bool:
    """Whether it can be parsed."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def fenced(program: str) -> str:
    """A program as the response of a model."""
    return f"```python\n{program}\n```"


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def write_lines(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(console.run(main, sys.argv[1:]))

"""A synthetic corpus in the layout of Project CodeNet: toy problems with programs of all five statuses."""

import csv
import pathlib

import numpy as np

STATUSES = ("Accepted", "Wrong Answer", "Time Limit Exceeded", "Runtime Error", "Compile Error")
SUBMISSION_COLUMNS = (
    *("submission_id", "problem_id", "user_id", "date", "language", "original_language", "filename_ext", "status"),
    *("cpu_time", "memory", "code_size", "accuracy"),
)
PROBLEM_COLUMNS = ("id", "name", "dataset", "time_limit", "memory_limit", "rating", "tags", "complexity")
NUMBERS = [(times, plus) for times in range(2, 10) for plus in range(1, 10)]
"""The problem (a, b) is to print a number times a plus b."""


def statement(times: int, plus: int) -> str:
    """The text of a problem."""
    return f"Print n times {times} plus {plus}."


def program(rng: np.random.Generator, times: int, plus: int, status: str) -> str:
    """A random program for a problem: a right one, or one with the mistake of its status."""
    if status == "Wrong Answer":
        times, plus = (times, plus % 9 + 1) if rng.random() < 0.5 else ((times - 1) % 8 + 2, plus)
    body = (f"n*{times}+{plus}", f"{plus}+n*{times}", f"{times}*n+{plus}")[rng.integers(3)]
    if status == "Runtime Error":
        body = body.replace("n", "m")
    lines = ["n=int(input())", f"print({body})"]
    if status == "Time Limit Exceeded":
        lines.insert(1, "while n==n:pass")
    if status == "Compile Error":
        lines[1] = lines[1][:-1]
    return "\n".join(lines)


def write_corpus(root: pathlib.Path, numbers: list[tuple[int, int]], *, seed: int = 0, most: int = 60) -> None:
    """Writes problems with 0 to ``most`` submissions and different shares of accepted ones."""
    rng = np.random.default_rng(seed)
    (root / "metadata").mkdir(parents=True)
    (root / "problem_descriptions").mkdir()
    with (root / "metadata" / "problem_list.csv").open("w", newline="") as file:
        listed = csv.DictWriter(file, PROBLEM_COLUMNS, restval="")
        listed.writeheader()
        for number, (times, plus) in enumerate(numbers, start=1):
            problem = f"p{number:05d}"
            listed.writerow({"id": problem, "name": f"Times {times}", "dataset": "AIZU"})
            page = f"<h1>Times</h1>\n<p>\n{statement(times, plus)}\n</p>"
            (root / "problem_descriptions" / f"{problem}.html").write_text(page)
            samples = root / "derived" / "input_output" / "data" / problem
            samples.mkdir(parents=True)
            (samples / "input.txt").write_text("5\n")
            (samples / "output.txt").write_text(f"{5 * times + plus}\n")
            _write_submissions(root, rng, problem, (times, plus), int(most * rng.random() ** 2))


def _write_submissions(
    root: pathlib.Path, rng: np.random.Generator, problem: str, numbers: tuple[int, int], count: int
) -> None:
    accepted = rng.uniform(0.1, 0.9)
    distribution = [accepted, *((1 - accepted) * np.array([0.55, 0.15, 0.2, 0.1]))]
    (root / "data" / problem).mkdir(parents=True)
    with (root / "metadata" / f"{problem}.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, SUBMISSION_COLUMNS, restval="")
        rows.writeheader()
        for i in range(count):
            status, language = STATUSES[rng.choice(5, p=distribution)], "Python" if rng.random() < 0.9 else "C++"
            name, suffix = f"s{int(problem[1:]):04d}{i:05d}", "py" if language == "Python" else "cpp"
            rows.writerow({"submission_id": name, "problem_id": problem, "language": language, "status": status})
            folder = root / "data" / problem / language
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.{suffix}").write_text(program(rng, *numbers, status) + "\n")

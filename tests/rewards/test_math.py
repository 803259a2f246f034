"""The math grader, as a pure function: extraction, equality, gold answers, real responses. Kinds: test_verdicts.py."""

import json
import random

import pytest

from hostile_programs import pids_of
from oapl_jax.config.reward import RewardConfig
from oapl_jax.rewards import tasks
from oapl_jax.rewards.math import answers
from oapl_jax.rewards.pool import GraderPool
from oapl_jax.rewards.worker import Setup
from oapl_jax.types import Verdict


@pytest.mark.parametrize(
    ("where", "expected"), [("boxed", ["1", None, None]), ("hash", [None, "2", None]), ("any", ["1", "2", "3"])]
)
def test_where_the_answer_is(where, expected):
    responses = [r"so \boxed{1}", "so\n#### 2", "it is 3"]
    assert [answers.extract_answer(response, where) for response in responses] == expected


def is_correct(gold, response):
    return answers.grade_answer(gold, response).is_correct


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"<think>\boxed{3}</think> it is \boxed{4}", "4"),
        (r"<think>\boxed{3}</think> it is four", "it is four"),
        (r"<think>so \boxed{3}", None),
        (r"\boxed{x \} y}", r"x \} y"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{} ", None),
        (r"\boxed{6} and \boxed{8}", "6, 8"),
        (r"\boxed{7}, that is \boxed{7}", "7"),
        (r"$\boxed{(2, 2)} \quad \text{and} \quad \boxed{(6, 2)}$", "(2, 2), (6, 2)"),
        (r"first \boxed{6}. Then, after thought, \boxed{8}", "8"),
        (r"\boxed{5} and \boxed{unclosed", None),
        (r"\boxed{1}, \boxed{234}", "1, 234"),
        ("<answer>42</answer> is it", "42"),
        ("<answer>42", None),
        ("#### The answer is **7** clips", "**7** clips"),
        ("no box at all\nA: 26", "no box at all\nA: 26"),
        ("48 + 16 = $64\n#### 66\n", "66"),
        ("So 2 and 3. The answer is 9/2 * \u03c0.", "9/2 * \u03c0."),
        ("the answer is 18 dollars", "18 dollars"),
        ("the answer is Evelyn.", "Evelyn"),
        ("   ", None),
    ],
)
def test_extraction(response, answer):
    assert answers.extract_answer(response) == answer


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("72", "so it is 72"),
        ("72", r"\boxed{72.0}"),
        ("1000", r"\boxed{1,000}"),
        ("32349", r"\boxed{32,\! 349}"),
        ("1000", r"\boxed{1 000}"),
        ("10", r"\boxed{\$10}"),
        ("18", "She makes 9 * 2 = $18 every day.\n#### 18"),
        (r"\frac{1}{2}", r"\boxed{\dfrac12}"),
        (r"\frac{1}{2}", r"\boxed{0.5}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}"),
        ("p - q", r"\boxed{-q + p}"),
        (r"1-1/\mathrm{e}", r"\boxed{1-\frac{1}{e}}"),
        ("1/2^{99}", r"\boxed{2^{-99}}"),
        (r"\frac{1}{3}", r"\boxed{\frac{11}{33.0}}"),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
        ("10^{10^{10}}", r"\boxed{10^{10^{10}}}"),
        ("1000.99", r"\boxed{1000,99}"),
        ("15\\%", r"\boxed{15}"),
    ],
)
def test_right_answers(gold, response):
    assert is_correct(gold, response), answers.grade_answer(gold, response)


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("72", r"\boxed{27}"),
        ("72", r"72 \boxed{}"),
        ("72", r"\boxed{72}, \boxed{73}"),
        ("12345678901234567890", r"\boxed{12345678901234567891}"),
        ("5", r"\boxed{-5}"),
        ("1/2^{99}", r"\boxed{1/2^{98}}"),
        (r"1-1/\mathrm{e}", r"\boxed{1+1/\mathrm{e}}"),
        ("1", r"\boxed{1-1/}"),
        ("0", r"\boxed{10^{-30}}"),
        ("10^{20}", r"\boxed{10^{20}+1}"),
        ("cannot be determined", r"\boxed{can be determined}"),
        ("[0,1)", r"\boxed{(0,1)}"),
        ("x+1", r"\boxed{x+2}"),
        ("7", "<think>7 is the answer, \\boxed{7}, but I"),
        ("7", ""),
        ("1.234", r"\boxed{1,234}"),
    ],
)
def test_wrong_answers(gold, response):
    assert not is_correct(gold, response), answers.grade_answer(gold, response)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (r"$1 = \zzz = x = 0$", ["0", "x = 0", r"\frac{0}{3}"], ["1", "x", "10", r"\zzz", "x = 1"]),
        (r"\zzz(x) = 4", [r"\zzz(x)=4"], ["4", "x = 4"]),
        (r"\zzz = a, b = 2", [r"\zzz = a, b = 2"], ["2", "b = 2"]),
    ],
)
def test_the_last_equation_counts_where_a_side_of_the_gold_answer_is_no_mathematics(gold, right, wrong):
    assert [answer for answer in right + wrong if is_correct(gold, rf"\boxed{{{answer}}}")] == right


def test_gold_of_gsm8k_is_after_the_last_hashes():
    assert answers.extract_gold("a #### 3\nb\n#### 1,234 ", "last_hash") == "1234"
    assert answers.extract_gold(" 1,234 ", "whole") == "1,234"
    with pytest.raises(ValueError, match="the answer has no '####': 'none'"):
        answers.extract_gold("none", "last_hash")


def test_usable_golds():
    for gold in ("5", "-1,234.5", r"\frac{1}{2}", r"$x \in [1, 2)$", r"\text{east}", r"so \boxed{7}"):
        assert answers.is_usable_gold(gold), gold
    for gold in ("", "  ", r"\frac{1}{2}{", "(" * 40 + "1" + ")" * 40):
        assert not answers.is_usable_gold(gold), gold


def test_a_gold_that_does_not_parse_is_never_a_wrong_verdict():
    with pytest.raises(ValueError, match=r"gold answer '\\\\boxed\{\}' does not parse"):
        answers.grade_answer(r"\boxed{}", r"\boxed{42}")


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_rows"), [("gsm8k_rollouts", 2638), ("qwen25math_rollouts", 400)])
def test_real_rollouts_get_their_labels(shared_data, name, num_rows):
    rows = read_jsonl(shared_data / "grader" / f"{name}.jsonl")
    assert len(rows) == num_rows
    assert [row["answer"] for row in rows if is_correct(row["gold"], row["answer"]) != row["expected"]] == []


MISSED = {
    166,  # boxes in the middle of the solution, the answer without one after them: the last box counts
}


@pytest.mark.slow
def test_cases_of_other_graders(shared_data):
    """On 194 cases that all projects judge alike, at least 98 % agree and no verdict is a false positive."""
    rows = [row for row in read_jsonl(shared_data / "grader" / "grader_cases.jsonl") if not row.get("policy")]
    assert len(rows) == 194
    golds = [row["gold"] if isinstance(row["gold"], list) else [row["gold"]] for row in rows]
    # One case has alternatives of which only empty boxes: as a single gold they would be refused at load time.
    golds = [[g for g in gold if g not in ("", r"\boxed{}")] for gold in golds]
    verdicts = [any(is_correct(g, row["answer"]) for g in gold) for row, gold in zip(rows, golds, strict=True)]
    missed = {row["id"] for row, verdict in zip(rows, verdicts, strict=True) if row["expected"] and not verdict}
    false = [row["id"] for row, verdict in zip(rows, verdicts, strict=True) if verdict and not row["expected"]]
    assert false == []
    assert missed == MISSED


PIECES = (
    [
        rf"\{name}"
        for name in ("frac", "sqrt", "sum", "int", "prod", "binom", "left(", "right)", "boxed{", "text{", "log")
    ]
    + list("{}()[]^_!/*+-=<>,.|$%&\\ \n")
    + [
        "0",
        "1",
        "9" * 30,
        "x",
        "e",
        "pi",
        "i",
        "10^",
        "{10}",
        "^{9}",
        "^{^",
        "!!",
        "..",
        "\x00",
        "\u0660",
        "\U0001f600",
    ]
)


def garbage(number):
    """Answers that a collapsed model, or one that wants to stall the grader, could write."""
    rng = random.Random(number)
    length = rng.choice([1, 3, 10, 30, 100])
    text = "".join(rng.choice(PIECES) for _ in range(length)) * rng.choice([1, 1, 1, 5])
    return rf"\boxed{{{text}}}" if rng.random() < 0.7 else text


@pytest.mark.slow
def test_two_thousand_garbage_answers_hang_no_worker():
    reward = RewardConfig(timeout=20.0)
    golds = ["5", r"\frac{1}{2}", "x^2+1", "[0,1)", r"\sqrt{2}"]
    made = [tasks.math_task(reward, golds[number % 5], garbage(number)) for number in range(2000)]
    with GraderPool(2, 0, Setup()) as pool:
        pool.grade(made[:2])
        pids = pids_of(pool)
        grades = pool.grade(made)
        assert pids_of(pool) == pids, "no worker had to be killed"
    assert [grade for grade in grades if grade.verdict is Verdict.INVALID] == []
    assert sum(grade.cpu_ms for grade in grades) / 2000 < 50
    assert sum(grade.verdict is Verdict.CORRECT for grade in grades) < 20, "some say 5"

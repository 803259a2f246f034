"""The reward functions of a config: parts, sums, bonus and penalty, and the mistakes that stop a run."""

import json
import math
import os
import pathlib
import re

import numpy as np
import pytest

from oapl_jax.cli import grade as command
from oapl_jax.config.config_file import ConfigError, load_reward
from oapl_jax.config.reward import RewardConfig
from oapl_jax.io import console
from oapl_jax.rewards import grader, tasks
from oapl_jax.rewards.code.sandbox import isolation
from oapl_jax.types import FinishReason, Grade, Prompt, Verdict

pytestmark = pytest.mark.usefixtures("sandboxed")

DOUBLE = json.dumps([{"stdin": "3\n", "stdout": "6"}, {"stdin": "-4\n", "stdout": "-8"}])
RIGHT, HALF_RIGHT = "```python\nprint(2 * int(input()))\n```", "```python\nprint(6)\n```"


@pytest.fixture
def make(monkeypatch):
    """Makes graders of a section `reward`; their workers can import this folder's modules."""
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent), prepend=os.pathsep)
    made = []

    def make_grader(**values):
        reward = RewardConfig.model_validate({"workers": 1, "timeout": 20.0, **values})
        made.append(grader.grader_of(None, reward))
        return made[-1]

    yield make_grader
    for running in made:
        running.close()


def prompt(answer, prompt_id="rows/0"):
    return Prompt(id=prompt_id, token_ids=np.zeros(1, np.int32), text="?", answer=answer)


def graded(running, answer, *texts, reason=FinishReason.STOP):
    return running.grade([(prompt(answer), text, reason) for text in texts])


def test_code_rewards(make):
    running = make(functions={"code": 1.0}, code_reward="fraction")
    running.check_golds([prompt(DOUBLE)])
    grades = graded(running, DOUBLE, RIGHT, HALF_RIGHT, "no program")
    assert [(g.verdict, g.reward) for g in grades] == [("correct", 1.0), ("wrong", 0.5), ("wrong", 0.0)]
    assert {g.level for g in grades[:2]} == {"namespaces"}
    assert grades[1].detail.startswith("wrong_answer in test 1: printed '6\\n'")
    assert all(g.cpu_ms > 0 for g in grades)


TROUBLE = {
    "surrogates": "raise ValueError('\\ud800' * 500)",
    "control characters": "raise ValueError('\\x00' * 500)",
    "depth": "x = []\n    for _ in range(900): x = [x]\n    return x",
    "megabytes": "return [[]] * 4_000_000",
    "a status of ours": "import os\n    os._exit(99)",
}


@pytest.mark.slow
@pytest.mark.parametrize("body", TROUBLE.values(), ids=TROUBLE)
def test_a_program_cannot_have_itself_excused(make, body):
    """Whatever it makes the grader read, show or send, its verdict is wrong and never invalid."""
    running = make(functions={"code": 1.0}, retries=3)
    tests = json.dumps([{"call": "f", "args": [], "expected": 1}])
    (grade,) = graded(running, tests, f"```python\ndef f():\n    {body}\n```")
    assert (grade.verdict, grade.reward) == ("wrong", 0.0), grade
    grade.detail.encode()


def test_rewards_by_status(make):
    rewards = {"accepted": 1.0, "wrong_answer": 0.1, "compile_error": -1.0}
    running = make(functions={"code": 1.0}, code_reward="status", status_rewards=rewards)
    grades = graded(running, DOUBLE, RIGHT, HALF_RIGHT, "```\nprint(\n```", "no program", "```\n1/0\n```")
    assert [g.reward for g in grades] == [1.0, 0.1, -1.0, -1.0, 0.0]


def test_a_weighted_sum_with_a_function_of_the_user_a_bonus_and_a_penalty(make):
    running = make(
        functions={"math": 1.0, "my_rewards:shortness": 0.5},
        format_pattern=r"^so ",
        format_bonus=0.2,
        length_penalty=10.0,
        length_free=20,
    )
    running.check_golds([prompt("1/2")])
    texts = ["so \\boxed{0.5}", "\\boxed{0.5}", "so \\boxed{3}", "so " + "long " * 10 + "\\boxed{1/2}"]
    grades = graded(running, "1/2", *texts)
    assert [g.verdict for g in grades] == ["correct", "correct", "wrong", "correct"]
    penalty = 10 * (len(texts[3]) - 20) / 1000
    assert [g.reward for g in grades] == pytest.approx([1.325, 1.125, 0.325, 1.325 - penalty])
    (truncated,) = graded(running, "1/2", texts[3], reason=FinishReason.LENGTH)
    assert (truncated.verdict, truncated.reward) == ("wrong", pytest.approx(-penalty))


def test_a_function_of_the_user_may_give_the_whole_verdict(make):
    running = make(functions={"my_rewards:graded": 1.0})
    running.check_golds([])
    right, wrong = graded(running, "7", "7", "8")
    assert (right.verdict, right.reward, right.detail) == ("correct", 2.0, "mine")
    assert (wrong.verdict, wrong.reward) == ("wrong", 0.0)


def test_a_function_of_the_user_that_fails_is_invalid(make):
    running = make(functions={"my_rewards:broken": 1.0, "math": 1.0}, timeout=1.0, retries=0)
    for text, reason in (
        ("x", "KeyError"),
        ("nan", "neither a finite number nor a Grade"),
        ("late", "no verdict in 1 s"),
    ):
        (grade,) = graded(running, "1", text)
        assert (grade.verdict, math.isnan(grade.reward)) == ("invalid", True)
        assert reason in grade.detail


@pytest.mark.parametrize("name", ["my_rewards:nothing", "no_such_module:f"])
def test_a_function_that_is_not_there_stops_the_run(make, name):
    with pytest.raises(ValueError, match=f"reward.functions: '{name}' cannot be used: .*Error"):
        make(functions={name: 1.0}, retries=0).check_golds([])


def test_rows_without_tests_are_named(make):
    with pytest.raises(ValueError, match=r"row rows/7: its tests cannot be used: tests: should be a list of at least"):
        make(functions={"code": 1.0}).check_golds([prompt(DOUBLE), prompt("[]", "rows/7")])


def test_graders_that_fail_their_canaries_stop_the_run(make, monkeypatch):
    monkeypatch.setattr(tasks, "_CODE_CANARIES", (('[{"stdin": "", "stdout": "7"}]', "print(8)", True),))
    with pytest.raises(
        ValueError, match=r"the code grader fails its test: 'print\(8\)' should be correct, but is wrong"
    ):
        make(functions={"code": 1.0}).check_golds([])


def test_a_machine_below_the_level_of_the_config_stops_the_run(make, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # where there is no bwrap
    with pytest.raises(
        ValueError, match=r"(?s)no sandbox of level 'namespaces' or stronger.*bubblewrap is not installed"
    ):
        make(functions={"code": 1.0}, retries=0).check_golds([])


def test_a_weaker_level_is_taken_only_if_allowed_and_never_quietly(make, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    running = make(functions={"code": 1.0}, isolation="landlock")
    with pytest.warns(grader.WeakIsolationWarning, match="below namespaces"):
        running.check_golds([prompt(DOUBLE)])
    (grade,) = graded(running, DOUBLE, RIGHT)
    assert (grade.verdict, grade.level) == ("correct", "uid" if isolation.is_root() else "landlock")


def test_compose_is_invalid_where_a_part_is():
    reward, good = RewardConfig(), Grade(Verdict.CORRECT, 1.0)
    invalid = Grade(Verdict.INVALID, math.nan, "why")
    assert grader.compose(reward, [1.0, 1.0], [good, invalid], "") == invalid


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"functions": {"meth": 1.0}}, "functions: 'meth' is not math, code, or package.module:function"),
        ({"functions": {}}, "at least 1 item"),
        ({"cpu_seconds": 3.0}, "cpu_seconds: has no effect with functions="),
        ({"functions": {"code": 1.0}, "gold": "last_hash"}, "gold: has no effect with functions="),
        ({"functions": {"code": 1.0}, "status_rewards": {"accepted": 2.0}}, "status_rewards: has no effect"),
        ({"format_pattern": "x"}, "format_pattern: has no effect with format_bonus=0"),
        ({"format_bonus": 1.0}, "format_bonus: needs format_pattern"),
        ({"format_bonus": 1.0, "format_pattern": "("}, "is not a regular expression"),
        ({"functions": {"code": 1.0}, "isolation": "none"}, "'namespaces', 'uid' or 'landlock'"),
    ],
)
def test_options_without_effect_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig.model_validate(values)


# ---- python -m oapl_jax grade ----

ROWS = [
    {"id": 1, "kind": "math", "gold": "1/2", "response": "so \\boxed{0.5}"},
    {"id": "b", "kind": "code", "program": "print(2 * int(input()))", "tests": json.loads(DOUBLE)},
    {"id": "c", "kind": "code", "response": RIGHT, "tests": [{"stdin": "1", "stdout": "3"}], "limits": {"cpu_s": 1}},
    {
        "id": None,
        "kind": "code",
        "program": "def f(a): return a + 1",
        "tests": [{"call": "f", "args": [1], "expected": 2}, {"assert": "assert f(2) == 3"}],
        "limits": {"wall_s": 20, "memory_mb": 200},
    },
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_grades_rows_in_order(tmp_path, capsys):
    source, target = write(tmp_path / "in.jsonl", ROWS * 3), tmp_path / "out.jsonl"
    assert command.main([str(source), str(target)]) == 0
    assert capsys.readouterr().out == "9 correct, 3 wrong, 0 invalid\n"
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert all(list(row) == ["id", "status", "reward", "detail", "level", "cpu_ms"] for row in rows)
    assert [row["id"] for row in rows] == [1, "b", "c", None] * 3
    assert [(row["status"], row["reward"]) for row in rows[:4]] == [
        ("correct", 1.0),
        ("correct", 1.0),
        ("wrong", 0.0),
        ("correct", 1.0),
    ]
    assert [row["level"] for row in rows[:4]] == ["", "namespaces", "namespaces", "namespaces"]


def test_the_command_takes_the_options_of_a_config(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("reward: {functions: {math: 2.0}, answer: boxed}\nmodel: {path: unused}\n")
    rows = [{"id": 1, "kind": "math", "gold": "5", "response": text} for text in ("\\boxed{5}", "it is 5")]
    target = tmp_path / "out.jsonl"
    assert command.main([str(write(tmp_path / "in.jsonl", rows)), str(target), "--config", str(config)]) == 0
    assert [json.loads(line)["reward"] for line in target.read_text().splitlines()] == [2.0, 0.0]
    config.write_text("reward: {functions: {math: 2.0, 'mine:judge': 1.0}}\nmodel: {path: unused}\n")
    command.main([str(tmp_path / "in.jsonl"), str(target), "--config", str(config)])
    assert "not run: mine:judge; " in capsys.readouterr().err
    config.write_text("model: {path: unused}\n")
    with pytest.raises(ConfigError, match="has no section 'reward'"):
        load_reward(config)


def test_the_command_reports_the_rule_and_reads_the_prompt(tmp_path, capsys):
    row = {"id": 1, "kind": "math", "gold": "12", "response": "84/7"}
    rows = [row, {**row, "prompt": "What is 84/7?"}, {**row, "response": "10 + 2"}]
    config, target = tmp_path / "c.yaml", tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", rows)
    config.write_text("reward: {form: any}\n")
    for options, pending in (
        ([], ("wrong", "pending arithmetic")),
        (["--config", str(config)], ("correct", "equal values")),
    ):
        assert command.main([str(source), str(target), *options]) == 0
        graded = [json.loads(line) for line in target.read_text().splitlines()]
        expected = [("correct", "equal values"), ("wrong", "an expression of the prompt"), pending]
        assert [(row["status"], row["detail"]) for row in graded] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "maths"}, "line 2: a row is an object whose 'kind' is math or code"),
        ({"kind": "math", "id": 1, "gold": "1"}, r"line 2: missing keys \['response'\]"),
        ({**ROWS[0], "prompt": 3}, "line 2: response and prompt are text"),
        ({**ROWS[1], "language": "c"}, r"unknown keys \['language'\]"),
        ({**ROWS[1], "response": ""}, "give either program or response"),
        ({**ROWS[1], "limits": {"cpu": 1}}, "limits: should be positive numbers for cpu_s, memory_mb, wall_s"),
        ({**ROWS[1], "tests": []}, "at least one test"),
    ],
)
def test_the_command_names_the_line_that_is_not_a_row(tmp_path, capsys, row, message):
    target = tmp_path / "out.jsonl"
    assert console.run(command.main, [str(write(tmp_path / "in.jsonl", [ROWS[0], row])), str(target)]) == 2
    assert not target.exists(), "nothing is graded before all rows are checked"
    assert re.search(message, capsys.readouterr().err)

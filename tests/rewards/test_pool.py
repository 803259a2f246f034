"""The worker processes: order, kills, hostile answers, no leftover processes; and the graders that use them."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from hostile_programs import pids_of
from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.reward import RewardConfig
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.rewards import grader, pool, tasks
from oapl_jax.rewards.worker import Setup
from oapl_jax.types import FinishReason, Prompt, Verdict

BROKEN = RewardConfig(functions={"my_rewards:broken": 1.0}, timeout=20.0)
SLEEP = tasks.function_task(BROKEN, "my_rewards:broken", Prompt("0", np.zeros(1, np.int32), "?", "5"), ["late"])
"""A task that keeps a worker busy for as long as it may."""


@pytest.fixture(scope="module")
def workers():
    with pool.GraderPool(2, 1, Setup()) as running:
        yield running


def answers(items, timeout=20.0):
    """Tasks that compare answers with gold answers."""
    reward = RewardConfig(timeout=timeout)
    return [tasks.math_task(reward, gold, response) for gold, response in items]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_grades_keep_the_order_of_the_items(workers):
    items = [(str(i), rf"\boxed{{\frac{{{2 * i}}}{{{2 if i % 3 else 3}}}}}") for i in range(1, 60)]
    grades = workers.grade(answers(items))
    assert [g.verdict for g in grades] == [Verdict.CORRECT if i % 3 else Verdict.WRONG for i in range(1, 60)]
    assert [g.reward for g in grades] == [1.0 if i % 3 else 0.0 for i in range(1, 60)]
    assert workers.grade([]) == []


def test_hostile_answers_are_wrong_at_once(workers):
    hostile = [
        r"\boxed{10^{10^{10}}}",
        r"\boxed{(10^9)!}",
        "\\boxed{" + "(" * 300 + "1" + ")" * 300 + "}",
        r"\boxed{9^{9^{9^9}} \mod 7}",
        r"\boxed{\binom{10^9}{10^8}}",
        r"\boxed{(x+1)^{100000}}",
        r"\boxed{\sum_{i=1}^{10^9} i^i}",
        r"\boxed{99999999!!}",
        r"\boxed{" * 20_000,
        "{" * 50_000,
        "$" * 20_000,
        "answer is " * 20_000,
        "\x00\ud800\U0001f600" * 100,
    ]
    pids = pids_of(workers)
    began = time.monotonic()
    grades = workers.grade(answers([("5", answer) for answer in hostile]))
    assert {g.verdict for g in grades} == {Verdict.WRONG}
    assert pids_of(workers) == pids, "no worker had to be killed"
    assert time.monotonic() - began < 15


@pytest.fixture
def exhausting(monkeypatch, tmp_path):
    """Workers in which two words of a response exhaust the time and the memory of its verdict."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'oapl_jax.rewards.worker' in sys.orig_argv:\n"
        "    from oapl_jax.rewards.math import extraction\n"
        "    find = extraction.find_boxes\n"
        "    def find_boxes(text):\n"
        "        while 'forever' in text: pass\n"
        "        bytearray(1 << 40) if 'everything' in text else None\n"
        "        return find(text)\n"
        "    extraction.find_boxes = find_boxes\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


@pytest.mark.parametrize(("word", "reason"), [("forever", "no verdict in 1 s"), ("everything", "out of memory")])
def test_an_answer_that_exhausts_its_worker_is_wrong_and_the_others_are_graded(exhausting, word, reason):
    with pool.GraderPool(2, 1, Setup()) as running:
        running.grade(answers([("1", r"\boxed{1}")] * 20))
        pids, began = pids_of(running), time.monotonic()
        items = [("5", r"\boxed{5}"), ("5", rf"{word} \boxed{{5}}"), ("5", r"\boxed{\frac{10}{2}}")]
        grades = running.grade(answers(items, timeout=1.0))
        assert [(g.verdict, g.reward) for g in grades] == [("correct", 1.0), ("wrong", 0.0), ("correct", 1.0)]
        assert grades[1].detail == f"{reason}, unlike the gold answer"
        assert pids_of(running) == pids, "the same worker judged the gold answer"
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(("word", "reason"), [("forever", "no verdict in 1 s"), ("everything", "out of memory")])
def test_an_answer_is_not_to_blame_if_its_gold_answer_is_not_judged_either(exhausting, word, reason):
    with pool.GraderPool(1, 0, Setup()) as running:
        (grade,) = running.grade(answers([(word, rf"{word} \boxed{{5}}")], timeout=1.0))
        assert (grade.verdict, grade.detail) == (Verdict.INVALID, reason)
        assert math.isnan(grade.reward)
        (grade,) = running.grade(answers([("5", r"\boxed{5}")]))
        assert grade.verdict == Verdict.CORRECT


def test_workers_killed_from_outside_are_replaced_and_their_answers_tried_again(workers):
    items = [("1/3", rf"\boxed{{\frac{{{i}}}{{{3 * i}.0}}}}") for i in range(1, 300)]
    victims = pids_of(workers)
    killer = threading.Timer(0.2, lambda: [os.kill(pid, signal.SIGKILL) for pid in victims])
    killer.start()
    grades = workers.grade(answers(items))
    killer.join()
    workers.grade(answers(items[:4]))
    assert {g.verdict for g in grades} == {Verdict.CORRECT}
    assert not set(victims) & set(pids_of(workers))


@pytest.fixture
def own_rewards(monkeypatch):
    """Workers can import this folder's modules."""
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent), prepend=os.pathsep)


def test_a_worker_that_is_killed_again_and_again_leaves_an_invalid_verdict(own_rewards):
    stop = threading.Event()
    with pool.GraderPool(1, 1, Setup()) as running:
        running.grade(answers([("1", r"\boxed{1}")]))
        (first,) = pids_of(running)

        def kill_all() -> None:
            while not stop.wait(0.01):
                worker = running._workers[0]
                if worker._num_done > (worker.process.pid == first):
                    worker.process.kill()

        thread = threading.Thread(target=kill_all)
        thread.start()
        grade = running.grade([SLEEP])[0]
        stop.set()
        thread.join()
    assert (grade.verdict, grade.detail) == (Verdict.INVALID, "worker died")
    assert math.isnan(grade.reward)


def test_a_stopped_worker_does_not_hang_the_caller():
    with pool.GraderPool(1, 1, Setup()) as running:
        running.grade(answers([("1", r"\boxed{1}")]))
        os.kill(pids_of(running)[0], signal.SIGSTOP)
        grade = running.grade(answers([("5", "5" * 3_000_000)], timeout=1.0))[0]
        assert grade.verdict == Verdict.WRONG, "the replacement graded it"


def test_old_workers_are_replaced(monkeypatch):
    monkeypatch.setattr(pool, "TASKS_PER_WORKER", 10)
    with pool.GraderPool(1, 0, Setup()) as running:
        first = pids_of(running)
        assert all(g.reward == 1 for g in running.grade(answers([("1", r"\boxed{1}")] * 25)))
        assert pids_of(running) != first


def test_closing_ends_the_processes_and_a_closed_pool_says_so():
    running = pool.GraderPool(2, 0, Setup())
    running.grade(answers([("1", r"\boxed{1}")]))
    pids = pids_of(running)
    running.close()
    running.close()
    assert not any(is_alive(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="the grading pool is closed"):
        running.grade(answers([("1", r"\boxed{1}")]))


@pytest.mark.parametrize("script", ["exit 1", "echo hello >&0; sleep 60", "sleep 60"])
def test_a_worker_that_cannot_start_is_an_error(monkeypatch, tmp_path, script):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{script}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(pool, "START_TIMEOUT", 2.0)
    began = time.monotonic()
    with (
        pool.GraderPool(1, 3, Setup()) as running,
        pytest.raises(RuntimeError, match="did not start"),
    ):
        running.grade(answers([("1", r"\boxed{1}")]))
    assert time.monotonic() - began < 3.5


def test_finished_tasks_are_counted_without_those_that_are_tried_again(monkeypatch):
    monkeypatch.setattr(pool, "FIRST_PAUSE", 0.01)
    counts = []
    with pool.GraderPool(1, 1, Setup()) as running:
        running.grade([{"kind": "unknown", "timeout": 2.0}] * 2 + answers([("1", r"\boxed{1}")] * 2), counts.append)
    assert counts == [1, 2, 3, 4]


@pytest.mark.parametrize("ending", ["sys.exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_worker_outlives_its_parent(own_rewards, ending):
    program = f"""
import os, signal, sys, threading
from oapl_jax.config.reward import RewardConfig
from oapl_jax.rewards import tasks
from oapl_jax.rewards.pool import GraderPool
from oapl_jax.rewards.worker import Setup
pool = GraderPool(2, 0, Setup())
reward = RewardConfig(timeout=2.0)
pool.grade([tasks.math_task(reward, "1", "1")] * 4)
print(*[worker.process.pid for worker in pool._workers], *[worker.child for worker in pool._workers if worker.child], flush=True)
threading.Thread(target=pool.grade, args=([{{**{SLEEP!r}, "timeout": 2.0}}],), daemon=True).start()
{ending}
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=root)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) > 2, done.stderr
    give_up = time.monotonic() + 15
    while any(is_alive(pid) for pid in pids) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in pids)


def test_workers_are_light(workers):
    workers.grade(answers([("1", r"\boxed{1}")]))
    for pid in pids_of(workers):
        maps = pathlib.Path(f"/proc/{pid}/maps").read_text()
        assert "jaxlib" not in maps
        assert "tensorflow" not in maps


def train_config(data, **reward):
    return TrainConfig.model_validate(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"config": "unused", "tokenizer": "characters"},
            "data": data,
            "sampler": {"max_response_tokens": 6},
            "reward": reward,
        }
    )


def prompt(text, answer="", prompt_id="rows/0"):
    return Prompt(id=prompt_id, token_ids=np.zeros(1, np.int32), text=text, answer=answer)


def test_toy_grader():
    tasks_grader = grader.make_grader(train_config({"task": "chain"}))
    chain = prompt("7+5*3-8*4+6=")
    text = CharacterTokenizer().decode([4, 8, 10, 4, 10, 1])
    assert text == "26828"
    tasks_grader.check_golds([chain])
    grades = tasks_grader.grade(
        [(chain, text, FinishReason.STOP), (chain, text, FinishReason.LENGTH), (chain, "26827", FinishReason.STOP)]
    )
    assert [(g.verdict, g.reward) for g in grades] == [("correct", 1.0), ("wrong", 0.0), ("wrong", 0.0)]
    tasks_grader.close()


@pytest.mark.slow
def test_math_grader_names_the_rows_of_bad_golds_and_calls_truncated_responses_wrong():
    math_grader = grader.make_grader(train_config({"path": "unused"}, workers=1, gold="last_hash"))
    good = prompt("1+2?", "because\n#### 3")
    math_grader.check_golds([good])
    with pytest.raises(
        ValueError, match=r"1 gold answers do not parse as mathematics:\n  row rows/7: '\\\\frac\{1\}\{'"
    ):
        math_grader.check_golds([good, prompt("?", r"#### \frac{1}{", "rows/7"), prompt("?", "#### 7", "rows/7")])
    with pytest.raises(ValueError, match=r"row rows/8: the answer has no '####': '3' \(reward.gold=last_hash\)"):
        math_grader.check_golds([good, prompt("?", "3", "rows/8")])
    answers = [(r"\boxed{3}", FinishReason.LENGTH), (r"\boxed{3}", FinishReason.STOP), ("4", FinishReason.STOP)]
    grades = math_grader.grade([(good, text, reason) for text, reason in answers])
    assert [(g.verdict, g.reward) for g in grades] == [("wrong", 0.0), ("correct", 1.0), ("wrong", 0.0)]
    math_grader.close()


@pytest.mark.slow
def test_gsm8k_golds_parse_and_answers_are_judged(shared_data, workers):
    lines = (shared_data / "math" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [prompt("", json.loads(line)["answer"], f"gsm8k/train/{i}") for i, line in enumerate(lines) if line]
    assert len(rows) == 7473
    math_grader = grader.RewardGrader(workers, RewardConfig(gold="last_hash", timeout=20.0))
    math_grader.check_golds(rows)
    golds = [row.answer.rpartition("####")[2].strip() for row in rows]
    right = [(row, f"It is \\boxed{{{gold}}}.", FinishReason.STOP) for row, gold in zip(rows, golds, strict=True)]
    assert {g.verdict for g in math_grader.grade(right)} == {Verdict.CORRECT}
    whole = [(row, row.answer, FinishReason.STOP) for row in rows[:1000]]
    assert {g.verdict for g in math_grader.grade(whole)} == {Verdict.CORRECT}
    perturbed = [
        (row, f"It is \\boxed{{{int(gold.replace(',', '')) + 1 + i % 5}}}.", FinishReason.STOP)
        for i, (row, gold) in enumerate(zip(rows, golds, strict=True))
    ]
    assert {g.verdict for g in math_grader.grade(perturbed)} == {Verdict.WRONG}

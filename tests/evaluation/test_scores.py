"""Rollout logs to scores, tables and pictures: counts against values by hand, shortages reported, comparisons paired."""

import csv
import json
import math
import struct

import numpy as np
import pytest

from oapl_jax.cli import evaluate
from oapl_jax.evaluation import scores, tables, tally
from oapl_jax.io import console
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict

REWARDS = {Verdict.CORRECT: 1.0, Verdict.WRONG: 0.0, Verdict.INVALID: math.nan}
LETTERS = {"c": Verdict.CORRECT, "w": Verdict.WRONG, "i": Verdict.INVALID, "t": Verdict.WRONG}


def sample(letter, text="", tokens=5):
    """c: correct; w: wrong; i: invalid; t: truncated at the limit."""
    verdict = LETTERS[letter]
    reason = FinishReason.LENGTH if letter == "t" else FinishReason.STOP
    drawn = Rollout(np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.float32), reason)
    return GradedRollout(drawn, text, Grade(verdict, REWARDS[verdict]), math.nan)


def write(folder, problems, version=0, answer="4"):
    """Writes a log of ``{prompt_id: samples}``; a sample is a letter, or a letter and a text."""
    groups = []
    for index, (name, samples) in enumerate(problems.items()):
        prompt = Prompt(name, np.zeros(1, np.int32), "?", answer)
        rollouts = tuple(sample(*item) if isinstance(item, tuple) else sample(item) for item in samples)
        groups.append(RolloutGroup(index, version, prompt, rollouts, math.nan))
    RolloutLog(folder).append(groups)
    return folder


def values(score, metric):
    return {value.k: value.value for value in score.of(metric)}


def test_counts_by_hand(tmp_path):
    log = write(tmp_path, {"gsm8k/test/0": "ccww", "gsm8k/test/1": "wwtw", "math500/test/0": "cc"})
    found = {item.benchmark: item for item in scores.score("a", tally.read(log, 0))}
    gsm8k = found["gsm8k/test"]
    assert values(gsm8k, "pass") == pytest.approx({1: 0.25, 2: 5 / 12, 3: 0.5, 4: 0.5})
    assert values(gsm8k, "avg") == {1: 0.5, 2: 0.5, 4: 0.25}
    assert gsm8k.counts == {
        "problems": 2,
        "samples": 8,
        "verdict_correct": 2,
        "verdict_wrong": 6,
        "verdict_invalid": 0,
        "response_tokens": 5.0,
        "truncated": 0.125,
    }
    average = found[scores.AVERAGE]
    assert values(average, "pass") == pytest.approx({1: 0.625, 2: (5 / 12 + 1) / 2})
    assert average.counts["problems"] == 3
    for value in gsm8k.of("pass"):
        assert value.low <= value.value <= value.high


def test_majority_votes_by_answers(tmp_path):
    box = r"so \boxed{%s}"
    votes = [("c", box % "4"), ("c", box % "4.0"), ("w", box % "5"), ("w", box % "$5$"), ("w", box % "5.00"), ("t", "")]
    log = write(tmp_path / "a", {"math500/test/0": votes})
    (score,) = scores.score("a", tally.read(log, 0))
    assert values(score, "maj")[6] == 0.0  # three say 5, two say 4, one was truncated
    log = write(tmp_path / "b", {"math500/test/0": [*votes, ("c", "the answer is 4")]})
    (score,) = scores.score("b", tally.read(log, 0))
    assert values(score, "maj")[7] == 0.5  # a tie
    log = write(tmp_path / "c", {"mbpp/test/0": "cw"}, answer='{"test_list": []}')
    (score,) = scores.score("c", tally.read(log, 0))
    assert values(score, "maj") == {}  # programs have no answers


def test_problems_with_fewer_samples_are_counted_and_named(tmp_path):
    log = write(tmp_path / "log", {"gsm8k/test/0": "cwww", "gsm8k/test/1": "ci", "gsm8k/test/2": "ii"})
    (score,) = scores.score("a", tally.read(log, 0))
    assert {v.k: (v.value, v.num_problems, v.num_short) for v in score.of("pass")} == {
        1: (pytest.approx(0.625), 2, 1),
        2: (0.5, 1, 2),
        3: (0.75, 1, 2),
        4: (1.0, 1, 2),
    }
    table = evaluate.report([("a", log)], tmp_path / "out")
    assert "2 of 3 problems have fewer than 4 samples" in table
    assert "gsm8k/test/1 (1), gsm8k/test/2 (0)" in table


def test_a_difference_is_paired_and_of_shared_problems(tmp_path):
    """b solves the problems that a solves and one more, so the paired interval is far narrower."""
    rng = np.random.default_rng(0)
    solved = rng.integers(0, 2, 60)
    mine = {f"aime2025/test/{i}": "cccc" if x else "wwww" for i, x in enumerate(solved)}
    theirs = {name: ("cccc" if i < 6 else samples) for i, (name, samples) in enumerate(mine.items())}
    theirs["aime2025/test/99"] = "cccc"
    a, b = write(tmp_path / "a", mine), write(tmp_path / "b", theirs)
    (comparison,) = scores.compare("b", tally.read(b, 0), "a", tally.read(a, 0))
    assert comparison.counts == {"unpaired": 1}
    expected = (6 - solved[:6].sum()) / 60
    first = comparison.values[0]
    assert (first.value, first.num_problems) == (pytest.approx(expected), 60)
    (unpaired,) = scores.score("a", tally.read(a, 0))
    one = unpaired.of("pass")[0]
    assert first.high - first.low < 0.6 * (one.high - one.low)
    (same,) = scores.compare("a", tally.read(a, 0), "a", tally.read(a, 0))
    assert {(v.value, v.low, v.high) for v in same.values} == {(0.0, 0.0, 0.0)}


def test_files_hold_what_the_table_says_and_pictures_are_pictures(tmp_path):
    a = write(tmp_path / "a", {"gsm8k/test/0": "cw", "math500/test/0": "ww"})
    write(a, {"gsm8k/test/0": "cc", "math500/test/0": "cw"}, version=7)
    table = evaluate.report([("run", a)], tmp_path / "out")
    assert "run@0" in table
    assert "run@7, gsm8k/test: k=1: +50.0" in table
    records = json.loads((tmp_path / "out" / tables.JSON_FILE).read_text())
    found = {(item["label"], item["benchmark"]): item["values"] for item in records["scores"]}
    assert found["run@0", "gsm8k/test"]["pass@2"]["value"] == 1.0
    assert found["run@7", "average"]["pass@1"]["value"] == pytest.approx(0.75)
    with (tmp_path / "out" / tables.CSV_FILE).open() as file:
        rows = {(r["label"], r["benchmark"], r["metric"], r["k"]): r for r in csv.DictReader(file)}
    assert float(rows["run@0", "gsm8k/test", "pass", "1"]["value"]) == 0.5
    assert rows["run@7", "gsm8k/test", "difference", "1"]["baseline"] == "run@0"
    for name in ("passk.png", "difference.png", "versions.png"):
        data = (tmp_path / "out" / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert min(struct.unpack(">II", data[16:24])) > 400


def test_mistakes_of_the_command_line_are_named(tmp_path, capsys):
    log = write(tmp_path / "log", {"gsm8k/test/0": "cw"})
    (tmp_path / "other").mkdir()
    for logs, message in (
        ([log, log], "two logs are called 'log'"),
        ([tmp_path / "other"], "has no rollouts"),
    ):
        words = [word for path in logs for word in ("--log", str(path))]
        assert console.run(evaluate.main, [*words, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    (log / "000000" / "part-000001.parquet").write_bytes(b"PAR1 torn")
    assert console.run(evaluate.main, ["--log", str(log), "--out", str(tmp_path / "out")]) == 2
    assert "not a readable Parquet file" in capsys.readouterr().err

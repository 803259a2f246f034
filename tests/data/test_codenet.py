"""Project CodeNet as groups in a rollout log: which programs form a group, what is left out, and their rewards."""

import collections
import csv
import json
import pathlib
import runpy

import numpy as np
import pytest

from oapl_jax.cli import codenet as command
from oapl_jax.cli import commands
from oapl_jax.data import codenet, tokenizer
from oapl_jax.io.console import ExitCode
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import Verdict

TOY = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "benchmarks/codenet_toy.py"))
NUMBERS, STATUSES, write_corpus = TOY["NUMBERS"], TOY["STATUSES"], TOY["write_corpus"]


class Bytes:
    """A tokenizer with one token per byte."""

    vocab_size, stop_ids, eos_id, pad_id, has_chat_template = 257, (256,), 256, 0, False

    def encode_prompt(self, question, system=None):
        return self.encode(question)

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode()

    def save(self, folder): ...


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("codenet") / "Project_CodeNet"
    write_corpus(root, NUMBERS[:30], most=200)
    return root


def log_of(root, out, **rules):
    summary = command.write(root, out, Bytes(), codenet.Rules(**rules))
    return RolloutLog(out).read(0), summary


def test_every_group_has_a_correct_and_an_incorrect_program_and_the_papers_rewards(root, tmp_path):
    groups, summary = log_of(root, tmp_path / "log")
    assert len(groups) == summary["groups"] > 100
    used = collections.Counter()
    rewards = dict(zip(STATUSES, (1.0, -0.1, -0.5, -0.6, -1.0), strict=True))
    for group in groups:
        verdicts = {item.grade.verdict for item in group.rollouts}
        assert len(group.rollouts) == 4
        assert verdicts == {Verdict.CORRECT, Verdict.WRONG}
        for item in group.rollouts:
            status, _, rest = item.grade.detail.partition(" (")
            assert item.grade.reward == rewards[status]
            assert item.rollout.token_ids[-1] == 256
            assert item.text == bytes(item.rollout.token_ids[:-1].tolist()).decode()
            assert np.isnan(item.rollout.logprobs).all()
            used[rest] += 1
    assert set(summary["statuses"]) == set(STATUSES)
    assert max(used.values()) == 1  # no program is in two groups
    assert sum(used.values()) == 4 * len(groups)


def test_a_program_stands_with_the_statement_that_it_answers(root, tmp_path):
    groups, _ = log_of(root, tmp_path / "log")
    for group in groups:
        place = int(group.prompt.id.removeprefix("codenet/"))
        times, plus = NUMBERS[place - 1]
        assert f"Print n times {times} plus {plus}." in group.prompt.text
        assert json.loads(group.prompt.answer) == [{"stdin": "5\n", "stdout": f"{5 * times + plus}\n"}]
        for item in group.rollouts:
            if item.grade.verdict is Verdict.CORRECT:
                assert eval(item.text.partition("print(")[2].partition(")\n")[0], {"n": 5}) == 5 * times + plus


def test_groups_are_as_many_as_there_can_be_and_of_at_most_50_correct_programs():
    def submissions(num_correct, num_wrong):
        return [
            codenet.Submission(f"s{i}", "x", "Accepted" if i < num_correct else "Wrong Answer")
            for i in range(num_correct + num_wrong)
        ]

    for num_correct, num_wrong, expected in (
        (0, 9, 0),
        (9, 0, 0),
        (1, 2, 0),
        (1, 3, 1),
        (3, 1, 1),
        (8, 8, 4),
        (2, 40, 2),
        (500, 3, 3),
        (500, 70, 30),
    ):
        groups = list(codenet.make_groups("p00001", submissions(num_correct, num_wrong), codenet.Rules()))
        assert len(groups) == expected, (num_correct, num_wrong)
        correct = [item.id for group in groups for item in group if item.status == "Accepted"]
        assert len(set(correct)) == len(correct) <= 50
    rules = [codenet.Rules(seed=seed) for seed in (0, 0, 1)]
    first, same, other = (list(codenet.make_groups("p00001", submissions(9, 9), rule)) for rule in rules)
    assert first == same != other


def test_what_is_left_out_is_counted(root, tmp_path):
    _, summary = log_of(root, tmp_path / "log")
    with (root / "metadata" / "problem_list.csv").open() as file:
        problems = [row["id"] for row in csv.DictReader(file)]
    rows = [row for p in problems for row in csv.DictReader((root / "metadata" / f"{p}.csv").open())]
    others = sum(row["language"] != "Python" for row in rows)
    assert summary["dropped"]["other languages"] == others > 0
    assert summary["programs"] + summary["dropped"]["programs beyond the groups"] == len(rows) - others
    short = command.write(root, tmp_path / "short", Bytes(), codenet.Rules(max_tokens=46))
    assert short["dropped"]["too long"] > 0
    assert all(len(r.rollout.token_ids) <= 46 for g in RolloutLog(tmp_path / "short").read(0) for r in g.rollouts)


def test_statements_are_text():
    page = "<html><head><title>x</title></head><body><h1>Sum</h1><p>Print\n a &lt; b.</p><pre>1 2\n 3</pre><br>end</body></html>"
    assert codenet.text_of(page) == "Sum\n\nPrint  a < b.\n\n1 2\n3\n\nend"


def test_what_is_wrong_with_a_copy_is_named(root, tmp_path):
    with pytest.raises(ValueError, match=r"not a copy of Project CodeNet: it lacks metadata/problem_list\.csv"):
        command.write(tmp_path, tmp_path / "log", Bytes(), codenet.Rules())
    with pytest.raises(ValueError, match="exists; choose another"):
        command.write(root, tmp_path, Bytes(), codenet.Rules())
    with pytest.raises(ValueError, match=r"no group can be made; left out: .*too long"):
        command.write(root, tmp_path / "log", Bytes(), codenet.Rules(max_tokens=5))


def test_published_statements_are_read(shared_data):
    import tarfile

    with tarfile.open(shared_data / "code" / "codenet_problem_descriptions.tar.gz") as archive:
        pages = [member for member in archive if member.name.endswith(".html")][:20]
        texts = [codenet.text_of(archive.extractfile(page).read().decode("utf-8", "replace")) for page in pages]
    assert all(len(text) > 40 and "<p>" not in text for text in texts)


def test_options_of_the_chat_template(root, tmp_path, shared_data, capsys):
    folder = str(shared_data / "tokenizer" / "qwen3-8b")
    words = ["codenet", str(root), str(tmp_path / "log"), "--tokenizer", folder, "--chat-template-kwargs"]
    assert commands.main([*words, '{"enable_thinking": false}']) == ExitCode.DONE
    group = RolloutLog(tmp_path / "log").read(0)[0]
    no_thinking = tokenizer.load(folder).encode("<think>\n\n</think>\n\n")
    assert group.prompt.token_ids.tolist()[-len(no_thinking) :] == no_thinking
    assert commands.main([*words, "[1]"]) == ExitCode.USAGE
    assert "--chat-template-kwargs: is a JSON list, not an object" in capsys.readouterr().err

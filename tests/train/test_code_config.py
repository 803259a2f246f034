"""The configs for code: their dry runs with LeetCode's and MBPP's problems, and GSM8K's at the size of MBPP's."""

import json
import re

import pytest

from oapl_jax import train
from oapl_jax.rewards.code.sandbox.sandbox import Settings
from oapl_jax.rewards.code.sandbox.self_test import try_level
from runs import ROOT
from test_gsm8k import model_folder, questions, shared  # noqa: F401 (fixtures)

pytestmark = pytest.mark.slow

RLOO = ("objective.name=rloo", "objective.beta2=1e-3")


@pytest.fixture
def words(model_folder, tmp_path):  # noqa: F811
    return [f"run.dir={tmp_path / 'run'}", f"model.path={model_folder}", "mesh.trainer=fsdp=1", "--dry-run"]


@pytest.fixture
def sandbox():
    worker, reason = try_level("namespaces", Settings())
    if worker is None:
        pytest.skip(f"no sandbox with namespaces here: {reason}")
    worker.close()


def files(folder, rows):
    """The last two rows are held out."""
    for name, part in (("train", rows[:-2]), ("test", rows[-2:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return [f"data.path={folder / 'train.jsonl'}", f"evaluation.path={folder / 'test.jsonl'}"]


def planned(capsys, name, *words):
    """What the dry run of a config of ours prints, here with four training problems."""
    train.main(["--config", str(ROOT / f"configs/{name}.yaml"), *words])
    printed = capsys.readouterr().out
    assert re.search(r"prompts  4 .*\n +held out  2\n", printed)
    return printed


@pytest.mark.usefixtures("sandbox")
def test_deepcoder_grades_the_canaries_and_reads_the_tests(shared, words, tmp_path, capsys):  # noqa: F811
    problems = json.loads((shared / "code/leetcode/train.json").read_text())[:6]
    rows = [{"problem": row["problem"], "tests": json.dumps(row["tests"])} for row in problems]
    small = ("data.format=jsonl", "data.name=null", "reward.workers=1", "sampler.max_response_tokens=16")
    assert "code: 1.0" in planned(capsys, "code_qwen2.5", *words, *files(tmp_path, rows), *small)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("objective", [(), RLOO], ids=["oapl", "rloo"])
def test_mbpp(shared, words, tmp_path, capsys, objective):  # noqa: F811
    lines = (shared / "code/mbpp/mbpp.jsonl").read_text().splitlines()[600:606]
    data = files(tmp_path, list(map(json.loads, lines)))
    printed = planned(capsys, "mbpp_qwen2.5_coder_0.5b", *words, *data, *objective)
    assert f"name: {'rloo' if objective else 'oapl'}" in printed
    assert "16 rollouts = 4 prompts x G=4" in printed


def test_gsm8k_of_that_size(words, questions, tmp_path, capsys):  # noqa: F811
    rows = [json.loads(line) for line in (questions / "train.jsonl").read_text().splitlines()[:6]]
    printed = planned(capsys, "gsm8k_qwen2.5_coder_0.5b", *words, *files(tmp_path, rows))
    assert "16 rollouts = 4 prompts x G=4" in printed

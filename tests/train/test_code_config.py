"""``configs/code_qwen2.5.yaml``: its dry run with LeetCode problems."""

import json
import re

import pytest

from oapl_jax import train
from oapl_jax.rewards.code.sandbox.sandbox import Settings
from oapl_jax.rewards.code.sandbox.self_test import try_level
from runs import ROOT
from test_gsm8k import model_folder, shared  # noqa: F401 (fixtures)

pytestmark = pytest.mark.slow

CONFIG = ROOT / "configs/code_qwen2.5.yaml"


@pytest.fixture
def words(shared, model_folder, tmp_path):  # noqa: F811
    worker, reason = try_level("namespaces", Settings())
    if worker is None:
        pytest.skip(f"no sandbox with namespaces here: {reason}")
    worker.close()
    problems = json.loads((shared / "code/leetcode/train.json").read_text())[:6]
    rows = [{"problem": row["problem"], "tests": json.dumps(row["tests"])} for row in problems]
    for name, part in (("train", rows[:4]), ("test", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return [
        *("--config", str(CONFIG), f"run.dir={tmp_path / 'run'}", f"model.path={model_folder}", "mesh.trainer=fsdp=1"),
        *("data.format=jsonl", "data.name=null", f"data.path={tmp_path / 'train.jsonl'}", "evaluation.split=test"),
        *(f"evaluation.path={tmp_path / 'test.jsonl'}", "reward.workers=1", "sampler.max_response_tokens=16"),
    ]


def test_a_dry_run_grades_the_canaries_and_reads_the_tests(words, tmp_path, capsys):
    train.main([*words, "--dry-run"])
    printed = capsys.readouterr().out
    assert "code: 1.0" in printed
    assert re.search(r"prompts  4 .*\n +held out  2\n", printed)
    assert not (tmp_path / "run").exists()

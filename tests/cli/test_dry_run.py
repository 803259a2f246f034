"""``--dry-run`` finds what would fail at the first prompt."""

import json
import pathlib

import pytest

from oapl_jax.cli import commands
from oapl_jax.io.console import ExitCode

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("return 1.0", ExitCode.DONE, "prompts: 2 (1 overlong or without an answer dropped)"),
        ("raise KeyError(prompt.answer)", ExitCode.USAGE, "'mine:reward' fails on the first prompt, sums/0"),
    ],
)
def test_generate_tries_the_reward_function_on_the_first_prompt(tmp_path, capsys, body, code, told):
    (tmp_path / "mine.py").write_text(f"def reward(prompt, response):\n    {body}\n")
    rows = [{"prompt": text, "answer": "2"} for text in ("1+1=", "3-1=", "1+1+1+1+1+1=")]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"config": str(ROOT / "configs/toy_qwen3.json"), "tokenizer": "characters"},
        "data": {"path": str(tmp_path / "sums.jsonl"), "max_prompt_tokens": 8},
        "sampler": {"max_response_tokens": 4},
        "reward": {"functions": {"mine:reward": 1.0}, "workers": 1},
    }
    path = tmp_path / "generate.yaml"
    path.write_text(json.dumps(config))
    assert commands.main(["generate", "--config", str(path), "--dry-run"]) == code
    printed = capsys.readouterr()
    assert told in printed.out + printed.err
    assert not (tmp_path / "run").exists()

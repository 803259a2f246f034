"""Rollouts that others collected, as windows between those that a run samples, and as a log for an offline run."""

import json

import pytest

from oapl_jax import train
from oapl_jax.cli.commands import main
from oapl_jax.config.data import SourceConfig
from oapl_jax.data import tasks
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.rollouts.audit import audit
from oapl_jax.rollouts.log import RolloutLog
from runs import make_config, read_lines, write_config
from test_own_source import chain_answer

pytestmark = pytest.mark.slow

TOKENIZER, GROUP_SIZE = CharacterTokenizer(), 8


def records(num_groups, first=500):
    """Groups of a teacher: the first response is right and graded by hand, the others say 0 and have no grade."""
    for index in range(first, first + num_groups):
        prompt = tasks.make_task(SourceConfig(task="chain")).prompt(index, "train", 3, TOKENIZER)
        for rollout in range(GROUP_SIZE):
            ids = [*TOKENIZER.encode("0000" if rollout else chain_answer(prompt.text)), TOKENIZER.eos_id]
            yield {
                "group_id": f"chain/{index}",
                "prompt_id": f"teacher/{index}",
                "prompt": prompt.text,
                "prompt_token_ids": prompt.token_ids.tolist(),
                "token_ids": ids,
                "logprobs": [-2.3] * len(ids),
                "finish_reason": "stop",
                "reward": None if rollout else 1.5,
            }


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_becomes_a_window_between_two_syncs_of_a_run(tmp_path):
    """And the run goes on in it after a stop; prompts of the stream are neither skipped nor asked twice."""
    run_dir, folder = tmp_path / "run", tmp_path / "others"

    def go_on(steps):
        window = {"imports": str(folder)}
        return train.run(make_config(run_dir, run={"steps": steps}, window=window, evaluation={"prompts": 0}))

    go_on(4)
    rows = [*records(13), {"prompt": "1+1=", "response": "2"}]
    write(folder / "a.jsonl", rows)
    write(folder / "b.jsonl", list(records(1)))  # too few for a batch
    go_on(5)
    (run_dir / "rollouts" / "000001" / "part-000000.parquet").rename(tmp_path / "lost")  # as if it was killed before
    go_on(6)
    assert (run_dir / "rollouts" / "000001" / "part-000000.parquet").read_bytes() == (tmp_path / "lost").read_bytes()
    go_on(11)
    metrics = read_lines(run_dir / "metrics.jsonl")[1:]
    assert [row["window/version"] for row in metrics] == [0] * 4 + [1] * 3 + [2] * 4
    assert [row["window/imported"] for row in metrics] == [0] * 4 + [1] * 3 + [0] * 4
    assert all(row["rollouts/reward"] >= 1.5 / GROUP_SIZE for row in metrics[4:7])
    record = json.loads((run_dir / "imports" / "000001.json").read_text())
    assert record["source"] == "a.jsonl"
    assert (record["groups"], record["rollouts"]) == (13, 13 * GROUP_SIZE)
    assert record["left_out"] == {"text without token ids": 1}
    refused = json.loads((run_dir / "imports" / "refused-b.jsonl.json").read_text())
    assert (refused["groups"], refused["policy_version"]) == (1, None)
    log = RolloutLog(run_dir / "rollouts")
    assert {group.prompt.id.partition("/")[0] for group in log.read(1)} == {"teacher"}
    assert [group.prompt.id for group in log.read(2)][:2] == ["chain/train/16", "chain/train/17"]
    assert "11 steps, 3 windows" in audit(run_dir)


def test_an_imported_log_trains_offline(tmp_path, capsys):
    rows = [*records(9), {"prompt": "1+1=", "response": "2"}]
    source, out = write(tmp_path / "in" / "a.jsonl", rows), tmp_path / "log"
    config = make_config(tmp_path / "run", evaluation={"prompts": 0})
    command = ["import-rollouts", str(source), str(out), "--config", str(write_config(tmp_path / "c.yaml", config))]
    assert main(command) == 2
    assert "a.jsonl line 73: has a text and no token_ids" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--drop"]) == 0
    assert "9 groups, 72 rollouts" in capsys.readouterr().out
    assert json.loads((out / "import.json").read_text())["left_out"] == {"text without token ids": 1}
    rounds = {"rounds": [{"log": str(out), "epochs": 1}]}
    sections = {"mode": "offline", "window": {"sync_every": 50}, "evaluation": {"prompts": 0}}
    offline = make_config(tmp_path / "run", offline=rounds, **sections)
    assert train.run(offline)["steps"] == 2
    assert "2 steps, 1 windows" in audit(tmp_path / "run")
    # The same records, without a log of their own.
    rounds = {"rounds": [{"log": str(source), "epochs": 1}], "bad_rows": "drop"}
    direct = make_config(tmp_path / "other", offline=rounds, **sections)
    assert train.run(direct)["steps"] == 2

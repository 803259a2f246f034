"""How a run ends and goes on: more steps, the best checkpoint, patience, what is kept, no evaluation, Ctrl-C."""

import gzip
import json
import signal

import pytest

from oapl_jax import train
from oapl_jax.io.storage import shared_path
from oapl_jax.rollouts import audit
from oapl_jax.rollouts.diagnostics import TOKEN_LOGPROBS_FILE
from oapl_jax.rollouts.log import RolloutLog
from runs import assert_same_run, finish, make_config, read_lines, signal_after, start, write_config

pytestmark = pytest.mark.slow


def test_more_steps_go_on_as_if_the_run_had_not_ended(finished, tmp_path):
    """Step 4 is the last of a window, step 6 is within one."""
    for steps in (4, 6, 10):  # the trace of steps 9 and 10 changes nothing
        profile = {} if steps < 10 else {"steps": [9, 10]}
        summary = train.run(make_config(tmp_path, run={"steps": steps}, profile=profile))
        assert (summary["steps"], summary["planned_steps"]) == (steps, steps)
    # The sync of step 4 was that of the next start, and each end had an evaluation.
    assert_same_run(finished[0], tmp_path, but=("sync/bytes", "evaluations.jsonl", TOKEN_LOGPROBS_FILE))
    for name, steps in (("evaluations.jsonl", [4, 6]), (TOKEN_LOGPROBS_FILE, [6])):
        of_whole, of_parts = (read_lines(run / name) for run in (finished[0], tmp_path))
        assert [line for line in of_parts if line in of_whole] == of_whole
        assert [line["step"] for line in of_parts if line not in of_whole] == steps
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "learner_step"] == ["9", "10"]
    assert {"wait", "train", "save"} <= {event.get("name") for event in events}
    assert list(trace.parent.glob("*.xplane.pb"))
    audit.audit(tmp_path)
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    assert train.run(make_config(tmp_path, run={"steps": 10})) == summary, "the trace is not of the run's identity"
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before, "a finished run is left alone"


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(tmp_path):
    """The weights stay as they are, so no evaluation is better than the first one; it has the same samples."""
    config = make_config(
        tmp_path,
        learner={"learning_rate": 0.0},
        window={"sync_every": 1},
        evaluation={"every": 1, "samples": 8},
        checkpoint={"keep": 1, "keep_best": "evaluation/pass@1", "patience": 3, "keep_rollouts": 1},
    )
    summary = train.run(config)
    assert summary["steps"] == 3
    rows, batches = read_lines(tmp_path / "metrics.jsonl"), read_lines(tmp_path / "batches.jsonl")
    assert [row["policy_version"] for row in batches] == [0, 1, 2], "on policy: a sync after every step"
    assert [row["window/lag"] for row in rows[1:]] == [0, 0, 0]
    assert summary["best_checkpoint"]["step"] == 0
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [0, 3]
    assert min(RolloutLog(shared_path(tmp_path / "rollouts")).versions(), default=3) == 3
    assert "which were removed" in audit.audit(tmp_path)
    assert train.run(config) == summary, "the run has ended, though steps are left"


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    config = write_config(tmp_path / "config.yaml", make_config(tmp_path / "run", run={"steps": 1000}))
    process = start(config)
    assert signal_after(process, tmp_path / "run", 1, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "Traceback" not in output
    assert "the same command again goes on" in output.strip().splitlines()[-1]
    step = read_lines(tmp_path / "run/metrics.jsonl")[-1]["step"]
    assert (tmp_path / "run/checkpoints" / str(step)).is_dir()

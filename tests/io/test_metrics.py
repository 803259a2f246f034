import inspect
import io
import json
import math
import pathlib
import re
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oapl_jax.io import metrics
from oapl_jax.report import report


def write_steps(run_dir, steps, **options):
    with metrics.MetricsWriter(run_dir, tensorboard=False, **options) as writer:
        for step in steps:
            writer.write(step, {"learner/loss": step / 2})


def steps_in(run_dir):
    return [record["step"] for record in metrics.read_metrics(run_dir / "metrics.jsonl")]


def test_each_write_is_one_json_line_that_is_on_disk_at_once(tmp_path):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"learner/loss": jnp.float32(0.5), "rollouts/reward": np.float64(0.25), "window/lag": 3})
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "learner/loss": 0.5, "rollouts/reward": 0.25, "window/lag": 3.0}


def test_nan_is_written_as_json_null_and_read_back_as_nan(tmp_path):
    with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"learner/loss": math.nan, "learner/grad_norm": math.inf})
    assert '"learner/loss": null' in (tmp_path / "metrics.jsonl").read_text()
    (record,) = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["learner/loss"])


def test_tensorboard_reads_what_was_written_and_forgets_steps_after_the_resume(tmp_path):
    for resume_step, steps, offset in ((None, range(1, 6), 0.0), (3, range(4, 6), 100.0)):
        with metrics.MetricsWriter(tmp_path, resume_step=resume_step) as writer:
            for step in steps:
                writer.write(step, {"learner/loss": step + offset})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("learner/loss")] == [(1, 1), (2, 2), (3, 3), (4, 104), (5, 105)]


def test_a_resumed_run_rewrites_the_steps_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(5, 7), resume_step=4)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_run_from_the_beginning_starts_an_empty_file(tmp_path):
    write_steps(tmp_path, range(5))
    write_steps(tmp_path, range(2))
    assert steps_in(tmp_path) == [0, 1]


def test_a_line_torn_by_a_kill_is_ignored_and_removed_on_resume(tmp_path):
    write_steps(tmp_path, range(1, 4))
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "learner/lo')
    assert steps_in(tmp_path) == [1, 2, 3]
    write_steps(tmp_path, [4], resume_step=3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_complete_last_line_without_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("damage", ["not json", '{"loss": 1}', "[1]"])
def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2"):
        metrics.read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2"):
        write_steps(tmp_path, [4], resume_step=3)


def test_a_wandb_project_without_wandb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match=r"logging\.wandb_project='demo'.*oapl-jax\[wandb\]"):
        metrics.MetricsWriter(tmp_path, wandb_project="demo")


SHOWN = {
    "rollouts/reward": 0.5,
    "rollouts/pass_rate": 0.25,
    "window/lag": 7,
    "learner/residual": 0.125,
    "learner/tokens_per_second": 12_345.0,
}


def test_outside_a_terminal_progress_prints_plain_lines_seconds_apart():
    stream = io.StringIO()
    with metrics.Progress(100, stream=stream) as progress:
        for step in range(1, 101):
            progress.update(step, SHOWN)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # the first and the last: the loop took no two seconds
    assert lines[0].startswith("step   1/100  reward 0.50  pass 0.25  lag 7  residual 0.125  12.3k tok/s  left")
    assert lines[-1].startswith("step 100/100")
    assert lines[-1].endswith("left 0:00")
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar_that_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    with metrics.Progress(200, stream=stream, live=True) as progress:
        for step in (1, 2, 123):
            progress.update(step, SHOWN)
        progress.note("synced version 2 [not markup]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "synced version 2 [not markup]" in text
    last = [line for line in re.split(r"[\r\n]", text) if "123/200" in line][-1]
    assert len(last.rstrip()) <= 80
    for part in ("reward 0.50", "pass 0.25", "lag 7", "residual 0.125", "12.3k tok/s", "left 0:", "━━"):
        assert part in last


def test_disabled_progress_prints_notes_only():
    stream = io.StringIO()
    with metrics.Progress(10, enabled=False, stream=stream) as progress:
        progress.update(10, SHOWN)
        progress.note("resumed from step 3")
    assert stream.getvalue() == "resumed from step 3\n"


def test_supervised_fine_tuning_has_no_rollouts_and_shows_its_loss():
    stream = io.StringIO()
    metrics.Progress(10, stream=stream).update(1, {"learner/loss": 0.25, "learner/grad_norm": 1.0})
    assert stream.getvalue() == "step  1/10  loss 0.250  left -:--\n"


def test_time_left_follows_the_pace_after_the_first_step_which_compiles():
    assert metrics._time_left((1, 50.0), (1, 50.0), 1001) == "left -:--"
    assert metrics._time_left((1, 50.0), (2, 50.3), 1002) == "left 5:00"
    assert metrics._time_left((101, 50.0), (111, 150.0), 1101) == "left 2:45:00"


def test_stopwatch_adds_up_over_uses_and_threads_and_starts_anew_after_collect():
    stopwatch = metrics.Stopwatch()

    def work():
        with stopwatch("sampler/idle_seconds"):
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    with pytest.raises(KeyError), stopwatch("learner/wait_seconds"):
        raise KeyError
    seconds = stopwatch.collect()
    assert seconds["sampler/idle_seconds"] >= 4 * 0.05
    assert seconds["learner/wait_seconds"] < 0.05
    assert stopwatch.collect() == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, jnp.float32(jnp.nan)])
def test_a_non_finite_metric_stops_the_run_and_names_itself(value):
    step_metrics = {"learner/loss": 1.0, "learner/grad_norm": value, "learner/entropy": math.nan}
    with pytest.raises(metrics.NonFiniteError, match=r"learner/grad_norm is -?(nan|inf) at step 17") as caught:
        metrics.check_finite(17, step_metrics, ["learner/loss", "learner/grad_norm"])
    assert (caught.value.step, caught.value.name) == (17, "learner/grad_norm")
    assert "learning_rate" in str(caught.value)
    metrics.check_finite(17, step_metrics, ["learner/loss"])


def test_the_metrics_page_names_each_metric_once_and_describes_it():
    page = (pathlib.Path(__file__).parents[2] / "docs/metrics.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    names = [row[0].strip("`") for row in rows]
    assert len(names) >= 30
    assert len(names) == len(set(names))
    for name, row in zip(names, rows, strict=True):
        assert re.fullmatch(r"(learner|rollouts|window|sync|sampler|evaluation)/[a-z]+([_@][a-z0-9]+)*", name), name
        assert len(row) == 5, name
        assert all(row), name
    shown = re.findall(r'"((?:learner|rollouts|window|sync|sampler|evaluation)/\w+)"', inspect.getsource(report))
    shown += [name for name, _, _ in metrics._SHOWN]
    assert set(shown) <= set(names)

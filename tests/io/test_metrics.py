"""metrics.jsonl survives kills and resumes."""

import inspect
import json
import math
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.io import metrics, progress_bar
from oapl_jax.report import curves, findings


def write_steps(run_dir, steps, **options):
    with metrics.MetricsWriter(run_dir, **options) as writer:
        for step in steps:
            writer.write(step, {"learner/loss": step / 2})


def steps_in(run_dir):
    return [record["step"] for record in metrics.read_metrics(run_dir / "metrics.jsonl")]


def test_each_write_is_one_json_line_that_is_on_disk_at_once(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"learner/loss": jnp.float32(0.5), "rollouts/reward": np.float64(0.25), "window/lag": 3})
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "learner/loss": 0.5, "rollouts/reward": 0.25, "window/lag": 3.0}


def test_nan_is_written_as_json_null_and_read_back_as_nan(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"learner/loss": math.nan, "learner/grad_norm": math.inf})
    assert '"learner/loss": null' in (tmp_path / "metrics.jsonl").read_text()
    (record,) = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["learner/loss"])


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


def test_the_metrics_page_names_each_metric_once_and_describes_it():
    page = (pathlib.Path(__file__).parents[2] / "docs/metrics.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    names = [row[0].strip("`") for row in rows]
    assert len(names) >= 30
    assert len(names) == len(set(names))
    for name, row in zip(names, rows, strict=True):
        assert re.fullmatch(
            r"(learner|rollouts|window|sync|sampler|grader|checkpoint|evaluation)/[a-z]+([_@][a-z0-9]+)*", name
        ), name
        assert len(row) == 5, name
        assert all(row), name
    shown = re.findall(r'"((?:learner|rollouts|window|sync|sampler|evaluation)/\w+)"', inspect.getsource(findings))
    shown += [name for panel in curves.PANELS for name in panel.metrics.values()]
    shown += [name for name, _, _ in progress_bar._SHOWN]
    assert set(shown) <= set(names)

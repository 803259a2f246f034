import base64
import dataclasses
import io
import json
import re

import matplotlib.image
import numpy as np
import pytest

from oapl_jax.cli import commands
from oapl_jax.config.run import LoggingConfig
from oapl_jax.io import metrics
from oapl_jax.io.console import ExitCode
from oapl_jax.io.run_dir import LAYOUT, RUN_FILE
from oapl_jax.report import report
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict


def make_group(index, version, response="7 4 1"):
    rollout = Rollout(np.arange(3, dtype=np.int32), np.full(3, -0.5, np.float32), FinishReason.STOP)
    graded = [
        GradedRollout(rollout, f"{response} {i}", Grade(verdict, reward), advantage=reward - 0.6)
        for i, (verdict, reward) in enumerate([(Verdict.CORRECT, 1.0), (Verdict.WRONG, 0.0)])
    ]
    prompt = Prompt(f"chain/train/{index}", np.arange(4, dtype=np.int32), f"3+4 & <{index}>=", "7")
    return RolloutGroup(index, version, prompt, tuple(graded), value=0.6)


def make_run(run_dir, steps=100, sync_every=25):
    """A run directory as training leaves it, with numbers like those of a real run."""
    rng = np.random.default_rng(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text("run:\n  dir: runs/demo\n  steps: 100\n")
    with metrics.MetricsWriter(run_dir, LoggingConfig(tensorboard=False)) as writer:
        for step in range(1, steps + 1):
            done, lag = step / steps, (step - 1) % sync_every
            reward = 0.27 + 0.65 * done**0.7 + rng.normal(0, 0.04)
            line = {
                "rollouts/reward": reward,
                "rollouts/pass_rate": reward,
                "rollouts/response_tokens": 6 + rng.normal(0, 0.1),
                "learner/residual": 0.35 - 0.2 * done + rng.normal(0, 0.02),
                "learner/advantage_abs": 0.38 - 0.25 * done + rng.normal(0, 0.02),
                "learner/log_ratio": -0.03 * lag,
                "learner/log_ratio_abs": 0.08 * lag**0.5,
                "learner/entropy": 0.9 - 0.7 * done + rng.normal(0, 0.02),
                "learner/seconds": 8.0 if step == 1 else 0.1 + rng.gamma(2, 0.02),
                "learner/wait_seconds": 5.0 if step == 1 else rng.gamma(1, 0.02),
                "window/lag": lag,
            }
            if lag == sync_every - 1:
                line |= {"sync/seconds": 0.1, "evaluation/pass@1": reward, "evaluation/pass@4": reward**0.4}
            writer.write(step, line)
    summary = {
        "before": {f"pass@{2**i}": 0.27 ** (1 / (1 + i)) for i in range(7)},
        "after": {f"pass@{2**i}": 0.92 ** (1 / (1 + i)) for i in range(7)},
        "steps": steps,
        "seconds": 4000.4,
        "rollouts": steps * 128,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    log = RolloutLog(run_dir / "rollouts")
    log.append([make_group(0, 0, "first"), make_group(1, 0)])
    log.append([make_group(0, 3, "last")])
    return run_dir


def picture_in(html):
    (encoded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return base64.b64decode(encoded)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "demo")
    assert report.write_report(run_dir) == run_dir / "report.html"
    return run_dir


def test_the_report_is_one_file_that_fetches_nothing(run_dir):
    html = (run_dir / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|<script""", html)
    assert picture_in(html) == (run_dir / "curves.png").read_bytes()


def test_the_report_shows_the_numbers_of_the_summary_and_the_config(run_dir):
    html = (run_dir / "report.html").read_text()
    for fact in ("0.270 → 0.920", "12,800", "1 h 06 min", "pass@64", "dir: runs/demo"):
        assert fact in html


def test_rollouts_of_the_first_and_the_newest_window_are_shown_with_their_text_escaped(run_dir):
    html = (run_dir / "report.html").read_text()
    assert "3+4 &amp; &lt;0&gt;=" in html
    assert html.index("first 0") < html.index("newest window") < html.index("last 0")
    assert "-1.50" in html  # the response's log-probability: three tokens of -0.5


def test_every_panel_draws_what_the_run_recorded(run_dir):
    """Each panel changes when its metrics are removed, so none ignores its data or repeats another panel."""
    record = report.read_run(run_dir)
    complete = matplotlib.image.imread(io.BytesIO(report.draw_curves(record)))
    empty = report.draw_curves(dataclasses.replace(record, lines=[], summary={}))
    changed = np.abs(complete - matplotlib.image.imread(io.BytesIO(empty))).max(axis=2) > 0.1
    height, width = (size // 3 for size in changed.shape)
    shares = changed[: 3 * height, : 3 * width].reshape(3, height, 3, width).mean(axis=(1, 3))
    assert (shares > 0.005).all(), shares


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "summary.json", "rollouts"])
def test_a_missing_piece_is_named_and_the_rest_is_shown(tmp_path, missing):
    run_dir = make_run(tmp_path / "demo", steps=3)
    (run_dir / missing).rename(run_dir / "elsewhere")
    html = report.write_report(run_dir).read_text()
    assert re.search(rf"{missing}/? is missing|under {missing}/", html)


def test_an_empty_run_directory_gets_a_report(tmp_path):
    assert "Nothing recorded yet" in report.write_report(tmp_path).read_text()


def test_a_single_step_and_values_that_are_not_finite_are_drawn(tmp_path):
    with metrics.MetricsWriter(tmp_path, LoggingConfig(tensorboard=False)) as writer:
        writer.write(1, {"rollouts/reward": 0.5, "learner/entropy": float("nan"), "learner/seconds": 0.0})
    report.write_report(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_middle_of_long_texts_is_omitted(tmp_path):
    RolloutLog(tmp_path / "rollouts").append([make_group(0, 0, "start " + "x" * 10_000)])
    html = report.write_report(tmp_path).read_text()
    assert "start xxx" in html
    assert "7,008 characters omitted" in html


def test_the_running_mean_keeps_a_constant_and_averages_neighbours():
    np.testing.assert_allclose(report._running_mean(np.full(200, 2.5)), 2.5)
    ramp = np.arange(120.0)
    np.testing.assert_allclose(report._running_mean(ramp)[2:-2], ramp[2:-2])


def test_the_command_writes_the_report_and_refuses_what_is_no_run(tmp_path, capsys):
    (tmp_path / RUN_FILE).write_text(json.dumps({"layout": LAYOUT, "version": "0"}))
    assert commands.main(["report", str(tmp_path)]) == ExitCode.DONE
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert commands.main(["report", str(tmp_path / "nowhere")]) == ExitCode.USAGE
    assert "nowhere' is no run directory" in capsys.readouterr().err

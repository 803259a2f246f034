"""The progress of a run on a terminal, and elsewhere."""

import io
import re

from oapl_jax.io import progress_bar
from oapl_jax.io.progress_bar import ProgressBar

SHOWN = {
    "rollouts/reward": 0.5,
    "rollouts/pass_rate": 0.25,
    "window/lag": 7,
    "learner/residual": 0.125,
    "learner/tokens_per_second": 12_345.0,
}


def test_outside_a_terminal_progress_prints_plain_lines_seconds_apart():
    stream = io.StringIO()
    with ProgressBar(100, stream=stream) as progress:
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
    stream.isatty = lambda: True
    with ProgressBar(200, stream=stream) as progress:
        for step in (1, 2, 123):
            progress.update(step, SHOWN)
        progress.note("synced version 2 [not markup]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "synced version 2 [not markup]" in text
    last = [line for line in re.split(r"[\r\n]", text) if "123/200" in line][-1]
    assert len(last.rstrip()) <= 80
    for part in ("reward 0.50", "pass 0.25", "lag 7", "residual 0.125", "12.3k tok/s", "left 0:", "━━"):
        assert part in last


def test_mfu_is_shown_where_there_is_room(monkeypatch):
    for columns, is_shown in ((80, False), (120, True)):
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = io.StringIO()
        stream.isatty = lambda: True
        with ProgressBar(200, stream=stream) as progress:
            progress.update(3, {**SHOWN, "learner/mfu": 0.314})
        assert ("mfu 0.31" in stream.getvalue()) == is_shown
    stream = io.StringIO()
    ProgressBar(10, stream=stream).update(1, {**SHOWN, "learner/mfu": 0.314})
    assert "12.3k tok/s  mfu 0.31  left" in stream.getvalue()


def test_disabled_progress_prints_notes_only():
    stream = io.StringIO()
    with ProgressBar(10, enabled=False, stream=stream) as progress:
        progress.update(10, SHOWN)
        progress.note("resumed from step 3")
    assert stream.getvalue() == "resumed from step 3\n"


def test_supervised_fine_tuning_has_no_rollouts_and_shows_its_loss():
    stream = io.StringIO()
    ProgressBar(10, stream=stream).update(1, {"learner/loss": 0.25, "learner/grad_norm": 1.0})
    assert stream.getvalue() == "step  1/10  loss 0.250  left -:--\n"


def test_time_left_follows_the_pace_after_the_first_step_which_compiles():
    assert progress_bar._time_left((1, 50.0), (1, 50.0), 1001) == "left -:--"
    assert progress_bar._time_left((1, 50.0), (2, 50.3), 1002) == "left 5:00"
    assert progress_bar._time_left((101, 50.0), (111, 150.0), 1101) == "left 2:45:00"

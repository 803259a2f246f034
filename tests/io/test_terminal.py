"""What anything writes to a terminal stands above the bar, in whole lines; Ctrl-C ends a command with one line."""

import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOREIGN = """
import logging, os, subprocess, sys, time, warnings
log = logging.getLogger("library")
log.addHandler(logging.StreamHandler())  # keeps today's sys.stderr
from oapl_jax.io.progress_bar import ProgressBar
with ProgressBar(9) as bar:
    for step in range(1, 9):
        bar.update(step, {"rollouts/reward": 0.5})
        if step == 1: os.write(2, b"W0000 from C++\\n")
        if step == 2: log.warning("from logging")
        if step == 3: warnings.warn("from warnings")
        if step == 4: subprocess.run("echo from a child; printf '1%%\\\\r99%% from tqdm\\\\n' >&2", shell=True)
        if step == 5: print("from print", flush=True)
        if step == 6: os.write(1, b"from half ")
        if step == 7: os.write(1, b"a line\\n")
        time.sleep(0.1)
print("after")
"""
LINES = ["W0000 from C++", "from logging", "UserWarning: from warnings", "from a child", "99% from tqdm", "from print"]


def on_a_terminal(program):
    """What the program writes to a terminal, as lines without colours; a shell keeps the terminal open."""
    ours, theirs = pty.openpty()
    command = ["sh", "-c", '"$0" -c "$1"; sleep 0.3', sys.executable, program]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            written += os.read(ours, 1 << 16)
        except OSError:  # all have closed it
            break
    process.wait()
    os.close(ours)
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode()))


def test_foreign_lines_stand_above_the_bar():
    lines = on_a_terminal(FOREIGN)
    for text in [*LINES, "from half a line"]:
        (line,) = [line for line in lines if text in line]
        assert "━" not in line
    assert any(line.endswith("after") for line in lines), lines[-4:]


WAITING = """
import sys, time
from oapl_jax.io import console
def command(words):
    print("begun", flush=True)
    time.sleep(60)
sys.exit(console.run(command, []))
"""
LOOP = """
import sys, time
from oapl_jax.io import console
from oapl_jax.io.preemption import StopSignals
from oapl_jax.types import PreemptedError
def command(words):
    with StopSignals() as stop:
        stop.takes_interrupts = True
        print("begun", flush=True)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if stop.is_set() and WAITS:
                print("saved", flush=True)
                raise PreemptedError(stop.received)
            time.sleep(0.01)
sys.exit(console.run(command, []))
"""


@pytest.mark.parametrize(
    ("program", "signals", "code", "said"),
    [
        (WAITING, [signal.SIGINT], 130, ["the same command again goes on"]),
        (LOOP.replace("WAITS", "True"), [signal.SIGINT], 130, ["once more", "saved"]),
        (LOOP.replace("WAITS", "True"), [signal.SIGTERM], 42, ["saved"]),
        (LOOP.replace("WAITS", "False"), [signal.SIGINT] * 2, 130, ["once more", "the same command again goes on"]),
    ],
)
def test_ctrl_c_ends_with_a_line(program, signals, code, said):
    command, environment = [sys.executable, "-c", program], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=-1, stderr=-2, text=True, env=environment) as process:
        assert process.stdout.readline() == "begun\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.2)
        lines = [line for line in process.stdout.read().splitlines() if line]
    assert process.returncode == code, lines
    assert len(lines) == len(said), lines
    for line, text in zip(lines, said, strict=True):
        assert text in line

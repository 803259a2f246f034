"""Ctrl-C while a command still imports ends it with one line."""

import pathlib
import signal
import subprocess
import sys

import pytest

from oapl_jax.io import interrupt

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("entry", "first"),
    [(["oapl_jax", "sft"], "pydantic_core"), (["oapl_jax.train"], "pydantic_core"), (["oapl_jax", "sft"], "jax")],
)
def test_ctrl_c_during_the_imports_is_one_line(entry, first):
    command = [sys.executable, "-X", "importtime", "-m", *entry, "--config", "none.yaml"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = (line for line in process.stderr if line.startswith("import time:"))
    assert any(line.rpartition("|")[2].strip().startswith(first) for line in lines), "it has begun to import"
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == interrupt.EXIT_CODE
    assert "Traceback" not in rest
    assert rest.strip().splitlines()[-1] == interrupt.MESSAGE

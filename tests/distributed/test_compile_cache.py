"""Compiled programs on disk: what a second process finds, and what damaged files do."""

import os
import subprocess
import sys

import pytest

from oapl_jax.distributed.compile_cache import reads_what_it_wrote

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from oapl_jax.distributed.compile_cache import use_compile_cache

use_compile_cache(sys.argv[1])
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event.endswith("cache_hits")))

@jax.jit
def compute(x):
    for i in range(30):
        x = jnp.sin(x @ x) + jnp.cumsum(x, axis=i % 2)
        x = x / jnp.linalg.norm(x)
    return x

print(bytes(compute(jnp.ones((8, 8)))).hex(), sum(found))
"""


def run(folder):
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env=environment | {"JAX_PLATFORMS": "cpu"}
    )
    result, num_found = done.stdout.split()
    return result, int(num_found)


@pytest.mark.slow
def test_a_second_process_finds_the_programs_of_the_first_and_computes_the_same(tmp_path):
    if not reads_what_it_wrote():
        pytest.skip("on this CPU nothing is kept")
    compiled, none = run(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert run(tmp_path) == (compiled, len(files))
    assert (none, sorted(tmp_path.iterdir())) == (0, files)
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    assert run(tmp_path) == (compiled, 0)

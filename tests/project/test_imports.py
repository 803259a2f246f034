"""Which libraries a part of the package pulls in, in a process of its own."""

import subprocess
import sys

import pytest

SERVING = ("tensorflow", "grpc", "jetstream")
"""What only a server needs: seconds of every start, and gigabytes on disk."""


@pytest.mark.parametrize("module", ["oapl_jax.train", "oapl_jax.sampler.engine"])
def test_what_serves_is_imported_by_the_server_alone(module):
    program = f"import sys, {module}; print([name for name in {SERVING} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout.strip()) == (0, "[]"), process.stderr

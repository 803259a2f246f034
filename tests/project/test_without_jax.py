"""An engine in another environment uses the data contract, the config, the files and the log without JAX."""

import subprocess
import sys

from test_layers import ROOT, real_modules, room_of

ROOMS = ("types", "config", "untrusted", "io", "rollouts")
BLOCKED = ("jax", "jaxlib", "flax", "orbax", "optax", "tensorflow", "torch", "transformers")


def test_these_rooms_import_without_jax():
    modules = [module for module in real_modules() if room_of(module) in ROOMS]
    assert {room_of(module) for module in modules} == set(ROOMS)
    # A module that is None in sys.modules cannot be imported, like one that is not installed.
    block = f"import importlib, sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))"
    program = f"{block}\nfor module in {modules!r}: importlib.import_module(module)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

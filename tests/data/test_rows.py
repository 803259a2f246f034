"""The libraries of the extra ``data`` are imported only where they are used, and a missing one is named."""

import re
import subprocess
import sys

import pytest

from oapl_jax.data import rows

LIBRARIES = ("datasets", "tensorflow", "tensorflow_datasets")


def test_the_package_imports_without_them():
    program = f"""
import pkgutil, sys
import oapl_jax.data
sys.modules |= dict.fromkeys({LIBRARIES})
for module in pkgutil.walk_packages(oapl_jax.data.__path__, "oapl_jax.data."):
    __import__(module.name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("library", "use"),
    [
        ("datasets", lambda: rows.read("owner/name", "datasets", ["prompt"])),
        ("tensorflow_datasets", lambda: rows.read("name", "tfds", ["prompt"])),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, library, use):
    monkeypatch.setitem(sys.modules, library, None)
    message = f'{library} is not installed; run: pip install "oapl-jax[data]"'
    with pytest.raises(ValueError, match=re.escape(message)):
        use()

import shutil
import subprocess

import pytest

from oapl_jax.rewards.code.sandbox.sandbox import Settings
from oapl_jax.rewards.code.sandbox.seccomp import compile_filter
from oapl_jax.rewards.code.sandbox.self_test import try_level


@pytest.fixture(scope="session")
def sandboxed():
    """Skips if the machine has no namespaces; if it has them and our sandbox does not start, the tests fail."""
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None or subprocess.run([bubblewrap, "--unshare-all", "--ro-bind", "/", "/", "true"]).returncode:
        pytest.skip("bubblewrap cannot make namespaces on this machine")
    try:
        compile_filter()
    except RuntimeError as error:
        pytest.skip(str(error))
    worker, reason = try_level("namespaces", Settings())
    assert worker is not None, reason
    worker.close()

import shutil
import subprocess

import pytest

from oapl_jax.rewards.code.programs import Judge, Limits, parse_tests
from oapl_jax.rewards.code.sandbox import self_test
from oapl_jax.rewards.code.sandbox.isolation import LEVELS
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


@pytest.fixture(
    scope="module", params=[LEVELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LEVELS[1:])]
)
def level(request):
    """Each isolation level; sandboxes that are opened meanwhile have exactly this one. One that is missing is skipped."""
    worker, reason = try_level(request.param, Settings())
    if worker is None:
        pytest.skip(f"this machine has no {request.param}: {reason}")
    worker.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_test, "LEVELS", (request.param,))
        yield request.param


@pytest.fixture(scope="module")
def judge(level):
    running = Judge(Settings(level))
    yield running
    assert running.level == level
    running.close()


@pytest.fixture
def status(judge):
    """The status of the first test that failed, or `accepted`."""

    def run(program, tests, limits=None):
        limits = limits or Limits(cpu_s=2, wall_s=20, memory_mb=256)
        return str(judge.judge(program, parse_tests(tests), limits, stop_early=True)[-1].status)

    return run

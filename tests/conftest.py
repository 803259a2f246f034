"""Runs everything on 8 pretended CPU devices; the type checker is switched on in pyproject.toml.

Workers of pytest-xdist and programs that tests start share one folder of compiled programs, since compiling is most of
the work. Set ``JAX_COMPILATION_CACHE_DIR`` to keep the programs from one session to the next.
"""

import collections
import gc
import importlib.metadata
import itertools
import os
import pathlib
import shutil
import tempfile

# Before anything imports jax. The session's first process sets the environment, the others inherit it.
_OWN_PROGRAMS = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _OWN_PROGRAMS = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="oapl-programs-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the work, and the programs are small and run a few times: no optimisation by LLVM, and kernels from
# the older of XLA's two code generators (docs/tests.md).
_FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_backend_optimization_level": 0,
}
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end at a flag that they do not know
    _FLAGS["xla_cpu_use_fusion_emitters"] = "false"
for _name, _value in _FLAGS.items():
    if _name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_name}={_value}".strip()

# Imports and traces make millions of objects that live on; looking through them took a fifth of the time.
gc.set_threshold(100_000, 20, 20)

import jax  # noqa: E402
import pytest  # noqa: E402

_MAPS = pathlib.Path("/proc/self/maps")
_MOST_MAPS = 10_000


def pytest_unconfigure() -> None:
    if _OWN_PROGRAMS is not None:
        shutil.rmtree(_OWN_PROGRAMS, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests first, so that no worker ends with a long file while the other has nothing left."""
    tests = collections.Counter(item.path for item in items)
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path] / tests[item.path])


def pytest_collection_finish() -> None:
    """Modules stay until the end: no collection has to look at them again."""
    gc.collect()
    gc.freeze()


def _cpu_seconds() -> float:
    times = os.times()
    return sum(times[:4])  # of this process and of the children that it waited for


_spent = [_cpu_seconds()]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    now = _cpu_seconds()
    report.cpu_seconds, _spent[0] = now - _spent[0], now
    return report


def pytest_runtest_logstart() -> None:
    _spent[0] = _cpu_seconds()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """With ``--durations``: CPU seconds of each file and of each test above one, which do not depend on other work."""
    if config.option.durations is None:
        return
    spent = collections.Counter()
    for report in itertools.chain(*terminalreporter.stats.values()):
        if hasattr(report, "cpu_seconds"):
            spent.update(dict.fromkeys((report.nodeid, report.nodeid.partition("::")[0]), report.cpu_seconds))
    terminalreporter.section("CPU seconds")
    for name, seconds in spent.most_common():
        if seconds >= 1:
            terminalreporter.write_line(f"{seconds:8.1f} {name}")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Each compiled program holds a few dozen memory maps, and a process may have 65,530: then it crashes.

    Below that the next file finds the programs of small operations, which all files have in common.
    """
    yield
    if not _MAPS.exists() or len(_MAPS.read_bytes().splitlines()) > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Real data that lies beside the checkout of a developer; tests of it are skipped elsewhere."""
    folder = pathlib.Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real data in {folder}")
    return folder

"""What pyproject.toml promises: which libraries an installation needs, and what is said where one is missing."""

import importlib
import re
import signal
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

import oapl_jax
from oapl_jax.cli import serve
from oapl_jax.config.run import RunConfig
from oapl_jax.data import rows
from oapl_jax.io import trackers
from test_layers import PACKAGE, ROOT, libraries_of, normal, providers_of, real_modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCK = {
    normal(one.name): one
    for name in ("requirements.txt", "requirements-vllm.txt")
    for one in map(Requirement, re.findall(r"^\w.*$", (ROOT / name).read_text(), re.MULTILINE))
}
# Pinned although we do not import them: one must fit the version of another package, and one shows our event files.
ONLY_PINNED = {"jaxlib", "tensorboard"}
OPTIONAL_LIBRARIES = {
    "tensorflow",
    "tensorflow_datasets",
    "datasets",
    "grpc",
    "jetstream",
    "torch",
    "vllm",
    "wandb",
    "trackio",
    "gcsfs",
    "s3fs",
}


def names(requirements):
    return {normal(Requirement(one).name) for one in requirements}


CORE = names(PROJECT["dependencies"])
IN_EXTRAS = names(one for extra in EXTRAS.values() for one in extra)


def test_the_core_is_what_the_modules_import_and_no_more():
    imported = set().union(*map(libraries_of, real_modules().values()))
    providers = {library: providers_of(library) for library in imported - OPTIONAL_LIBRARIES}
    assert not [library for library, names in providers.items() if not names & CORE]
    assert not CORE - set().union(*providers.values())


def test_the_lock_has_a_tested_version_of_every_dependency_and_nothing_else():
    assert set(LOCK) == CORE | IN_EXTRAS | ONLY_PINNED


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_bounds_are_lower_ones_that_admit_the_locked_version(extra):
    for requirement in map(Requirement, EXTRAS[extra] if extra else PROJECT["dependencies"]):
        assert [one.operator for one in requirement.specifier] == [">="], requirement
        (locked,) = LOCK[normal(requirement.name)].specifier
        assert requirement.specifier.contains(locked.version), f"{requirement}, {locked}"


def test_constraints_have_no_extras_which_pip_refuses():
    assert not [one for one in LOCK.values() if one.extras]


def test_the_version_is_written_once():
    assert PROJECT["dynamic"] == ["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == oapl_jax.__version__


def test_the_console_script_is_the_command_line(monkeypatch, capsys):
    module, _, function = PROJECT["scripts"]["oapl-jax"].partition(":")
    monkeypatch.setattr(sys, "argv", ["oapl-jax", "--version"])
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert getattr(importlib.import_module(module), function)() == 0
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().out == f"oapl-jax {oapl_jax.__version__}\n"


@pytest.mark.slow
def test_no_command_imports_an_optional_library():
    """All of them at once, as a process does that has everything installed: what would be loaded without being used."""
    program = (
        "import pathlib, sys, importlib, oapl_jax.train\n"
        f"for path in sorted(pathlib.Path({str(ROOT / PACKAGE / 'cli')!r}).glob('[a-z]*.py')):\n"
        "    importlib.import_module(f'oapl_jax.cli.{path.stem}')\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(done.stdout.split()) & OPTIONAL_LIBRARIES


def tracked_by(tracker):
    return RunConfig(dir="demo", steps=1, tracker=tracker)


@pytest.mark.parametrize(
    ("library", "use", "extra"),
    [
        ("datasets", lambda folder: rows.read("owner/name", "datasets", ["text"]), "data"),
        ("tensorflow_datasets", lambda folder: rows.read("mnist", "tfds", ["label"]), "data"),
        ("jetstream", lambda folder: serve.main(["--ask", "1+1="]), "serve"),
        ("grpc", lambda folder: serve.main(["--model", str(folder)]), "serve"),
        ("wandb", lambda folder: trackers.start(folder, tracked_by("wandb"), 0, {}), "wandb"),
        ("trackio", lambda folder: trackers.start(folder, tracked_by("trackio"), 0, {}), "trackio"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_extra(library, use, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"{library}.*pip install .*oapl-jax\[{extra}\]"):
        use(tmp_path)
    assert any(library in normal(one).replace("-", "_") for one in EXTRAS[extra])


@pytest.mark.parametrize(("library", "scheme", "extra"), [("gcsfs", "gs", "gcs"), ("s3fs", "s3", "s3")])
def test_an_object_store_without_its_library_names_the_extra(library, scheme, extra):
    """In a process of its own: other tests leave file systems in fsspec's cache."""
    code = (
        f"import sys; sys.modules[{library!r}] = None\nfrom oapl_jax.io import storage\n"
        f"try: storage.names(storage.shared_path('{scheme}://bucket/run'))\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert library in done.stdout
    assert f"oapl-jax[{extra}]" in done.stdout

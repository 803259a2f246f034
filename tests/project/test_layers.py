"""The floors of docs/architecture.md: a module imports only from lower floors, or from its own room."""

import ast
import pathlib
import re
import sys
from importlib.metadata import packages_distributions

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = "oapl_jax"

# Every room of the package (a folder, or a file at its top). A room imports from lower floors and from itself.
# Rooms of the bottom floor, and of the top floor, import also from those before them in this order.
BOTTOM_FLOOR = ("types", "untrusted", "config")
MIDDLE_FLOORS = (
    ("objectives", "data", "rewards", "io", "distributed"),
    ("model", "rollouts"),
    ("learner", "sampler", "weights", "evaluation"),
)
TOP_FLOOR = ("build", "sft", "sources", "report", "run", "train", "preflight", "cli", "__main__")
ORDER = (*[(room,) for room in BOTTOM_FLOOR], *MIDDLE_FLOORS, *[(room,) for room in TOP_FLOOR])
LAYERS = {room: layer for layer, rooms in enumerate(ORDER) for room in rooms}
VAGUE = {"utils", "util", "common", "base", "helpers", "misc", "tools"}

DISTRIBUTIONS = packages_distributions()
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
"""Dotted name -> file, ``__init__`` included."""


def room_of(module: str) -> str:
    """``oapl_jax.model.qwen`` -> ``model``."""
    return module.split(".")[1]


def imports_of(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function; names as ``package.module.name``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def libraries_of(path: pathlib.Path) -> set[str]:
    """Libraries outside this package and Python's own that a file imports."""
    return {name.split(".")[0] for name in imports_of(path)} - {PACKAGE, *sys.stdlib_module_names}


def providers_of(library: str) -> set[str]:
    """Distributions that a library may come from."""
    return {normal(name) for name in DISTRIBUTIONS.get(library, [library])}


def internal_imports(path: pathlib.Path) -> set[str]:
    """Modules of this package that a file imports."""
    found = {name for name in imports_of(path) if name.split(".")[0] == PACKAGE}
    modules = set()
    for name in found:
        while name not in MODULES and "." in name and f"{name}.__init__" not in MODULES:
            name = name.rpartition(".")[0]
        modules.add(name)
    return modules - {PACKAGE, f"{PACKAGE}.__init__"}


def real_modules() -> dict[str, pathlib.Path]:
    return {name: path for name, path in MODULES.items() if path.name != "__init__.py"}


@pytest.mark.parametrize("module", real_modules())
def test_imports_go_down(module):
    assert room_of(module) in LAYERS, f"{module} has no layer: add its room to LAYERS"
    for imported in internal_imports(MODULES[module]):
        here, there = room_of(module), room_of(imported)
        assert here == there or LAYERS[there] < LAYERS[here], (
            f"{module} (layer {LAYERS[here]}) imports {imported} (layer {LAYERS[there]})"
        )


def test_there_is_no_cycle():
    graph = {name: internal_imports(path) & set(MODULES) for name, path in real_modules().items()}
    done, open_path = set(), []

    def visit(name: str) -> None:
        if name in done:
            return
        assert name not in open_path, " -> ".join([*open_path[open_path.index(name) :], name])
        open_path.append(name)
        for imported in sorted(graph.get(name, ())):
            visit(imported)
        done.add(open_path.pop())

    for name in graph:
        visit(name)


def test_no_file_has_a_name_that_says_nothing():
    assert not [str(path) for path in MODULES.values() if path.stem in VAGUE or path.parent.name in VAGUE]


def test_init_files_are_empty():
    """That of the package has the version, which pyproject.toml reads, and nothing else."""
    found = {path: path.read_text().strip() for path in MODULES.values() if path.name == "__init__.py"}
    version = found.pop(ROOT / PACKAGE / "__init__.py")
    assert re.fullmatch(r'__version__ = "[^"]+"', version)
    assert not [str(path) for path, text in found.items() if text]


def test_every_library_that_is_imported_is_pinned_exactly():
    requirement = re.compile(r"^([\w.-]+)==[\w.]+$", re.MULTILINE)
    text = "".join(
        (ROOT / name).read_text() for name in ("requirements.txt", "requirements-torch.txt", "requirements-vllm.txt")
    )
    pinned = {normal(name) for name in requirement.findall(text)}
    for module, path in real_modules().items():
        for library in libraries_of(path):
            providers = providers_of(library)
            assert providers & pinned, f"{module} imports {library}: pin {' or '.join(providers)} in requirements.txt"


def test_what_processes_agree_by_reads_no_clock_that_can_jump():
    """``time.monotonic`` cannot; a date is for people only."""
    shared = ("io", "weights", "sources", "rollouts", "distributed")
    for module, path in real_modules().items():
        if room_of(module) in shared and module != f"{PACKAGE}.io.metrics":
            assert not re.search(r"time\.time\(|datetime|st_mtime|getmtime", path.read_text()), module


def test_requirements_are_exact():
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            assert not line or line.startswith(("#", "-r ")) or "==" in line, f"{path.name}: {line}"


def normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def test_the_tree_in_agents_md_is_the_tree():
    listed = re.findall(r"^  ([\w/]+\.py) ", (ROOT / "AGENTS.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(ROOT / PACKAGE).as_posix() for path in real_modules().values())

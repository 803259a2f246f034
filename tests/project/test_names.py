"""Names that are used and bound nowhere.

Ruff and pyright are told to pass over them, for jaxtyping's letters; pyright does not read tests and benchmarks.
"""

import ast
import functools
import json
import pathlib
import subprocess
import symtable
import sys

from project.test_layers import MODULES, PACKAGE, imports_of

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = [ROOT / name for name in ("oapl_jax", "tests", "benchmarks", "experiments", "launch")]


def undefined_names(*paths: pathlib.Path) -> list[str]:
    """``file:line: message`` of each, without the dimensions in jaxtyping annotations."""
    command = ["-m", "ruff", "check", "--isolated", "--no-cache", "--ignore-noqa", "--select", "F821"]
    options = ["--target-version", "py311", "--output-format", "json"]
    process = subprocess.run([sys.executable, *command, *options, *paths], capture_output=True, text=True, check=False)
    assert process.returncode in (0, 1), process.stderr
    found = []
    for finding in json.loads(process.stdout):
        path, row, column = finding["filename"], finding["location"]["row"], finding["location"]["column"]
        if not any(row == text.lineno and column in columns_of(text) for text in dimensions_of(path)):
            found.append(f"{path}:{row}: {finding['message']}")
    return found


def columns_of(text: ast.Constant) -> range:
    """From 1, as ruff counts."""
    assert text.end_col_offset is not None
    return range(text.col_offset + 1, text.end_col_offset + 1)


@functools.cache
def dimensions_of(path: str) -> list[ast.Constant]:
    """The strings of ``Float[Array, "B"]`` in a file, where ``Float`` comes from jaxtyping."""
    tree = ast.parse(pathlib.Path(path).read_text(), path)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"]
    types = {alias.asname or alias.name for node in imports for alias in node.names}
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(ast.Name(name), ast.Tuple([_, ast.Constant(str()) as text])) if name in types:
                found.append(text)
    return found


@functools.cache
def names_of(module: str) -> set[str]:
    """What can be imported from a module or a folder of the package."""
    folder = f"{module}.__init__" in MODULES
    path = MODULES[f"{module}.__init__" if folder else module]
    table = symtable.symtable(path.read_text(), str(path), "exec")
    names = {one.get_name() for one in table.get_symbols() if one.is_assigned() or one.is_imported()}
    inside = {name.removeprefix(f"{module}.").split(".")[0] for name in MODULES if name.startswith(f"{module}.")}
    return names | inside


def is_there(name: str) -> bool:
    """Whether ``package.module.name`` can be imported."""
    parent, _, last = name.rpartition(".")
    known = parent in MODULES or f"{parent}.__init__" in MODULES
    return name == PACKAGE or (known and last in names_of(parent))


def test_what_is_imported_from_the_package_is_there():
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for folder in FOLDERS
        for path in sorted(folder.rglob("*.py"))
        for name in sorted(imports_of(path))
        if name.split(".")[0] == PACKAGE and not is_there(name)
    ]
    assert missing == []


def test_every_name_is_bound():
    assert undefined_names(*FOLDERS) == []


def test_a_name_without_a_binding_is_found_beside_dimensions(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from jaxtyping import Array, Float\n"
        "def double(x: Float[Array, 'B']) -> Float[Array, 'B']:\n"
        "    return missing(x)\n"
        "def halve(x: 'absent') -> list['B']:\n"
        "    return x\n"
    )
    found = [line.removeprefix(f"{path}:") for line in undefined_names(path)]
    assert found == ["3: Undefined name `missing`", "4: Undefined name `absent`", "4: Undefined name `B`"]

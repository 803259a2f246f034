"""A config and every local file that it reaches, made to travel: the config is resolved and names the files' new places.

    python launch/bundle.py --config configs/x.yaml --out FOLDER [--at /config] [section.key=value ...]

The files are those that the config names, the config of its warm start, and the modules of reward functions with those
that they import from the same folder. Folders and names on the Hugging Face hub stay as they are written.
"""

import argparse
import ast
import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import EvaluateConfig, GenerateConfig, SftConfig, TrainConfig

SCHEMAS = {"train": TrainConfig, "sft": SftConfig, "generate": GenerateConfig, "evaluate": EvaluateConfig}
CONFIG_FILE = "config.yaml"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What travels."""

    config: Any
    """As it was read, with the paths of this machine."""
    at: str
    """The folder in which the program will find the files."""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """By their paths in that folder; one is ``CONFIG_FILE``."""
    left: list[str] = dataclasses.field(default_factory=list)
    """Folders of this machine, which do not travel: ``key: path``."""

    def add(self, name: str, content: bytes) -> str:
        """Adds a file, under another name where it is taken by another content; returns its path over there."""
        path = pathlib.PurePosixPath(name)
        for number in range(1, len(self.files) + 2):
            name = str(path) if number == 1 else str(path.with_stem(f"{path.stem}_{number}"))
            if self.files.setdefault(name, content) == content:
                break
        return f"{self.at}/{name}"


def make(command: str, path: str, overrides: list[str], at: str) -> Bundle:
    """Reads and checks the config of a command, and collects what it reaches.

    Raises:
        ValueError: it does not exist or has mistakes, or two modules of reward functions have one name.
    """
    bundle = Bundle(config_file.load(SCHEMAS[command], path, overrides, CHECKS), at)
    bundle.add(CONFIG_FILE, _packed_config(bundle.config, bundle))
    return bundle


def _packed_config(config: Any, bundle: Bundle) -> bytes:
    values = config_file.written(config)  # without what it took from the environment
    _pack(values, bundle)
    return OmegaConf.to_yaml(OmegaConf.create(values)).encode()


def _pack(value: Any, bundle: Bundle) -> None:
    """Replaces the paths of local files by those of their copies."""
    if isinstance(value, list):
        for inner in value:
            _pack(inner, bundle)
    elif isinstance(value, dict):
        if any(":" in str(name) for name in value.get("functions") or ()):
            _pack_functions(value, bundle)
        for key, inner in value.items():
            if key in config_file.INPUTS and isinstance(inner, str) and inner != bundle.at:
                value[key] = _pack_file(key, inner, bundle)
            else:
                _pack(inner, bundle)


def _pack_file(key: str, text: str, bundle: Bundle) -> str:
    path = pathlib.Path(text)
    if key == "warm_start":
        return bundle.add(path.name, _packed_config(config_file.load(SftConfig, text, [], CHECKS), bundle))
    if path.is_file():
        return bundle.add(path.name, path.read_bytes())
    if path.is_dir():
        bundle.left.append(f"{key}: {text}")
    return text


def _pack_functions(reward: dict[str, Any], bundle: Bundle) -> None:
    """Adds the modules of reward functions; one that is not in the folder has to be installed over there."""
    folder = pathlib.Path(reward["folder"])
    for name in reward["functions"]:
        for path in _modules(folder, name.partition(":")[0].partition(".")[0], set()):
            if bundle.files.setdefault(str(path.relative_to(folder)), path.read_bytes()) != path.read_bytes():
                raise ValueError(f"reward.functions: {name}: another module named {path.name} travels too; rename one")
    reward["folder"] = bundle.at


def _modules(folder: pathlib.Path, name: str, seen: set[str]) -> Iterator[pathlib.Path]:
    """A module or package of the folder, and all of the folder that it imports."""
    paths = [folder / f"{name}.py", *sorted((folder / name).rglob("*.py"))]
    if name in seen:
        return
    seen.add(name)
    for path in filter(pathlib.Path.is_file, paths):
        yield path
        try:
            tree = ast.parse(path.read_text(), str(path))
        except SyntaxError as error:
            raise ValueError(f"reward.functions: {error}") from None
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for imported in names:
                yield from _modules(folder, imported.partition(".")[0], seen)


def write(bundle: Bundle, folder: pathlib.Path) -> None:
    """Writes the files below a folder."""
    for name, content in bundle.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A config and the local files that it reaches, as a folder.")
    parser.add_argument("--config", required=True, help="YAML file, or a shipped one by name")
    parser.add_argument("--command", default="train", choices=SCHEMAS, help="of oapl-jax (default: %(default)s)")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder to write")
    parser.add_argument("--at", help="where the program will find that folder (default: --out)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the config")
    arguments = parser.parse_intermixed_args(argv)
    at = arguments.at or str(arguments.out.absolute())
    try:
        bundle = make(arguments.command, arguments.config, arguments.overrides, at)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    write(bundle, arguments.out)
    for line in bundle.left:
        print(f"{line} is a folder of this machine and stays here", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])

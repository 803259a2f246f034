"""Every command in the pages works as far as can be said without running it for long.

A command is a line of a fenced block, or inline code, that begins like one. Those of ``oapl-jax`` are parsed by their own
parser, and their config is loaded with its overrides; launch scripts are dry-run; targets, files, tests and extras have to
exist. What cannot be checked here is marked by a comment before the block, or behind the inline code: ``<!-- cluster -->``
needs a cluster, ``<!-- hub -->`` something from the net, ``<!-- hours -->`` takes long.
"""

import argparse
import ast
import functools
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from packaging.requirements import InvalidRequirement, Requirement

from experiments import grid as grids
from oapl_jax.build.checks import CHECKS
from oapl_jax.cli.commands import COMMANDS
from oapl_jax.config import config_file
from oapl_jax.config.commands import EvaluateConfig, GenerateConfig, SftConfig, TrainConfig

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "launch/*.md", "benchmarks/*.md", "experiments/*.md", "configs/models/*.md")
    for path in ROOT.glob(pattern)
    if "_build" not in path.parts
)
SCHEMAS = {
    "train": TrainConfig,
    "preflight": TrainConfig,
    "import-rollouts": TrainConfig,
    "sft": SftConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
}
NAMES = {command.name for group in COMMANDS.values() for command in group}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PYTHON = r"(?:(?:\S*/)?python3?)"
BEGINNINGS = (
    rf"make(?: |$)|(?:\S*/)?oapl-jax |{PYTHON} -m (?:oapl_jax|experiments|pytest|venv)|{PYTHON} (?:benchmarks|tests)/|"
    r"(?:\S*/)?(?:pip|pytest|pre-commit) |(?:launch|benchmarks)/\S|srun |git |docker |kubectl |gcloud |gsutil |sbatch |sky |ray |"
    r"curl |apt-get |sudo |source |\. "
)
IS_COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{BEGINNINGS})")
MARK = r"<!-- (?:cluster|hub|hours) -->"
UNCHECKED = "cannot be checked here; mark it as cluster, hub or hours"
BLOCK = re.compile(rf"({MARK}\n+)?^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(rf"`([^`\n]+)`( ?{MARK})?")
OWN_CONFIG = re.compile(r"(configs/)?\w\.yaml")
"""``C.yaml`` stands for a file of the reader's."""


class Command(NamedTuple):
    """A command of a page."""

    words: tuple[str, ...]
    is_inline: bool
    """It may leave out options that it needs: the text around it is about those that it has."""


class Parsed(BaseException):
    """Raised by a parser in place of going on, with what it found."""


def commands_of(text: str) -> Iterator[tuple[Command, bool]]:
    """The commands of a page, and whether they are marked."""
    for mark, language, block in BLOCK.findall(text):
        if language in ("", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"(^|\s)#.*", "", line).strip()
                if language == "sh" or IS_COMMAND.match(line):
                    yield from ((command, bool(mark)) for command in split(line, is_inline=False))
    for code, mark in INLINE.findall(BLOCK.sub("", text)):
        if IS_COMMAND.match(code):
            yield from ((command, bool(mark)) for command in split(code, is_inline=True))


def split(line: str, *, is_inline: bool) -> Iterator[Command]:
    """Commands that are joined in a line, without what comes before them; brackets around optional words are taken off."""
    words: list[str] = []
    for word in [*shlex.split(line.replace("[-", "-").replace("[section", "section")), "&&"]:
        if word not in ("&&", ";", "|", "&"):
            words.append(word.removesuffix("]") if "[" not in word else word)
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        if words and words[0] == "srun":
            words = words[next(i for i, word in enumerate(words) if re.fullmatch(f"{PYTHON}|oapl-jax", word)) :]
        if words:
            yield Command(tuple(words), is_inline)
        words = []


def problem(command: Command) -> str | None:
    """What is wrong with a command; None: nothing."""
    words = list(command.words)
    program = pathlib.PurePath(words[0]).name or words[0]
    if re.fullmatch(PYTHON, words[0]) and len(words) > 1:
        program, words = (words[2], words[2:]) if words[1] == "-m" else (words[1], words[1:])
    if program == "oapl_jax.train":
        program, words = "oapl-jax", ["oapl-jax", "train", *words[1:]]
    if program in ("oapl-jax", "oapl_jax"):
        return oapl_jax_problem(words[1:], is_inline=command.is_inline)
    if words[0].startswith("launch/"):
        return launch_problem(words)
    if words[0].startswith(("benchmarks/", "tests/")):
        return script_problem(words)
    return OTHERS.get(program, lambda _: UNCHECKED)(words[1:])


def oapl_jax_problem(words: list[str], *, is_inline: bool) -> str | None:
    name, arguments = words[0], words[1:]
    if name in ("COMMAND", "--help", "--version"):
        return None
    if name not in NAMES:
        return f"no command {name!r}"
    if is_inline and not arguments:
        return None
    try:
        parse(name, tuple(arguments), is_inline)
    except ValueError as error:
        return str(error)
    config = value_of("--config", arguments)
    if config is None or OWN_CONFIG.fullmatch(config):
        return None
    return config_problem(name, config, [word for word in arguments if "=" in word and not word.startswith("-")])


def parse(name: str, words: tuple[str, ...], is_inline: bool) -> None:
    """Lets the command's own parser read the words, and stops there.

    Raises:
        ValueError: it refuses them.
    """
    with pytest.MonkeyPatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(
                argparse.ArgumentParser, method, stopping(getattr(argparse.ArgumentParser, method), is_inline)
            )
        patch.setattr(argparse.ArgumentParser, "error", refuse)
        try:
            importlib.import_module(f"oapl_jax.cli.{name.replace('-', '_')}").main(list(words))
        except Parsed:
            return
        except SystemExit as end:
            if end.code == 0:  # --help
                return
    raise ValueError(f"{name} has no parser of its own")


def stopping(method, is_inline):
    def parse_and_stop(self, *args, **kwargs):
        for action in (*self._actions, *self._mutually_exclusive_groups) if is_inline else ():
            action.required = False
        raise Parsed(method(self, *args, **kwargs))

    return parse_and_stop


def refuse(_, message):
    raise ValueError(message)


@functools.cache
def loaded(name: str, config: str, overrides: tuple[str, ...]) -> str | None:
    try:
        if name == "grade":
            config_file.load_reward(ROOT / config)
        else:
            config_file.load(SCHEMAS[name], ROOT / config, list(overrides), CHECKS)
    except ValueError as error:
        return str(error)
    return None


def config_problem(name: str, config: str, overrides: list[str]) -> str | None:
    by_name = f"configs/{config}.yaml"
    config = by_name if (ROOT / by_name).is_file() else config
    if not (ROOT / config).is_file():
        return f"{config} does not exist"
    return loaded(name, config, tuple(overrides))


def value_of(option: str, words: list[str]) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def launch_problem(words: list[str]) -> str | None:
    """A launch script is dry-run."""
    if not (ROOT / words[0]).exists():
        return f"{words[0]} does not exist"
    if len(words) == 1:
        return None
    if "--dry-run" not in words:
        return f"without --dry-run it {UNCHECKED}"
    path = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", *words], cwd=ROOT, env=path, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else None


def script_problem(words: list[str]) -> str | None:
    """A program beside the package has the options that it is given, and its config loads."""
    if not (path := ROOT / words[0].partition("::")[0]).exists():
        return f"{words[0]} does not exist"
    if path.is_dir():
        return None
    if unknown := {word for word in words if word.startswith("--")} - options_of(path):
        return f"{words[0]} has no {', '.join(unknown)}"
    config = value_of("--config", words)
    if config is None:
        return None
    taken = {value_of(option, words) for option in options_of(path)}
    return config_problem("train", config, [word for word in words if "=" in word and word not in taken])


@functools.cache
def options_of(path: pathlib.Path) -> set[str]:
    """What the calls of ``add_argument`` in a file name."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument" and call.args
        and isinstance(call.args[0], ast.Constant)
    }  # fmt: skip


def make_problem(words: list[str]) -> str | None:
    missing = {word for word in words if "=" not in word} - TARGETS
    return f"no target {', '.join(missing)}" if missing else None


def pip_problem(words: list[str]) -> str | None:
    """Files that are named exist, and extras of ours."""
    verb, *rest = words
    for previous, word in zip(["", *rest], rest, strict=False):
        if previous in ("-c", "-r"):
            if not (ROOT / word).is_file():
                return f"{word} does not exist"
        elif not word.startswith("-"):
            name, bracket, extras = word.partition("[")
            if name in (".", "oapl-jax") and bracket:
                unknown = set(extras.rstrip("]").split(",")) - EXTRAS.keys()
                if unknown:
                    return f"no extra {', '.join(unknown)}"
            elif name != ".":
                try:
                    Requirement(word)
                except InvalidRequirement as error:
                    return str(error)
    return None if verb in ("install", "uninstall") else UNCHECKED


def pytest_problem(words: list[str]) -> str | None:
    missing = [word for word in words if "/" in word and not (ROOT / word.partition("::")[0]).exists()]
    return f"{', '.join(missing)}: no such tests" if missing else None


def nothing(_: list[str]) -> None:
    return None


def experiments_problem(words: list[str]) -> str | None:
    """The grid loads with the overrides."""
    if unknown := {word for word in words if word.startswith("--")} - options_of(ROOT / "experiments/__main__.py"):
        return f"python -m experiments has no {', '.join(unknown)}"
    try:
        grids.load(ROOT / words[0], [word for word in words[1:] if "=" in word])
    except (ValueError, OSError) as error:
        return str(error)
    return None


OTHERS = {
    "experiments": experiments_problem,
    "make": make_problem,
    "pip": pip_problem,
    "pytest": pytest_problem,
    "venv": nothing,
    ".": nothing,
    "source": nothing,
    "pre-commit": nothing,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_work_or_are_marked(page):
    found = dict.fromkeys(commands_of(page.read_text()))
    problems = [
        f"{' '.join(command.words)}: {trouble}"
        for command, is_marked in found
        if not is_marked and (trouble := problem(command)) is not None
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("```\noapl-jax train --config configs/absent.yaml\n```", "does not exist"),
        ("```sh\noapl-jax train --config configs/quickstart.yaml learner.rate=1\n```", "unknown key"),
        ("```sh\noapl-jax sample --engine vllm\n```", "--run"),
        ("`oapl-jax sample --motor vllm`", "--motor"),
        ("`python -m oapl_jax tarin --config configs/quickstart.yaml`", "no command 'tarin'"),
        ("`make absent`", "no target absent"),
        ("`python benchmarks/rewards.py --absent`", "has no --absent"),
        ("`python -m experiments experiments/paper.yaml --absent`", "has no --absent"),
        ("`python -m experiments experiments/absent.yaml --out runs/x`", "No such file"),
        ("```\nlaunch/gke_tpu.sh --config configs/quickstart.yaml\n```", "--dry-run"),
        ('`pip install "oapl-jax[absent]"`', "no extra absent"),
        ("`python -m pytest tests/absent.py`", "no such tests"),
        ("```sh\nsomething --else\n```", "mark it"),
        ("```\nkubectl get pods\n```", "mark it"),
    ],
)
def test_what_is_wrong_with_a_command_is_found(text, trouble):
    ((command, is_marked),) = commands_of(text)
    assert not is_marked
    assert trouble in problem(command)


def test_a_mark_is_seen_and_what_is_no_command_is_left_alone():
    page = "<!-- cluster -->\n```sh\nkubectl get pods\n```\n`git clone ADDRESS` <!-- hub --> and `make_setup`, `python file.py`"
    assert [is_marked for _, is_marked in commands_of(page)] == [True, True]


def test_a_command_goes_over_lines_and_optional_words_count():
    page = "```\nA=1 .venv/bin/python -m oapl_jax train \\\n  --config C.yaml [--dry-run]  # a comment\n```"
    ((command, _),) = commands_of(page)
    assert command.words == (".venv/bin/python", "-m", "oapl_jax", "train", "--config", "C.yaml", "--dry-run")
    assert problem(command) is None

"""The commands, and the help that lists them by what a user wants to do.

Each is a file of this folder with a function ``main(argv)``, imported only when it is called.
"""

import importlib
import sys
from typing import NamedTuple

from oapl_jax import __version__
from oapl_jax.io import console
from oapl_jax.io.terminal import say


class Command(NamedTuple):
    """A line of the help."""

    name: str
    summary: str
    example: str
    """Arguments, as one would type them."""


COMMANDS: dict[str, tuple[Command, ...]] = {
    "Train a model": (
        Command("train", "reinforcement learning: OAPL and its baselines", "--config configs/quickstart.yaml"),
        Command("sft", "supervised fine-tuning", "--config configs/chain_sft.yaml"),
        Command("preflight", "memory and cost on a TPU slice, without one", "--config C.yaml --topology v5p-64"),
    ),
    "Make rollouts": (
        Command("sample", "sample for a run with mode: detached, from anywhere", "--run runs/NAME"),
        Command("generate", "a data set of graded responses", "--config configs/countdown_generate.yaml"),
        Command("codenet", "Project CodeNet as a data set of graded programs", "Project_CodeNet OUT --tokenizer T"),
        Command("import-rollouts", "rollouts that others collected as a rollout log", "IN.jsonl OUT --config C.yaml"),
    ),
    "Judge a model": (
        Command("evaluate", "pass@k on benchmarks, or of rollout logs", "--config configs/evaluate_math.yaml"),
        Command("grade", "grade rows by themselves", "IN.jsonl OUT.jsonl --config C.yaml"),
        Command("check-sandbox", "which sandbox this machine offers to graded programs", "--level namespaces"),
    ),
    "Look at a run": (
        Command("report", "verdict, curves and responses of runs as one page", "runs/NAME [--serve]"),
        Command("audit", "check from its files what a run was trained on", "runs/NAME"),
    ),
    "Use a trained model": (
        Command("export", "a checkpoint as a Hugging Face folder", "runs/NAME OUT --step 100"),
        Command("serve", "a model behind JetStream's gRPC server", "--model runs/NAME/export"),
    ),
}
_NAMES = [command.name for group in COMMANDS.values() for command in group]


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the words name; returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        say(_help())
        return console.ExitCode.DONE
    if name == "--version":
        say(f"oapl-jax {__version__}")
        return console.ExitCode.DONE
    if name not in _NAMES:
        say(f"error: no command {name!r}; there are: {', '.join(_NAMES)}", sys.stderr)
        return console.ExitCode.USAGE
    return console.run(
        lambda words: importlib.import_module(f"oapl_jax.cli.{name.replace('-', '_')}").main(words), rest
    )


def _help() -> str:
    lines = [
        f"oapl-jax {__version__}: reinforcement learning of language models on JAX, off-policy by design",
        "",
        "usage: oapl-jax COMMAND [--help] ...    (or: python -m oapl_jax COMMAND ...)",
    ]
    for title, commands in COMMANDS.items():
        lines += ["", title]
        for command in commands:
            lines += [f"  {command.name:<14} {command.summary}"]
            lines += [f"  {'':<14} oapl-jax {command.name} {command.example}"]
    return "\n".join(lines)

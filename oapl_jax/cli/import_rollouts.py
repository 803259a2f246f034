"""Makes a rollout log of rollouts that others collected (docs/offline.md).

    python -m oapl_jax import-rollouts --config C.yaml SOURCE OUT [--drop]

SOURCE is a file or a folder of JSONL or Parquet with token ids and log-probabilities. C is the config of the run that is to
learn from them: its tokenizer, its limits and its sampling distribution are what rows are checked against, and its graders
grade those without a reward. OUT is what ``offline.rounds.N.log`` names; OUT/import.json counts what was used and what was
left out, by reason.

Exit codes: 0 done, 2 a row or the config is wrong.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
from typing import Any

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.data import tokenizer as tokenizers
from oapl_jax.io.terminal import say
from oapl_jax.model import hf
from oapl_jax.rewards.grader import make_grader
from oapl_jax.rollouts.import_rollouts import BadRows
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.sources import imported
from oapl_jax.sources.setup import make_grading

SUMMARY_FILE = "import.json"


def write(source: pathlib.Path, out: pathlib.Path, config: TrainConfig, bad: BadRows) -> dict[str, Any]:
    """Writes the log (version 0) and returns its summary.

    Raises:
        ValueError: ``out`` exists, or nothing of ``source`` can be used; or, as ``bad`` has it, for the first bad row.
    """
    if out.exists():
        raise ValueError(f"{str(out)!r} exists; choose another folder")
    model = config.model
    path = model.path and hf.local_copy(model.path)
    tokenizer = tokenizers.load(model.tokenizer, path, model.chat_template_kwargs)
    with contextlib.closing(make_grading(config, tokenizer, make_grader(config))) as grading:
        groups = imported.make_groups(0, imported.read(source, config, tokenizer, grading, bad), grading)
    summary = imported.counts(groups, bad)
    if not groups:
        raise ValueError(f"{str(source)!r}: nothing can be used; left out: {summary['left_out']}")
    imported.write(RolloutLog(out, dataclasses.asdict(SamplingDistribution.of(config.sampler))), groups)
    (out / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def main(argv: list[str]) -> None:
    """Writes the log and prints its summary."""
    parser = argparse.ArgumentParser(
        prog="python -m oapl_jax import-rollouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", type=pathlib.Path)
    parser.add_argument("out", metavar="OUT", type=pathlib.Path)
    parser.add_argument("--config", required=True, help="YAML file of oapl_jax.train")
    parser.add_argument("--drop", action="store_true", help="leave bad rows out and count them; else they are errors")
    arguments = parser.parse_args(argv)
    config = config_file.load(TrainConfig, arguments.config, [], CHECKS)
    bad = BadRows("drop" if arguments.drop else "error", option="--drop")
    summary = write(arguments.source, arguments.out, config, bad)
    say(
        f"{summary['groups']:,} groups, {summary['rollouts']:,} rollouts, {summary['correct']:,} correct: {arguments.out}"
    )
    for reason, count in summary["left_out"].items():
        example = f", such as {bad.examples[reason]}" if reason in bad.examples else ""
        say(f"left out: {count:,} x {reason}{example}")

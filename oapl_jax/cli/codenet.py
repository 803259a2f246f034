"""Writes Project CodeNet as a rollout log of people's programs, for objectives that do not need a sampler.

    python -m oapl_jax codenet Project_CodeNet OUT --tokenizer TOKENIZER [--group-size 4] [--max-correct 50] ...

A response is the program in a fenced block, followed by the stop token; models are asked for this form too. The
log-probabilities are unknown, so they are NaN in the log. OUT/codenet.json counts what was used and what was left out,
by reason.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from oapl_jax.data import codenet
from oapl_jax.data import tokenizer as tokenizers
from oapl_jax.data.catalogue import PROGRAM
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.io.terminal import say
from oapl_jax.objectives import oapl
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict
from oapl_jax.untrusted import reading

SUMMARY_FILE = "codenet.json"
GROUPS_PER_FILE = 256


def write(root: pathlib.Path, out: pathlib.Path, tokenizer: Tokenizer, rules: codenet.Rules) -> dict[str, Any]:
    """Writes the log (version 0) for a model with this tokenizer, and returns its summary.

    Raises:
        ValueError: ``root`` is not a copy of CodeNet, ``out`` exists, or no group can be made.
    """
    if out.exists():
        raise ValueError(f"{str(out)!r} exists; choose another folder")
    dropped, statuses, problems = (collections.Counter[str]() for _ in range(3))
    groups, log = _groups(root, tokenizer, rules, dropped), RolloutLog(out)
    while batch := list(itertools.islice(groups, GROUPS_PER_FILE)):
        log.append(batch)
        problems.update(group.prompt.id for group in batch)
        statuses.update(item.grade.detail.partition(" (")[0] for group in batch for item in group.rollouts)
    if not problems:
        raise ValueError(f"{str(root)!r}: no group can be made; left out: {dict(dropped)}")
    summary = {
        "groups": problems.total(),
        "problems": len(problems),
        "programs": problems.total() * rules.group_size,
        "statuses": dict(statuses),
        "dropped": {reason: count for reason, count in dropped.items() if count},
    }
    (out / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _groups(
    root: pathlib.Path, tokenizer: Tokenizer, rules: codenet.Rules, dropped: collections.Counter[str]
) -> Iterator[RolloutGroup]:
    index = itertools.count()

    def keeps(source: str) -> bool:
        return len(response_ids(source, tokenizer)) <= rules.max_tokens

    for problem in codenet.read_problems(root, dropped):
        message = PROGRAM.replace("{prompt}", problem.statement)
        token_ids = np.asarray(tokenizer.encode_prompt(message), np.int32)
        prompt = Prompt(f"codenet/{problem.id[1:]}", token_ids, message, problem.tests)
        if len(token_ids) > rules.max_prompt_tokens:
            dropped["problems with a prompt that is too long"] += 1
            continue
        found = list(codenet.read_submissions(root, problem.id, keeps, dropped))
        groups = list(codenet.make_groups(problem.id, found, rules))
        dropped["programs beyond the groups"] += len(found) - len(groups) * rules.group_size
        if found and not groups:
            dropped["problems without a correct or without an incorrect program, or with too few"] += 1
        for members in groups:
            yield _group(next(index), prompt, members, tokenizer)


def response_ids(source: str, tokenizer: Tokenizer) -> list[int]:
    """A program as the response of a model."""
    return [*tokenizer.encode(f"```python\n{source}\n```"), tokenizer.eos_id]


def _group(index: int, prompt: Prompt, members: Sequence[codenet.Submission], tokenizer: Tokenizer) -> RolloutGroup:
    """A group with V* and advantages of OAPL at beta1 = 1, as in every log; training computes the objective's own."""
    rewards = np.array([codenet.REWARDS[member.status] for member in members])
    value = oapl.optimal_value(rewards, beta1=1.0)
    rollouts = []
    for member, reward in zip(members, rewards.tolist(), strict=True):
        token_ids = np.asarray(response_ids(member.source, tokenizer), np.int32)
        verdict = Verdict.CORRECT if member.status == codenet.ACCEPTED else Verdict.WRONG
        unknown = np.full(len(token_ids), math.nan, np.float32)
        rollouts.append(
            GradedRollout(
                Rollout(token_ids, unknown, FinishReason.STOP),
                tokenizer.decode(token_ids.tolist()),
                Grade(verdict, reward, f"{member.status} ({member.id})"),
                reward - value,
            )
        )
    return RolloutGroup(index, 0, prompt, tuple(rollouts), value)


def main(argv: list[str]) -> None:
    """Writes the log and prints its summary."""
    parser = argparse.ArgumentParser(
        prog="oapl-jax codenet", description="Writes Project CodeNet as a rollout log of graded groups."
    )
    parser.add_argument("root", type=pathlib.Path, metavar="PROJECT_CODENET", help="the archive's folder")
    parser.add_argument("out", type=pathlib.Path, metavar="OUT", help="folder of the log")
    parser.add_argument(
        "--tokenizer", required=True, help="tokenizer of the model to be trained: a folder or a name on the hub"
    )
    parser.add_argument(
        "--chat-template-kwargs", default="{}", metavar="JSON", help='such as {"enable_thinking": false}'
    )
    for field in dataclasses.fields(codenet.Rules):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=int, default=field.default, help=field.metadata["help"])
    options = vars(parser.parse_args(argv))
    root, out, source, template = (options.pop(name) for name in ("root", "out", "tokenizer", "chat_template_kwargs"))
    if options["group_size"] < 2 or options["max_correct"] < 1:
        parser.error("--group-size: at least 2; --max-correct: at least 1")
    template_options = reading.parse_object(template, "--chat-template-kwargs")
    tokenizer = tokenizers.load(source, template_options=template_options)
    say(json.dumps(write(root, out, tokenizer, codenet.Rules(**options)), indent=1))

"""Writes Project CodeNet as a rollout log of people's programs, for objectives that do not need a sampler.

    python -m oapl_jax codenet Project_CodeNet OUT --tokenizer TOKENIZER [--group-size 4] [--max-correct 50] ...

A response is the program in a fenced block, followed by the stop token; models are asked for this form too. The
log-probabilities are unknown, so they are NaN in the log. OUT/codenet.json counts what was used and what was left out,
by reason.
"""

import argparse
import collections
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from oapl_jax.data import codenet
from oapl_jax.data import tokenizer as tokenizers
from oapl_jax.data.dataset import PROGRAM
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.objectives import oapl
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict

SUMMARY_FILE = "codenet.json"
GROUPS_PER_FILE = 256


def write(
    root: pathlib.Path,
    out: pathlib.Path,
    tokenizer: Tokenizer,
    rules: codenet.Rules,
    *,
    max_tokens: int = 2048,
    max_prompt_tokens: int = 2048,
) -> dict[str, Any]:
    """Writes the log (version 0) and returns its summary.

    Args:
        root: ``Project_CodeNet``.
        out: folder of the log, which must not exist.
        tokenizer: of the model that will be trained.
        rules: how groups are formed.
        max_tokens: most tokens of a response; longer programs are left out.
        max_prompt_tokens: most tokens of a prompt; problems with longer ones are left out.

    Raises:
        ValueError: ``root`` is not a copy of CodeNet, ``out`` exists, or no group can be made.
    """
    if out.exists():
        raise ValueError(f"{str(out)!r} exists; choose another folder")
    dropped: collections.Counter[str] = collections.Counter()
    statuses: collections.Counter[str] = collections.Counter()
    log, waiting, index, num_problems = RolloutLog(out), [], 0, 0
    for problem in codenet.read_problems(root, dropped):
        prompt = _prompt(problem, tokenizer)
        if len(prompt.token_ids) > max_prompt_tokens:
            dropped["problems with a prompt that is too long"] += 1
            continue
        found = codenet.read_submissions(
            root, problem.id, lambda source: len(response_ids(source, tokenizer)) <= max_tokens, dropped
        )
        groups = list(codenet.make_groups(problem.id, found, rules))
        num_used = len(groups) * rules.group_size
        dropped["programs beyond the groups"] += len(found) - num_used
        if groups:
            num_problems += 1
        elif found:
            dropped["problems without a correct or without an incorrect program, or with too few"] += 1
        for members in groups:
            statuses.update(member.status for member in members)
            waiting.append(_group(index, prompt, members, tokenizer))
            index += 1
            if len(waiting) == GROUPS_PER_FILE:
                log.append(waiting)
                waiting = []
    if not index:
        raise ValueError(f"{str(root)!r}: no group can be made; left out: {dict(dropped)}")
    if waiting:
        log.append(waiting)
    summary = {
        "groups": index,
        "problems": num_problems,
        "programs": index * rules.group_size,
        "statuses": dict(statuses),
        "dropped": {reason: count for reason, count in dropped.items() if count},
    }
    (out / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def response_ids(source: str, tokenizer: Tokenizer) -> list[int]:
    """A program as the response of a model."""
    return [*tokenizer.encode(f"```python\n{source}\n```"), tokenizer.eos_id]


def _prompt(problem: codenet.Problem, tokenizer: Tokenizer) -> Prompt:
    message = PROGRAM.replace("{prompt}", problem.statement)
    token_ids = np.asarray(tokenizer.encode_prompt(message), np.int32)
    return Prompt(f"codenet/{problem.id[1:]}", token_ids, message, problem.tests)


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
        prog="python -m oapl_jax codenet", description="Writes Project CodeNet as a rollout log of graded groups."
    )
    parser.add_argument("root", type=pathlib.Path, metavar="PROJECT_CODENET", help="the archive's folder")
    parser.add_argument("out", type=pathlib.Path, metavar="OUT", help="folder of the log")
    parser.add_argument(
        "--tokenizer", required=True, help="tokenizer of the model to be trained: a folder or a name on the hub"
    )
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--max-correct", type=int, default=50, help="correct programs kept per problem")
    parser.add_argument(
        "--max-tokens", type=int, default=2048, help="most tokens of a program; longer ones are left out"
    )
    parser.add_argument(
        "--max-prompt-tokens", type=int, default=2048, help="most tokens of a prompt; longer ones are left out"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of programs and of their groups")
    arguments = parser.parse_args(argv)
    if arguments.group_size < 2 or arguments.max_correct < 1:
        parser.error("--group-size: at least 2; --max-correct: at least 1")
    summary = write(
        arguments.root,
        arguments.out,
        tokenizers.load(arguments.tokenizer),
        codenet.Rules(arguments.group_size, arguments.max_correct, arguments.seed),
        max_tokens=arguments.max_tokens,
        max_prompt_tokens=arguments.max_prompt_tokens,
    )
    print(json.dumps(summary, indent=1))

"""Made-up groups for tests of the log, the buffer and the batch."""

import dataclasses
import functools
import math

import numpy as np

from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.objectives import oapl
from oapl_jax.rewards.grader import ToyGrader
from oapl_jax.rollouts.buffer import Ticket
from oapl_jax.rollouts.grading import Advantages, Grading
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict

GRADING = Grading(
    CharacterTokenizer().decode,
    ToyGrader("chain"),
    Advantages(lambda rewards, _: oapl.advantages(rewards, 1.0), functools.partial(oapl.optimal_value, beta1=1.0)),
)


def prompt(position: int, length: int = 3) -> Prompt:
    token_ids = np.random.default_rng(position).integers(2, 40, length).astype(np.int32)
    return Prompt(f"test/{position}", token_ids, f"what is {position}?", str(position))


def rollout(rng: np.random.Generator, length: int, verdict: Verdict = Verdict.CORRECT, advantage=0.5) -> GradedRollout:
    reward = {Verdict.CORRECT: 1.0, Verdict.WRONG: 0.0, Verdict.INVALID: math.nan}[verdict]
    sampled = Rollout(
        rng.integers(2, 40, length).astype(np.int32),
        np.log(rng.uniform(size=length)).astype(np.float32),
        FinishReason.STOP if rng.random() < 0.5 else FinishReason.LENGTH,
    )
    advantage = math.nan if verdict is Verdict.INVALID else advantage
    return GradedRollout(sampled, f"answer {length}", Grade(verdict, reward, "as it is"), advantage)


def group(index: int, version: int = 0, *, position: int | None = None, is_usable: bool = True) -> RolloutGroup:
    """Two rollouts; without a usable one where ``is_usable`` is False."""
    rng = np.random.default_rng((index, version))
    verdicts = [Verdict.CORRECT, Verdict.WRONG] if is_usable else [Verdict.INVALID] * 2
    rollouts = tuple(rollout(rng, 2 + i, verdict) for i, verdict in enumerate(verdicts))
    value = 0.7 if is_usable else math.nan
    return RolloutGroup(index, version, prompt(index if position is None else position), rollouts, value)


def sound(index: int, version: int = 0, *, is_usable: bool = True) -> RolloutGroup:
    """A group of a run with a built-in task, characters as tokens and OAPL, which passes all checks."""
    made = group(index, version, is_usable=is_usable)
    question = dataclasses.replace(made.prompt, token_ids=made.prompt.token_ids % 18)
    rollouts = []
    for item in made.rollouts:
        tokens = 2 + item.rollout.token_ids % 16
        tokens[-1] = CharacterTokenizer().eos_id
        ended = dataclasses.replace(item.rollout, token_ids=tokens, finish_reason=FinishReason.STOP)
        rollouts.append(dataclasses.replace(item, rollout=ended))
    return GRADING.group(Ticket(version, index, index), question, rollouts)


def bits(item: RolloutGroup) -> tuple:
    """Everything in a group, with the bits of its numbers, for comparison (NaN is equal to itself)."""

    def number(value: float) -> bytes:
        return np.float64(value).tobytes()

    def array(values: np.ndarray) -> tuple:
        return values.dtype.str, values.shape, values.tobytes()

    question = item.prompt
    return (
        *(item.index, item.policy_version, item.id, number(item.value)),
        *(question.id, array(question.token_ids), question.text, question.answer),
        *(
            (
                *(array(r.rollout.token_ids), array(r.rollout.logprobs), r.rollout.finish_reason),
                *(
                    r.text,
                    r.grade.verdict,
                    number(r.grade.reward),
                    r.grade.detail,
                    number(r.advantage),
                    r.is_usable,
                    r.extra,
                ),
            )
            for r in item.rollouts
        ),
    )

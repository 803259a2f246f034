"""Which groups of a finished rollout log are used, and how many are dropped for which reason."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from oapl_jax.config.offline import FilterConfig
from oapl_jax.types import FinishReason, RolloutGroup, Verdict

FEWEST_ROLLOUTS = 2
"""Of a group: the V* of one rollout is its own reward."""


@dataclasses.dataclass
class FilterCounts:
    """How many groups a filter kept, and how many it dropped for each reason."""

    groups: int = 0
    kept: int = 0
    truncated_rollouts: int = 0
    """Responses that ended at the limit."""
    small_groups: int = 0
    """Groups that had fewer than two responses left."""
    too_few_correct: int = 0
    too_many_correct: int = 0
    not_in_subset: int = 0

    def __str__(self) -> str:
        """``kept 90 of 100 groups; dropped: 10 too few correct``; counts of 0 are left out."""
        counts = list(dataclasses.asdict(self).items())[2:]
        dropped = [f"{count} {name.replace('_', ' ')}" for name, count in counts if count]
        return f"kept {self.kept} of {self.groups} groups" + (f"; dropped: {', '.join(dropped)}" if dropped else "")


def apply(groups: Iterable[RolloutGroup], filters: FilterConfig, seed: int) -> tuple[list[RolloutGroup], FilterCounts]:
    """The groups that are used, in their order, and the counts; ``seed`` draws the random subset of prompts.

    A group that loses rollouts keeps the V* and the advantages of before.
    """
    counts = FilterCounts()
    kept = []
    for group in groups:
        counts.groups += 1
        left = _finished(group, counts) if filters.finished_only else group
        num_correct = sum(item.grade.verdict is Verdict.CORRECT for item in left.rollouts)
        if filters.finished_only and len(left.rollouts) < FEWEST_ROLLOUTS:
            counts.small_groups += 1
        elif num_correct < filters.min_correct:
            counts.too_few_correct += 1
        elif filters.max_correct is not None and num_correct > filters.max_correct:
            counts.too_many_correct += 1
        else:
            kept.append(left)
    if filters.prompts is not None:
        chosen = set(choose(list(dict.fromkeys(group.prompt.id for group in kept)), filters.prompts, seed))
        kept, before = [group for group in kept if group.prompt.id in chosen], len(kept)
        counts.not_in_subset = before - len(kept)
    counts.kept = len(kept)
    return kept, counts


def choose(names: list[str], number: int, seed: int) -> list[str]:
    """A random subset of ``number`` names, or all where there are fewer, in their order."""
    chosen = np.random.default_rng((seed, number)).permutation(len(names))[:number]
    return [names[i] for i in sorted(chosen.tolist())]


def _finished(group: RolloutGroup, counts: FilterCounts) -> RolloutGroup:
    rest = tuple(item for item in group.rollouts if item.rollout.finish_reason is not FinishReason.LENGTH)
    counts.truncated_rollouts += len(group.rollouts) - len(rest)
    return dataclasses.replace(group, rollouts=rest)

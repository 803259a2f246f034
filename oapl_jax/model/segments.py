"""What the tokens of a packed row see of each other."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int


class Segments(NamedTuple):
    """The ids of the tokens of rows: a token sees earlier tokens of its rollout, and of its prompt where it is shared."""

    rollouts: Int[Array, "*B T"]
    """Which rollout of the row a token belongs to, from 1; 0: a shared prompt, or padding."""
    prompts: Int[Array, "*B T"] | None = None
    """Which prompt of the row a token belongs to or answers; None: no prompt is shared."""


def may_see(queries: Segments, keys: Segments) -> Bool[Array, "*B T S"]:
    """Whether a query sees a key that is not after it."""
    of_rollout = queries.rollouts[..., :, None] == keys.rollouts[..., None, :]
    if queries.prompts is None or keys.prompts is None:
        return of_rollout
    of_prompt = queries.prompts[..., :, None] == keys.prompts[..., None, :]
    return of_prompt & (of_rollout | (keys.rollouts == 0)[..., None, :])

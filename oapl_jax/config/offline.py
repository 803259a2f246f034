"""Training on finished data."""

from typing import Annotated, Literal

from pydantic import Field

from oapl_jax.config.applies import AppliesWhen, is_null
from oapl_jax.config.section import Count, CountOrZero, Section


class FilterConfig(Section):
    """Which groups of a rollout log are used. What is dropped is counted, by reason."""

    finished_only: bool = False
    """Leave out responses that were truncated at the limit, and groups with fewer than two others."""
    min_correct: CountOrZero = 0
    """Fewest correct responses of a group."""
    max_correct: CountOrZero | None = None
    """Most correct responses of a group; null: any number."""
    prompts: Count | None = None
    """Prompts whose groups are used, drawn by ``run.seed`` from those of the groups that are left; null: all."""


class RoundConfig(Section):
    """A round of offline training: some data, some epochs over it."""

    log: str | None = None
    """Finished data: a folder of rollout log files, or a file (or a folder) in the layout of the paper's authors or of
    records (docs/offline.md); null: generated with the policy that the round starts from."""
    prompts: Annotated[Count | None, AppliesWhen("log", condition=is_null)] = None
    """Prompts that are generated for; null, with a dataset: all."""
    epochs: Count = 1
    """Passes over the data, each in an order of its own."""
    scorer: Annotated[str | None, AppliesWhen("log")] = None
    """Model that made the data, where these lack log-probabilities; null: the policy that the round starts from."""
    filter: FilterConfig = FilterConfig()
    """Which groups are used."""


class OfflineConfig(Section):
    """Training on finished data, round by round (docs/offline.md)."""

    rounds: Annotated[tuple[RoundConfig, ...], Field(min_length=1)]
    """Each starts from what the one before has learned."""
    logprobs: Literal["logged", "scored"] = "logged"
    """logged: the sampler's, where the data have them, and scored ones elsewhere; scored: the learner's own of the model
    that made the data, whatever the log has."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """Responses over ``sampler.max_response_tokens``. truncate: the beginning is kept as a wrong response, without its
    reward."""
    bad_rows: Literal["error", "drop"] = "error"
    """Rows that cannot be used (docs/offline.md lists why): an error, or dropped and counted by reason."""
    reward_range: tuple[float, float] | None = None
    """Least and largest reward that a row may have; null: any number."""
    source_limit: Count | None = None
    """Length in tokens at which responses were truncated when the data were made, where the data do not say it; null:
    none was."""

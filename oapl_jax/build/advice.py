"""Warnings at the start of a run whose config lies where runs have failed; docs/tuning.md has the experiments."""

from collections.abc import Iterator

from oapl_jax.build.checks import objective_of
from oapl_jax.config.commands import TrainConfig
from oapl_jax.objectives.oapl import RegressionOptions

MAX_TARGET = 20.0
"""Nats a token that an advantage of 1 may ask a regression for."""
MAX_MOVEMENT = 0.04
"""How far AdamW may move each parameter between two syncs, where importance weights correct for it."""


def advice(config: TrainConfig) -> Iterator[str]:
    """What is likely to go wrong, with the way out."""
    objective, options = objective_of(config.objective)
    tokens = config.sampler.max_response_tokens
    if isinstance(options, RegressionOptions) and (target := 1 / (options.beta2 * tokens)) > MAX_TARGET:
        yield (
            f"objective.beta2={options.beta2:g} with responses of at most {tokens} tokens asks for log-ratios of up to"
            f" {target:.3g} nats a token, and hardly holds the policy near the sampler; raise it to"
            f" {1 / (MAX_TARGET * tokens):.1g} or more (docs/tuning.md)"
        )
    if config.mode == "offline" or objective.clipped is None:
        return
    steps = config.window.sync_every * config.learner.updates_per_batch
    if (movement := config.learner.learning_rate * steps) > MAX_MOVEMENT:
        yield (
            f"objective.name={objective.name} rests on importance weights, and {steps} updates with"
            f" learner.learning_rate={config.learner.learning_rate:g} between two syncs may move a parameter by"
            f" {movement:.2g}: such runs collapsed; sync more often, or keep the product below {MAX_MOVEMENT:g}"
            " (docs/tuning.md)"
        )

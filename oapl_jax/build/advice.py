"""Warnings at the start of a run whose config lies where runs have failed; docs/tuning.md has the experiments."""

from collections.abc import Iterator

from oapl_jax.build.checks import objective_of
from oapl_jax.config.commands import TrainConfig
from oapl_jax.objectives.oapl import RegressionOptions

MAX_TARGET = 20.0
"""Nats a token. A regression whose advantage of 1 asks for more has no hold on the policy: 5.6 learned and 56 did not,
with responses of 6 tokens (experiments/tuning.yaml)."""


def advice(config: TrainConfig) -> Iterator[str]:
    """What is likely to go wrong, a sentence or two each, with the way out."""
    _, options = objective_of(config.objective)
    tokens = config.sampler.max_response_tokens
    if isinstance(options, RegressionOptions) and (target := 1 / (options.beta2 * tokens)) > MAX_TARGET:
        yield (
            f"objective.beta2={options.beta2:g} with responses of at most {tokens} tokens asks for log-ratios of up to"
            f" {target:.3g} nats a token, which does not hold the policy near the sampler; raise it to"
            f" {1 / (MAX_TARGET * tokens):.1g} or more (docs/tuning.md)"
        )

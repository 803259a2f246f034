"""A few rollouts of the sampler, for the parity gate."""

from typing import Any, NamedTuple

import numpy as np

from oapl_jax.rollouts.sampling import Request, run
from oapl_jax.sources.setup import SamplingSetup

PARITY_STREAM = 2**32 - 2
"""Stream of the sampling keys, see ``evaluation.held_out.EVALUATION_STREAM``."""


class Drawn(NamedTuple):
    """A rollout of the sampler."""

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray


def draw(setup: SamplingSetup, weights: Any) -> list[Drawn]:
    """Samples a batch of rollouts, or as many as are decoded at once, with these weights."""
    assert setup.turns is not None
    config = setup.config
    prompts = [setup.prompts[i] for i in range(min(setup.groups_per_batch, config.sampler.groups_in_flight))]
    requests = [
        Request(
            prompt.token_ids,
            prompt.token_ids,
            config.sampler.group_size,
            (config.run.seed, PARITY_STREAM, i),
            setup.distribution,
        )
        for i, prompt in enumerate(prompts)
    ]
    with setup.turns.take() as sampler:
        sampler.set_weights(weights)
        finished = list(run(sampler, requests))
    return [Drawn(ids, rollout.token_ids, rollout.logprobs) for ids, rollouts in finished for rollout in rollouts]

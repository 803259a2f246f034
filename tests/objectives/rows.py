"""Rows as the train step gives them to an objective."""

import jax
import jax.numpy as jnp
import numpy as np

from oapl_jax.types import TrainBatch


def make_rows(sampler_logprobs, response_ids, advantages):
    """Only what the losses read: where the responses are, the sampler's log-probabilities, and the advantages."""
    ids = np.asarray(response_ids, np.int32)
    is_rollout = np.ones(np.shape(advantages), bool)
    rows = TrainBatch(ids, ids, ids, ids > 0, sampler_logprobs, advantages, is_rollout)
    return jax.tree.map(jnp.asarray, rows)

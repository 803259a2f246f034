"""The law that tokens are drawn from, and the draw."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Which law: temperature first, then top-k, then top-p; ids from ``vocab_size`` on never."""

    vocab_size: int
    """The tokenizer's length; embedding rows beyond it are padding."""
    temperature: float = 1.0
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    """1: all."""


def log_law(logits: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B V"]:
    """Log-probabilities in nats, float32, of the processed law; -inf where a token is excluded.

    Tokens that tie with the last one kept by top-k or top-p are kept too.
    """
    with jax.named_scope("log_law"):
        logits = logits.astype(jnp.float32) / params.temperature
        logits = jnp.where(jnp.arange(logits.shape[-1]) < params.vocab_size, logits, -jnp.inf)
        if params.top_k:
            kth = jax.lax.top_k(logits, min(params.top_k, params.vocab_size))[0][:, -1:]
            logits = jnp.where(logits >= kth, logits, -jnp.inf)
        if params.top_p < 1:
            probs = jax.nn.softmax(logits)
            descending = -jnp.sort(-probs, axis=-1)
            mass_before = jnp.cumsum(descending, axis=-1) - descending
            # The likeliest token has no mass before it, so at least one is kept.
            last_kept = jnp.min(jnp.where(mass_before < params.top_p, descending, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(probs >= last_kept, logits, -jnp.inf)
        return jax.nn.log_softmax(logits)


def draw(
    keys: Key[Array, "B"], positions: Int[Array, "B"], logits: Float[Array, "B V"], params: SamplingParams
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token a row and its log-probability.

    The randomness of row b is ``fold_in(keys[b], positions[b])``: a sample depends on its own key
    and on positions, not on its row or its neighbours.
    """
    logprobs = log_law(logits, params)
    tokens = jax.vmap(lambda key, position, row: jax.random.categorical(jax.random.fold_in(key, position), row))(
        keys, positions, logprobs
    )
    return tokens.astype(jnp.int32), jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]

"""Log-probabilities of given tokens, in chunks, so that ``[B, T, V]`` logits never exist.

Learner, parity gate and scorers all use ``sequence_logprobs``: one definition of the policy's law.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once; at V = 151,936 that is 0.6 GiB of float32 before sharding."""

CHUNK_LOGITS = 2**27
"""Logits that may exist at once in any case: a small vocabulary needs no loop and no recomputation."""

# Finite, so that p * log p of an impossible token is 0 * -1e30 = 0, in the gradient too, and not NaN.
IMPOSSIBLE = -1e30


def sequence_logprobs(
    graphdef: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    temperature: float,
    vocab_size: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Teacher-forced log-probabilities and entropies of whole rows, right-padded.

    ``logprobs[:, t]`` scores ``tokens[:, t]`` given the tokens before it; ``entropy[:, t]`` is of the law
    that token t was drawn from. Position 0 (nothing before it) and everything outside ``mask`` is 0.

    Args:
        graphdef: of ``nnx.split(model)``.
        params: of ``nnx.split(model)``, or the tree that gradients are taken of.
        tokens: rows of prompt + response.
        mask: which positions are scored, usually the response.
        temperature: of the sampled law.
        vocab_size: length of the tokenizer, see ``token_logprobs``.

    Returns:
        Log-probabilities in nats and entropies in nats, float32.
    """
    model = nnx.merge(graphdef, params)
    B, T = tokens.shape
    hidden, _ = model.hidden(tokens, jnp.broadcast_to(jnp.arange(T), (B, T)))
    # Position T-1 predicts beyond the row: it is scored against a dummy and cut off by the shift.
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    unembedding = model.unembedding()
    chunk = max(CHUNK_TOKENS, CHUNK_LOGITS // unembedding.shape[1])
    scored = token_logprobs(hidden, unembedding, targets, temperature=temperature, vocab_size=vocab_size, chunk=chunk)
    mask = mask & (jnp.arange(T) > 0)
    logprobs, entropy = (jnp.where(mask, jnp.pad(x[:, :-1], ((0, 0), (1, 0))), 0.0) for x in scored)
    return logprobs, entropy


def token_logprobs(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    temperature: float,
    vocab_size: int,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target, and entropy, under ``softmax(logits / temperature)``.

    The law is restricted to ids below ``vocab_size``: checkpoints pad their embedding beyond the
    tokenizer, and the sampler never draws those ids. A target at or beyond it has log-probability -inf.

    The chunks are pieces of T with all rows in each: rows are what a mesh splits, so every device works
    on its own rows in every chunk. Each chunk is recomputed in the backward pass.

    Args:
        hidden: after the final norm; ``hidden[:, t]`` predicts ``targets[:, t]``. Its dtype is the one in
            which the product with the unembedding is computed (accumulated in float32).
        unembedding: any floating dtype.
        targets: the token after each hidden state.
        temperature: > 0.
        vocab_size: number of ids that can be drawn, at most V.
        chunk: tokens whose logits exist at once.

    Returns:
        Log-probabilities and entropies in nats, float32, ``[B, T]`` each.
    """
    score = functools.partial(_score, temperature=temperature, vocab_size=vocab_size, compute_dtype=hidden.dtype)
    # float32 here and cast inside the loop: the gradient of a weight that a loop closes over is summed
    # over the iterations in the weight's own dtype, and bf16 sums are off by up to 3e-2.
    unembedding = unembedding.astype(jnp.float32)
    B, T, D = hidden.shape
    if chunk >= B * T:
        return score(hidden, targets, unembedding)
    length = max(1, chunk // B)
    num_chunks = -(-T // length)
    padding = num_chunks * length - T
    hidden_BnCD = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(B, num_chunks, length, D)
    targets_BnC = jnp.pad(targets, ((0, 0), (0, padding))).reshape(B, num_chunks, length)
    score = jax.checkpoint(score)
    chunks = (jnp.moveaxis(hidden_BnCD, 1, 0), jnp.moveaxis(targets_BnC, 1, 0))
    scored = jax.lax.map(lambda chunk: score(*chunk, unembedding), chunks)
    logprobs, entropy = (jnp.moveaxis(x, 0, 1).reshape(B, num_chunks * length)[:, :T] for x in scored)
    return logprobs, entropy


def _score(
    hidden: Array, targets: Array, unembedding: Array, *, temperature: float, vocab_size: int, compute_dtype: Any
) -> tuple[Array, Array]:
    with jax.named_scope("token_logprobs"):
        logits = jnp.einsum(
            "BTD,DV->BTV", hidden, unembedding.astype(compute_dtype), preferred_element_type=jnp.float32
        )
        ids = jnp.arange(logits.shape[-1])
        logits = jnp.where(ids < vocab_size, logits / temperature, IMPOSSIBLE)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum and not a gather: on logits split over the vocabulary it needs no all-gather.
        target_logits = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
        logprobs = jnp.where(targets < vocab_size, target_logits - normalizer, -jnp.inf)
        entropy = normalizer - jnp.sum(jnp.exp(logits - normalizer[..., None]) * logits, axis=-1)
        return logprobs, entropy

"""Log-probabilities of given tokens, in chunks, so that ``[B, T, V]`` logits never exist.

Learner, parity gate and scorers all use ``sequence_logprobs``: one definition of the policy's distribution.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from oapl_jax.distributed.sharding import BATCH_AXES, free_axes, on_devices, platform_of
from oapl_jax.model.segments import Segments

CHUNK_TOKENS = {"cpu": 128, "tpu": 512, "gpu": 2048}
"""Tokens whose logits exist at once on a device: enough for a product that is not bound by reading the weights.

A batch computes whole chunks, and a GPU, where memory is less short, reads and writes the sum of the unembedding's
gradient once a chunk.
"""

CHUNK_LOGITS = {"cpu": 2**22, "tpu": 2**24, "gpu": 2**24}
"""Logits that may exist at once in any case: a small vocabulary needs no loop."""

# Finite, so that p * log p of an impossible token is 0 * -1e30 = 0 and not NaN.
IMPOSSIBLE = -1e30


def sequence_logprobs(
    graphdef: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    temperature: float,
    vocab_size: int,
    positions: Int[Array, "B T"] | None = None,
    segments: Segments | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Teacher-forced log-probabilities and entropies of whole rows, in nats, float32.

    ``logprobs[:, t]`` scores ``tokens[:, t]`` given the tokens before it; ``entropy[:, t]`` is of the distribution
    that token t was drawn from. Position 0 (nothing before it) and everything outside ``mask``, usually the responses,
    is 0. Without ``positions`` and ``segments`` a row is one rollout, padded on the right; a packed row's mask has
    no rollout's first token. Only log-probabilities have a gradient.
    """
    model = nnx.merge(graphdef, params)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.hidden(tokens, positions, model.attend_rows(segments))
    # The state at t predicts token t + 1; the last one predicts beyond the row and is not scored.
    targets, is_scored = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens, mask))
    unembedding, letters = model.unembedding()
    scored = token_logprobs(
        hidden,
        unembedding,
        letters,
        targets,
        is_scored,
        temperature=temperature,
        vocab_size=vocab_size,
        mesh=model.mesh,
    )
    logprobs, entropy = (jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for x in scored)
    return logprobs, entropy


def token_logprobs(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "_D _V"],
    letters: str,
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    temperature: float,
    vocab_size: int,
    mesh: Mesh | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target, and entropy, under ``softmax(logits / temperature)``, in nats, float32.

    The distribution is restricted to ids below ``vocab_size``: checkpoints pad their embedding beyond the tokenizer,
    and the sampler never draws those ids. A target at or beyond it has log-probability -inf.

    Each device gathers its own tokens inside the mask, and scores them chunk by chunk; the others cost nothing and have
    0. The backward pass recomputes the logits of a chunk, and sums the unembedding's gradient in float32, whatever the
    dtype of the products, which is that of ``hidden``. The entropy has no gradient.

    ``hidden[:, t]``, after the final norm, predicts ``targets[:, t]``. ``letters`` are those of the unembedding, ``DV``
    or ``VD``. The trainer's mesh splits rows, tokens and vocabulary; without one the arrays are on one device. ``chunk``
    tokens of a device have logits at once, by default ``chunk_tokens``.
    """
    platform = platform_of(mesh)
    mesh = None if mesh is None or mesh.size == 1 else mesh
    num_ids = unembedding.shape[letters.index("V")] // (1 if mesh is None else mesh.shape["tensor"])
    chunk = chunk or chunk_tokens(num_ids, platform)
    scoring = _Scoring(letters, temperature, vocab_size, chunk, mesh, free_axes((*BATCH_AXES, "context")))
    logprobs, entropy = _score(scoring, hidden, unembedding, targets, mask)  # pyright: ignore[reportGeneralTypeIssues]
    return logprobs, jax.lax.stop_gradient(entropy)


def chunk_tokens(num_ids: int, platform: str) -> int:
    """Tokens of a chunk on a device that has ``num_ids`` logits of each token."""
    return max(CHUNK_TOKENS[platform], CHUNK_LOGITS[platform] // num_ids)


@dataclasses.dataclass(frozen=True)
class _Scoring:
    """The arguments of the scoring that are not arrays."""

    letters: str
    temperature: float
    vocab_size: int
    chunk: int
    mesh: Mesh | None
    row_axes: tuple[str, ...]
    """Mesh axes that the tokens are split over."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(scoring: _Scoring, hidden: Array, unembedding: Array, targets: Array, mask: Array) -> tuple[Array, Array]:
    return _score_forward(scoring, hidden, unembedding, targets, mask)[0]


def _score_forward(scoring: _Scoring, hidden: Array, unembedding: Array, targets: Array, mask: Array) -> Any:
    run = _on_devices(scoring, _forward, [ROWS, _spec(scoring, None), ROWS, ROWS], (ROWS, ROWS, ROWS))
    logprobs, entropy, normalizer = run(hidden, unembedding.astype(hidden.dtype), targets, mask)
    return (logprobs, entropy), (hidden, unembedding, targets, mask, normalizer)


def _score_backward(scoring: _Scoring, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    hidden, unembedding, *rows = saved
    specs = [ROWS, _spec(scoring, None), *[ROWS] * 4]
    run = _on_devices(scoring, _backward, specs, (ROWS, _spec(scoring, "fsdp")))
    gradients = run(hidden, unembedding.astype(hidden.dtype), *rows, cotangents[0])
    return gradients[0], gradients[1].astype(unembedding.dtype), None, None


_score.defvjp(_score_forward, _score_backward)

ROWS = P(BATCH_AXES, "context")
"""Each device scores its own tokens."""


def _spec(scoring: _Scoring, of_embed: str | None) -> P:
    """Of the unembedding; None: gathered from fsdp."""
    return P(*({"D": of_embed, "V": "tensor"}[letter] for letter in scoring.letters))


def _on_devices(scoring: _Scoring, run: Any, in_specs: list[P], out_specs: tuple[P, ...]) -> Any:
    """``run`` with the scoring as its first argument, on the part of the arrays that each device has."""
    run = functools.partial(run, scoring)
    return run if scoring.mesh is None else on_devices(run, scoring.mesh, tuple(in_specs), out_specs)


def _forward(scoring: _Scoring, hidden: Array, weight: Array, targets: Array, mask: Array) -> tuple[Array, ...]:
    """Log-probabilities, entropies and logarithms of the normalizer, ``[B, T]`` of one device."""
    places, num_chunks = _places(scoring, mask)

    def score(index: Array, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        at = places[index]
        logits, ids = _logits(scoring, _take(hidden, at), weight)
        target = _take(targets, at)
        highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        highest = highest if scoring.mesh is None else jax.lax.pmax(highest, "tensor")
        exps = jnp.exp(logits - highest[:, None])
        total = _over_vocabulary(scoring, exps.sum(axis=-1))
        normalizer = highest + jnp.log(total)
        # A masked sum and not a gather: only one of the devices that share a vocabulary has the target.
        target_logit = _over_vocabulary(scoring, jnp.where(ids == target[:, None], logits, 0.0).sum(axis=-1))
        logprobs = jnp.where(target < scoring.vocab_size, target_logit - normalizer, -jnp.inf)
        entropy = normalizer - _over_vocabulary(scoring, (exps * logits).sum(axis=-1)) / total
        return tuple(
            old.at[at].set(new, mode="drop") for old, new in zip(outputs, (logprobs, entropy, normalizer), strict=True)
        )

    with jax.named_scope("token_logprobs"):
        nothing = jnp.zeros(mask.size, jnp.float32)
        outputs = jax.lax.fori_loop(0, num_chunks, score, (nothing, nothing, nothing))
        return tuple(output.reshape(mask.shape) for output in outputs)


def _backward(
    scoring: _Scoring, hidden: Array, weight: Array, targets: Array, mask: Array, normalizer: Array, cotangent: Array
) -> tuple[Array, Array]:
    """Gradients of the hidden states, and of the unembedding in float32, its D split over fsdp."""
    places, num_chunks = _places(scoring, mask)
    D, V = hidden.shape[-1], weight.shape[scoring.letters.index("V")]

    def add(index: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        at = places[index]
        states, target = _take(hidden, at), _take(targets, at)
        logits, ids = _logits(scoring, states, weight)
        # d logprob / d logits = (one-hot - distribution) / temperature; an impossible target has no gradient.
        slope = jnp.where(target < scoring.vocab_size, _take(cotangent, at), 0.0) / scoring.temperature
        error = (ids == target[:, None]) - jnp.exp(logits - _take(normalizer, at)[:, None])
        error = (slope[:, None] * error).astype(hidden.dtype)
        for_states = jnp.einsum(f"NV,{scoring.letters}->ND", error, weight, preferred_element_type=jnp.float32)
        # Transposed first, behind a barrier: XLA on CPUs is slow at products whose first operand is transposed in them.
        states = jax.lax.optimization_barrier(states.T)
        for_weight = jnp.einsum("DN,NV->DV", states, error, preferred_element_type=jnp.float32)
        for_states = _over_vocabulary(scoring, for_states).astype(hidden.dtype)
        return gradients[0].at[at].set(for_states, mode="drop"), gradients[1] + for_weight

    with jax.named_scope("token_logprobs_backward"):
        nothing = jnp.zeros((mask.size, D), hidden.dtype), jnp.zeros((D, V), jnp.float32)
        for_hidden, for_weight = jax.lax.fori_loop(0, num_chunks, add, nothing)
        if scoring.mesh is not None:
            for_weight = jax.lax.psum(for_weight, [axis for axis in scoring.row_axes if axis != "fsdp"])
            for_weight = jax.lax.psum_scatter(for_weight, "fsdp", scatter_dimension=0, tiled=True)
        return for_hidden.reshape(hidden.shape), for_weight if scoring.letters == "DV" else for_weight.T


def _places(scoring: _Scoring, mask: Array) -> tuple[Int[Array, "A N"], Array]:
    """Where a device's tokens inside the mask are, in chunks, and how many chunks there are, the same on all devices.

    Places beyond the last are out of range.
    """
    size = min(scoring.chunk, mask.size)
    num_places = -(-mask.size // size) * size
    places = jnp.nonzero(mask.ravel(), size=num_places, fill_value=mask.size)[0]
    num_chunks = -(-mask.sum() // size)
    if scoring.mesh is not None:
        num_chunks = jax.lax.pmax(num_chunks, scoring.row_axes)
    return places.reshape(-1, size), num_chunks


def _take(array: Array, places: Array) -> Array:
    """Entries of ``[B, T, ...]``; 0 out of range."""
    return array.reshape(-1, *array.shape[2:]).at[places].get(mode="fill", fill_value=0)


def _logits(scoring: _Scoring, states: Array, weight: Array) -> tuple[Float[Array, "N V"], Int[Array, "V"]]:
    """Logits of the ids that a device has, float32, and which these are."""
    logits = jnp.einsum(f"ND,{scoring.letters}->NV", states, weight, preferred_element_type=jnp.float32)
    ids = jnp.arange(logits.shape[-1])
    if scoring.mesh is not None:
        ids += jax.lax.axis_index("tensor") * logits.shape[-1]
    return jnp.where(ids < scoring.vocab_size, logits / scoring.temperature, IMPOSSIBLE), ids


def _over_vocabulary(scoring: _Scoring, x: Array) -> Array:
    return x if scoring.mesh is None else jax.lax.psum(x, "tensor")

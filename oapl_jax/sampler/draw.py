"""The distribution that tokens are drawn from, and the draw, in few passes over V x B logits, without sorting them.

Ids come first, ``[V, B]``: every sum over ids is then one of whole rows of memory.

* The vocabulary is N blocks of W consecutive ids. One uniform number picks a block by the blocks' masses, another one
  a token of that block: the inverse of the distribution function, on two levels.
* Top-k, top-p and min-p each keep the logits from some cut upwards. The cuts of top-k and top-p are
  found by bisection down to neighbouring float32 numbers where need be, so they are exact; each of
  its 10 to 30 steps is a pass. Where no row asks for them there is no pass.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

NUM_BLOCKS = 128
"""Blocks of a vocabulary of up to ``NUM_BLOCKS ** 2`` ids; a power of two, so that a sharded one is split between blocks."""

FEWEST_BLOCKS = 32
"""A vocabulary that no power of two from here on divides (a large one: that ``NUM_BLOCKS`` does not divide) is copied with
padding; real models have none such."""

BLOCK_IDS = 16
"""Ids of a block of a larger vocabulary: those that lie in one tile of the output matrix of a TPU. Blocks that begin inside
a tile would make XLA copy the matrix in every step, so that the logits come out in blocks."""

RESOLUTION = 1e-5
"""Parts of a mass beyond which one weight more or less stands out from the rounding of a float32 sum."""

RowFn = Callable[[Float[Array, "B"]], Float[Array, "B"]]


class Distributions(NamedTuple):
    """``SamplingDistribution`` of each row. What the other fields say of a row with temperature 0 is not read."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]


class Draw(NamedTuple):
    """One token a row."""

    token: Int[Array, "B"]
    logprob: Float[Array, "B"]
    """In the processed distribution (truncated, renormalised), in nats, float32; NaN in a greedy row."""


def draw(
    uniform: Float[Array, "2 B"],
    logits: Float[Array, "V B"],
    distribution: Distributions,
    *,
    vocab_size: int,
    is_sharded: bool = False,
    can_truncate: bool = True,
) -> Draw:
    """Draws one token a sequence from unprocessed logits; ``uniform``, of ``uniforms``, is all the randomness there is.

    Ids from ``vocab_size`` on, the tokenizer's length, are padding and never drawn. Where the vocabulary is split over
    devices (``is_sharded``), what is needed of it is found by sums over all of it: a gather would bring all logits to
    every device. Without ``can_truncate`` no sequence may have a top-k or a top-p, and there is less to compile.
    """
    with jax.named_scope("draw"):
        logits_NWB = _to_blocks(logits.astype(jnp.float32), vocab_size)
        # The barriers keep XLA from fusing what follows into one reduction over all logits instead of two.
        block_tops = jax.lax.optimization_barrier(jnp.max(logits_NWB, axis=1))
        top = jnp.max(block_tops, axis=0)
        is_greedy = distribution.temperature == 0
        inverse_temperature = 1 / jnp.where(is_greedy, 1, distribution.temperature)
        cut = _cut(logits_NWB, block_tops, inverse_temperature, distribution, can_truncate=can_truncate)

        def log_weights(part: Float[Array, "... B"]) -> Float[Array, "... B"]:
            """Log-probabilities of some logits, up to a constant of each sequence."""
            return jnp.where(part >= cut, (part - top) * inverse_temperature, -jnp.inf)

        masses = jax.lax.optimization_barrier(jnp.sum(jnp.exp(log_weights(logits_NWB)), axis=1))
        mass = jnp.sum(masses, axis=0)
        log_mass = jnp.log(mass)

        block = _pick(masses, _cumulate(masses), uniform[0] * mass)
        highest = _first(block_tops == top) % len(block_tops)  # a NaN equals nothing
        block = jnp.where(is_greedy | (block < 0), highest, block)
        logits_WB = _take_blocks(logits_NWB, block[None], is_sharded=is_sharded)[0]
        weights = jnp.exp(log_weights(logits_WB))
        cumulative = jnp.cumsum(weights, axis=0)
        within = _pick(weights, cumulative, uniform[1] * cumulative[-1])
        within = jnp.where(is_greedy | (within < 0), jnp.argmax(logits_WB, axis=0), within)
        logit = jnp.take_along_axis(logits_WB, within[None], axis=0)[0]
        logprob = jnp.where(is_greedy, jnp.nan, log_weights(logit) - log_mass)
        token = block * logits_NWB.shape[1] + within
        return Draw(token.astype(jnp.int32), logprob)


def uniforms(keys: Key[Array, "B"], positions: Int[Array, "B"]) -> Float[Array, "2 B"]:
    """Two numbers strictly between 0 and 1 (0 would draw tokens next to impossible) for each token to draw.

    They follow from ``fold_in(keys[b], positions[b])``, not from the place of a sequence in the batch.
    """
    bits = jax.vmap(lambda key, position: jax.random.bits(jax.random.fold_in(key, position), (2,)))(keys, positions)
    return (((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23).T


def _to_blocks(logits: Float[Array, "V B"], vocab_size: int) -> Float[Array, "N W B"]:
    """Consecutive ids in blocks; -inf for padding."""
    num_ids = logits.shape[0]
    is_large = num_ids > NUM_BLOCKS**2
    if vocab_size < num_ids:
        logits = jnp.where(jnp.arange(num_ids)[:, None] < vocab_size, logits, -jnp.inf)
    if math.gcd(num_ids, NUM_BLOCKS) < (NUM_BLOCKS if is_large else FEWEST_BLOCKS):
        padding = -num_ids % (NUM_BLOCKS * BLOCK_IDS if is_large else NUM_BLOCKS)
        logits = jnp.pad(logits, ((0, padding), (0, 0)), constant_values=-jnp.inf)
    num_blocks = len(logits) // BLOCK_IDS if is_large else math.gcd(len(logits), NUM_BLOCKS)
    return logits.reshape(num_blocks, -1, logits.shape[1])


def _take_blocks(
    logits_NWB: Float[Array, "N W B"], blocks: Int[Array, "n B"], *, is_sharded: bool
) -> Float[Array, "n W B"]:
    if not is_sharded:
        return jnp.take_along_axis(logits_NWB, blocks[:, None], axis=0)
    is_taken = blocks[:, None] == jnp.arange(logits_NWB.shape[0])[:, None]
    return jnp.sum(jnp.where(is_taken[:, :, None], logits_NWB, 0), axis=1)


def _cumulate(masses: Float[Array, "N B"]) -> Float[Array, "N B"]:
    """Cumulative sums, within runs of blocks and over the runs.

    Over the runs by a product, which takes one reduction over a sharded axis and not one for each doubling.
    """
    num_runs = math.gcd(len(masses), NUM_BLOCKS)
    within = jnp.cumsum(masses.reshape(num_runs, -1, masses.shape[1]), axis=1)
    is_before = jnp.tril(jnp.ones((num_runs, num_runs), jnp.float32), -1)
    before = jnp.matmul(is_before, within[:, -1], precision=jax.lax.Precision.HIGHEST)
    return (before[:, None] + within).reshape(masses.shape)


def _pick(masses: Float[Array, "N B"], cumulative: Float[Array, "N B"], level: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first entry at which the cumulative mass exceeds the level; never one without mass, -1 if none has any.

    Rounding can lift the level to the cumulative mass of the last entry, and sums of different order
    need not be monotone: the entry has to have mass, and the last one that has it is the limit.
    """
    index = jnp.arange(masses.shape[0])[:, None]
    has_mass = masses > 0
    last = jnp.max(jnp.where(has_mass, index, -1), axis=0)
    return jnp.minimum(_first(has_mass & (cumulative > level)), last)


def _first(is_one: Bool[Array, "N B"]) -> Int[Array, "B"]:
    """The first entry that is one, or N; on a CPU it takes a third of ``argmax``."""
    return jnp.min(jnp.where(is_one, jnp.arange(len(is_one))[:, None], len(is_one)), axis=0)


def _cut(
    logits_NWB: Float[Array, "N W B"],
    block_tops: Float[Array, "N B"],
    inverse_temperature: Float[Array, "B"],
    distribution: Distributions,
    *,
    can_truncate: bool,
) -> Float[Array, "B"]:
    """The lowest logit that each row keeps, or -inf."""
    top = jnp.max(block_tops, axis=0)
    num_blocks, num_ids = block_tops.shape[0], math.prod(logits_NWB.shape[:2])
    is_drawn = distribution.temperature != 0
    everything = jnp.full_like(top, -jnp.inf)

    def cut_of_top_k() -> Float[Array, "B"]:
        def count(cut: Float[Array, "B"]) -> Float[Array, "B"]:
            # In float32, exact to 2^24: XLA sums it several times as fast as integers on CPU.
            return jnp.sum((logits_NWB >= cut).astype(jnp.float32), axis=(0, 1))

        is_cut = is_drawn & (distribution.top_k > 0) & (distribution.top_k < num_ids)
        # Each block has a logit that is at least the lowest maximum.
        low = jnp.where(is_cut & (distribution.top_k <= num_blocks), jnp.min(block_tops, axis=0), -jnp.inf)
        goal = jnp.where(is_cut, distribution.top_k, num_ids).astype(jnp.float32)
        at_low = jnp.full_like(top, num_ids)
        return _highest_cut(count, jnp.ones_like, goal, low=low, at_low=at_low, high=top)

    def cut_of_top_p() -> Float[Array, "B"]:
        weights = jnp.exp((logits_NWB - top) * inverse_temperature)

        def mass_from(cut: Float[Array, "B"]) -> Float[Array, "B"]:
            return jnp.sum(jnp.where(logits_NWB >= cut, weights, 0), axis=(0, 1))

        def weight_at(cut: Float[Array, "B"]) -> Float[Array, "B"]:
            weight = jnp.exp((cut - top) * inverse_temperature)
            return jnp.where(weight > RESOLUTION * mass, weight, 0)

        mass = mass_from(by_top_k)
        top_p = jnp.where(is_drawn, distribution.top_p, 1)
        # All tokens of less than this mass have less than 1 - top_p together, so that the cut is not among
        # them; half of it covers rounding. -inf where top_p is 1.
        spare = (1 - top_p) * mass / num_ids / 2
        low = jnp.maximum(by_top_k, top + jnp.log(spare) / inverse_temperature)
        return _highest_cut(mass_from, weight_at, top_p * mass, low=low, at_low=mass, high=top)

    by_top_k = by_top_p = everything
    if can_truncate:
        by_top_k = jax.lax.cond(jnp.any(is_drawn & (distribution.top_k > 0)), cut_of_top_k, lambda: everything)
        by_top_p = jax.lax.cond(jnp.any(is_drawn & (distribution.top_p < 1)), cut_of_top_p, lambda: by_top_k)
    by_min_p = top + jnp.log(distribution.min_p) / inverse_temperature
    return jnp.where(is_drawn, jnp.maximum(by_top_p, by_min_p), -jnp.inf)


def _highest_cut(
    measure: RowFn,
    least: RowFn,
    goal: Float[Array, "B"],
    *,
    low: Float[Array, "B"],
    at_low: Float[Array, "B"],
    high: Float[Array, "B"],
) -> Float[Array, "B"]:
    """A cut that keeps what the highest one keeps at which a measure of the logits from there upwards reaches its goal.

    ``least`` is what the measure gains at least by a logit at a cut (0: less than rounding). The goal, which is positive,
    is reached at ``low``; ``at_low`` is the measure there, or more. ``high`` is the highest logit.

    A bracket has the ordinals of the highest cut known to reach the goal and of the lowest known to fail, and the
    measure at both.
    """

    def is_open(reaches: Array, fails: Array, at_reaches: Array, at_fails: Array) -> Array:
        # Ended where the goal is just met, where one logit is left between the two cuts, and, with ties
        # at the cut, where the two are neighbours among the numbers.
        one = 1.5 * least(_from_ordinal(reaches))
        is_ended = (at_reaches == goal) | (at_reaches - at_fails < one)
        return ~is_ended & (reaches + 1 < fails)

    def halve(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        step, *bracket = carry
        reaches, fails, at_reaches, at_fails = bracket
        # Logits that matter span tens: halving their values parts neighbours soonest. Halving the bits
        # every fourth time bounds the passes whatever the spread is.
        value = _from_ordinal(reaches) / 2 + _from_ordinal(fails) / 2
        by_value = jnp.clip(_to_ordinal(value), reaches + 1, fails - 1)
        by_bits = (reaches >> 1) + (fails >> 1) + (reaches & fails & 1)  # their sum would overflow
        middle = jnp.where((step % 4 == 3) | jnp.isinf(value), by_bits, by_value)
        at_middle = measure(_from_ordinal(middle))
        # A row that has ended stays, so that no row depends on its neighbours.
        rises, falls = is_open(*bracket) & (at_middle >= goal), is_open(*bracket) & (at_middle < goal)
        reaches, fails = jnp.where(rises, middle, reaches), jnp.where(falls, middle, fails)
        return step + 1, reaches, fails, jnp.where(rises, at_middle, at_reaches), jnp.where(falls, at_middle, at_fails)

    carry = jnp.int32(0), _to_ordinal(low), _to_ordinal(high) + 1, at_low, jnp.zeros_like(goal)
    return _from_ordinal(jax.lax.while_loop(lambda carry: jnp.any(is_open(*carry[1:])), halve, carry)[1])


def _to_ordinal(x: Float[Array, "B"]) -> Int[Array, "B"]:
    """Integers in the order of float32 numbers: the magnitude bits of negative ones are inverted."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_ordinal(ordinal: Int[Array, "B"]) -> Float[Array, "B"]:
    bits = jnp.where(ordinal < 0, ordinal ^ 0x7FFFFFFF, ordinal)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

"""Eight-bit numbers in place of floats: the sampler's weights and its cache.

Numbers that are summed over together share a scale, so a product is taken of the integers and scaled once, at its
output: no float copy of a matrix is stored. Integers up to 127 are exact in bfloat16. A weight has a scale for each
output channel, the embedding one for each row. Norms, biases and routers stay floats: they are small, and a router's
choice is not continuous.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Tree = TypeVar("Tree")

LARGEST = 127
"""-128 is not used, so that the range is the same on both sides."""

STACKED = ("layers", "experts")
"""Logical axes of which each index is a matrix of its own."""

CONTRACTED = {
    ("vocab", "embed"): {"embed"},
    ("embed", "vocab"): {"embed"},
    ("embed", "heads", "head_dim"): {"embed"},
    ("embed", "kv_heads", "head_dim"): {"embed"},
    ("heads", "head_dim", "embed"): {"heads", "head_dim"},
    ("embed", "mlp"): {"embed"},
    ("mlp", "embed"): {"mlp"},
}
"""The axes of each kind of matrix that its product sums over; a parameter of another kind stays a float."""


class Int8(NamedTuple):
    """Stands for ``values * scale``."""

    values: Int[Array, "..."]
    """int8."""
    scale: Float[Array, "..."]
    """float32, with size 1 in each dimension whose values share a scale; so it is split like the values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape


def quantize(numbers: Float[Array, "..."], shared: tuple[int, ...]) -> Int8:
    """The nearest integers, with one scale for all numbers along the axes ``shared``; the error is at most half of it."""
    numbers = numbers.astype(jnp.float32)
    largest = jnp.max(jnp.abs(numbers), axis=shared, keepdims=True)
    # A NaN has to stay one, in the scale: integers have none.
    scale = jnp.where(largest == 0, 1.0, largest / LARGEST)
    return Int8(jnp.round(numbers / scale).astype(jnp.int8), scale)


def dequantize(numbers: Array | Int8, dtype: DTypeLike) -> Float[Array, "..."]:
    """As floats; floats are cast."""
    if isinstance(numbers, Int8):
        numbers = numbers.values.astype(jnp.float32) * numbers.scale
    return numbers.astype(dtype)


def quantize_weights(params: Tree) -> Tree:
    """The parameters of ``Qwen`` with an ``Int8`` in each matrix; for ``jit``, of one model's ``nnx.State``."""

    def one(param: nnx.Variable) -> nnx.Variable:
        kind = tuple(axis for axis in param.axes if axis not in STACKED)
        if kind not in CONTRACTED:
            return param
        shared = tuple(i for i, axis in enumerate(param.axes) if axis in CONTRACTED[kind])
        return param.replace(quantize(param.get_value(), shared))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

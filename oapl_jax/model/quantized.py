"""Eight-bit numbers in place of floats: the sampler's weights and its cache.

Numbers that are summed over together share a scale, so a product is taken of the integers and scaled
once, at its output: the compiler converts the integers on their way into the product, and no float copy
of a matrix is stored. Integers up to 127 are exact in bfloat16.

A weight has a scale for each output channel, and the embedding one for each row of the vocabulary, which
serves both as a lookup and as the output matrix. Norms, biases and routers stay as they are: they are
small, and a router's choice is not continuous.
"""

import functools
import re
from typing import Any, NamedTuple, TypeVar

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


def einsum(spec: str, x: Float[Array, "..."], weight: nnx.Variable, **options: Any) -> Float[Array, "..."]:
    """``jnp.einsum`` of activations and a parameter, float or ``Int8``, computed in the dtype of ``x``.

    Args:
        spec: the letters that the weight shares with the output are the output's last ones, in this order.
        x: activations.
        weight: the parameter.
        **options: of ``jnp.einsum``.
    """
    matrix = weight.get_value()
    letters, output = spec.split(",")[1].split("->")
    summed = {letter: i for i, letter in enumerate(letters) if letter not in output}
    # jnp.einsum sums over letters in alphabetical order; in any other than the weight's own a CPU transposes it first.
    spec = spec.translate(str.maketrans("".join(summed), "".join(sorted(summed))))
    if not isinstance(matrix, Int8):
        return jnp.einsum(spec, x, matrix.astype(x.dtype), **options) if options else _product(spec, x, matrix)
    product = jnp.einsum(spec, x, matrix.values.astype(x.dtype), **options)
    return (product * jnp.squeeze(matrix.scale, tuple(summed.values()))).astype(product.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: Array, matrix: Array) -> Array:
    return jnp.einsum(spec, x, matrix.astype(x.dtype))


def _product_forward(spec: str, x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(spec, x, matrix), (x, matrix)


def _product_backward(spec: str, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """The matrix's gradient is summed over tokens in float32, and its product reads both operands as they lie.

    Autodiff would put the gradient first, which XLA on CPUs transposes; that costs as much as the product.
    """
    x, matrix = saved
    of_x, of_matrix, of_output = re.split(",|->", spec)
    for_x = jnp.einsum(f"{of_output},{of_matrix}->{of_x}", gradient, matrix.astype(x.dtype))
    for_matrix = jnp.einsum(f"{of_x},{of_output}->{of_matrix}", x, gradient, preferred_element_type=jnp.float32)
    return for_x, for_matrix.astype(matrix.dtype)


_product.defvjp(_product_forward, _product_backward)


def ragged_dot(
    rows: Float[Array, "N D"], weight: nnx.Variable, sizes: Int[Array, "E"], experts: Int[Array, "N"]
) -> Float[Array, "N F"]:
    """``jax.lax.ragged_dot`` of rows sorted by expert and their matrices ``[E, D, F]``.

    Args:
        rows: sorted by expert.
        weight: the parameter, float or ``Int8``.
        sizes: rows of each expert.
        experts: of each row.
    """
    matrix = weight.get_value()
    if not isinstance(matrix, Int8):
        return jax.lax.ragged_dot(rows, matrix.astype(rows.dtype), sizes)
    product = jax.lax.ragged_dot(rows, matrix.values.astype(rows.dtype), sizes)
    return (product * matrix.scale[experts, 0]).astype(product.dtype)


def lookup(table: nnx.Variable, ids: Int[Array, "..."], dtype: DTypeLike) -> Float[Array, "... D"]:
    """Rows of a parameter ``[V, D]``, float or ``Int8``."""
    return dequantize(jax.tree.map(lambda array: array[ids], table.get_value()), dtype)

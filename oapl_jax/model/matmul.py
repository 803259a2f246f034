"""Products of activations with parameters, of whatever kind: floats, ``Int8``, or with a low-rank adapter."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from oapl_jax.model.lora import LowRank
from oapl_jax.model.quantized import Int8, dequantize


def einsum(spec: str, x: Float[Array, "..."], weight: nnx.Variable | LowRank, **options: Any) -> Float[Array, "..."]:
    """``jnp.einsum`` of activations and a parameter of any kind, computed in the dtype of ``x``.

    Args:
        spec: the letters that the weight shares with the output are the output's last ones, in this order.
        x: activations.
        weight: the parameter.
        **options: of ``jnp.einsum``.
    """
    inputs, letters, output = re.split(",|->", spec)
    if isinstance(weight, LowRank):
        kept = "".join(letter for letter in letters if letter in output)
        thin = output.removesuffix(kept) + "r"
        inner = einsum(f"{inputs},{letters.removesuffix(kept)}r->{thin}", x, weight.down)
        return einsum(spec, x, weight.base, **options) + weight.up.scale * einsum(
            f"{thin},r{kept}->{output}", inner, weight.up
        )
    matrix = weight.get_value()
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

"""Matmuls of activations and parameters: floats, ``Int8``, or a matrix with a low-rank adapter."""

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

    The letters that the weight shares with the output must be the output's last ones, in this order.
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
        return jnp.einsum(spec, x, matrix.astype(x.dtype), **options) if options else matmul(spec, x, matrix)
    unscaled = jnp.einsum(spec, x, matrix.values.astype(x.dtype), **options)
    return (unscaled * jnp.squeeze(matrix.scale, tuple(summed.values()))).astype(unscaled.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(spec: str, x: Float[Array, "..."], matrix: Float[Array, "..."]) -> Float[Array, "..."]:
    """``jnp.einsum`` of ``x`` and a float matrix in the dtype of ``x``, with a gradient of its own.

    The gradient of the matrix is the matmul of ``x`` and the output's gradient, in this order and summed over tokens
    in float32 whatever the dtype of ``x``. Autodiff would put the output's gradient first, which XLA on a CPU
    transposes before it multiplies: that costs as much as the matmul. Every letter of ``spec`` occurs twice.
    """
    return jnp.einsum(spec, x, matrix.astype(x.dtype))


def _forward(spec: str, x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(spec, x, matrix), (x, matrix)


def _backward(spec: str, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, matrix = saved
    of_x, of_matrix, of_output = re.split(",|->", spec)
    for_x = jnp.einsum(f"{of_output},{of_matrix}->{of_x}", gradient, matrix.astype(x.dtype))
    for_matrix = jnp.einsum(f"{of_x},{of_output}->{of_matrix}", x, gradient, preferred_element_type=jnp.float32)
    return for_x, for_matrix.astype(matrix.dtype)


matmul.defvjp(_forward, _backward)


def lookup(table: nnx.Variable, ids: Int[Array, "..."], dtype: DTypeLike) -> Float[Array, "... D"]:
    """Rows of a parameter ``[V, D]``, float or ``Int8``."""
    return dequantize(jax.tree.map(lambda array: array[ids], table.get_value()), dtype)

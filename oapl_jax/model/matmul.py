"""Matmuls of activations and parameters: floats, ``Int8``, or a matrix with a low-rank adapter."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
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


class InStack(NamedTuple):
    """The experts' matrices of one layer, in the stack of all layers' ones; for products without a gradient."""

    stack: Float[Array, "L E D F"]
    layer: Int[Array, ""]


Experts = Array | Int8 | InStack
"""Of one layer, ``[E, D, F]``."""


def ragged_dot(
    rows: Float[Array, "N D"], matrices: Experts, sizes: Int[Array, "E"], experts: Int[Array, "N"]
) -> Float[Array, "N F"]:
    """``jax.lax.ragged_dot`` of rows sorted by expert and the experts' matrices; see ``grouped_matmul`` for gradients."""
    if isinstance(matrices, InStack):
        on_tpu = products_in_stack
        return jax.lax.platform_dependent(rows, matrices, sizes, default=_products_in_stack_xla, tpu=on_tpu)
    if not isinstance(matrices, Int8):
        return grouped_matmul(rows, matrices, sizes)
    unscaled = jax.lax.ragged_dot(rows, matrices.values.astype(rows.dtype), sizes)
    return (unscaled * matrices.scale[experts, 0]).astype(unscaled.dtype)


@jax.custom_vjp
def grouped_matmul(
    rows: Float[Array, "N D"], matrices: Float[Array, "E D F"], sizes: Int[Array, "E"]
) -> Float[Array, "N F"]:
    """Each run of rows with the matrix of its group, in the dtype of ``rows``; of the sizes the sum is N.

    The gradient of the matrices is summed in float32, and on a TPU by a kernel: XLA would multiply all rows for every
    group there, and mask them.
    """
    return jax.lax.ragged_dot(rows, matrices.astype(rows.dtype), sizes)


def _grouped_forward(rows: Array, matrices: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped_matmul(rows, matrices, sizes), (rows, matrices, sizes)


def _grouped_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, None]:
    rows, matrices, sizes = saved
    for_rows = jax.lax.ragged_dot(gradient, matrices.astype(rows.dtype).swapaxes(1, 2), sizes)
    kernels = {"tpu": products_of_groups} if len(rows) % GROUP_TILES[0] == 0 else {}
    for_matrices = jax.lax.platform_dependent(rows, gradient, sizes, default=_products_of_groups_xla, **kernels)
    return for_rows, for_matrices.astype(matrices.dtype), None


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)

GROUP_TILES = (128, 1024, 512)
"""Rows of a product in the TPU's kernel, and at most its columns of the two sides: the sum and two results of this size
are 6 MiB of the 16 that a kernel has."""

LANES = 128
"""Of a TPU: the last dimension of an array in its memory is padded to a multiple of it."""

IN_STACK_TILE = (128, 2048, 2**20)
"""Rows of a product in the kernel for ``InStack``, at most the width of a block of a matrix, and at most its numbers."""


def products_of_groups(
    left: Float[Array, "N D"], right: Float[Array, "N F"], sizes: Int[Array, "E"], *, interpret: bool = False
) -> Float[Array, "E D F"]:
    """The product ``left.T @ right`` of each group's rows, float32, by a TPU kernel; N is a multiple of a tile."""
    size, *widest = GROUP_TILES
    widths = (min(most, -(-x.shape[1] // 128) * 128) for most, x in zip(widest, (left, right), strict=True))
    return tgmm(left.T, right, sizes, jnp.float32, (size, *widths), interpret=interpret)


def products_in_stack(
    rows: Float[Array, "N D"], matrices: InStack, sizes: Int[Array, "E"], *, interpret: bool = False
) -> Float[Array, "N F"]:
    """Each run of rows with the matrix of its group, by a TPU kernel that reads the matrices of one layer in the stack.

    XLA's kernels for ``ragged_dot`` take a whole array: in a scan each layer would be copied out of the stack first.
    """
    E, D, F = matrices.stack.shape[1:]
    depth = min(D, IN_STACK_TILE[1])
    size = IN_STACK_TILE[0], depth, min(F, IN_STACK_TILE[1], IN_STACK_TILE[2] // depth)
    padded = jnp.pad(rows, ((0, -len(rows) % IN_STACK_TILE[0]), (0, 0)))
    stack = matrices.stack.reshape(-1, D, F)
    is_turned = F % LANES > 0 and D % LANES == 0  # as it lies in memory, so that no row is padded to whole lanes
    products = gmm(
        padded,
        stack.swapaxes(1, 2) if is_turned else stack,
        sizes.astype(jnp.int32),
        rows.dtype,
        size,
        group_offset=-E * matrices.layer.astype(jnp.int32),  # the kernel subtracts it from the number of a group
        transpose_rhs=is_turned,
        interpret=interpret,
    )
    return products[: len(rows)]


def _products_in_stack_xla(rows: Array, matrices: InStack, sizes: Array) -> Array:
    return jax.lax.ragged_dot(rows, matrices.stack[matrices.layer].astype(rows.dtype), sizes)


def _products_of_groups_xla(left: Array, right: Array, sizes: Array) -> Array:
    by_row = (((0,), (0,)), ((), ()))
    numbers = jax.lax.RaggedDotDimensionNumbers(by_row, lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    return jax.lax.ragged_dot_general(left, right, sizes, numbers, preferred_element_type=jnp.float32)


def lookup(table: nnx.Variable, ids: Int[Array, "..."], dtype: DTypeLike) -> Float[Array, "... D"]:
    """Rows of a parameter ``[V, D]``, float or ``Int8``."""
    return dequantize(jax.tree.map(lambda array: array[ids], table.get_value()), dtype)

"""Matmuls of a mixture of experts: each run of rows with the matrix of its group (``jax.lax.ragged_dot``).

On a TPU, XLA's kernels take a whole array, so that in decode steps each layer would be copied out of the stack of all
layers, and none is for the gradient of the matrices: every row would be multiplied for each group, and masked. These two
are megablox's kernels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from oapl_jax.model.quantized import Int8


class InStack(NamedTuple):
    """The experts' matrices of one layer, in the stack of all layers' ones; for products without a gradient."""

    stack: Float[Array, "L E D F"]
    layer: Int[Array, ""]


Experts = Array | Int8 | InStack
"""Of one layer, ``[E, D, F]``."""

LANES = 128
"""Of a TPU: the last dimension of an array in its memory is padded to a multiple of it."""

ROW_TILE, WIDEST, LARGEST = 128, 2048, 2**20
"""In ``multiply_groups``: rows of a product; of a block of a matrix its largest width, and its most numbers."""

GRADIENT_TILES = (128, 1024, 512)
"""Rows of a product in ``multiply_transposed``, and at most its columns of the two sides: the sum and two results of
this size are 6 MiB of the 16 that a kernel has."""


def ragged_dot(
    rows: Float[Array, "N D"], matrices: Experts, sizes: Int[Array, "E"], experts: Int[Array, "N"]
) -> Float[Array, "N F"]:
    """Rows sorted by expert, each with the matrix of its own; of the sizes the sum is N.

    Of float matrices it has gradients: that of the matrices is summed in float32.
    """
    if isinstance(matrices, Int8):
        unscaled = jax.lax.ragged_dot(rows, matrices.values.astype(rows.dtype), sizes)
        return (unscaled * matrices.scale[experts, 0]).astype(unscaled.dtype)
    if isinstance(matrices, InStack):
        L, E, *shape = matrices.stack.shape
        return jax.lax.platform_dependent(
            rows,
            matrices,
            sizes,
            default=lambda rows, m, sizes: jax.lax.ragged_dot(rows, m.stack[m.layer].astype(rows.dtype), sizes),
            tpu=lambda rows, m, sizes: multiply_groups(rows, m.stack.reshape(L * E, *shape), sizes, E * m.layer),
        )
    return grouped_matmul(rows, matrices, sizes)


@jax.custom_vjp
def grouped_matmul(
    rows: Float[Array, "N D"], matrices: Float[Array, "E D F"], sizes: Int[Array, "E"]
) -> Float[Array, "N F"]:
    """``ragged_dot`` of float matrices, in the dtype of ``rows``."""
    return jax.lax.ragged_dot(rows, matrices.astype(rows.dtype), sizes)


def _grouped_forward(rows: Array, matrices: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped_matmul(rows, matrices, sizes), (rows, matrices, sizes)


def _grouped_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, None]:
    rows, matrices, sizes = saved
    for_rows = jax.lax.ragged_dot(gradient, matrices.astype(rows.dtype).swapaxes(1, 2), sizes)
    for_matrices = jax.lax.platform_dependent(
        rows, gradient, sizes, default=_multiply_transposed_xla, tpu=multiply_transposed
    )
    return for_rows, for_matrices.astype(matrices.dtype), None


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def multiply_groups(
    rows: Float[Array, "N D"],
    matrices: Float[Array, "_G D F"],
    sizes: Int[Array, "E"],
    first: Int[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "N F"]:
    """Each run of rows with the matrix of its group, by a TPU kernel; the first group has the matrix of number ``first``."""
    D, F = matrices.shape[1:]
    # XLA lays such matrices down with D last, so that no row is padded to whole lanes.
    is_turned, depth = F % LANES > 0 and D % LANES == 0, min(D, WIDEST)
    products = gmm(
        _padded(rows, ROW_TILE),
        matrices.swapaxes(1, 2) if is_turned else matrices,
        sizes.astype(jnp.int32),
        rows.dtype,
        (ROW_TILE, depth, min(F, WIDEST, LARGEST // depth)),
        group_offset=-first.astype(jnp.int32),  # which the kernel subtracts from the number of a group
        transpose_rhs=is_turned,
        interpret=interpret,
    )
    return products[: len(rows)]


def multiply_transposed(
    left: Float[Array, "N D"], right: Float[Array, "N F"], sizes: Int[Array, "E"], *, interpret: bool = False
) -> Float[Array, "E D F"]:
    """The product ``left.T @ right`` of each group's rows, float32, by a TPU kernel."""
    size, *widest = GRADIENT_TILES
    widths = (min(most, -(-x.shape[1] // LANES) * LANES) for most, x in zip(widest, (left, right), strict=True))
    left, right = _padded(left, size), _padded(right, size)
    return tgmm(left.T, right, sizes.astype(jnp.int32), jnp.float32, (size, *widths), interpret=interpret)


def _multiply_transposed_xla(left: Array, right: Array, sizes: Array) -> Array:
    by_row = (((0,), (0,)), ((), ()))
    numbers = jax.lax.RaggedDotDimensionNumbers(by_row, lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    return jax.lax.ragged_dot_general(left, right, sizes, numbers, preferred_element_type=jnp.float32)


def _padded(rows: Array, size: int) -> Array:
    """With rows of no group, up to a multiple of a tile."""
    return jnp.pad(rows, ((0, -len(rows) % size), (0, 0)))

"""Products of groups of rows against a loop over the groups, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.model import matmul

SIZES = np.array([100, 0, 28, 128], np.int32)
"""Of 256 rows: a group without rows, a tile of rows that two groups share, and one of a single group."""


def arrays(rows_dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"rows": (256, 24), "matrices": (4, 24, 40), "slope": (256, 40)}
    found = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return found["rows"].astype(rows_dtype), found["matrices"], found["slope"]


def by_loop(left, right):
    """``left.T @ right`` of each group."""
    ends = np.cumsum(SIZES)
    parts = [slice(end - size, end) for end, size in zip(ends, SIZES, strict=True)]
    return np.stack([np.asarray(left, np.float64)[p].T @ np.asarray(right, np.float64)[p] for p in parts])


def test_values_and_gradients():
    rows, matrices, slope = arrays()
    output, pull = jax.vjp(
        lambda rows, matrices: matmul.grouped_matmul(rows, matrices, jnp.asarray(SIZES)), rows, matrices
    )
    of_row = np.asarray(matrices, np.float64)[np.repeat(np.arange(4), SIZES)]
    np.testing.assert_allclose(output, np.einsum("ND,NDF->NF", rows, of_row), atol=1e-4)
    for_rows, for_matrices = pull(slope)
    np.testing.assert_allclose(for_rows, np.einsum("NF,NDF->ND", slope, of_row), atol=1e-4)
    np.testing.assert_allclose(for_matrices, by_loop(rows, slope), atol=1e-4)


def test_the_gradient_of_float32_matrices_is_summed_in_float32():
    rows, matrices, slope = arrays(jnp.bfloat16)
    _, pull = jax.vjp(lambda matrices: matmul.grouped_matmul(rows, matrices, jnp.asarray(SIZES)), matrices)
    slope = slope.astype(jnp.bfloat16)
    (for_matrices,) = pull(slope)
    assert for_matrices.dtype == jnp.float32
    np.testing.assert_allclose(for_matrices, by_loop(rows, slope), atol=1e-4)


@pytest.mark.slow
def test_the_kernel_of_the_tpu():
    rows, _, slope = arrays()
    found = matmul.products_of_groups(rows, slope, jnp.asarray(SIZES), interpret=True)
    np.testing.assert_allclose(found, by_loop(rows, slope), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "num_rows", "depth", "tile"),
    # 24 and 40 are a whole block and a part of one; where 128 numbers are summed, the matrices are turned.
    [(0, 256, 24, (128, 16, 16 * 16)), (2, 250, 24, (128, 16, 16 * 16)), (2, 250, 128, (128, 64, 64 * 32))],
)
def test_the_kernel_that_reads_one_layer_of_a_stack(layer, num_rows, depth, tile, monkeypatch):
    monkeypatch.setattr(matmul, "IN_STACK_TILE", tile)
    rng = np.random.default_rng(1)
    rows = jnp.asarray(rng.normal(size=(num_rows, depth)), jnp.float32)
    stack = jnp.asarray(rng.normal(size=(3, 4, depth, 40)), jnp.float32)
    sizes = jnp.asarray(SIZES - [0, 0, 0, 256 - num_rows])
    matrices = matmul.InStack(stack, jnp.asarray(layer))
    found = matmul.products_in_stack(rows, matrices, sizes, interpret=True)
    of_row = np.asarray(stack[layer], np.float64)[np.repeat(np.arange(4), sizes)]
    np.testing.assert_allclose(found, np.einsum("ND,NDF->NF", rows, of_row), atol=1e-4)
    by_xla = jax.jit(matmul.ragged_dot)(rows, matrices, sizes, jnp.repeat(jnp.arange(4), sizes))
    np.testing.assert_allclose(by_xla, found, atol=1e-4)

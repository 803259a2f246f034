"""Products of groups of rows against a loop over the groups, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.model import grouped_matmul as grouped

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
        lambda rows, matrices: grouped.grouped_matmul(rows, matrices, jnp.asarray(SIZES)), rows, matrices
    )
    of_row = np.asarray(matrices, np.float64)[np.repeat(np.arange(4), SIZES)]
    np.testing.assert_allclose(output, np.einsum("ND,NDF->NF", rows, of_row), atol=1e-4)
    for_rows, for_matrices = pull(slope)
    np.testing.assert_allclose(for_rows, np.einsum("NF,NDF->ND", slope, of_row), atol=1e-4)
    np.testing.assert_allclose(for_matrices, by_loop(rows, slope), atol=1e-4)


def test_the_gradient_of_float32_matrices_is_summed_in_float32():
    rows, matrices, slope = arrays(jnp.bfloat16)
    _, pull = jax.vjp(lambda matrices: grouped.grouped_matmul(rows, matrices, jnp.asarray(SIZES)), matrices)
    slope = slope.astype(jnp.bfloat16)
    (for_matrices,) = pull(slope)
    assert for_matrices.dtype == jnp.float32
    np.testing.assert_allclose(for_matrices, by_loop(rows, slope), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [256, 250])
def test_the_kernel_of_the_gradient(num_rows):
    rows, _, slope = (x[:num_rows] for x in arrays())
    found = grouped.multiply_transposed(rows, slope, jnp.asarray(SIZES - [0, 0, 0, 256 - num_rows]), interpret=True)
    np.testing.assert_allclose(found, by_loop(rows, slope), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    # 24 and 40 are a whole block and a part of one; where 128 numbers are summed, the matrices are turned.
    ("first", "num_rows", "depth", "width", "largest"),
    [(0, 256, 24, 16, 256), (8, 250, 24, 16, 256), (8, 250, 128, 64, 2048)],
)
def test_the_kernel_of_the_tpu_with_the_matrices_of_one_layer(first, num_rows, depth, width, largest, monkeypatch):
    monkeypatch.setattr(grouped, "WIDEST", width)
    monkeypatch.setattr(grouped, "LARGEST", largest)
    rng = np.random.default_rng(1)
    stack = jnp.asarray(rng.normal(size=(12, depth, 40)), jnp.float32)
    rows = jnp.asarray(rng.normal(size=(num_rows, depth)), jnp.float32)
    sizes = SIZES - [0, 0, 0, 256 - num_rows]
    found = grouped.multiply_groups(rows, stack, jnp.asarray(sizes), jnp.asarray(first), interpret=True)
    of_row = np.asarray(stack, np.float64)[first : first + 4][np.repeat(np.arange(4), sizes)]
    np.testing.assert_allclose(found, np.einsum("ND,NDF->NF", rows, of_row), atol=1e-4)


def test_the_matrices_of_a_layer_in_the_stack():
    rows, matrices, _ = arrays()
    experts = jnp.repeat(jnp.arange(4), SIZES)
    stack = jnp.stack([jnp.zeros_like(matrices), matrices])
    found = jax.jit(grouped.ragged_dot)(rows, grouped.InStack(stack, jnp.asarray(1)), jnp.asarray(SIZES), experts)
    np.testing.assert_array_equal(found, grouped.ragged_dot(rows, matrices, jnp.asarray(SIZES), experts))

"""Bytes that kernels move, against values worked out by hand; they are lowered for a TPU without its compiler."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from oapl_jax.model import grouped_matmul as grouped
from oapl_jax.model import splash
from oapl_jax.model.segments import Segments
from oapl_jax.preflight import kernels


def bodies(function, *arguments):
    """Of the kernels that a function calls."""
    text = str(jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module())
    return re.findall(r"\\22body\\22: \\22([\w+/=]+)", text)


def copies(grid, in_map, shape=(64, 256), block=(16, 128), dtype=jnp.float32):
    """A kernel that reads blocks as ``in_map`` says, and writes a block in each step of its first axis."""

    def kernel(x, out):
        out[...] = x[...] + 1

    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec(block, in_map)],
        out_specs=pl.BlockSpec(block, lambda i, *_: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((grid[0] * block[0], block[1]), dtype),
    )
    (body,) = bodies(call, jax.ShapeDtypeStruct(shape, dtype))
    return kernels.work(body, kernels.Scalars()).hbm_bytes


BLOCK = 16 * 128 * 4


def test_an_array_that_is_read_twice_counts_twice():
    once = copies((4, 2), lambda i, j: (i, j))
    assert once == (64 * 256 / (16 * 128) + 4) * BLOCK
    # The four blocks of the first column, again and again.
    assert copies((2, 4), lambda i, j: (j, 0)) == (2 * 4 + 2) * BLOCK


def test_the_same_block_in_the_next_step_is_not_read_again():
    assert copies((4, 2), lambda i, j: (i, 0)) == (4 + 4) * BLOCK
    assert copies((4, 2), lambda i, j: (jax.lax.div(i, 2), 0)) == (2 + 4) * BLOCK
    assert copies((4, 2), lambda i, j: (jax.lax.select(i > 2, 1, 0), 1)) == (2 + 4) * BLOCK


def test_blocks_are_padded_to_tiles():
    """Heads of 64 take the room of 128, three rows that of eight."""
    found = copies((4, 1), lambda i, j: (i, 0), shape=(64, 64), block=(16, 64), dtype=jnp.bfloat16)
    assert found == 2 * 4 * 16 * 128 * 2


def test_what_is_in_fast_memory_already_is_not_read():
    call = pl.pallas_call(
        lambda x, out: None,
        grid=(4,),
        in_specs=[pl.BlockSpec((16, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((16, 128), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((64, 128), jnp.float32),
    )
    (body,) = bodies(call, jax.ShapeDtypeStruct((64, 128), jnp.float32))
    assert kernels.work(body, kernels.Scalars(), [False, True]).hbm_bytes == 4 * BLOCK


def test_index_maps_that_read_scalars():
    def kernel(table, x, out):
        out[...] = x[...]

    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(4,),
            in_specs=[pl.BlockSpec((16, 128), lambda i, table: (table[i], 0))],
            out_specs=pl.BlockSpec((16, 128), lambda i, table: (0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32),
        name="by_table",
    )
    (body,) = bodies(call, jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((64, 128), jnp.float32))
    known = kernels.Scalars({"by_table": [np.array([2, 2, 0, 2])]})
    assert kernels.work(body, known).hbm_bytes == (3 + 1) * BLOCK
    assert kernels.work(body, kernels.Scalars()).hbm_bytes == (4 + 1) * BLOCK


def test_a_kernel_that_copies_by_itself_does_so_for_the_live_tokens():
    """Two sequences; a block has two pages of 16 tokens, of keys and of values."""

    def kernel(keys, values, out, buffer, semaphore):
        def one_block(i, carry):
            for pages in (keys, values):
                for page in range(2):
                    copy = pltpu.make_async_copy(pages.at[2 * i + page], buffer, semaphore)
                    copy.start()
                    copy.wait()
            return carry

        jax.lax.fori_loop(0, 4, one_block, 0)
        out[...] = buffer[...]

    pages = jax.ShapeDtypeStruct((8, 16, 128), jnp.bfloat16)
    call = pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_specs=pl.BlockSpec((16, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((16, 128), jnp.bfloat16),
        scratch_shapes=[pltpu.VMEM((16, 128), jnp.bfloat16), pltpu.SemaphoreType.DMA],
    )
    (body,) = bodies(call, pages, pages)
    page, written = 16 * 128 * 2, 16 * 128 * 2
    for live, blocks in [(32, 1), (33, 2), (100, 4)]:
        assert kernels.work(body, kernels.Scalars(live_tokens=live)).hbm_bytes == 2 * blocks * 4 * page + written


def test_splash_reads_the_blocks_that_its_tables_name():
    """One rollout of four blocks: 10 of the 16 pairs are seen, and the second one needs the same keys as the first."""
    T, H, K, C, size = 2048, 4, 2, 64, 512
    ids = Segments(jnp.ones(T, jnp.int32))

    def attend(query, key, value):
        segments = jax.tree.map(lambda x: x[None], ids)
        return splash.attend(query, key, value, segments, segments, 0, interpret=False)

    heads = [jax.ShapeDtypeStruct((1, T, n, C), jnp.bfloat16) for n in (H, K, K)]
    (body,) = bodies(attend, *heads)
    found = kernels.work(body, splash_scalars(ids, size)).hbm_bytes
    block = size * 128 * 2  # of keys, values, queries or results: heads of 64 in the room of 128
    of_keys = 9 * (2 * block + 8 * size * 4)  # and their ids, in eight equal rows
    of_queries = 4 * (2 * block + 2 * size * 128 * 4)  # and their ids and places, along the lanes
    running = 3 * size * 128 * 4  # maximum, sum and output, which are outputs of the kernel too
    assert found == H * (of_keys + of_queries) + running


def splash_scalars(ids, size):
    by_query, _ = splash.find_blocks(ids, ids, 0, size)
    tables = [by_query.data_next, by_query.block_mask, by_query.mask_next]
    return kernels.Scalars({"splash_mha_fwd": [np.asarray(table) for table in tables if table is not None]})


def test_products_of_groups_count_once():
    """Four groups in 16 tiles of rows: the gradient of the matrices, whose columns are read in one piece."""
    N, D, F, E, tile = 2048, 256, 128, 4, 128
    arrays = [jax.ShapeDtypeStruct((N, width), jnp.bfloat16) for width in (D, F)]
    (body,) = bodies(grouped.multiply_transposed, *arrays, jax.ShapeDtypeStruct((E,), jnp.int32))
    found = kernels.work(body, kernels.Scalars())
    assert found.flops == 2 * N * D * F
    assert found.hbm_bytes == N * (D + F) * 2 + E * D * F * 4
    # Five equal groups share tiles: each of the four tiles between two groups is computed twice, and read once.
    (body,) = bodies(grouped.multiply_transposed, *arrays, jax.ShapeDtypeStruct((5,), jnp.int32))
    assert kernels.work(body, kernels.Scalars()).flops == (N + 4 * tile) / N * 2 * N * D * F


@pytest.mark.parametrize(("D", "F"), [(256, 128), (256, 192), (192, 128)])
def test_products_of_experts_read_one_layer_of_the_stack_without_padding(D, F):
    """Two groups in 16 tiles of rows; of 192 columns, or 192 summed numbers, none is padded to 256."""
    N, L, E = 2048, 3, 2
    shapes = (N, D), (L * E, D, F)
    rows, stack = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((E,), ())]
    (body,) = bodies(grouped.multiply_groups, rows, stack, *integers)
    lanes = lambda size: -(-size // 128) * 128  # noqa: E731
    moved = N * (lanes(D) + lanes(F)) + E * D * F
    assert kernels.work(body, kernels.Scalars()).hbm_bytes == 2 * moved

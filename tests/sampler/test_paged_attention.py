"""Every implementation against a transcription in float64, kernels in Pallas's interpreter and lowered for their platform."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import tiny
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.sampler import kv_cache, paged_attention
from oapl_jax.sampler.paged_attention import choose_implementation, paged_attend

PAGE, WIDTH, NUM_LAYERS, LAYER_PAGES = 4, 8, 2, 9
LENGTHS = [1, PAGE, PAGE + 1, 3 * PAGE, 0, 2 * PAGE - 1]
TABLE = [
    [4, -7, 10**6],
    [2, 18, -1],
    [3, 5, 10**6],
    # Two rows share the pages of a prompt with the one above and go on alone.
    [3, 7, 0],
    [-1, -1, -1],
    [3, 8, 17],
]
TOLERANCE = 1e-6
"""Float32 sums in another order. The TPU kernel rounds keys and values to bfloat16: its pages are rounded before."""


def make_inputs(num_heads, num_kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    shape = (num_kv_heads, NUM_LAYERS * LAYER_PAGES, PAGE, WIDTH)
    query = rng.normal(0, 3, (len(LENGTHS), num_heads, WIDTH)).astype(np.float32)
    k_pages, v_pages = (np.asarray(jnp.bfloat16(rng.normal(0, 1, shape)), np.float32) for _ in range(2))
    return query, k_pages, v_pages


def expected(query, k_pages, v_pages, table, length):
    """One row's attention, one head at a time."""
    output = np.zeros(query.shape)
    group = len(query) // len(k_pages)
    slots = [(table[i // PAGE], i % PAGE) for i in range(length)]
    for head in range(len(query)):
        keys, values = (
            np.stack([pages[head // group][slot] for slot in slots]).astype(float) for pages in (k_pages, v_pages)
        )
        scores = keys @ query[head] / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        output[head] = weights @ values / weights.sum()
    return output


@functools.cache
def make_attend(implementation, words, interpret, table_entries):
    """Compiled; ``table_entries`` is the module's limit while it is traced."""
    mesh, _ = make_meshes(MeshConfig(trainer=words))
    return jax.jit(functools.partial(paged_attend, mesh=mesh, implementation=implementation, interpret=interpret))


def side_by_side(pages, joined):
    """Pages of which each holds several heads."""
    _, *shape, width = pages.shape
    return np.moveaxis(pages.reshape(-1, joined, *shape, width), 1, -2).reshape(-1, *shape, joined * width)


def check(implementation, words, num_heads, num_kv_heads, *, lengths=LENGTHS, layer=1, joined=1):
    query, k_pages, v_pages = make_inputs(num_heads, num_kv_heads)
    table = np.asarray(TABLE, np.int32) + layer * LAYER_PAGES
    attend = make_attend(implementation, words, True, paged_attention.TPU_TABLE_ENTRIES)
    pages = [side_by_side(pages, joined) for pages in (k_pages, v_pages)]
    output = np.asarray(attend(query, *pages, table, np.asarray(lengths, np.int32)))
    assert np.isfinite(output).all()
    for row, length in enumerate(lengths):
        if length:
            np.testing.assert_allclose(
                output[row],
                expected(query[row], k_pages, v_pages, table[row], length),
                atol=TOLERANCE,
                err_msg=f"row {row}",
            )


@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("implementation", ["xla", "gpu", "tpu"])
def test_rows_see_their_tokens_and_no_others(implementation, group):
    check(implementation, "data=1", 2 * group, 2)


@pytest.mark.parametrize(
    ("words", "num_heads", "num_kv_heads", "joined"),
    [("data=1", 6, 2, 2), ("data=1", 8, 4, 2), ("tensor=2", 8, 4, 2), ("tensor=2", 8, 2, 2)],
)
def test_joined_heads_see_their_own_keys_and_values(words, num_heads, num_kv_heads, joined):
    check("tpu", words, num_heads, num_kv_heads, joined=joined)


def test_pages_of_joined_heads_hold_what_the_heads_have():
    config = tiny.config("qwen3_tied", num_hidden_layers=NUM_LAYERS, num_key_value_heads=4, head_dim=WIDTH)
    rng = np.random.default_rng(0)
    prompt = kv_cache.PromptKV(*jnp.asarray(rng.normal(size=(2, NUM_LAYERS, 1, 2 * PAGE, 4, WIDTH)), jnp.float32))
    new = jnp.asarray(rng.normal(size=(2, 1, 4, WIDTH)), jnp.float32)
    full, tails, length = jnp.array([2, LAYER_PAGES]), jnp.array([3, 4]), jnp.int32(6)
    table, positions, is_live = jnp.array([[2, 3], [2, 4]]), jnp.array([6, 7]), jnp.array([True, True])

    def written(joined):
        pages = kv_cache.make_pages(config, LAYER_PAGES, PAGE, jnp.float32, joined)
        pages = kv_cache.write_prompt(pages, prompt, full, length, tails)
        return [kv_cache.put_tokens(page, 1, NUM_LAYERS, table, positions, is_live, new) for page in pages]

    for joined, apart in zip(written(2), written(1), strict=True):
        np.testing.assert_array_equal(joined, side_by_side(np.asarray(apart), 2))


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "tensor", "joined"),
    [(8, 128, 4, 1), (2, 64, 1, 2), (4, 64, 2, 2), (8, 32, 2, 4), (2, 64, 4, 2), (3, 64, 1, 0), (2, 64, 2, 0)],
)
def test_heads_are_joined_where_the_kernel_needs_it_and_the_mesh_allows_it(num_kv_heads, head_dim, tensor, joined):
    assert paged_attention.joined_heads(num_kv_heads, head_dim, tensor) == joined


@pytest.mark.parametrize("layer", [0, 1])
def test_table_points_into_one_layer_of_the_pool(layer):
    check("xla", "data=1", 2, 1, layer=layer)


@pytest.mark.parametrize("idle", [(0,), (5,), (0, 1, 3), (2, 3, 4, 5), range(6)], ids=str)
def test_idle_rows_anywhere_do_not_disturb_the_tpu_kernel(idle):
    # It fetches the pages of the next row that has any while it computes.
    check("tpu", "data=1", 2, 1, lengths=[0 if row in idle else length for row, length in enumerate(LENGTHS)])


def test_tables_larger_than_the_memory_of_a_tpu_kernel(monkeypatch):
    monkeypatch.setattr(paged_attention, "TPU_TABLE_ENTRIES", 2 * len(TABLE[0]))
    check("tpu", "data=1", 2, 1)


@pytest.mark.parametrize(
    ("words", "num_heads", "num_kv_heads"),
    [
        pytest.param("tensor=2", 10, 2, id="kv-heads-split"),
        pytest.param("tensor=2", 10, 1, id="one-kv-head-everywhere"),
        pytest.param("tensor=4", 12, 2, id="kv-heads-of-two-devices-each"),
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "gpu", "tpu"])
def test_heads_over_a_mesh_give_the_same(implementation, words, num_heads, num_kv_heads):
    check(implementation, words, num_heads, num_kv_heads)


@pytest.mark.parametrize("implementation", ["gpu", "tpu"])
def test_heads_that_a_kernel_cannot_split_are_refused(implementation):
    with pytest.raises(ValueError, match="6 query heads and 3 kv heads over tensor=2"):
        check(implementation, "tensor=2", 6, 3)


@pytest.mark.parametrize("num_pages", [1, 7, 33, 512])
@pytest.mark.parametrize("implementation", ["gpu", "tpu"])
def test_kernels_lower_for_their_platform_with_any_length_of_the_table(implementation, num_pages):
    shape = jax.ShapeDtypeStruct
    pages = shape((2, 100, 64, 128), jnp.bfloat16)
    mesh, _ = make_meshes(MeshConfig(trainer="tensor=2"))
    attend = jax.jit(functools.partial(paged_attend, mesh=mesh, implementation=implementation))
    traced = attend.trace(
        shape((3, 10, 128), jnp.bfloat16), pages, pages, shape((3, num_pages), jnp.int32), shape((3,), jnp.int32)
    )
    platform = "cuda" if implementation == "gpu" else "tpu"
    assert "custom_call" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("tokens", "block"), [(64, 64), (512, 128), (704, 256), (1024, 256), (2048, 512), (32768, 512)]
)
def test_the_tpu_kernel_loads_short_sequences_in_smaller_blocks(tokens, block):
    assert paged_attention.tpu_block_pages(tokens // 64, 64) * 64 == block


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "head_dim", "implementation"),
    [
        ("tpu", None, "bfloat16", 128, "tpu"),
        ("tpu", None, "float32", 128, "tpu"),
        ("tpu", None, "bfloat16", 64, "tpu"),
        ("tpu", None, "bfloat16", 40, "xla"),
        ("tpu", None, "int8", 128, "xla"),
        ("gpu", "9.0", "bfloat16", 64, "gpu"),
        ("gpu", "10.0", "bfloat16", 128, "gpu"),
        ("gpu", "7.5", "bfloat16", 128, "xla"),
        ("gpu", "gfx90a", "bfloat16", 128, "xla"),
        ("gpu", "9.0", "float32", 128, "xla"),
        ("gpu", "9.0", "bfloat16", 96, "xla"),
        ("gpu", "9.0", "int8", 128, "xla"),
        ("cpu", None, "bfloat16", 128, "xla"),
    ],
)
def test_choice(platform, capability, dtype, head_dim, implementation):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert choose_implementation(device, dtype, 2, head_dim, 1) == implementation

"""Attention of packed rows: each kind, on each mesh, against loops in NumPy."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.model.row_attention import attend_rows, choose
from oapl_jax.model.segments import Segments


@functools.cache
def inputs(T=256, H=8, K=4, C=64, B=2):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(B, T, heads, C)).astype(np.float32) for heads in (H, K, K))
    cuts = [[T // 3, T // 2 + 5, T - 17], [1, T // 2, T - 1]]
    segment_ids = np.array([np.searchsorted(cut, np.arange(T), side="right") + 1 for cut in cuts], np.int32)
    segment_ids[0, T - 17 :] = 0
    return query, key, value, Segments(segment_ids)


@functools.cache
def shared_inputs(T=256):
    """Two prompts a row; the first has two rollouts, the second one or three."""
    prompts, rollouts = np.zeros((2, T), np.int32), np.zeros((2, T), np.int32)
    for row, starts in enumerate(((0, 60, 90, 131, 200, 239), (0, 1, 50, 128, 130, 131, 190, 255))):
        second = 3
        of_rollout = [0, 1, 2, 0, 3, 4, 5][: len(starts) - 1]
        for i, (first, last) in enumerate(itertools.pairwise(starts)):
            prompts[row, first:last] = 1 + (i >= second)
            rollouts[row, first:last] = of_rollout[i]
    return *inputs(T=T)[:3], Segments(rollouts, prompts)


def sees(segments, b, t):
    """The tokens that token t of row b sees."""
    of_rollout = segments.rollouts[b] == segments.rollouts[b, t]
    if segments.prompts is not None:
        of_prompt = segments.prompts[b] == segments.prompts[b, t]
        of_rollout = of_prompt & (of_rollout | (segments.rollouts[b] == 0))
    return np.flatnonzero(of_rollout & (np.arange(len(of_rollout)) <= t))


def reference(query, key, value, segments):
    """Softmax over the tokens that a query sees, one query and head at a time, float64."""
    B, T, H, _ = query.shape
    output = np.zeros(query.shape)
    for b in range(B):
        for t in range(T):
            seen = sees(segments, b, t)
            for h in range(H):
                kv = h * key.shape[2] // H
                scores = key[b, seen, kv].astype(np.float64) @ query[b, t, h] / np.sqrt(query.shape[3])
                weights = np.exp(scores - scores.max())
                output[b, t, h] = weights @ value[b, seen, kv] / weights.sum()
    return output


@functools.cache
def expected(make=inputs):
    return reference(*make())


def run(kind, words="fsdp=1", make=inputs):
    arrays = jax.tree.map(jnp.asarray, make())
    mesh = make_meshes(MeshConfig(trainer=words))[0]
    attend = functools.partial(attend_rows, kind=kind, mesh=mesh, interpret=True)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)

    def loss(query, key, value):
        output = attend(query, key, value, arrays[3])
        return (output * weights).sum(), output

    (_, output), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays[:3])
    return np.asarray(output), [np.asarray(g) for g in gradients]


@functools.cache
def plain(make=inputs):
    return run("xla", make=make)


@pytest.mark.parametrize("make", [inputs, shared_inputs])
def test_xla_equals_loops(make):
    np.testing.assert_allclose(plain(make)[0], expected(make), atol=2e-5)


@pytest.mark.parametrize("make", [inputs, shared_inputs])
def test_xla_gradient_is_the_slope(make):
    arrays, (_, gradients) = make(), plain(make)
    weights = np.random.default_rng(1).normal(size=arrays[0].shape)
    for i, place in [(0, (0, 200, 3, 5)), (1, (0, 100, 1, 2)), (2, (1, 0, 0, 0))]:
        values = []
        for step in (1e-3, -1e-3):
            moved = [np.float64(x) for x in arrays[:3]]
            moved[i][place] += step
            values.append((reference(*moved, arrays[3]) * np.float32(weights)).sum())
        assert gradients[i][place] == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("xla", "data=2,context=4"),
        ("xla", "context=2,tensor=4"),
        ("xla", "tensor=8"),  # more devices than kv heads
        ("splash", "fsdp=1"),
        ("splash", "fsdp=2,context=2,tensor=2"),
        ("splash", "tensor=8"),
        ("triton", "fsdp=1"),
        ("triton", "fsdp=2,tensor=4"),
    ],
)
def test_every_kind_on_every_mesh_equals_plain_xla(kind, words):
    check_mesh(kind, words, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("xla", "data=2,context=4"),
        ("xla", "fsdp=2,context=2,tensor=2"),
        ("splash", "fsdp=1"),
        ("splash", "fsdp=2,context=2,tensor=2"),
    ],
)
def test_prompts_are_shared_on_every_mesh(kind, words):
    check_mesh(kind, words, shared_inputs)


def check_mesh(kind, words, make):
    output, gradients = run(kind, words, make)
    np.testing.assert_allclose(output, expected(make), atol=5e-5)
    for found, wanted in zip(gradients, plain(make)[1], strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_tritons_kernel_refuses_shared_prompts():
    arrays = jax.tree.map(jnp.asarray, shared_inputs())
    with pytest.raises(ValueError, match=r"model\.attention=triton has no rows whose rollouts share a prompt"):
        attend_rows(*arrays, kind="triton", interpret=True)


def test_without_segments_a_row_is_one_rollout():
    query, key, value, _ = jax.tree.map(jnp.asarray, inputs(T=16, C=8))
    whole = attend_rows(query, key, value, Segments(jnp.ones((2, 16), jnp.int32)), kind="xla")
    np.testing.assert_allclose(attend_rows(query, key, value, kind="xla"), whole, atol=1e-6)


def test_the_tpus_kernel_refuses_rows_that_it_cannot_split():
    query, key, value, segments = jax.tree.map(jnp.asarray, inputs(T=96, C=64))
    with pytest.raises(ValueError, match="needs rows of a multiple of 128 tokens"):
        attend_rows(query, key, value, segments, kind="splash", interpret=True)


def test_tritons_kernel_refuses_rows_that_it_cannot_split():
    query, key, value, segments = jax.tree.map(jnp.asarray, inputs(T=96, C=64))
    with pytest.raises(ValueError, match="triton needs rows of a multiple of 128 tokens"):
        attend_rows(query, key, value, segments, kind="triton", interpret=True)


def test_tritons_kernel_lowers_for_gpus():
    query, key, value, segments = jax.tree.map(jnp.asarray, inputs(C=64))

    def loss(query, key, value):
        return attend_rows(query, key, value, segments, kind="triton").astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    traced = gradient.trace(*(x.astype("bfloat16") for x in (query, key, value)))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "num_queries", "num_keys", "head_dim", "is_packed", "kind"),
    [
        ("tpu", None, "bfloat16", 4096, 4096, 128, True, "splash"),
        ("tpu", None, "bfloat16", 4096, 8192, 64, False, "splash"),
        ("tpu", None, "bfloat16", 100, 100, 128, True, "xla"),
        ("gpu", "9.0", "bfloat16", 100, 100, 128, False, "cudnn"),
        ("gpu", "9.0", "bfloat16", 4096, 4096, 128, True, "triton"),
        ("gpu", "9.0", "bfloat16", 4160, 4160, 128, True, "xla"),
        ("gpu", "9.0", "bfloat16", 4096, 8192, 128, True, "cudnn"),
        ("gpu", "9.0", "bfloat16", 2080, 4160, 128, False, "xla"),
        ("gpu", "9.0", "float32", 4096, 4096, 128, False, "xla"),
        ("gpu", "7.5", "bfloat16", 4096, 4096, 128, False, "xla"),
        ("gpu", "gfx90a", "bfloat16", 4096, 4096, 128, True, "xla"),
        ("cpu", None, "bfloat16", 4096, 4096, 128, True, "xla"),
    ],
)
def test_the_kind_follows_device_and_shape(
    platform, capability, dtype, num_queries, num_keys, head_dim, is_packed, kind
):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert choose(device, dtype, num_queries, num_keys, head_dim, is_packed=is_packed) == kind

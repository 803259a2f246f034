"""The sampler's copy: right values, right place, and never the memory that the train step donates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import tiny
from oapl_jax.config.learner import LearnerConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.config.model import LoraConfig
from oapl_jax.distributed.sharding import TRAINER_RULES, make_meshes, shardings
from oapl_jax.learner.batch import RowLayout, from_pairs, place
from oapl_jax.learner.state import init_state, make_optimizer, make_schedule
from oapl_jax.learner.step import make_train_step
from oapl_jax.model import lora, qwen
from oapl_jax.model.quantized import quantize_weights
from oapl_jax.objectives import oapl
from oapl_jax.sampler.sampler import replica_meshes, replica_params
from oapl_jax.weights.checkpoints import Checkpoints
from oapl_jax.weights.sync import WeightSync

CONFIG = tiny.config("qwen3_tied")
MESHES = {
    "colocated": MeshConfig(trainer="fsdp=1"),
    "colocated on 8": MeshConfig(trainer="fsdp=4,tensor=2"),
    "disaggregated": MeshConfig(trainer="fsdp=4", sampler="tensor=4"),
}


def host(tree):
    """Copies in host memory of their own."""
    return [np.array(leaf, copy=True) for leaf in jax.tree.leaves(tree)]


def buffers(tree):
    return {
        (shard.device.id, shard.data.unsafe_buffer_pointer())
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    }


def make(meshes, dtype):
    """State at step 0, the sync, and a donating train step that needs no batch."""
    trainer, sampler = make_meshes(MESHES[meshes])
    graphdef, abstract = qwen.abstract(CONFIG, mesh=trainer)
    learner = LearnerConfig(learning_rate=0.1, clip_norm=1.0)
    schedule = make_schedule(learner, 10)
    optimizer = make_optimizer(learner, schedule)
    params = jax.device_put(tiny.split(CONFIG)[1], shardings(abstract, trainer, TRAINER_RULES))
    state, placed = init_state(jax.tree.map(jnp.copy, params), optimizer, trainer)
    step = make_train_step(
        graphdef,
        optimizer,
        schedule,
        oapl.OBJECTIVE,
        oapl.OaplOptions(),
        temperature=1.0,
        vocab_size=48,
        mesh=trainer,
        shardings=placed,
    )
    pair = (np.array([3, 4], np.int32), np.array([5, 6, 1], np.int32))
    layout = RowLayout(4, 16, mesh=trainer)
    batch = from_pairs([pair] * 4, layout, advantages=[1.0, -1.0, 0.5, 2.0])
    batch = place(batch, layout)
    return state, WeightSync(abstract, sampler, dtype), lambda state: step(state, batch)[0], sampler


@pytest.mark.slow
@pytest.mark.parametrize(
    ("meshes", "dtype"),
    [
        ("colocated", "float32"),
        ("colocated", "bfloat16"),
        ("colocated on 8", "float32"),
        ("disaggregated", "float32"),
        ("disaggregated", "bfloat16"),
    ],
)
def test_the_sampler_keeps_its_weights_while_the_trainer_donates_its_own(meshes, dtype):
    state, sync, step, sampler_mesh = make(meshes, dtype)
    start = host(state.params)
    copy, metrics = sync(state.params)
    leaves = jax.tree.leaves(copy)
    assert not buffers(copy) & buffers(state), "no memory is shared"
    assert all(leaf.dtype == dtype for leaf in leaves)
    assert {device for leaf in leaves for device in leaf.devices()} == set(sampler_mesh.devices.flat)
    wanted = jax.tree.leaves(sync.abstract(state.params))
    assert [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves] == [
        (leaf.shape, leaf.dtype, leaf.sharding) for leaf in wanted
    ]
    expected = [value.astype(dtype) for value in start]
    for _ in range(3):
        state = step(state)
    for found, value in zip(host(copy), expected, strict=True):
        assert found.tobytes() == value.tobytes()
    moved = [np.abs(now - before).max() for now, before in zip(host(state.params), start, strict=True)]
    assert min(moved) > 1e-3, "the trainer's weights did change"
    assert metrics["sync/bytes"] == sum(value.nbytes for value in expected)
    assert metrics["sync/seconds"] > 0
    again, _ = sync(state.params)
    for found, value in zip(host(again), host(state.params), strict=True):
        assert found.tobytes() == value.astype(dtype).tobytes()


def test_the_disaggregated_sampler_splits_over_tensor_only():
    state, sync, _, sampler_mesh = make("disaggregated", "float32")
    copy, _ = sync(state.params)
    assert sampler_mesh.shape["tensor"] == 4
    assert not copy["embedding"].value.sharding.is_fully_replicated
    axes = {axis for leaf in jax.tree.leaves(copy) for axis in leaf.sharding.spec if axis is not None}
    assert axes == {"tensor"}
    trainer_axes = {axis for leaf in jax.tree.leaves(state.params) for axis in leaf.sharding.spec if axis is not None}
    assert "fsdp" in trainer_axes
    assert state.params["embedding"].value.devices().isdisjoint(copy["embedding"].value.devices())


INT8_MESHES = {
    **MESHES,
    "overlapping": MeshConfig(trainer="data=2,tensor=2"),
    "replicas": MeshConfig(trainer="fsdp=2", sampler="data=2,tensor=2"),
}


@pytest.mark.parametrize(
    "meshes", [pytest.param(name, marks=[pytest.mark.slow] if "8" in name else []) for name in INT8_MESHES]
)
def test_an_int8_copy_is_the_same_on_every_mesh(meshes):
    trainer, sampler = make_meshes(INT8_MESHES[meshes])
    if meshes == "overlapping":
        sampler = make_meshes(MeshConfig(trainer="tensor=2"))[0]
    abstract = qwen.abstract(CONFIG)[1]
    params = jax.device_put(tiny.split(CONFIG)[1], shardings(abstract, trainer, TRAINER_RULES))
    sync = WeightSync(abstract, sampler, "int8")
    copy, metrics = sync(params)
    expected = jax.tree.leaves(jax.jit(quantize_weights)(tiny.split(CONFIG)[1]))
    for leaf, value, wanted in zip(
        jax.tree.leaves(copy), expected, jax.tree.leaves(sync.abstract(params)), strict=True
    ):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
        np.testing.assert_array_equal(leaf, value)
    assert not buffers(copy) & buffers(params), "no memory is shared"
    num_weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert num_weights < metrics["sync/bytes"] == sum(value.nbytes for value in expected) < 1.2 * num_weights
    axes = {axis for leaf in jax.tree.leaves(copy) for axis in leaf.sharding.spec if axis is not None}
    assert axes == {"tensor"}
    for replica in replica_meshes(sampler):
        for leaf, value in zip(jax.tree.leaves(replica_params(copy, replica)), expected, strict=True):
            assert leaf.sharding.device_set == set(replica.devices.flat)
            np.testing.assert_array_equal(leaf, value)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("meshes", ["colocated", "disaggregated"])
def test_a_copy_in_chunks_is_the_whole_copy(meshes, dtype):
    """With adapters, which are merged, on both kinds of mesh; and a chunk has one parameter."""
    trainer, sampler = make_meshes(MESHES[meshes])
    config = LoraConfig(rank=2, targets=("q_proj", "up_proj", "down_proj"))
    abstract = qwen.abstract(CONFIG, lora=config)[1]
    adapters = nnx.split(qwen.Qwen(CONFIG, rngs=nnx.Rngs(5), lora=config))[1]
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, lora.trained(adapters))
    params = lora.attached(tiny.split(CONFIG)[1], adapters)
    merged = jax.jit(lora.merged)(params)
    expected = jax.tree.leaves(jax.jit(quantize_weights)(merged) if dtype == "int8" else merged)
    params = jax.device_put(params, shardings(abstract, trainer, TRAINER_RULES))
    sync = WeightSync(abstract, sampler, dtype, chunk_mib=0)
    assert len(sync.chunks) == len(jax.tree.leaves(tiny.split(CONFIG)[1]))
    copy, _ = sync(params)
    assert jax.tree.structure(copy) == jax.tree.structure(sync.abstract(params))
    for leaf, value in zip(jax.tree.leaves(copy), expected, strict=True):
        # A product of adapters whose parts lie on several devices may round otherwise.
        atol = 1 if leaf.dtype == jnp.int8 else 1e-6
        np.testing.assert_allclose(np.asarray(leaf, np.float64), np.asarray(value, np.float64), atol=atol)


@pytest.mark.slow
def test_an_int8_copy_is_restored_from_a_checkpoint(tmp_path):
    trainer, sampler = make_meshes(MESHES["disaggregated"])
    abstract = qwen.abstract(CONFIG)[1]
    params = jax.device_put(tiny.split(CONFIG)[1], shardings(abstract, trainer, TRAINER_RULES))
    sync = WeightSync(abstract, sampler, "int8")
    copy, _ = sync(params)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, (params, copy), {})
    checkpoints.wait()
    step, (_, restored), _ = checkpoints.restore((params, sync.abstract(params)), print)
    checkpoints.close()
    assert step == 3
    assert jax.tree.structure(restored) == jax.tree.structure(copy)
    for leaf, value in zip(jax.tree.leaves(restored), jax.tree.leaves(copy), strict=True):
        assert (leaf.dtype, leaf.sharding) == (value.dtype, value.sharding)
        np.testing.assert_array_equal(leaf, value)

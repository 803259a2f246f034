import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from model import tiny
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed import sharding
from oapl_jax.learner import batch
from oapl_jax.model import qwen


def sizes(mesh):
    return tuple(mesh.shape[axis] for axis in ("data", "fsdp", "context", "tensor"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fsdp=-1", (1, 8, 1, 1)),
        ("fsdp=4", (1, 4, 1, 1)),
        ("tensor=2,data=-1", (4, 1, 1, 2)),
        ("data=2,fsdp=2,tensor=2", (2, 2, 1, 2)),
    ],
)
def test_colocated_mesh(words, expected):
    trainer, sampler = sharding.make_meshes(MeshConfig(trainer=words))
    assert sampler is trainer
    assert trainer.axis_names == ("data", "fsdp", "context", "tensor")
    assert sizes(trainer) == expected


@pytest.mark.parametrize(
    ("trainer_words", "sampler_words", "trainer_size", "sampler_size"),
    [("fsdp=-1", "tensor=2", 6, 2), ("fsdp=4", "tensor=-1", 4, 4), ("fsdp=2", "tensor=2", 2, 2)],
)
def test_sampler_devices_come_after_the_trainers(trainer_words, sampler_words, trainer_size, sampler_size):
    trainer, sampler = sharding.make_meshes(MeshConfig(trainer=trainer_words, sampler=sampler_words))
    assert list(trainer.devices.flat) == jax.devices()[:trainer_size]
    assert list(sampler.devices.flat) == jax.devices()[trainer_size : trainer_size + sampler_size]


@pytest.mark.parametrize(
    ("trainer", "sampler", "named"),
    [
        ("fsdp=16", None, ["mesh.trainer", "fsdp=16", "16", "8 devices"]),
        ("fsdp=-1,tensor=3", None, ["mesh.trainer", "tensor=3", "do not divide", "8 devices"]),
        ("fsdp=-1,tensor=-1", None, ["mesh.trainer", "-1 more than once"]),
        ("fsdp=2,fsdp=4", None, ["mesh.trainer", "fsdp=2,fsdp=4", "twice"]),
        ("fsdp=-1", "tensor=-1", ["mesh.trainer", "mesh.sampler", "8 devices"]),
        ("fsdp=-1", "tensor=8", ["mesh.sampler", "tensor=8", "8 of 8", "none for the trainer"]),
        ("fsdp=6", "tensor=4", ["mesh.trainer", "fsdp=6", "4 devices"]),
        ("fsdp=8", "tensor=-1", ["mesh.sampler", "tensor=-1", "0 devices"]),
    ],
)
def test_meshes_that_do_not_fit_are_refused_by_name(trainer, sampler, named):
    with pytest.raises(ValueError, match=re.escape(named[0])) as error:
        sharding.make_meshes(MeshConfig(trainer=trainer, sampler=sampler))
    for word in named:
        assert word in str(error.value)


def specs(name, words, rules):
    mesh, _ = sharding.make_meshes(MeshConfig(trainer=words))
    abstract = qwen.abstract(tiny.config(name))[1]
    placed = sharding.shardings(abstract, mesh, rules)
    assert jax.tree.structure(placed) == jax.tree.structure(abstract)
    return jax.tree.map(lambda leaf: leaf.spec, placed)


def test_trainer_splits_every_matrix_over_both_axes():
    tree = specs("qwen3_wide_heads", "fsdp=4,tensor=2", sharding.TRAINER_RULES)
    assert tree.embedding.get_value() == P("tensor", "fsdp")
    assert tree.lm_head.get_value() == P("fsdp", "tensor")
    assert tree.layers.attention.query.get_value() == P(None, "fsdp", "tensor", None)
    assert tree.layers.attention.output.get_value() == P(None, "tensor", None, "fsdp")
    assert tree.layers.mlp.down.get_value() == P(None, "tensor", "fsdp")


def test_sampler_splits_over_tensor_only():
    tree = specs("qwen3_wide_heads", "fsdp=4,tensor=2", sharding.SAMPLER_RULES)
    assert tree.embedding.get_value() == P("tensor", None)
    assert tree.layers.attention.query.get_value() == P(None, None, "tensor", None)
    assert tree.final_norm.get_value() == P(None)


def test_kv_heads_that_do_not_divide_are_replicated():
    tree = specs("qwen3_one_kv_head", "tensor=4", sharding.SAMPLER_RULES)
    assert tree.layers.attention.key.get_value() == P(None, None, None, None)
    assert tree.layers.attention.query.get_value() == P(None, None, "tensor", None)


def test_any_other_dimension_that_does_not_divide_is_refused_by_name():
    with pytest.raises(ValueError, match="not divisible") as error:
        specs("qwen3_wide_heads", "tensor=8", sharding.SAMPLER_RULES)
    for word in ("layers/attention/output", "'heads'", "of 4", "tensor=8"):
        assert word in str(error.value)


def test_leaves_that_are_no_parameters_are_replicated():
    mesh, _ = sharding.make_meshes(MeshConfig())
    assert sharding.shardings({"count": jnp.zeros(())}, mesh, sharding.TRAINER_RULES)["count"].spec == P()


def sharded_params(words, name="qwen3_wide_heads"):
    mesh, sampler = sharding.make_meshes(words)
    config = tiny.config(name)
    placed = sharding.shardings(qwen.abstract(config)[1], mesh, sharding.TRAINER_RULES)
    return jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s), tiny.split(config)[1], placed), sampler


@pytest.mark.parametrize(
    "words",
    [
        MeshConfig(trainer="fsdp=4,tensor=2"),  # the same devices
        MeshConfig(trainer="fsdp=1"),
        MeshConfig(trainer="fsdp=4", sampler="tensor=2"),  # other devices
    ],
)
@pytest.mark.parametrize("same_partitioning", [False, True])
def test_reshard_is_bit_exact_and_shares_no_memory(words, same_partitioning):
    params, sampler = sharded_params(words)
    rules = sharding.TRAINER_RULES if same_partitioning else sharding.SAMPLER_RULES
    target = sharding.shardings(qwen.abstract(tiny.config("qwen3_wide_heads"))[1], sampler, rules)
    before = jax.device_get(params)
    copied = sharding.reshard(params, target)
    assert pointers(copied).isdisjoint(pointers(params))
    for leaf, expected in zip(jax.tree.leaves(copied), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
    # What the train step does: its parameters are donated, their memory is reused.
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)(params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(copied), before)


def pointers(tree):
    return {shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards}


@pytest.mark.parametrize("sampler", [None, "tensor=2"])
def test_reshard_casts_floats_and_leaves_integers(sampler):
    trainer, sampler = sharding.make_meshes(MeshConfig(trainer="fsdp=4", sampler=sampler))
    tree = {"w": jnp.linspace(0, 1, 64), "n": jnp.arange(8)}
    tree = jax.device_put(tree, NamedSharding(trainer, P("fsdp")))
    copied = sharding.reshard(tree, dict.fromkeys(tree, NamedSharding(sampler, P("tensor"))), jnp.bfloat16)
    np.testing.assert_array_equal(copied["w"], np.asarray(tree["w"]).astype(jnp.bfloat16))
    assert copied["n"].dtype == tree["n"].dtype
    assert copied["w"].sharding.mesh == sampler


def test_reshard_between_overlapping_devices_shares_no_memory():
    (first, _), devices = sharding.make_meshes(MeshConfig(trainer="fsdp=4")), jax.devices()
    second, _ = sharding.make_meshes(MeshConfig(trainer="fsdp=4"), devices[2:6])
    array = jax.device_put(jnp.arange(32.0), NamedSharding(first, P()))
    copied = sharding.reshard({"a": array}, {"a": NamedSharding(second, P())})["a"]
    assert pointers(copied).isdisjoint(pointers(array))
    np.testing.assert_array_equal(copied, np.arange(32.0))


def test_optimizer_state_is_placed_like_its_parameters():
    optax = pytest.importorskip("optax")
    mesh, _ = sharding.make_meshes(MeshConfig(trainer="fsdp=4,tensor=2"))
    params = qwen.abstract(tiny.config("qwen3_wide_heads"))[1]
    placed = sharding.shardings(jax.eval_shape(optax.adam(1e-3).init, params), mesh, sharding.TRAINER_RULES)
    expected = sharding.shardings(params, mesh, sharding.TRAINER_RULES)
    assert jax.tree.leaves(placed[0].mu) == jax.tree.leaves(expected)
    assert placed[0].count.spec == P()
    assert isinstance(placed[0].nu.embedding, nnx.Variable)


def test_batch_rows_are_split_over_data_and_fsdp_and_tokens_over_context():
    mesh, _ = sharding.make_meshes(MeshConfig(trainer="data=2,fsdp=2,context=2"))
    places = batch.shardings(batch.RowLayout(8, 6, 6, mesh=mesh, shares_prompts=True))
    assert places.prompt_ids == places.tokens
    tokens = jax.device_put(jnp.zeros((3, 8, 6)), places.tokens)
    assert tokens.addressable_shards[0].data.shape == (3, 2, 3)
    rollouts = jax.device_put(jnp.zeros((3, 8, 5)), places.advantages)
    assert rollouts.addressable_shards[0].data.shape == (3, 2, 5)
    assert sharding.row_shards(mesh) == 4

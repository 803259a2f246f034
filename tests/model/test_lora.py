"""Adapters: merged equals unmerged, only they are trained, and peft reads them."""

import functools

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
from oapl_jax.model import hf, lora, qwen
from oapl_jax.objectives import oapl

LORA = LoraConfig(rank=3, alpha=5.0)
SOME = LoraConfig(rank=2, alpha=8.0, targets=("q_proj", "o_proj", "down_proj"))


@functools.cache
def split(name, config=LORA, mesh=None, is_new=False):
    """Structure and parameters of a tiny policy whose adapters are random, or as they are made (``is_new``)."""
    graphdef, shapes = qwen.abstract(tiny.config(name), lora=config, mesh=mesh)
    rng = np.random.default_rng(7)

    def make():
        return lora.trained(nnx.split(qwen.Qwen(tiny.config(name), rngs=nnx.Rngs(0), lora=config))[1])

    adapters = jax.jit(make)()
    if not is_new:
        adapters = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), adapters)
    params = lora.attached(tiny.split(tiny.config(name))[1], adapters)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    return graphdef, params


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3_tied"])
def test_new_adapters_change_nothing(name):
    tokens = tiny.rows(2, 9)
    expected = tiny.logits(*tiny.split(tiny.config(name)), tokens)
    found = tiny.logits(*split(name, is_new=True), tokens)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("config", [LORA, SOME], ids=["all", "some"])
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3_tied"])
def test_merged_equals_unmerged(name, config):
    """And differs from the base: the adapters are not small."""
    graphdef, params = split(name, config)
    tokens = tiny.rows(2, 9)
    base = tiny.logits(*tiny.split(tiny.config(name)), tokens)
    unmerged = tiny.logits(graphdef, params, tokens)
    merged = tiny.logits(tiny.split(tiny.config(name))[0], jax.jit(lora.merged)(params), tokens)
    np.testing.assert_allclose(merged, unmerged, atol=2e-5 * np.abs(base).max())
    assert np.abs(unmerged - base).max() > 0.1


def test_a_merged_matrix_is_base_plus_the_scaled_product():
    """In NumPy, of a matrix whose heads are inputs."""
    params = split("qwen3_tied")[1]
    output = params["layers"]["attention"]["output"]
    base, down, up = (np.asarray(output[part].get_value(), np.float64) for part in ("base", "down", "up"))
    merged = jax.jit(lora.merged)(params)["layers"]["attention"]["output"].get_value()
    for layer in range(len(base)):
        H, C, D = base[layer].shape
        expected = base[layer].reshape(H * C, D) + 5.0 / 3 * down[layer].reshape(H * C, 3) @ up[layer]
        np.testing.assert_allclose(np.asarray(merged)[layer].reshape(H * C, D), expected, atol=1e-5)


def step_and_state(mesh_words, params=None, graphdef=None, remat=False):
    """A train step on a mesh, and its state at step 0 with the given policy or the one with adapters."""
    mesh = make_meshes(MeshConfig(trainer=mesh_words))[0]
    name = "qwen3_tied"
    options = {"mesh": mesh, "remat": qwen.Remat(remat)}
    with_adapters = params is None
    graphdef, shapes = qwen.abstract(tiny.config(name), lora=LORA if with_adapters else None, **options)
    params = split(name)[1] if with_adapters else params
    params = jax.device_put(jax.tree.map(jnp.copy, params), shardings(shapes, mesh, TRAINER_RULES))
    learner = LearnerConfig(learning_rate=1e-2, clip_norm=1e9)
    schedule = make_schedule(learner, 10)
    optimizer = make_optimizer(learner, schedule)
    state, placed = init_state(params, optimizer, mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        schedule,
        oapl.OBJECTIVE,
        oapl.OaplOptions(beta2=0.3),
        temperature=1.0,
        vocab_size=45,
        mesh=mesh,
        shardings=placed,
    )
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 45, 3).astype(np.int32), rng.integers(0, 45, 4 + i).astype(np.int32)) for i in range(4)]
    layout = RowLayout(8, 16, mesh=mesh)
    batch = from_pairs(
        pairs,
        layout,
        sampler_logprobs=[np.full(len(response), -3.0, np.float32) for _, response in pairs],
        advantages=[0.5, -0.2, 0.1, 0.4],
    )
    return step, state, place(batch, layout)


def moments(state):
    """Adam's first moments, which after one step are a tenth of the gradient."""
    (moment,) = [s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    return jax.tree.map(np.asarray, moment)


@pytest.mark.slow
def test_only_adapters_are_trained():
    before = jax.tree.map(np.asarray, split("qwen3_tied")[1])
    step, state, batch = step_and_state("fsdp=1")
    state, metrics, _ = step(state, batch)
    assert jax.tree.structure(moments(state)) == jax.tree.structure(lora.trained(before))
    for path, leaf in nnx.to_flat_state(jax.tree.map(np.asarray, state.params)):
        old = dict(nnx.to_flat_state(before))[path].get_value()
        is_changed = not np.array_equal(leaf.get_value(), old)
        assert is_changed == (path[-1] in ("down", "up")), path
    assert float(metrics["learner/grad_norm"]) > 0


@pytest.mark.slow
def test_gradients_are_those_of_the_merged_weights():
    """By the chain rule, in NumPy, from the gradient of every weight of the merged policy."""
    params = split("qwen3_tied")[1]
    state = step_and_state("fsdp=1")
    found = moments(state[0](*state[1:])[0])
    state = step_and_state("fsdp=1", jax.jit(lora.merged)(params))
    whole = moments(state[0](*state[1:])[0])
    for module, name in lora.MODULES.values():
        adapter, gradient = params["layers"][module][name], whole["layers"][module][name].get_value()
        down, up = (np.asarray(adapter[part].get_value()) for part in ("down", "up"))
        slots = gradient.reshape(len(down), -1, np.prod(up.shape[2:]))
        flat_down, flat_up = down.reshape(len(down), -1, 3), up.reshape(len(up), 3, -1)
        for_down = 5 / 3 * np.einsum("lio,lro->lir", slots, flat_up).reshape(down.shape)
        for_up = 5 / 3 * np.einsum("lio,lir->lro", slots, flat_down).reshape(up.shape)
        for part, expected in (("down", for_down), ("up", for_up)):
            tolerance = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(found["layers"][module][name][part].get_value(), expected, atol=tolerance)


@pytest.mark.slow
def test_a_mesh_has_the_gradients_of_one_device():
    one, many = (step_and_state(words) for words in ("fsdp=1", "fsdp=2,context=2,tensor=2"))
    expected, found = (moments(step(state, batch)[0]) for step, state, batch in (one, many))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


@pytest.mark.slow
def test_frozen_weights_cost_no_gradient():
    """The compiled step has fewer operations than the one that trains all weights."""

    def flops(step, state, batch):
        return step.lower(state, batch).compile().cost_analysis()["flops"]

    base = tiny.split(tiny.config("qwen3_tied"))[1]
    assert flops(*step_and_state("fsdp=1")) < 0.95 * flops(*step_and_state("fsdp=1", base))


def test_experts_are_refused():
    with pytest.raises(ValueError, match="gate_proj of a mixture of experts is not implemented"):
        qwen.abstract(tiny.config("moe"), lora=LORA.model_copy(update={"targets": ("gate_proj",)}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3_tied"])
def test_peft_reads_the_adapter(name, tmp_path):
    """Base and adapter, loaded by peft, have the logits of ours."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    graphdef, params = split(name, SOME)
    hf.save_folder(tmp_path / "base", tiny.config(name), tiny.split(tiny.config(name))[1])
    hf.save_adapter(tmp_path / "adapter", tiny.config(name), params, SOME, str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokens = tiny.rows(2, 9)
    with torch.no_grad():
        theirs = model(torch.tensor(np.asarray(tokens))).logits.numpy()
    np.testing.assert_allclose(tiny.logits(graphdef, params, tokens), theirs, atol=1e-4)

import functools
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

import tiny
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed import sharding
from oapl_jax.model import hf, logprob, qwen

HUB_MODELS = [
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen2.5-14B",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-30B-A3B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
]
DENSE = "qwen3_wide_heads"


def load_tiny(name, folder):
    save_file(tiny.weights(name), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tiny.HF_CONFIGS[name]))
    mesh, _ = sharding.make_meshes(MeshConfig(trainer="fsdp=1"))
    config, params = hf.load_params(folder, mesh, sharding.TRAINER_RULES, jnp.float32)
    return qwen.abstract(config)[0], params


@pytest.mark.parametrize("name", tiny.HF_CONFIGS)
def test_logits_are_those_of_transformers(name, tmp_path):
    with np.load(tiny.GOLDEN) as golden:
        token_ids, expected = golden[f"{name}/tokens"], golden[f"{name}/logits"]
    np.testing.assert_array_equal(token_ids, tiny.tokens(name))
    logits = tiny.logits(*load_tiny(name, tmp_path), token_ids)
    assert logits.dtype == jnp.float32
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", HUB_MODELS)
def test_published_configs_have_the_published_number_of_weights(name, shared_data):
    configs = json.loads((shared_data / "model_configs" / "configs.json").read_text())
    path = shared_data / "model_configs" / "hf" / f"{name.replace('/', '--')}.json"
    assert qwen.QwenConfig.from_hf(json.loads(path.read_text())).num_params == configs[name]["params"]


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3_wide_heads", "qwen3_one_kv_head", "moe"])
def test_the_number_of_weights_is_that_of_the_traced_model(name, is_tied):
    config = tiny.config(name, tie_word_embeddings=is_tied, num_hidden_layers=3)
    assert config.num_params == sum(leaf.size for leaf in jax.tree.leaves(qwen.abstract(config)[1]))


def test_all_published_configs_are_tested(shared_data):
    files = {path.stem.replace("--", "/", 1) for path in (shared_data / "model_configs" / "hf").glob("*.json")}
    assert files == set(HUB_MODELS)


@pytest.mark.parametrize("name", tiny.HF_CONFIGS)
def test_config_survives_the_way_to_hugging_face_and_back(name):
    config = tiny.config(name, eos_token_id=(3, 4), bos_token_id=1)
    assert qwen.QwenConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_rope_theta_is_found_where_transformers_5_writes_it():
    values = {**tiny.HF_CONFIGS[DENSE], "rope_parameters": {"rope_theta": 12345.0, "rope_type": "default"}}
    del values["rope_theta"]
    assert qwen.QwenConfig.from_hf(values).rope_theta == 12345.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma"}, ["model_type", "gemma", "qwen2, qwen3, qwen3_moe, llama"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"use_sliding_window": True}, ["use_sliding_window", "True"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["rope_scaling", "dynamic"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "yarn", "lacks factor"]),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, ["rope_scaling", "factor=-1"]),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}}, ["rope_scaling", "'mscale'"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["rope_parameters", "high_freq_factor"]),
        ({"mlp_bias": True}, ["mlp_bias", "True"]),
        ({"attention_bias": True}, ["attention_bias", "True"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=re.escape(named[0])) as error:
        qwen.QwenConfig.from_hf({**tiny.HF_CONFIGS[DENSE], **changes})
    for word in named:
        assert word in str(error.value)


def test_experts_in_some_layers_only_are_refused_by_name():
    with pytest.raises(ValueError, match=r"mlp_only_layers=\[0\]"):
        qwen.QwenConfig.from_hf({**tiny.HF_CONFIGS["moe"], "mlp_only_layers": [0]})


@pytest.mark.slow
def test_random_weights_have_the_configured_spread():
    config = tiny.config(DENSE, hidden_size=256, intermediate_size=512, initializer_range=0.05)
    params = nnx.split(qwen.Qwen(config, rngs=nnx.Rngs(0)))[1]
    assert np.std(params.embedding[...]) == pytest.approx(0.05, rel=0.05)
    assert np.std(params.layers.mlp.gate[...]) == pytest.approx(0.05, rel=0.05)
    assert np.std(params.layers.mlp.down[...]) == pytest.approx(0.05 / np.sqrt(4), rel=0.05)
    assert np.all(params.layers.attention.query_norm[...] == 1)
    layers = np.asarray(params.layers.mlp.gate[...])
    assert not np.array_equal(layers[0], layers[1])


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(graphdef, params, token_ids):
    def loss(params):
        mask = jnp.ones(token_ids.shape, bool)
        return logprob.sequence_logprobs(graphdef, params, token_ids, mask, temperature=1.0, vocab_size=48)[0].sum()

    return jax.value_and_grad(loss)(params)


EIGHT_HEADS = tiny.config(DENSE, num_attention_heads=8, num_key_value_heads=4)


@functools.cache
def eight_heads_reference():
    return loss_and_gradient(*tiny.split(EIGHT_HEADS), tiny.rows(8, 8))


def assert_trees_close(actual, expected, **tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (DENSE, {"scan_layers": False}),
        (DENSE, {"remat": qwen.Remat(True)}),
        (DENSE, {"remat": qwen.Remat(True, ("layer_input", "query", "attention"))}),
        (DENSE, {"remat": qwen.Remat(True, ("layer_input", "gate", "up"), offload=True)}),
        ("moe", {"remat": qwen.Remat(True), "scan_layers": False}),
    ],
)
def test_remat_and_layer_loop_change_no_number(name, options):
    config, token_ids = tiny.config(name), tiny.rows(2, 9)
    graphdef, params = tiny.split(config)
    expected = loss_and_gradient(graphdef, params, token_ids)
    actual = loss_and_gradient(qwen.abstract(config, **options)[0], params, token_ids)
    assert np.abs(jax.tree.leaves(expected[1])[0]).max() > 1e-3
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("saved", "runs"), [((), 2), (("query", "gate"), 2), (("attention",), 1)])
def test_attention_that_is_saved_runs_cudnns_forward_pass_once(saved, runs, monkeypatch):
    """What is traced for a GPU; on a CPU JAX only lacks a cuDNN to ask for its version."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    options = {"compute_dtype": jnp.bfloat16, "remat": qwen.Remat(True, saved), "attention": "cudnn"}
    graphdef, params = qwen.abstract(tiny.config(DENSE), **options)
    tokens = tiny.rows(2, 16)

    def loss(params):
        model = nnx.merge(graphdef, params)
        hidden, _ = model.hidden(tokens, tiny.positions(tokens), model.attend_rows())
        return hidden.astype(jnp.float32).sum()

    assert str(jax.make_jaxpr(jax.grad(loss))(params)).count(f"{qwen.CUDNN_ATTENTION}[") == runs


def test_a_later_token_changes_no_earlier_state():
    graphdef, params = tiny.split(tiny.config(DENSE))
    token_ids = tiny.rows(1, 8)
    changed = token_ids.at[0, 5].set((token_ids[0, 5] + 1) % 48)
    before, after = (tiny.logits(graphdef, params, rows) for rows in (token_ids, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_untied", "moe"])
def test_sharded_equals_unsharded(name):
    mesh, _ = sharding.make_meshes(MeshConfig(trainer="fsdp=4,tensor=2"))
    config = tiny.config(name)
    graphdef, abstract = qwen.abstract(config, mesh=mesh)
    plain, params = tiny.split(config)
    sharded = sharding.reshard(params, sharding.shardings(abstract, mesh, sharding.TRAINER_RULES))
    assert sharded.layers.mlp.gate[...].addressable_shards[0].data.size * 8 == sharded.layers.mlp.gate[...].size
    token_ids = tiny.rows(8, 9)
    expected = loss_and_gradient(plain, params, token_ids)
    batch = jax.device_put(token_ids, NamedSharding(mesh, P(sharding.BATCH_AXES)))
    assert_trees_close(loss_and_gradient(graphdef, sharded, batch), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_experts_of_a_device_see_its_own_tokens_only():
    """Of eight times the tokens on eight devices, each has the temporaries of its share."""
    config = tiny.config("moe")

    def temporaries(words, num_rows):
        mesh, _ = sharding.make_meshes(MeshConfig(trainer=words))
        graphdef, params = qwen.abstract(config, mesh=mesh)
        params = sharding.placed(params, sharding.shardings(params, mesh, sharding.TRAINER_RULES))
        rows = jax.ShapeDtypeStruct((num_rows, 512), jnp.int32, sharding=NamedSharding(mesh, P(sharding.BATCH_AXES)))

        def mixed(params, tokens):
            return nnx.merge(graphdef, params).hidden(tokens, tiny.positions(tokens))[0].sum()

        compiled = jax.jit(jax.grad(mixed)).lower(params, rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("fsdp=8", 8) < 1.5 * temporaries("fsdp=1", 1)


def test_a_layer_is_gathered_before_it_is_used():
    """Each of its matrices is to be whole but for ``tensor``, so that no product is left to XLA to take apart."""
    mesh, _ = sharding.make_meshes(MeshConfig(trainer="fsdp=4,tensor=2"))
    graphdef, params = qwen.abstract(EIGHT_HEADS, mesh=mesh)
    params = sharding.placed(params, sharding.shardings(params, mesh, sharding.TRAINER_RULES))
    rows = jax.ShapeDtypeStruct((4, 16), jnp.int32, sharding=NamedSharding(mesh, P(sharding.BATCH_AXES)))
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).hidden(tokens, tokens)[0])
    lowered = forward.lower(params, rows).as_text()
    width, columns = EIGHT_HEADS.hidden_size, EIGHT_HEADS.intermediate_size
    for spec, shape in (('{}, {"tensor"}', (width, columns)), ('{"tensor"}, {}', (columns, width))):
        wanted = f"sdy.sharding_constraint .* <@mesh, \\[{spec}\\]> : tensor<{shape[0]}x{shape[1]}xf32>"
        assert re.search(wanted, lowered), wanted


@pytest.mark.slow
def test_random_weights_do_not_depend_on_the_mesh():
    config = tiny.config(DENSE)
    trees = []
    for words in ("fsdp=1", "fsdp=4,tensor=2"):
        mesh, _ = sharding.make_meshes(MeshConfig(trainer=words))
        placed = sharding.shardings(qwen.abstract(config)[1], mesh, sharding.TRAINER_RULES)
        trees.append(jax.device_get(qwen.initialize(config, jax.random.key(3), placed)))
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.slow
def test_bfloat16_products_stay_near_float32():
    config, token_ids = tiny.config(DENSE), tiny.rows(2, 9)
    graphdef, params = tiny.split(config)
    exact = tiny.logits(graphdef, params, token_ids)
    rounded = tiny.logits(qwen.abstract(config, compute_dtype=jnp.bfloat16)[0], params, token_ids)
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.05


_PRODUCTS = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]


# All triples of the axes, of which the pairs are parts, and `tensor` alone, which has more devices than kv heads.
_SHORT = [sizes for sizes in _PRODUCTS if max(sizes) == 2 or sizes[-1] == 8]
SHAPES_OF_8 = [pytest.param(sizes, marks=[] if sizes in _SHORT else [pytest.mark.long]) for sizes in _PRODUCTS]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SHAPES_OF_8, ids=str)
def test_every_mesh_of_8_devices_gives_the_loss_and_gradients_of_one(sizes):
    words = ",".join(f"{axis}={size}" for axis, size in zip(sharding.AXES, sizes, strict=True))
    mesh, _ = sharding.make_meshes(MeshConfig(trainer=words))
    graphdef, abstract = qwen.abstract(EIGHT_HEADS, mesh=mesh)
    _, params = tiny.split(EIGHT_HEADS)
    sharded = sharding.reshard(params, sharding.shardings(abstract, mesh, sharding.TRAINER_RULES))
    token_ids = tiny.rows(8, 8)
    batch = jax.device_put(token_ids, NamedSharding(mesh, P(sharding.BATCH_AXES, "context")))
    loss, gradient = loss_and_gradient(graphdef, sharded, batch)
    expected_loss, expected = eight_heads_reference()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(expected)))
    assert_trees_close(gradient, expected, rtol=0, atol=1e-5 * norm)

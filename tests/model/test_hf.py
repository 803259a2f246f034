import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.distributed import sharding
from oapl_jax.model import hf, qwen

NAMES = ["qwen2_tied", "qwen2_untied", "qwen3_wide_heads", "moe"]
DENSE = "qwen3_wide_heads"


def mesh(words="fsdp=4,tensor=2"):
    return sharding.make_meshes(MeshConfig(trainer=words))[0]


def load(folder, words="fsdp=4,tensor=2", dtype=jnp.float32):
    return hf.load_params(folder, mesh(words), sharding.TRAINER_RULES, dtype)


def write(folder, name=DENSE, **changes):
    """A checkpoint folder of a tiny model; ``changes`` replace tensors, None removes one."""
    folder.mkdir(exist_ok=True)
    weights = {key.replace("/", "."): value for key, value in (tiny.weights(name) | changes).items()}
    save_file({key: value for key, value in weights.items() if value is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tiny.HF_CONFIGS[name]))
    return folder


def write_shards(folder, name=DENSE):
    """The same in three files with an index."""
    weights = tiny.weights(name)
    weight_map = {tensor: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, tensor in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file({k: v for k, v in weights.items() if weight_map[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(tiny.HF_CONFIGS[name]))
    return weight_map


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_stacked_transposed_tensors_in_their_shardings(name, tmp_path):
    config, params = load(write(tmp_path, name))
    weights = tiny.weights(name)
    assert config == tiny.config(name)
    D, H, C = config.hidden_size, config.num_attention_heads, config.head_dim
    np.testing.assert_array_equal(params.embedding[...], weights["model.embed_tokens.weight"])
    query = np.stack([weights[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(2)])
    np.testing.assert_array_equal(params.layers.attention.query[...], query.transpose(0, 2, 1).reshape(2, D, H, C))
    output = np.stack([weights[f"model.layers.{i}.self_attn.o_proj.weight"] for i in range(2)])
    np.testing.assert_array_equal(params.layers.attention.output[...], output.transpose(0, 2, 1).reshape(2, H, C, D))
    prefix = "model.layers.1.mlp.experts.3" if config.num_experts else "model.layers.1.mlp"
    down = params.layers.mlp.down[1, 3] if config.num_experts else params.layers.mlp.down[1]
    np.testing.assert_array_equal(down, weights[f"{prefix}.down_proj.weight"].T)
    expected = sharding.shardings(qwen.abstract(config)[1], mesh(), sharding.TRAINER_RULES)
    for leaf, target in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding == target


def test_several_files_and_another_mesh_give_the_same_parameters(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    write_shards(tmp_path / "three")
    one, three = load(write(tmp_path / "one"))[1], load(tmp_path / "three", "data=2,fsdp=2")[1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(three))


@pytest.mark.parametrize("stored", [np.float32, jnp.bfloat16, np.float16])
def test_weights_are_cast(stored, tmp_path):
    weights = {name: value.astype(stored) for name, value in tiny.weights(DENSE).items()}
    _, params = load(write(tmp_path, **weights), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    expected = weights["model.embed_tokens.weight"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(params.embedding[...], expected)


def test_donating_one_replica_of_loaded_parameters_leaves_no_trace(tmp_path):
    """Replicas of a shard may start as one host buffer."""
    _, params = load(write(tmp_path), "data=8")
    before = jax.device_get(params)
    after = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
    for leaf, expected in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected + 1)


def test_tensors_without_a_meaning_are_ignored(tmp_path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "lm_head.weight": tiny.weights("qwen2_tied")["model.embed_tokens.weight"],
    }
    with_extra = load(write(tmp_path / "extra", "qwen2_tied", **extra))
    plain = load(write(tmp_path / "plain", "qwen2_tied"))
    assert with_extra[0] == plain[0]
    for leaf, expected in zip(jax.tree.leaves(with_extra[1]), jax.tree.leaves(plain[1]), strict=True):
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.slow
def test_a_tied_config_with_another_head_in_the_file_loads_untied_as_in_transformers(tmp_path, caplog):
    head = np.random.default_rng(0).normal(size=(48, 32)).astype(np.float32)
    write(tmp_path, "qwen2_tied", **{"lm_head.weight": head})
    config, params = load(tmp_path, "fsdp=2")
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(params.lm_head[...], head.T)
    assert str(tmp_path / "config.json") in caplog.text
    assert str(tmp_path / "model.safetensors") in caplog.text
    assert not hf.load_config(hf.save_folder(tmp_path / "saved", config, params)).tie_word_embeddings
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    token_ids = tiny.tokens("qwen2_tied")
    with torch.no_grad():
        expected = model(torch.from_numpy(token_ids).long()).logits.numpy()
    np.testing.assert_allclose(tiny.logits(qwen.abstract(config)[0], params, token_ids), expected, rtol=0, atol=1e-4)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({UP: None}, [UP, "lacks", "model.safetensors"]),
        ({UP: np.ones((56, 31), np.float32)}, [UP, "[56, 31]", "[56, 32]", "model.safetensors"]),
        ({"model.layers.0.mlp.extra": np.ones(3, np.float32)}, ["model.layers.0.mlp.extra", "model.safetensors"]),
        # A bias that this architecture has no place for, and an output matrix that the config forgets.
        ({"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}, ["q_proj.bias", "qwen3"]),
        ({"lm_head.weight": None}, ["lm_head.weight", "lacks"]),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(changes, named, tmp_path):
    with pytest.raises(ValueError, match=re.escape(named[0])) as error:
        load(write(tmp_path, **changes))
    for word in named:
        assert word in str(error.value)


def test_an_index_that_names_an_absent_file_is_refused_by_name(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003.safetensors does not exist.*index\.json"):
        load(tmp_path)


def test_an_index_that_misplaces_a_tensor_is_refused_by_name(tmp_path):
    weight_map = write_shards(tmp_path)
    weight_map["model.norm.weight"] = weight_map["model.layers.0.mlp.up_proj.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"of-00003.safetensors lacks tensor model\.norm\.weight"):
        load(tmp_path)


def test_a_torn_file_is_refused_by_name(tmp_path):
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize(("file", "named"), [("model.safetensors", "neither"), ("config.json", "config.json does not")])
def test_an_absent_file_is_refused_by_name(file, named, tmp_path):
    (write(tmp_path) / file).unlink()
    with pytest.raises(FileNotFoundError, match=named) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_unknown_model_type_is_refused_with_its_file(tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type='gemma' is unknown; known: qwen2"):
        load(tmp_path)


def test_a_folder_that_does_not_exist_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load(tmp_path / "absent")


def test_a_hub_name_that_cannot_be_had_is_refused_by_name(tmp_path):
    """In a process of its own, which is offline whatever this machine is."""
    program = "from oapl_jax.model import hf; hf.resolve('nobody/nothing')"
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, check=False)
    assert "FileNotFoundError: 'nobody/nothing' is no folder here" in result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
    (tmp_path / "source").mkdir()
    config, params = load(write(tmp_path / "source", name))
    saved = hf.save_folder(tmp_path / "saved", config, params)
    actual, expected = load_file(saved / "model.safetensors"), tiny.weights(name)
    assert actual.keys() == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_array_equal(actual[tensor], values, err_msg=tensor)
    again_config, again = load(saved)
    assert again_config == config
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(params))


def test_many_weights_go_to_several_files_with_an_index(tmp_path, monkeypatch):
    config, params = load(write(tmp_path))
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    saved = hf.save_folder(tmp_path / "saved", config, params, dtype=jnp.bfloat16)
    files = sorted(path.name for path in saved.glob("*.safetensors"))
    assert len(files) > 2
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert all((saved / file).stat().st_size < 22_000 for file in files)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * config.num_params
    again = load(saved, dtype=jnp.bfloat16)[1]
    np.testing.assert_array_equal(again.lm_head[...], params.lm_head[...].astype(jnp.bfloat16))


def test_saving_writes_the_tokenizer_and_its_stop_ids_and_replaces_what_was_there(tmp_path):
    config, params = load(write(tmp_path))
    for _ in range(2):
        saved = hf.save_folder(tmp_path / "saved", config, params, CharacterTokenizer())
        (saved / "left_from_before").touch()
    saved = hf.save_folder(tmp_path / "saved", config, params, CharacterTokenizer())
    names = {path.name for path in saved.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "character_tokenizer.json"}
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_save_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path):
    class Broken(CharacterTokenizer):
        def save(self, folder):
            raise OSError("disk full")

    config, params = load(write(tmp_path))
    saved = hf.save_folder(tmp_path / "saved", config, params)
    with pytest.raises(OSError, match="disk full"):
        hf.save_folder(saved, config, params, Broken())
    load(saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "saved"]


PEAK_PROGRAM = """
import pathlib, sys, threading, time
import jax, jax.numpy as jnp
from oapl_jax.distributed import sharding
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.model import hf, qwen

def megabytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

def watch():
    while True:
        peak[0] = max(peak[0], megabytes())
        time.sleep(0.001)

mesh, _ = sharding.make_meshes(MeshConfig(trainer="fsdp=4,tensor=2"))
jax.block_until_ready(jnp.ones(8))
base = megabytes()
peak = [base]
threading.Thread(target=watch, daemon=True).start()
config, params = hf.load_params(sys.argv[1], mesh, sharding.TRAINER_RULES, jnp.bfloat16)
jax.block_until_ready(params)
leaves = jax.tree.leaves(params)
print(peak[0] - base, sum(x.nbytes for x in leaves) / 2**20, max(x.nbytes for x in leaves) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_loading_holds_one_parameter_on_the_host_and_not_the_model(tmp_path):
    """On CPU devices the parameters themselves are host memory; beyond them about one is allowed."""
    config = tiny.config("qwen3_tied", num_hidden_layers=16, hidden_size=512, intermediate_size=1536, head_dim=128)
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(size=layout.hf_shape(shape)).astype(np.float32)
        for name, layout, shape, _ in hf._all_tensors(config, qwen.abstract(config)[1])
    }
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    result = subprocess.run(
        [sys.executable, "-c", PEAK_PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    peak, total, largest = map(float, result.stdout.split())
    assert total > 4 * largest
    assert peak < total + 2 * largest + 16  # MiB; a full host copy would be at least 2 * total


@pytest.mark.parametrize(
    "name",
    [
        name if name in (*NAMES, "llama_llama3") else pytest.param(name, marks=pytest.mark.slow)
        for name in tiny.HF_CONFIGS
    ],
)
def test_transformers_model_survives_the_way_to_ours_and_back(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = dict(tiny.HF_CONFIGS[name])
    torch.manual_seed(0)
    hf_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values, initializer_range=0.2)
    model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    token_ids = tiny.tokens(name)
    config, params = load(tmp_path / "theirs", "fsdp=2")
    with torch.no_grad():
        expected = model(torch.from_numpy(token_ids).long()).logits.numpy()
    np.testing.assert_allclose(tiny.logits(qwen.abstract(config)[0], params, token_ids), expected, rtol=0, atol=1e-4)
    hf.save_folder(tmp_path / "ours", config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.from_numpy(token_ids).long()).logits.numpy(), expected)

"""The plan of a run on given devices: what lies on each, and the programs that are compiled for them."""

import pathlib

import jax
import pytest

from oapl_jax.build import policy
from oapl_jax.build.sampler import kv_shards
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.model import flops
from oapl_jax.preflight import programs

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30
QWEN_05B = ROOT / "configs/models/qwen2.5_0.5b_instruct.json"
TOY = "configs/quickstart.yaml"


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def plan(*overrides, path=TOY, usable=16 * GIB):
    return programs.make_plan(config_file.load(TrainConfig, path, list(overrides)), jax.devices(), usable)


def test_memory_of_a_colocated_run():
    found = plan("mesh.trainer=fsdp=8", *MODEL)
    num_params = found.assembly.architecture.num_params
    assert num_params == 494_032_768
    # A few kv biases and norms are not divided.
    assert found.assembly.account.weights == pytest.approx(4 * num_params / 8, rel=1e-3)
    assert found.assembly.account.optimizer == pytest.approx(2 * found.assembly.account.weights, rel=1e-3)
    assert found.assembly.account.gradient == found.assembly.account.weights
    assert found.assembly.account.sampler_weights == 2 * num_params
    assert found.assembly.num_replicas == 8
    # Rows of one replica: 16 groups of 8 over 8 replicas, 1,024 tokens each; 2 kv heads of 64 in 24 layers.
    assert found.assembly.account.kv_cache == 16 * 1024 * 2 * 24 * 2 * 64 * 2
    assert programs.rollout_bytes(found.assembly) == 1024 * 2 * 24 * 2 * 64 * 2


def test_memory_of_a_sampler_of_its_own():
    found = plan("mesh.trainer=fsdp=4", "mesh.sampler=data=2,tensor=2", *MODEL)
    assert not found.assembly.account.is_colocated
    assert found.assembly.account.weights == pytest.approx(4 * found.assembly.architecture.num_params / 4, rel=1e-3)
    assert found.assembly.account.sampler_weights == pytest.approx(
        2 * found.assembly.architecture.num_params / 2, rel=1e-3
    )
    assert {program.name: program.beside for program in found.programs}["train_step"] == 0


@pytest.mark.parametrize(("tensor", "shards"), [(1, 1), (2, 2), (4, 1)])
def test_kv_heads_that_do_not_divide_are_on_every_device(tensor, shards):
    """Qwen2.5-0.5B has two."""
    mesh, _ = make_meshes(MeshConfig(trainer=f"tensor={tensor}"), jax.devices())
    assert kv_shards(policy.read_config(QWEN_05B), mesh) == shards


def test_what_cannot_fit_is_known_before_anything_is_compiled():
    found = plan("mesh.trainer=fsdp=1", *MODEL, usable=7 * GIB)
    # float32 weights, two moments and a gradient are 7.36 GiB on the one device.
    assert found.assembly.account.shortage(7 * GIB) > 0.36 * GIB
    assert not found.programs


def test_no_room_for_one_rollout():
    found = plan("mesh.trainer=fsdp=8", *MODEL).assembly
    memory, rollout = found.account, programs.rollout_bytes(found) / found.config.sampler.kv_memory
    least = memory.learner + memory.sampler - memory.kv_cache + rollout
    assert plan("mesh.trainer=fsdp=8", *MODEL, usable=least + rollout / 2).assembly.engines
    assert plan("mesh.trainer=fsdp=8", *MODEL, usable=least - rollout / 2).assembly.engines == ()


def test_the_programs_of_a_run():
    found = plan("model.scan_layers=true").programs
    assert [program.name for program in found] == ["train_step", "score", "prefill", "decode", "sync"]
    for program in found:
        program.lower()


def test_a_replica_may_be_compiled_for_other_devices():
    config = config_file.load(TrainConfig, TOY, ["mesh.trainer=data=4,tensor=1"])
    others = jax.devices()[5:6]
    found = programs.make_plan(config, jax.devices(), 16 * GIB, lambda num_devices: others[:num_devices])
    assert {program.name: list(program.mesh.devices.flat) for program in found.programs}["decode"] == others
    assert found.assembly.num_replicas == 4


@pytest.mark.slow
def test_abstract_programs_compile_as_they_are():
    """For CPU devices as for any: arguments have the bytes that the plan says."""
    found = plan("mesh.trainer=data=2,fsdp=4", "model.scan_layers=true")
    chosen = [program for program in found.programs if program.name in ("train_step", "sync")]
    compiled = {program.name: program.lower().compile().memory_analysis() for program in chosen}
    memory = found.assembly.account
    # Per device 16 rows of 18 tokens: two integers (positions are not read where a row is one rollout), a byte and a
    # float for each, and a float and a byte for the rollout.
    batch = 16 * (18 * (2 * 4 + 1 + 4) + 4 + 1)
    assert compiled["train_step"].argument_size_in_bytes == pytest.approx(memory.learner + batch, abs=256)
    assert compiled["train_step"].alias_size_in_bytes == pytest.approx(memory.learner, abs=256)
    assert compiled["sync"].argument_size_in_bytes == memory.weights
    assert compiled["sync"].output_size_in_bytes == pytest.approx(memory.sampler_weights, rel=0.01)


def test_forward_flops_by_hand():
    model = policy.read_config(QWEN_05B)
    D, F, L, V, H, K, C = 896, 4864, 24, 151_936, 14, 2, 64
    layer = D * (H + 2 * K) * C + H * C * D + 3 * D * F
    whole, attention = flops.forward_flops(model, tokens=100, pairs=5050, scored=100)
    assert attention == 2 * 2 * L * H * C * 5050
    # Norms and biases, which the count of weights includes, are 0.01 % of them.
    assert whole == pytest.approx(2 * 100 * (L * layer + V * D) + attention, rel=3e-4)


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        # As the files of published weights have them, tied embeddings once.
        ("qwen2.5_0.5b_instruct", 494_032_768),
        ("qwen2.5_1.5b_instruct", 1_543_714_304),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_30b_a3b", 30_532_122_624),
        ("deepseek_r1_distill_qwen_14b", 14_770_033_664),
    ],
)
def test_parameters_of_the_known_models(name, num_params):
    assert policy.read_config(programs.MODELS / f"{name}.json").num_params == num_params


def test_a_token_costs_the_experts_that_it_goes_to():
    """Qwen3-30B-A3B is published as 3.3B active parameters, embeddings included."""
    model = policy.read_config(programs.MODELS / "qwen3_30b_a3b.json")
    in_products = flops.forward_flops(model, tokens=1, pairs=0, scored=1)[0] / 2
    assert in_products + model.vocab_size * model.hidden_size == pytest.approx(3.35e9, rel=0.01)


@pytest.mark.parametrize("name", ["math_qwen3_4b", "math_r1_distill_14b", "math_qwen2.5_0.5b"])
def test_the_large_configs_have_all_programs(name):
    found = plan("mesh.trainer=fsdp=4,tensor=2", path=f"configs/{name}.yaml", usable=95 * GIB)
    assert len(found.programs) == 5
    assert found.assembly.engines[0].num_pages >= found.assembly.engines[0].max_pages


def test_a_model_of_the_hub_is_found_among_the_known_ones():
    found = plan("mesh.trainer=fsdp=8", "model.path=Qwen/Qwen2.5-0.5B-Instruct", "model.warm_start=null", *SHORT)
    assert found.source == "configs/models/qwen2.5_0.5b_instruct.json"
    assert found.assembly.architecture == policy.read_config(QWEN_05B)


def test_a_model_of_the_hub_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"configs/models/gpt_9\.json.*qwen3_4b.*model\.config=FILE"):
        plan("model.path=openai/GPT-9", "model.warm_start=null", "model.tokenizer=model")


SHORT = (
    "model.tokenizer=model",
    "sampler.dtype=bfloat16",
    "data.max_prompt_tokens=256",
    "sampler.max_response_tokens=768",
)
MODEL = ("model.warm_start=null", f"model.config={QWEN_05B}", "model.tokenizer=characters", *SHORT[1:])

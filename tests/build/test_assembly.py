"""A run, its dry run and preflight build the same thing; the cache finds what the learner leaves."""

import pathlib

import jax
import pytest

from oapl_jax import train
from oapl_jax.build import peak
from oapl_jax.build.account import size
from oapl_jax.build.assembly import evaluates_within_windows, make_assembly
from oapl_jax.build.checks import CHECKS
from oapl_jax.build.policy import read_config
from oapl_jax.build.sampler import NoRoomError, make_engines
from oapl_jax.config import config_file
from oapl_jax.config.commands import EvaluateConfig, TrainConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed import memory
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.model import lora
from oapl_jax.preflight import programs
from oapl_jax.run import start

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30
USABLE = 15 * GIB // 2
QWEN_05B = ROOT / "configs/models/qwen2.5_0.5b_instruct.json"
OVERRIDES = (
    "model.warm_start=null",
    f"model.config={QWEN_05B}",
    "model.tokenizer=characters",
    "data.max_prompt_tokens=1024",
    "sampler.max_response_tokens=7168",
    "sampler.groups_in_flight=64",
    "mesh.trainer=fsdp=8",
)


def load(*overrides):
    return config_file.load(TrainConfig, ROOT / "configs/quickstart.yaml", [*OVERRIDES, *overrides], CHECKS)


def pages(assembly):
    return [engine.num_pages for engine in assembly.engines]


def test_run_dry_run_and_preflight_agree(monkeypatch):
    """On the pages of the cache, and on what lies beside the train step."""
    monkeypatch.setattr(memory, "_host_bytes", lambda: 8 * USABLE)  # eight devices share the host
    run, _ = start.load(load())
    plan = programs.make_plan(load(), jax.devices(), USABLE)
    assert set(pages(run)) == set(pages(plan.assembly))
    assert run.account == plan.assembly.account
    beside = {program.name: program.beside for program in plan.programs}
    assert beside["train_step"] == run.account.beside_train_step
    text = next(train.describe(load()))
    assert f"{run.engines[0].num_pages:,} pages" in text
    for line in run.account.describe().values():
        assert line in text
    assert pages(run)[0] < 64 * 8 // 8 * 512, "the memory decides, or the test says nothing"


def test_a_dry_run_compiles_nothing_for_devices_that_are_too_small(monkeypatch):
    monkeypatch.setattr(memory, "_host_bytes", lambda: 8 * USABLE)
    monkeypatch.setattr(memory, "usable_bytes", lambda mesh: 2**20)
    monkeypatch.setattr(peak, "expected_peak", None)
    _, text = train.describe(load())
    assert "before a program runs, so none is compiled" in text


def test_the_cache_is_sized_by_what_weights_moments_and_copies_leave():
    """On a mesh that trainer and sampler share, the moments are subtracted although they do not exist yet."""
    architecture = read_config(QWEN_05B)
    assembly = make_assembly(load(), architecture, architecture.vocab_size, (0,), devices=jax.devices(), usable=USABLE)
    account, engine = assembly.account, assembly.engines[0]
    assert account.optimizer == pytest.approx(2 * account.weights, rel=1e-3)
    left = USABLE - account.learner - account.sampler_weights - account.prepared_weights - account.evaluation_weights
    config = assembly.config
    assert account.kv_cache <= config.sampler.kv_memory * left
    assert account.kv_cache > config.sampler.kv_memory * left - 2 * engine.cache_bytes / engine.num_pages
    apart = make_assembly(
        load("mesh.trainer=fsdp=4", "mesh.sampler=data=4"),
        architecture,
        architecture.vocab_size,
        (0,),
        devices=jax.devices(),
        usable=USABLE,
    )
    assert apart.engines[0].num_pages > engine.num_pages
    assert apart.account.beside_train_step == 0


def test_a_second_policy_is_counted_where_an_evaluation_falls_within_a_window():
    assert evaluates_within_windows(load("window.sync_every=50", "evaluation.every=25"))
    assert not evaluates_within_windows(load("window.sync_every=50", "evaluation.every=100"))
    assert not evaluates_within_windows(load("evaluation.every=0"))
    architecture = read_config(QWEN_05B)
    for every, copies in ((25, 1), (100, 0)):
        config = load("window.sync_every=50", f"evaluation.every={every}")
        account = make_assembly(
            config, architecture, architecture.vocab_size, (0,), devices=jax.devices(), usable=USABLE
        ).account
        assert account.evaluation_weights == copies * account.sampler_weights


def test_a_reference_is_counted_where_it_is_a_copy():
    """And the cache has that much less room; adapters have it in their base."""
    architecture = read_config(QWEN_05B)

    def account(*overrides):
        sizes = architecture, architecture.vocab_size, (0,)
        return make_assembly(load(*overrides), *sizes, devices=jax.devices(), usable=USABLE).account

    without, copied = account(), account("objective.kl_weight=0.1")
    assert without.reference == 0
    assert copied.reference == copied.weights == without.weights
    assert copied.beside_train_step == copied.reference + copied.sampler
    assert without.kv_cache - copied.kv_cache == pytest.approx(load().sampler.kv_memory * copied.reference, rel=0.01)
    assert f"reference {size(copied.reference)}" in copied.describe()["trainer"]
    assert account("objective.kl_weight=0.1", "lora.rank=4").reference == 0


def test_published_adapters_take_no_more_of_the_disk_than_adapters():
    architecture = read_config(QWEN_05B)
    for publish in ("model", "adapters"):
        config = load("mode=detached", "lora.rank=8", f"window.publish={publish}", "checkpoint.keep_policies=4")
        assembly = make_assembly(
            config, architecture, architecture.vocab_size, (0,), devices=jax.devices(), usable=USABLE
        )
        published = assembly.sampler_shapes if publish == "model" else lora.trained(assembly.learner.shapes.params)
        num_bytes = 5 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(published))
        assert f"published policies {size(num_bytes)}" in assembly.describe()["disk"]


def test_no_room_for_one_rollout_is_an_error_that_says_what_to_do():
    architecture = read_config(QWEN_05B)
    with pytest.raises(NoRoomError, match=r"no room for one rollout: 1024 \+ 7168 tokens .*sampler\.kv_memory"):
        make_assembly(load(), architecture, architecture.vocab_size, (0,), devices=jax.devices(), usable=2 * GIB)


@pytest.mark.parametrize("longest", [60, 3700])
def test_one_long_prompt_does_not_make_the_cache_long_for_every_row(longest):
    architecture, (mesh, _) = read_config(QWEN_05B), make_meshes(MeshConfig(trainer="tensor=1"))
    sections = {"run": {"dir": "r"}, "model": {"path": "m"}, "benchmarks": {"names": ["mbpp"]}}
    sections["sampler"] = {"rows": 8, "max_response_tokens": 100, "dtype": "float32"}
    config = EvaluateConfig.model_validate(sections)
    common = {"vocab_size": 10, "stop_ids": (0,), "max_prompt_tokens": longest, "free": 64 * GIB}
    (engine,) = make_engines(config, architecture, mesh, **common, prompt_lengths=[50] * 500 + [longest])
    (unaware,) = make_engines(config, architecture, mesh, **common)
    pages_of_response = 100 // 16 + 2
    assert unaware.num_pages == 8 * unaware.max_pages
    if longest == 60:
        assert engine.num_pages == unaware.num_pages
    else:
        assert engine.num_pages == 3700 // 16 + 15 * (50 // 16) + 16 * pages_of_response
        assert engine.num_pages < unaware.num_pages / 4

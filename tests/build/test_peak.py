"""The peak that a dry run names, and what is in it."""

import dataclasses
import pathlib

import jax
import pytest

from oapl_jax.build.assembly import make_assembly
from oapl_jax.build.checks import CHECKS
from oapl_jax.build.peak import Peak, expected_peak
from oapl_jax.build.policy import read_config
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.sampler.sampler import programs_take_turns

ROOT = pathlib.Path(__file__).parents[2]
TOY = ROOT / "configs/toy_qwen3.json"
OVERRIDES = (
    "model.warm_start=null",
    f"model.config={TOY}",
    "model.tokenizer=characters",
    "run.steps=2",
    "window.sync_every=1",
    "learner.batch_rollouts=16",
    "sampler.groups_in_flight=2",
    "evaluation.prompts=4",
)
LARGE = read_config(ROOT / "configs/models/qwen2.5_0.5b_instruct.json")


def assembly_of(*overrides):
    config = config_file.load(TrainConfig, ROOT / "configs/quickstart.yaml", [*OVERRIDES, *overrides], CHECKS)
    architecture = read_config(TOY)
    return make_assembly(config, architecture, 18, (1,), devices=jax.devices(), usable=2**30)


@pytest.mark.slow
def test_the_temporaries_are_those_of_the_programs_that_a_run_compiles():
    assembly = assembly_of("mesh.trainer=fsdp=1")
    peak, learner, engine = expected_peak(assembly), assembly.learner, assembly.engines[0]
    compiled = learner.train_step.lower(learner.shapes, learner.largest_batch()).compile().memory_analysis()
    results = compiled.output_size_in_bytes - compiled.alias_size_in_bytes
    assert peak.train_step == compiled.temp_size_in_bytes + results
    assert peak.train_step > assembly.account.gradient
    weights = assembly.sampler_shapes
    assert peak.sampler > 0
    decode = engine.lower_generate(weights).compile().memory_analysis()
    assert peak.sampler >= decode.temp_size_in_bytes
    assert peak.process is not None
    assert peak.total == peak.process + peak.trainer_device


@pytest.mark.parametrize(
    ("is_colocated", "takes_turns", "trainer", "sampler"),
    [
        pytest.param(True, True, 300 + 770 + 500, None, id="one program at a time"),
        pytest.param(True, False, 300 + 770 + 500 + 90, None, id="at the same time"),
        pytest.param(False, True, 300 + 500, 770 + 400, id="devices of their own: the sync is the sampler's peak"),
    ],
)
def test_what_lies_on_a_device_at_once(is_colocated, takes_turns, trainer, sampler):
    account = assembly_of("mesh.trainer=fsdp=1").account
    account = dataclasses.replace(
        account,
        weights=100,
        optimizer=200,
        gradient=100,
        sampler_weights=400,
        prepared_weights=40,
        evaluation_weights=0,
        kv_cache=330,
        is_colocated=is_colocated,
    )
    peak = Peak(account, 500, 90, takes_turns, 1, 0 if is_colocated else 2, process=7)
    assert peak.trainer_device == trainer
    assert peak.total == 7 + trainer + 2 * (sampler or 0) * (not is_colocated)
    if sampler is not None:
        assert peak.sampler_device == sampler
    at_sync = dataclasses.replace(peak, train_step=0)
    assert at_sync.trainer_device == (1070 + 400 + 90 * (not takes_turns) if is_colocated else 300)


def test_programs_of_a_large_model_take_turns_on_one_cpu():
    one, eight = (make_meshes(MeshConfig(trainer=f"fsdp={size}"))[0] for size in (1, 8))
    assert [programs_take_turns(model, one) for model in (read_config(TOY), LARGE)] == [False, True]
    assert programs_take_turns(read_config(TOY), eight), "collectives in one order"

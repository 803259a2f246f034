"""Detached runs with the real vLLM, whose interpreter OAPL_JAX_VLLM names; without it these tests skip."""

import json
import os
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from oapl_jax import train
from oapl_jax.build.sampler import make_sampler
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.data import tokenizer as tokenizers
from oapl_jax.distributed.sharding import SAMPLER_RULES, make_meshes
from oapl_jax.model import hf
from oapl_jax.rollouts.audit import audit
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Request, SamplingDistribution, run
from oapl_jax.rollouts.schema import ENGINE_KEY
from oapl_jax.sampler.engine_process import make_vllm
from runs import finish, make_config, read_lines, start_sampler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("OAPL_JAX_VLLM" not in os.environ, reason="OAPL_JAX_VLLM names no interpreter that has vLLM"),
]
OPTIONS = {"enforce_eager": True, "max_num_seqs": 32}
LORA = {"lora": {"rank": 4, "alpha": 8.0}, "window": {"sync_every": 2, "shard_groups": 2, "publish": "adapters"}}


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.mark.parametrize(
    "sections", [{"window": {"sync_every": 2, "shard_groups": 2}}, LORA], ids=["model", "adapters"]
)
def test_vllm_agrees_with_the_learner_after_each_sync_and_answers_as_the_exported_model(sections, tmp_path):
    directory = tmp_path / "run"
    evaluation = {"every": 0, "prompts": 1}
    config = make_config(directory, mode="detached", run={"steps": 6}, evaluation=evaluation, **sections)
    words = [f"{name}={json.dumps(value)}" for name, value in OPTIONS.items()]
    sampler = start_sampler(directory, "--engine", "vllm", *words)
    try:
        train.run(config)
        code, output = finish(sampler)
    finally:
        sampler.kill()
    assert code == 0, output
    assert audit(directory).startswith("6 steps, 3 windows, 24 groups")
    rows = read_lines(directory / "metrics.jsonl")[1:]
    apart = [row["learner/log_ratio_abs"] for row in rows if row["window/lag"] == 0]
    assert len(apart) == 3
    assert max(apart) < 1e-4, "nats a response"
    log = RolloutLog(directory / "rollouts")
    facts = [json.loads(pq.read_schema(str(log.path(i, 0))).metadata[ENGINE_KEY]) for i in range(3)]
    assert {each["engine"] for each in facts} == {"vllm"}
    assert len({each["probe"]["mean_logprob"] for each in facts}) == 3
    assert facts[2]["loaded"] == "in place"
    assert greedy_vllm(config, directory / "export", tmp_path) == greedy_jax(config, directory / "export")


def requests(config):
    prompts = np.random.default_rng(0).integers(2, 18, (6, 8), dtype=np.int32)
    greedy = SamplingDistribution(temperature=0.0)
    return [Request(i, prompt, 1, (0, 0, i), greedy, needs_logprobs=False) for i, prompt in enumerate(prompts)]


def greedy_vllm(config, folder: pathlib.Path, tmp_path):
    tokenizer = tokenizers.load(config.model.tokenizer, folder, {})
    sampler, _ = make_vllm(config, tokenizer, **OPTIONS)
    (tmp_path / "000000").symlink_to(folder)
    try:
        sampler.set_weights(tmp_path / "000000")
        return {tag: rollouts[0].token_ids.tolist() for tag, rollouts in run(sampler, requests(config))}
    finally:
        sampler.release()


def greedy_jax(config, folder):
    mesh = make_meshes(MeshConfig(trainer="fsdp=1"))[0]
    tokenizer = tokenizers.load(config.model.tokenizer, folder, {})
    sampler = make_sampler(config, hf.load_config(folder), mesh, tokenizer, config.data.max_prompt_tokens)
    sampler.set_weights(hf.load_params(folder, mesh, SAMPLER_RULES, "float32")[1])
    return {tag: rollouts[0].token_ids.tolist() for tag, rollouts in run(sampler, requests(config))}

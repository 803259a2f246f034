"""The real vLLM as a sampler. The interpreter that has it is named by OAPL_JAX_VLLM; without it these tests skip."""

import os

import jax
import numpy as np
import pytest

from model import tiny
from oapl_jax.model import hf
from oapl_jax.rollouts.sampling import Request, SamplingDistribution, run
from oapl_jax.sampler import engine_process
from oapl_jax.types import FinishReason
from test_torch_generate import LIMIT, PROMPTS, STOP, VOCABULARY, Letters, distribution_of
from train.runs import make_config

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("OAPL_JAX_VLLM" not in os.environ, reason="OAPL_JAX_VLLM names no interpreter that has vLLM"),
]
# vLLM's attention on CPUs has no smaller heads. The embedding has 48 rows, of which the tokenizer knows 40.
CONFIGS = {name: tiny.config(name, head_dim=32) for name in ("llama_tied", "qwen3_wide_heads")}


@pytest.fixture(scope="module", params=CONFIGS)
def policies(request, tmp_path_factory):
    """Three versions of a model, each with other weights than the one before."""
    config, root = CONFIGS[request.param], tmp_path_factory.mktemp("policy")
    graphdef, params = tiny.split(config)
    versions = [jax.tree.map(lambda x, scale=scale: scale * x, params) for scale in (1.0, 1.2, 0.9)]
    folders = [hf.save_folder(root / f"{i:06d}", config, each) for i, each in enumerate(versions)]
    return graphdef, versions, folders


def test_vllm_samples_each_version_with_the_logprobs_of_the_distribution_that_it_draws_from(policies, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    graphdef, versions, folders = policies
    sections = {"max_response_tokens": LIMIT, "groups_in_flight": 4, "group_size": 8}
    config = make_config("unused", mode="detached", sampler=sections)
    sampler, _ = engine_process.make_vllm(config, Letters(), enforce_eager=True, max_num_seqs=32)
    distributions = [
        SamplingDistribution(),
        SamplingDistribution(0.7),
        SamplingDistribution(1.0, 5),
        SamplingDistribution(1.3, 0, 0.8),
        SamplingDistribution(2.0),
    ]
    try:
        for version, params in enumerate(versions):
            sampler.set_weights(folders[version])
            for distribution in distributions:
                requests = [Request(i, prompt, 8, (0, 0, i), distribution) for i, prompt in enumerate(PROMPTS)]
                rollouts = [(PROMPTS[i], each) for i, group in run(sampler, requests) for each in group]
                assert len({rollout.token_ids.tobytes() for _, rollout in rollouts}) > 8, "rollouts differ"
                for prompt, rollout in rollouts:
                    assert_is_drawn(graphdef, params, prompt, rollout, distribution)
        assert sampler.facts[2]["loaded"] == "in place"
        assert sampler.facts[2]["settings"]["logprobs_mode"] == "processed_logprobs"
    finally:
        sampler.release()


def assert_is_drawn(graphdef, params, prompt, rollout, distribution):
    tokens = np.concatenate([prompt, rollout.token_ids])
    logits = np.asarray(tiny.logits(graphdef, params, tokens[None]))[0, len(prompt) - 1 : -1, :VOCABULARY]
    expected = distribution_of(logits, distribution)[np.arange(len(rollout.token_ids)), rollout.token_ids]
    np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)
    assert STOP not in rollout.token_ids[:-1]
    is_stop = rollout.token_ids[-1] == STOP
    assert rollout.finish_reason == (FinishReason.STOP if is_stop else FinishReason.LENGTH)
    assert is_stop or len(rollout.token_ids) == LIMIT

"""oapl-jax import-rollouts reads its config as a run does."""

import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

from oapl_jax.cli import commands
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import FinishReason

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TOKENIZER = CharacterTokenizer()
OFFLINE = f"""
mode: offline
run: {{dir: unused, steps: 1}}
model: {{config: {CONFIGS}/toy_qwen3.json, tokenizer: characters}}
data: {{task: chain, max_prompt_tokens: 12}}
sampler: {{group_size: 2, max_response_tokens: 6}}
learner: {{batch_rollouts: 2}}
offline: {{rounds: [{{log: unused}}], source_limit: 4}}
"""


def import_rollouts(source, out, config):
    assert commands.main(["import-rollouts", str(source), str(out), "--config", str(config)]) == 0
    (group,) = RolloutLog(out).read(0)
    return group.rollouts


def test_a_config_with_a_warm_start_names_its_tokenizer(tmp_path):
    ids = [*TOKENIZER.encode("9"), TOKENIZER.eos_id]
    row = {"prompt_token_ids": TOKENIZER.encode("4+5="), "token_ids": ids, "logprobs": [-0.5] * 2}
    source = tmp_path / "in.jsonl"
    source.write_text((json.dumps(row | {"finish_reason": "stop", "reward": 1.0}) + "\n") * 2)
    assert len(import_rollouts(source, tmp_path / "out", CONFIGS / "quickstart.yaml")) == 2


def test_responses_that_reach_the_limit_of_their_source_are_truncated(tmp_path):
    config, source = tmp_path / "c.yaml", tmp_path / "in.parquet"
    config.write_text(OFFLINE)
    responses = [[*TOKENIZER.encode("9"), TOKENIZER.eos_id], TOKENIZER.encode("1111")]
    rows = [
        {
            "prompt": [{"role": "user", "content": "4+5="}],
            "response": TOKENIZER.decode(ids),
            "precomputed_reward": reward,
            "response_rewards": [1.0, 0.0],
            "reward_model": {"ground_truth": "9"},
            "response_token_ids": ids,
            "response_logprobs": [-0.5] * len(ids),
        }
        for ids, reward in zip(responses, (1.0, 0.0), strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), source)
    short, long = import_rollouts(source, tmp_path / "out", config)
    assert short.rollout.finish_reason is FinishReason.STOP
    assert long.rollout.finish_reason is FinishReason.LENGTH

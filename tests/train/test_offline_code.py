"""From Project CodeNet's layout to a trained model, without a sampler: the second paper's pipeline."""

import json
import runpy

import numpy as np
import pytest

import runs
from oapl_jax import train
from oapl_jax.cli import codenet as command
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.data import codenet
from oapl_jax.data import tokenizer as tokenizers
from oapl_jax.io.metrics import read_metrics
from oapl_jax.rollouts.log import RolloutLog

VOCABULARY = 258
TOY = json.loads((runs.ROOT / "configs/toy_qwen3.json").read_text())


def make_tokenizer(folder):
    """A token a byte, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|end|>", "<|pad|>", *characters]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=names[0], pad_token=names[1]).save_pretrained(folder)
    return tokenizers.load(str(folder))


@pytest.mark.slow
def test_people_s_programs_train_a_model_and_nothing_is_scored(tmp_path):
    root = tmp_path / "Project_CodeNet"
    corpus = runpy.run_path(str(runs.ROOT / "benchmarks/codenet_toy.py"))
    corpus["write_corpus"](root, corpus["NUMBERS"][:4], most=60)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.decode(tokenizer.encode("print(n*3)\n")) == "print(n*3)\n"
    command.write(root, tmp_path / "log", tokenizer, codenet.Rules(max_tokens=96))
    (tmp_path / "model.json").write_text(
        json.dumps(TOY | {"vocab_size": VOCABULARY, "eos_token_id": 0, "max_position_embeddings": 256})
    )
    config = {
        "mode": "offline",
        "run": {"dir": str(tmp_path / "run"), "steps": 3},
        "model": {"config": str(tmp_path / "model.json"), "tokenizer": str(tmp_path / "tokenizer")},
        "data": {"task": "chain", "max_prompt_tokens": 160},
        "sampler": {"group_size": 4, "max_response_tokens": 96, "groups_in_flight": 2, "dtype": "float32"},
        "objective": {"name": "rloo"},
        "learner": {"batch_rollouts": 8, "learning_rate": 1e-3, "clip_norm": 1.0},
        "offline": {"rounds": [{"log": str(tmp_path / "log")}], "reward_range": [-1.0, 1.0]},
        "mesh": {"trainer": "fsdp=1"},
        "checkpoint": {"every": 10},
        "evaluation": {"prompts": 0},
        "logging": {"progress": False},
    }
    train.run(config_file.validate(TrainConfig, config, source="tests"))
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"] > 0]
    assert len(lines) == 3
    assert all(np.isfinite(line["learner/loss"]) and line["learner/grad_norm"] > 0 for line in lines)
    for group in RolloutLog(tmp_path / "run" / "rollouts").read(0):
        rewards = np.array([item.grade.reward for item in group.rollouts])
        others = (rewards.sum() - rewards) / 3
        np.testing.assert_allclose([item.advantage for item in group.rollouts], rewards - others, atol=1e-12)

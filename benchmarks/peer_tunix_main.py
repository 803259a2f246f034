"""google-tunix's GRPOLearner on the job of ``benchmarks/main_job.py``, which starts this with tunix's own Python.

    python benchmarks/peer_tunix_main.py JOB.json REPORT.json

It loads Qwen2 models from a folder; SmolLM2-135M is one with biases of zero. It knows no stop strings: a response ends
at the tokens in which the string is whole. It gives the reward function the text before that token, and does not
train on the token.
"""

import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from main_job import cpu_seconds, figures
from transformers import AutoTokenizer
from tunix.models.qwen2 import params
from tunix.models.qwen2.model import ModelConfig
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from oapl_jax.rewards.toy import TOY_GRADERS
from sampler import versions

SETTINGS: dict[str, Any] = {"micro_batch_groups": 1}
"""``micro_batch_groups``: groups that are trained on at once."""


class Learner(GRPOLearner):
    """Notes what is asked of each step."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.rewards: list[float] = []
        """Of the rollouts of the step in progress."""
        self.steps: list[tuple[float, float]] = []

    def _run_global_step(self, *arguments: Any) -> None:
        super()._run_global_step(*arguments)
        jax.block_until_ready(jax.live_arrays())
        self.steps.append((cpu_seconds(), sum(self.rewards) / len(self.rewards)))
        self.rewards.clear()
        print(f"step {len(self.steps)}: {self.steps[-1]}", flush=True)


def main(source: str, target: str) -> None:
    job = json.loads(pathlib.Path(source).read_text())
    settings = {**SETTINGS, **job["settings"]}
    folder = pathlib.Path(job["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    stops = [i for i in range(len(tokenizer)) if job["stop"] in tokenizer.decode([i])]
    for prompt in job["prompts"]:
        assert tokenizer.encode(prompt["text"]) == prompt["token_ids"], prompt["text"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    dtype = jnp.dtype(job["dtype"])
    model = params.create_model_from_safe_tensors(str(folder), read_config(folder, dtype), mesh, dtype=dtype)
    grade, limit = TOY_GRADERS[job["task"]], job["max_response_tokens"]
    longest = max(len(prompt["token_ids"]) for prompt in job["prompts"])
    optimizer = job["optimizer"]
    training = RLTrainingConfig(
        actor_optimizer=optax.chain(
            optax.clip_by_global_norm(optimizer["max_grad_norm"]),
            optax.adamw(
                optimizer["learning_rate"],
                optimizer["adam_beta1"],
                optimizer["adam_beta2"],
                weight_decay=optimizer["weight_decay"],
            ),
        ),
        eval_every_n_steps=1_000_000,
        max_steps=job["steps"],
        mini_batch_size=job["groups"],
        train_micro_batch_size=settings["micro_batch_groups"],
        rollout_micro_batch_size=job["groups"],
        compute_logps_micro_batch_size=job["groups"],
    )
    rollouts = RolloutConfig(
        max_tokens_to_generate=limit,
        temperature=job["temperature"],
        top_p=1.0,
        max_prompt_length=longest,
        kv_cache_size=longest + limit + 8,
        eos_tokens=[tokenizer.eos_token_id, *stops],
        data_type=dtype,
        seed=job["seed"],
    )
    roles = dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh)
    cluster = RLCluster(
        actor=model,
        tokenizer=tokenizer,
        cluster_config=ClusterConfig(role_to_mesh=roles, training_config=training, rollout_config=rollouts),
    )

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        rewards = [
            float(len(tokenizer.encode(text)) < limit and grade(prompt, text))
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        learner.rewards += rewards
        return rewards

    learner = Learner(cluster, GRPOConfig(num_generations=job["group_size"], beta=0.0), reward)
    groups = job["groups"]
    texts = [prompt["text"] for prompt in job["prompts"]]
    with mesh:
        learner.train([{"prompts": texts[i : i + groups]} for i in range(0, len(texts), groups)])
    report = figures(learner.steps, job["first_steps"], groups * job["group_size"])
    report |= {"settings": settings, "versions": versions("google-tunix", "jax", "jaxlib", "flax")}
    pathlib.Path(target).write_text(json.dumps(report))


def read_config(folder: pathlib.Path, dtype: Any) -> ModelConfig:
    """Tunix's config of the model in a folder.

    Raises:
        SystemExit: the model is of another kind.
    """
    raw = json.loads((folder / "config.json").read_text())
    if raw["model_type"] != "qwen2":
        raise SystemExit(f"tunix: {folder} is of type {raw['model_type']}; only qwen2 is loaded here")
    return ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["hidden_size"] // raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=raw.get("rope_theta") or raw["rope_parameters"]["rope_theta"],
        norm_eps=raw["rms_norm_eps"],
        use_tied_embedding=raw["tie_word_embeddings"],
        dtype=dtype,
        param_dtype=dtype,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

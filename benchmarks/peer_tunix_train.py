"""google-tunix's train step as a contender of ``benchmarks/train_step.py``, which starts this with tunix's own Python.

One call is one step of its own RL trainer: its GRPO loss without a reference model, backward pass, AdamW update.
"""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from peer_tunix import VOCAB, make_model
from train_step import make_lengths
from tunix.rl import (
    algo_core,  # noqa: F401 - registers the losses
    common,
    function_registry,
)
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig

from sampler import Report, serve, versions


def tunix(workload: str):
    """Returns the step that is timed."""
    trainer = make_trainer()
    example = make_example(workload)
    step, _ = trainer.jit_train_and_eval_step(False, True)
    takes_flag = "is_update_step" in inspect.signature(trainer._train_step).parameters
    options = {"is_update_step": jnp.array(True)} if takes_flag else {}
    temporaries = temporary_bytes(trainer, example, options) / 2**20

    def run(_: int) -> Report:
        loss = float(jax.block_until_ready(step(example, **options))[0])
        assert math.isfinite(loss)
        return {"temp_mib": temporaries, "loss": loss}

    return run


def make_trainer() -> Trainer:
    """AdamW and the GRPO loss as the library registers it."""
    config = GRPOConfig(num_generations=8, beta=0.0)
    config.temperature = 1.0  # its GRPO learner copies it from the config of its rollouts
    loss = function_registry.get_policy_loss_fn("grpo")
    trainer = Trainer(
        make_model(),
        optax.adamw(1e-6),
        TrainingConfig(eval_every_n_steps=1_000_000),
        custom_checkpoint_metadata_fn=dict,
    )
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=algo_config, pad_id=VOCAB, eos_id=VOCAB
        ),
        has_aux=True,
    )
    return trainer.with_gen_model_input_fn(lambda example: {"train_example": example, "algo_config": config})


def make_example(workload: str) -> common.TrainExample:
    """The rollouts of ``ours``."""
    (prompt_length, response_length), num_rollouts = make_lengths(workload)[0], len(make_lengths(workload))
    rng = np.random.default_rng(1)
    prompt, response = (
        jnp.asarray(rng.integers(0, VOCAB, (num_rollouts, length)), jnp.int32)
        for length in (prompt_length, response_length)
    )
    return common.TrainExample(
        prompt_ids=prompt,
        prompt_mask=jnp.ones_like(prompt),
        completion_ids=response,
        completion_mask=jnp.ones_like(response),
        advantages=jnp.asarray(rng.normal(size=num_rollouts), jnp.float32),
        ref_per_token_logps=None,
        old_per_token_logps=jnp.asarray(rng.normal(-10.0, 0.3, response.shape), jnp.float32),
    )


def temporary_bytes(trainer: Trainer, example: common.TrainExample, options: dict) -> int:
    """What XLA needs beside arguments and results, from compiling the step once more."""
    donated = ("optimizer", "grad_accumulator") if options else ("optimizer",)
    state = [trainer.model, trainer.optimizer, *([trainer.grad_accumulator] if options else [])]
    lowered = nnx.jit(trainer._train_step, donate_argnames=donated).lower(*state, example, **options)
    return lowered.compile().memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    serve(tunix, "step", versions("google-tunix", "jax", "jaxlib", "flax", "numpy"))

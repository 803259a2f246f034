"""The train step: log-probabilities, loss, gradient, update, in one program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from oapl_jax.config import ObjectiveConfig
from oapl_jax.learner.state import TrainState
from oapl_jax.model.logprob import sequence_logprobs
from oapl_jax.objectives import grpo, oapl, sft
from oapl_jax.types import TrainBatch

LossFn = Callable[[Float[Array, "B T"], TrainBatch, Float[Array, ""]], Float[Array, "B"]]
"""Log-probabilities, rows and the mean response tokens of a row of the whole batch, to the loss of each row."""


def make_loss_fn(config: ObjectiveConfig) -> LossFn:
    """The objective of an online run as a function of the learner's log-probabilities."""
    if config.name == "grpo":
        return lambda logprobs, batch, _: grpo.sequence_losses(
            logprobs, batch.sampler_logprobs, batch.response_mask, batch.advantages
        )
    return lambda logprobs, batch, _: oapl.sequence_losses(
        logprobs, batch.sampler_logprobs, batch.response_mask, batch.advantages, beta2=config.beta2
    )


def sft_loss_fn(logprobs: Float[Array, "B T"], rows: TrainBatch, tokens_per_row: Float[Array, ""]) -> Float[Array, "B"]:
    """Negative log-likelihood of each row, scaled so that the mean over rows is the mean over tokens."""
    return sft.sequence_losses(logprobs, rows.response_mask) / tokens_per_row


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss_fn: LossFn,
    *,
    beta2: float,
    temperature: float,
    vocab_size: int,
    num_micro_batches: int,
    mesh: Mesh,
    shardings: TrainState,
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, dict[str, Array]]]:
    """Compiles ``(state, batch) -> (state, metrics)``; the state is donated.

    The batch is split by rows into micro-batches whose gradients are summed; each row weighs
    1 / (rows that count), so the result does not depend on the split.

    Args:
        graphdef: structure half of ``nnx.split(Qwen(...))``.
        optimizer: see ``make_optimizer``.
        schedule: its learning rate, for the metrics.
        loss_fn: loss of each row.
        beta2: weight of the log-ratio in the residual that the metrics report.
        temperature: of the policy; the sampler's.
        vocab_size: ids from here on are never drawn and have no probability.
        num_micro_batches: must divide the rows of a batch.
        mesh: the trainer's.
        shardings: of the state.
    """

    def micro_loss(
        params: Any, rows: TrainBatch, num_rows: Float[Array, ""], tokens_per_row: Float[Array, ""]
    ) -> tuple[Array, dict[str, Array]]:
        logprobs, entropy = sequence_logprobs(
            graphdef, params, rows.tokens, rows.response_mask, temperature=temperature, vocab_size=vocab_size
        )
        losses = jnp.where(rows.row_mask, loss_fn(logprobs, rows, tokens_per_row), 0.0)
        return losses.sum() / num_rows, _row_sums(logprobs, entropy, rows, beta2)

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, Array]]:
        num_rows = jnp.maximum(batch.row_mask.sum(), 1).astype(jnp.float32)
        tokens_per_row = jnp.maximum(batch.response_mask.sum(), 1) / num_rows
        whole = functools.partial(micro_loss, num_rows=num_rows, tokens_per_row=tokens_per_row)
        gradient_fn = jax.value_and_grad(whole, has_aux=True)

        def accumulate(total: Any, rows: TrainBatch) -> tuple[Any, dict[str, Array]]:
            (loss, sums), gradient = gradient_fn(state.params, rows)
            return jax.tree.map(jnp.add, total, (loss, gradient)), sums

        if num_micro_batches == 1:
            ((loss, sums), gradient) = gradient_fn(state.params, batch)
        else:
            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
            (loss, gradient), stacked = jax.lax.scan(accumulate, zeros, _split_rows(batch, num_micro_batches))
            sums = {name: (value.min if name == "log_ratio_min" else value.sum)() for name, value in stacked.items()}
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = _metrics(loss, optax.global_norm(gradient), sums, num_rows)
        metrics["learner/learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return TrainState(state.step + 1, params, opt_state), metrics

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))


def _split_rows(batch: TrainBatch, num_micro_batches: int) -> TrainBatch:
    """[B, ...] to [M, B/M, ...], every M-th row together, so that each device keeps its own rows."""
    return jax.tree.map(lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)


def _row_sums(
    logprobs: Float[Array, "B T"], entropy: Float[Array, "B T"], rows: TrainBatch, beta2: float
) -> dict[str, Array]:
    """Sums over rows (one is a minimum), so that micro-batches can be put together."""
    log_ratio = jnp.where(rows.row_mask, oapl.log_ratios(logprobs, rows.sampler_logprobs, rows.response_mask), 0.0)
    residual = jnp.where(rows.row_mask, beta2 * log_ratio - rows.advantages, 0.0)
    return {
        "log_ratio": log_ratio.sum(),
        "log_ratio_abs": jnp.abs(log_ratio).sum(),
        "log_ratio_min": log_ratio.min(initial=jnp.inf, where=rows.row_mask),
        "residual": jnp.abs(residual).sum(),
        "advantage_abs": jnp.abs(rows.advantages).sum(),
        "entropy": jnp.where(rows.response_mask, entropy, 0.0).sum(),
        "tokens": rows.response_mask.sum().astype(jnp.float32),
    }


def _metrics(loss: Array, grad_norm: Array, sums: dict[str, Array], num_rows: Array) -> dict[str, Array]:
    return {
        "learner/loss": loss,
        "learner/grad_norm": grad_norm,
        "learner/log_ratio": sums["log_ratio"] / num_rows,
        "learner/log_ratio_abs": sums["log_ratio_abs"] / num_rows,
        "learner/log_ratio_min": sums["log_ratio_min"],
        "learner/residual": sums["residual"] / num_rows,
        "learner/advantage_abs": sums["advantage_abs"] / num_rows,
        "learner/entropy": sums["entropy"] / jnp.maximum(sums["tokens"], 1),
    }

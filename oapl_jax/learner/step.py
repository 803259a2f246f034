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

from oapl_jax.learner.state import TrainState
from oapl_jax.model import lora
from oapl_jax.model.logprob import sequence_logprobs
from oapl_jax.model.segments import Segments
from oapl_jax.objectives import oapl, reference
from oapl_jax.objectives.objective import Objective, ObjectiveOptions
from oapl_jax.types import TrainBatch


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: Objective,
    options: ObjectiveOptions,
    *,
    temperature: float,
    vocab_size: int,
    mesh: Mesh,
    shardings: TrainState,
    kl_weight: float = 0.0,
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, dict[str, Array]]]:
    """Compiles ``(state, batch) -> (state, metrics)``; the state is donated.

    The gradients of the batch's micro-batches are summed one after the other, as many as hold anything: each rollout
    weighs 1 / (rollouts of the batch), so the result does not depend on which rows share a micro-batch. Ids from
    ``vocab_size`` on have no probability; ``schedule`` is for the metrics; ``kl_weight`` is that of the divergence from the
    reference, of batches that have its log-probabilities.
    """
    score = _score_fn(graphdef, temperature, vocab_size)
    beta2 = oapl.options_or_defaults(options).beta2

    def micro_loss(
        trained: Any,
        rows: TrainBatch,
        policy: Any,
        num_rollouts: Float[Array, ""],
        tokens_per_rollout: Float[Array, ""],
    ) -> tuple[Array, dict[str, Array]]:
        logprobs, entropy = score(lora.with_trained(policy, trained), rows)
        losses = objective.losses(logprobs, rows, options, tokens_per_rollout)
        sums = _sums(logprobs, entropy, rows, beta2)
        if rows.reference_logprobs is not None:
            divergences = reference.divergences(logprobs, rows)
            losses += kl_weight * divergences
            sums["reference_kl"] = jnp.sum(divergences, where=rows.segment_mask)
        return jnp.sum(losses, where=rows.segment_mask) / num_rollouts, sums

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, Array]]:
        num_rollouts = jnp.maximum(batch.segment_mask.sum(), 1).astype(jnp.float32)
        tokens_per_rollout = jnp.maximum(batch.response_mask.sum(), 1) / num_rollouts
        trained = lora.trained(state.params)
        whole = functools.partial(
            micro_loss, policy=state.params, num_rollouts=num_rollouts, tokens_per_rollout=tokens_per_rollout
        )
        gradient_fn = jax.value_and_grad(whole, has_aux=True)

        def add(index: Array, total: Any) -> Any:
            (loss, sums), gradient = gradient_fn(trained, _micro_batch(batch, index))
            lowest = jnp.minimum(total[0][1]["log_ratio_min"], sums["log_ratio_min"])
            (loss, sums), gradient = jax.tree.map(jnp.add, total, ((loss, sums), gradient))
            return (loss, {**sums, "log_ratio_min": lowest}), gradient

        if batch.tokens.shape[0] == 1:
            (loss, sums), gradient = gradient_fn(trained, _micro_batch(batch, 0))
        else:
            shapes = jax.eval_shape(gradient_fn, trained, _micro_batch(batch, 0))
            (loss, sums), gradient = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
            gradient = jax.lax.with_sharding_constraint(gradient, lora.trained(shardings.params))
            nothing = (loss, {**sums, "log_ratio_min": jnp.float32(jnp.inf)}), gradient
            (loss, sums), gradient = jax.lax.fori_loop(0, _num_used(batch), add, nothing)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
            params = lora.with_trained(state.params, optax.apply_updates(trained, updates))
        metrics = _metrics(loss, optax.global_norm(gradient), sums, num_rollouts)
        if "reference_kl" in sums:
            metrics["learner/reference_kl"] = sums["reference_kl"] / num_rollouts
        metrics["learner/learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return TrainState(state.step + 1, params, opt_state), metrics

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))


def make_scorer(
    graphdef: nnx.GraphDef, *, temperature: float, vocab_size: int, out_sharding: NamedSharding | None = None
) -> Callable[[Any, TrainBatch], Float[Array, "A B T"]]:
    """Compiles ``(params, batch) -> log-probabilities`` of the response tokens, of the micro-batches that hold anything.

    ``out_sharding``: of the result; None: the compiler's choice.
    """
    score = _score_fn(graphdef, temperature, vocab_size)

    def scores(params: Any, batch: TrainBatch) -> Float[Array, "A B T"]:
        def add(index: Any, found: Float[Array, "A B T"]) -> Float[Array, "A B T"]:
            return found.at[index].set(score(params, _micro_batch(batch, index))[0])

        nothing = jnp.zeros_like(batch.sampler_logprobs)
        return add(0, nothing) if len(nothing) == 1 else jax.lax.fori_loop(0, _num_used(batch), add, nothing)

    return jax.jit(scores, out_shardings=out_sharding)


def _micro_batch(batch: TrainBatch, index: Any) -> TrainBatch:
    return jax.tree.map(lambda x: x[index], batch)


def _num_used(batch: TrainBatch) -> Array:
    """Micro-batches that hold anything: the first ones."""
    return batch.segment_mask.any(axis=(1, 2)).sum()


def _score_fn(graphdef: nnx.GraphDef, temperature: float, vocab_size: int) -> Callable[[Any, TrainBatch], Any]:
    """Log-probabilities and entropies of the rows of a micro-batch."""

    def score(params: Any, rows: TrainBatch) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        # Packed rows say where each rollout is; rows of one rollout need no mask but the causal one.
        is_packed = rows.segment_mask.shape[-1] > 1
        return sequence_logprobs(
            graphdef,
            params,
            rows.tokens,
            rows.response_mask,
            positions=rows.positions if is_packed else None,
            segments=Segments(rows.segment_ids, rows.prompt_ids) if is_packed else None,
            temperature=temperature,
            vocab_size=vocab_size,
        )

    return score


def _sums(
    logprobs: Float[Array, "B T"], entropy: Float[Array, "B T"], rows: TrainBatch, beta2: float
) -> dict[str, Array]:
    """Sums over rollouts (one is a minimum), so that micro-batches can be put together."""
    num_segments = rows.segment_mask.shape[1]
    log_ratio = oapl.log_ratios(logprobs, rows.sampler_logprobs, rows.response_ids, num_segments)
    residual = jnp.where(rows.segment_mask, beta2 * log_ratio - rows.advantages, 0.0)
    return {
        "log_ratio": log_ratio.sum(),
        "log_ratio_abs": jnp.abs(log_ratio).sum(),
        "log_ratio_min": log_ratio.min(initial=jnp.inf, where=rows.segment_mask),
        "residual": jnp.abs(residual).sum(),
        "advantage_abs": jnp.abs(rows.advantages).sum(),
        "entropy": jnp.where(rows.response_mask, entropy, 0.0).sum(),
        "tokens": rows.response_mask.sum().astype(jnp.float32),
    }


def _metrics(loss: Array, grad_norm: Array, sums: dict[str, Array], num_rollouts: Array) -> dict[str, Array]:
    return {
        "learner/loss": loss,
        "learner/grad_norm": grad_norm,
        "learner/log_ratio": sums["log_ratio"] / num_rollouts,
        "learner/log_ratio_abs": sums["log_ratio_abs"] / num_rollouts,
        "learner/log_ratio_min": sums["log_ratio_min"],
        "learner/residual": sums["residual"] / num_rollouts,
        "learner/advantage_abs": sums["advantage_abs"] / num_rollouts,
        "learner/entropy": sums["entropy"] / jnp.maximum(sums["tokens"], 1),
    }

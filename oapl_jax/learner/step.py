"""The train step: log-probabilities, loss, gradient, update, in one program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from oapl_jax.distributed.sharding import constrain
from oapl_jax.learner.state import TrainState
from oapl_jax.model import lora
from oapl_jax.model.logprob import sequence_logprobs
from oapl_jax.model.segments import Segments
from oapl_jax.objectives import reference
from oapl_jax.objectives.objective import Objective, ObjectiveOptions
from oapl_jax.types import TrainBatch


class TokenScores(NamedTuple):
    """What a train step finds at the response tokens of its batch, by the parameters before the update."""

    logprobs: Float[Any, "A B T"]
    """0 at other tokens, as the entropy."""
    entropy: Float[Any, "A B T"]
    """Of the distribution that scores the token, in nats."""
    is_clipped: Bool[Any, "A B T"] | None
    """Of ``Objective.clipped``, where the objective has it."""


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
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, dict[str, Array], TokenScores]]:
    """Compiles ``(state, batch) -> (state, metrics, scores)``; the state is donated.

    The gradients of the batch's micro-batches are summed one after the other, as many as hold anything: each rollout
    weighs 1 / (rollouts of the batch), so the result does not depend on which rows share a micro-batch. Ids from
    ``vocab_size`` on have no probability; ``schedule`` is for the metrics; ``kl_weight`` is that of the divergence from the
    reference, of batches that have its log-probabilities. Metrics and scores are whole on every device.

    With several micro-batches each part of the axis ``data`` sums its own gradients, and they cross it once a step: it
    may be the network between slices. The gradient of a single one is left to the compiler, which sums it layer by layer
    while the backward pass goes on.
    """
    score = _score_fn(graphdef, temperature, vocab_size)

    def micro_loss(
        trained: Any,
        rows: TrainBatch,
        policy: Any,
        num_rollouts: Float[Array, ""],
        tokens_per_rollout: Float[Array, ""],
    ) -> tuple[Array, TokenScores]:
        logprobs, entropy = score(lora.with_trained(policy, trained), rows)
        with jax.named_scope("loss"):
            losses = objective.losses(logprobs, rows, options, tokens_per_rollout)
            if rows.reference_logprobs is not None:
                losses += kl_weight * reference.divergences(logprobs, rows)
        is_clipped = None if objective.clipped is None else objective.clipped(logprobs, rows, options)
        return jnp.sum(losses, where=rows.segment_mask) / num_rollouts, TokenScores(logprobs, entropy, is_clipped)

    def sums(policy: Any, batch: TrainBatch, *counts: Array) -> tuple[Array, Any, TokenScores]:
        """Loss and gradient over the micro-batches, and the scores of each.

        ``counts``: micro-batches that hold anything, rollouts of the batch, tokens of a rollout.
        """
        num_used, num_rollouts, tokens_per_rollout = counts
        trained, num_micro_batches = lora.trained(policy), batch.tokens.shape[0]
        whole = functools.partial(
            micro_loss, policy=policy, num_rollouts=num_rollouts, tokens_per_rollout=tokens_per_rollout
        )
        gradient_fn = jax.value_and_grad(whole, has_aux=True)
        if num_micro_batches == 1:
            (loss, found), gradient = gradient_fn(trained, _micro_batch(batch, 0))
            return loss, gradient, jax.tree.map(lambda x: x[None], found)

        def add(index: Array, total: Any) -> Any:
            *sums, scores = total
            (loss, found), gradient = gradient_fn(trained, _micro_batch(batch, index))
            scores = jax.tree.map(lambda whole, part: whole.at[index].set(part), scores, found)
            return *jax.tree.map(jnp.add, sums, [loss, gradient]), scores

        (_, found), shapes = jax.eval_shape(gradient_fn, trained, _micro_batch(batch, 0))
        gradient = jax.tree.map(
            lambda x, place: constrain(jnp.zeros(x.shape, jnp.float32), mesh, place.spec),
            shapes,
            lora.trained(shardings.params),
        )
        scores = jax.tree.map(lambda x: jnp.zeros((num_micro_batches, *x.shape), x.dtype), found)
        return jax.lax.fori_loop(0, num_used, add, (jnp.float32(0), gradient, scores))

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, Array], TokenScores]:
        num_rollouts = jnp.maximum(batch.segment_mask.sum(), 1).astype(jnp.float32)
        tokens_per_rollout = jnp.maximum(batch.response_mask.sum(), 1) / num_rollouts
        trained = lora.trained(state.params)
        is_local = mesh.shape["data"] > 1 and batch.tokens.shape[0] > 1
        sum_fn = _over_data(sums, mesh) if is_local else sums
        loss, gradient, scores = sum_fn(state.params, batch, _num_used(batch), num_rollouts, tokens_per_rollout)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
            params = lora.with_trained(state.params, optax.apply_updates(trained, updates))
        metrics = {
            "learner/loss": loss,
            "learner/grad_norm": optax.global_norm(gradient),
            "learner/entropy": scores.entropy.sum() / jnp.maximum(batch.response_mask.sum(), 1),
            "learner/learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        if batch.reference_logprobs is not None:
            divergences = jax.vmap(reference.divergences)(scores.logprobs, batch)
            metrics["learner/reference_kl"] = jnp.sum(divergences, where=batch.segment_mask) / num_rollouts
        return TrainState(state.step + 1, params, opt_state), metrics, scores

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated, replicated))


def _over_data(sums: Callable[..., tuple[Array, Any, TokenScores]], mesh: Mesh) -> Callable[..., Any]:
    """The same sums, where each part of the axis ``data`` adds up its own rows first."""

    def run(*arguments: Any) -> tuple[Array, Any, TokenScores]:
        loss, gradient, scores = sums(*arguments)
        return *jax.lax.psum((loss, gradient), "data"), scores

    whole, rows = PartitionSpec(), PartitionSpec(None, "data")
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(whole, rows, whole, whole, whole),
        out_specs=(whole, whole, rows),
        axis_names={"data"},
        check_vma=False,
    )


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

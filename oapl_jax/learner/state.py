"""What training changes: parameters and optimizer state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from oapl_jax.config.learner import LearnerConfig
from oapl_jax.distributed.sharding import TRAINER_RULES, shardings
from oapl_jax.model import lora

FINAL_FRACTION = 0.1
"""Where a cosine schedule ends, as a fraction of the peak."""


class TrainState(NamedTuple):
    """A pytree of arrays."""

    step: Int[Array, ""]
    """Updates so far."""
    params: Any
    """State half of ``nnx.split(Qwen(...))``, what is frozen included."""
    opt_state: Any
    """The optimizer's state for the parameters that are trained (``lora.trained``)."""

    @property
    def stored(self) -> "TrainState":
        """What a checkpoint holds: without the frozen weights, which are where the run started from."""
        return self._replace(params=lora.trained(self.params))

    def restored(self, stored: "TrainState") -> "TrainState":
        """A stored state with the frozen weights of this one."""
        return stored._replace(params=lora.with_trained(self.params, stored.params))


def make_schedule(config: LearnerConfig, num_steps: int, updates_per_step: int = 1) -> optax.Schedule:
    """Learning rate by update, the same for all updates of a step: linear warm-up, then constant or cosine."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        decay_steps = max(1, num_steps - config.warmup_steps - 1)  # from the first of them to the last update
        after = optax.cosine_decay_schedule(config.learning_rate, decay_steps, alpha=FINAL_FRACTION)
    # The first update is step 0; a warm-up from exactly 0 would waste it.
    by_step = optax.join_schedules([lambda step: warmup(step + 1), after], [config.warmup_steps])

    def by_update(update: Any) -> Any:
        return by_step(update // updates_per_step)

    return by_update


def make_optimizer(config: LearnerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW after a clip of the gradient's global norm (paper Table 1)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.adam_b1,
            b2=config.adam_b2,
            weight_decay=config.weight_decay,
            mu_dtype=config.moment_dtype,
        ),
    )


def init_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """Step 0 with the given parameters (consumed), and the shardings of the state.

    The optimizer state is made in its sharding: moments as their parameters, scalars replicated.
    """
    placed = shardings(abstract_state(params, optimizer), mesh, TRAINER_RULES)
    make = functools.partial(_first_state, optimizer=optimizer)
    return jax.jit(make, out_shardings=placed, donate_argnums=0)(params), placed


def abstract_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes of the state with the given parameters, or shapes of them."""
    return jax.eval_shape(functools.partial(_first_state, optimizer=optimizer), params)


def _first_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.int32(0), params, optimizer.init(lora.trained(params)))

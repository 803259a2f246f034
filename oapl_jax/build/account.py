"""The account of memory, what lies on a device from the start of a run to its end; and of the disk."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax

from oapl_jax.config.commands import TrainConfig
from oapl_jax.distributed.sharding import device_bytes

TOKEN_BYTES = 12
"""Of a token in the rollout log before it is compressed: id, log-probability, text."""
ROLLOUT_BYTES = 150
"""Of a rollout besides: the quickstart's, of at most six tokens, take this."""


@dataclasses.dataclass(frozen=True)
class Account:
    """Bytes on each device. Trainer and sampler may share their devices; else these are two kinds of device."""

    weights: float
    optimizer: float
    gradient: float
    """While a train step runs, at least."""
    reference: float
    """The frozen copy of the weights that the run started from, where the objective needs one."""
    sampler_weights: float
    prepared_weights: float
    """The sampler's own copy of the layers, where its programs read one (``sampler/cpu``)."""
    evaluation_weights: float
    """The policy that an evaluation in the middle of a window samples, beside that of the window."""
    kv_cache: float
    is_colocated: bool

    @property
    def learner(self) -> float:
        """Weights and optimizer state of the learner: what the train step takes and gives."""
        return self.weights + self.optimizer

    @property
    def trainer(self) -> float:
        """All that the trainer holds between two steps."""
        return self.learner + self.reference

    @property
    def sampler(self) -> float:
        """All that the sampler holds."""
        return self.sampler_weights + self.prepared_weights + self.evaluation_weights + self.kv_cache

    @property
    def beside_train_step(self) -> float:
        """What lies on a trainer's device while the train step runs, and is not its argument."""
        return self.reference + (self.sampler if self.is_colocated else 0)

    def shortage(self, usable: float) -> float:
        """Bytes that a device lacks before anything is compiled; negative: left over."""
        trainer = self.trainer + self.gradient
        return (trainer + self.sampler if self.is_colocated else max(trainer, self.sampler)) - usable

    def describe(self) -> dict[str, str]:
        """Lines for people."""
        trainer = f"weights {size(self.weights)}, optimizer {size(self.optimizer)}, gradient {size(self.gradient)}"
        if self.reference:
            trainer += f", reference {size(self.reference)}"
        sampler = [f"weights {size(self.sampler_weights)}", f"KV cache {size(self.kv_cache)}"]
        if self.prepared_weights:
            sampler.append(f"prepared layers {size(self.prepared_weights)}")
        if self.evaluation_weights:
            sampler.append(f"weights of an evaluation {size(self.evaluation_weights)}")
        total = self.learner + self.gradient + self.beside_train_step
        return {
            "trainer": trainer,
            "sampler": ", ".join(sampler),
            "a device": f"{size(total)} for certain"
            if self.is_colocated
            else f"{size(total)} for certain of a trainer's, {size(self.sampler)} of a sampler's",
        }


def learner_bytes(state: Any) -> tuple[int, int, int]:
    """Weights, optimizer state and gradient of a ``TrainState`` of shapes with shardings, on one device."""
    return device_bytes(state.params), device_bytes(state.opt_state), device_bytes(state.stored.params)


def disk(config: TrainConfig, state: Any, sampler_weights: Any, model: Any) -> str:
    """What a run leaves on disk, for people, from the shapes of its arrays; responses count with their longest length."""
    steps, sampler, kept = config.run.steps, config.sampler, config.checkpoint
    windows, rounds = -(-steps // config.window.sync_every), config.offline.rounds if config.offline else ()
    num = min(2 + steps // kept.every, kept.keep) + bool(kept.keep_best)  # the first and the last step are saved too
    num += (steps // kept.keep_every if kept.keep_every else 0) + windows * config.window.keep_checkpoints
    rollouts = config.learner.batch_rollouts * steps / (rounds[0].epochs if rounds else config.window.epochs)
    if kept.keep_rollouts:
        rollouts *= min(1, (kept.keep_rollouts + 1) / windows)
    num_models = 1 + sum(data.epochs for data in rounds)
    parts = {
        f"{num} checkpoints": num * (_bytes(state) + _bytes(sampler_weights)),
        f"{num_models} exported models": num_models * _bytes(model),
        "rollouts at most": rollouts * (ROLLOUT_BYTES + TOKEN_BYTES * sampler.max_response_tokens),
    }
    if config.mode == "detached":  # one more while it is written
        published = state.params if config.window.publish == "adapters" else sampler_weights
        parts["published policies"] = (kept.keep_policies + 1) * _bytes(published)
    folder = pathlib.Path(config.run.dir).absolute()
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    text = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in parts.items())
    return f"{text}; {size(sum(parts.values()))} of {size(free)} that are free"


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit, divisor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= divisor:
            return f"{num_bytes / divisor:.2f} {unit}"
    return f"{num_bytes:.0f} B"

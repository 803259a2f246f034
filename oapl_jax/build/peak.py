"""The most memory that a run takes: the account, and the temporaries of its programs, compiled for this from shapes."""

import dataclasses
from typing import Any

import jax

from oapl_jax.build.account import Account, size
from oapl_jax.build.assembly import Assembly
from oapl_jax.distributed.memory import resident_bytes, trim_heap
from oapl_jax.distributed.sharding import platform_of
from oapl_jax.sampler.sampler import programs_take_turns

ON_CPU: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of the compiler on a CPU: half the time, and the same temporaries, which are laid out before."""


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes on each device, and of the process where the devices are its own memory."""

    account: Account
    train_step: int
    """Temporaries and new results of the train step, the gradient among them."""
    sampler: int
    """Those of prefill or of decoding, whichever has more; 0 where this process does not sample."""
    takes_turns: bool
    """Trainer and sampler never run a program at the same time on a device."""
    num_trainers: int
    num_samplers: int
    """Devices of the sampler that are not the trainer's."""
    process: int | None
    """What the process takes beside its arrays; None where the devices have a memory of their own."""

    @property
    def trainer_device(self) -> float:
        """While the train step runs, or at a sync, when the sampler has its old weights until the new ones are complete."""
        account = self.account
        if not account.is_colocated:
            return account.trainer + self.train_step
        trainer = max(self.train_step, account.sampler_weights)
        both = max(trainer, self.sampler) if self.takes_turns else trainer + self.sampler
        return account.trainer + account.sampler + both

    @property
    def sampler_device(self) -> float:
        """The same of a device that the sampler has for itself."""
        return self.account.sampler + max(self.sampler, self.account.sampler_weights)

    @property
    def total(self) -> float | None:
        """Of the process; None where the devices have a memory of their own."""
        if self.process is None:
            return None
        return self.process + self.num_trainers * self.trainer_device + self.num_samplers * self.sampler_device

    def describe(self) -> dict[str, str]:
        """Lines for people."""
        temporaries = f"train step {size(self.train_step)}, sampler {size(self.sampler)}"
        temporaries += ", one at a time" if self.takes_turns else ", at the same time"
        device = size(self.trainer_device)
        if self.num_samplers:
            device += f" of a trainer's, {size(self.sampler_device)} of a sampler's"
        lines = {"temporaries": temporaries, "peak": f"{device} of a device"}
        if self.total is not None and self.process is not None:
            lines["peak"] += f"; {size(self.total)} of the process, {size(self.process)} of it beside its arrays"
        return lines


def expected_peak(assembly: Assembly) -> Peak:
    """Compiles the train step, and the sampler's programs of full length, for the devices of the assembly."""
    learner, model = assembly.learner, assembly.architecture
    is_cpu = platform_of(learner.mesh) == "cpu"
    options = ON_CPU if is_cpu else None
    train_step, sampler = _extra(learner.train_step.lower(learner.shapes, learner.largest_batch()), options), 0
    if assembly.engines:
        engine, weights = assembly.engines[0], assembly.replica_shapes
        sampler = max(_extra(program(weights), options) for program in (engine.lower_prefill, engine.lower_generate))
    if is_cpu:
        trim_heap()
    return Peak(
        account=assembly.account,
        train_step=train_step,
        sampler=sampler,
        takes_turns=not is_cpu or not assembly.is_colocated or programs_take_turns(model, learner.mesh),
        num_trainers=learner.mesh.size,
        num_samplers=0 if assembly.is_colocated else assembly.sampler_mesh.size,
        process=resident_bytes() if is_cpu else None,
    )


def _extra(program: jax.stages.Lowered, options: dict[str, Any] | None) -> int:
    """Bytes of a device that a program takes beside its arguments."""
    memory: Any = program.compile(options).memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes

"""Whether a run fits its machines, by preflight's arithmetic: seconds, no compiler, no accelerator.

The devices are descriptions with what meshes and the account of memory read of a device. ``oapl-jax preflight`` also
compiles the programs, and so knows what they take while they run.
"""

import dataclasses
import math

from machines import Machines
from oapl_jax.build.account import size
from oapl_jax.config.commands import TrainConfig
from oapl_jax.preflight.programs import architecture_file, make_plan


@dataclasses.dataclass(frozen=True)
class _Device:
    """A device that is only described; the fields are those of JAX's."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    compute_capability: str = "9.0"


def check(config: TrainConfig, machines: Machines, num_slices: int) -> str:
    """A line for people: what a device holds of its memory.

    Raises:
        ValueError: the meshes do not suit the machines, or a device has too little memory.
    """
    try:
        architecture_file(config)
    except ValueError as error:
        return f"memory: not known, {error}"
    usable = machines.usable_bytes if math.isfinite(machines.usable_bytes) else 2.0**40
    plan = make_plan(config, _devices(machines, num_slices), usable)
    account, where = plan.assembly.account, f"{num_slices} x {machines.name}"
    lines = [f"{name}: {text}" for name, text in account.describe().items()]
    if (shortage := account.shortage(usable)) > 0:
        raise ValueError(
            "\n  ".join([f"does not fit {where}: a device lacks {size(shortage)} of {size(usable)}", *lines])
        )
    if not plan.assembly.engines:
        raise ValueError("\n  ".join([f"does not fit {where}: no room for the keys and values of one rollout", *lines]))
    known = f" of {size(usable)}" if math.isfinite(machines.usable_bytes) else ""
    return f"memory of a device: {lines[-1].partition(': ')[2]}{known}, before activations"


def _devices(machines: Machines, num_slices: int) -> list[_Device]:
    per_host = machines.chips_per_host * machines.devices_per_chip
    per_slice = machines.hosts * per_host
    return [
        _Device(i, i // per_host, i // per_slice, machines.kind, machines.name, (i % per_slice, 0, 0))
        for i in range(per_slice * num_slices)
    ]

"""The machines of a job by the name of their topology: TPU slices, hosts with GPUs, hosts with CPUs alone."""

import dataclasses
import math
import re
from typing import Literal

from oapl_jax.distributed.chips import GENERATIONS as PREFLIGHT
from oapl_jax.distributed.chips import GIB

CHIPS_PER_HOST = 4
"""Of a TPU slice; a slice of one chip is a host of one."""
# The shape that a plain chip count stands for; other shapes are written out, e.g. v5p-4x4x12.
SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: (
        "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
    ),
}  # fmt: skip
GPUS_PER_HOST = 8
GPU_FRACTION = 0.75
"""Of a GPU's memory that JAX takes (``XLA_PYTHON_CLIENT_MEM_FRACTION``)."""


@dataclasses.dataclass(frozen=True)
class Machines:
    """Equal hosts that belong together: one pod or process on each."""

    kind: Literal["tpu", "gpu", "cpu"]
    name: str
    """Topology as written, e.g. ``v5p-64`` or ``h100-16``."""
    hosts: int
    chips_per_host: int
    """TPU chips or GPUs; 1 for a CPU."""
    usable_bytes: float
    """Memory of one JAX device that programs may use; infinite where nothing is known of it."""
    selector: dict[str, str] = dataclasses.field(default_factory=dict)
    """Labels of the Kubernetes nodes."""
    devices_per_chip: int = 1

    @property
    def chips(self) -> int:
        """Of all hosts."""
        return self.hosts * self.chips_per_host

    @property
    def resource(self) -> dict[str, int]:
        """What a pod asks for."""
        names = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}
        return {names[self.kind]: self.chips_per_host} if self.kind in names else {}


@dataclasses.dataclass(frozen=True)
class _Generation:
    """One generation of TPUs as GKE sells it."""

    accelerator: str
    """Value of the node label cloud.google.com/gke-tpu-accelerator."""
    units_per_chip: int
    """What N counts in "v5p-N": TensorCores (2 a chip) or chips."""
    dimensions: int
    usable_bytes: float
    devices_per_chip: int = 1


TPUS = {
    "v4": _Generation("tpu-v4-podslice", 2, 3, PREFLIGHT["v4"].usable_bytes),
    "v5e": _Generation("tpu-v5-lite-podslice", 1, 2, PREFLIGHT["v5e"].usable_bytes),
    "v5p": _Generation("tpu-v5p-slice", 2, 3, PREFLIGHT["v5p"].usable_bytes),
    "v6e": _Generation("tpu-v6e-slice", 1, 2, PREFLIGHT["v6e"].usable_bytes),
    "tpu7x": _Generation("tpu7x", 2, 3, 94.75 * GIB, devices_per_chip=2),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v7x": "tpu7x", "7x": "tpu7x"}
GPUS = {
    "l4": ("nvidia-l4", 22 * GIB),
    "a100": ("nvidia-a100-80gb", 79 * GIB),
    "h100": ("nvidia-h100-80gb", 79 * GIB),
    "h200": ("nvidia-h200-141gb", 139 * GIB),
}
"""Value of the node label cloud.google.com/gke-accelerator, and memory."""


def parse(text: str) -> Machines:
    """``v5p-64``, ``v5litepod-16``, ``v6e-4x4``, ``tpu7x-4x4x4``, ``h100-16`` or ``cpu-2`` as machines.

    Raises:
        ValueError: an unknown kind, or no such number of machines.
    """
    match = re.fullmatch(r"([a-z0-9]+)[-:]([0-9]+(?:x[0-9]+)*)", text)
    name = ALIASES.get(match[1], match[1]) if match else ""
    if not match or name not in {*TPUS, *GPUS, "cpu"}:
        raise ValueError(
            f"topology {text!r}: write GENERATION-SIZE, e.g. v5p-64 or v5p-2x4x4; generations: {', '.join(TPUS)};"
            f" or the number of GPUs ({', '.join(GPUS)}) as in h100-8, or of hosts without either as in cpu-2"
        )
    if name in TPUS:
        return _tpu_slice(text, name, match[2])
    if not match[2].isdigit() or int(match[2]) == 0:
        raise ValueError(f"topology {text!r}: {name} is followed by a number, as in {name}-8")
    size = int(match[2])
    if name == "cpu":
        return Machines("cpu", text, size, 1, math.inf)
    accelerator, memory = GPUS[name]
    if size not in (1, 2, 4) and size % GPUS_PER_HOST:
        raise ValueError(f"topology {text!r}: {size} GPUs are not 1, 2, 4, or whole hosts of {GPUS_PER_HOST}")
    per_host = min(size, GPUS_PER_HOST)
    selector = {"cloud.google.com/gke-accelerator": accelerator}
    return Machines("gpu", text, size // per_host, per_host, GPU_FRACTION * memory, selector)


def _tpu_slice(text: str, name: str, size: str) -> Machines:
    generation = TPUS[name]
    shape = size if "x" in size else _standard_shape(text, name, int(size))
    if shape.count("x") + 1 != generation.dimensions:
        example = SHAPES[generation.dimensions][3]
        raise ValueError(
            f"topology {text!r}: {name} slices have {generation.dimensions} dimensions, e.g. {name}-{example}"
        )
    chips = _chips(shape)
    if chips == 0 or (chips % CHIPS_PER_HOST and chips != 1):
        raise ValueError(f"topology {text!r}: {chips} chips are not whole hosts of {CHIPS_PER_HOST}")
    selector = {
        "cloud.google.com/gke-tpu-accelerator": generation.accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    per_host = min(chips, CHIPS_PER_HOST)
    memory, devices = generation.usable_bytes, generation.devices_per_chip
    return Machines("tpu", text, chips // per_host, per_host, memory, selector, devices)


def _standard_shape(text: str, name: str, units: int) -> str:
    generation = TPUS[name]
    chips, odd = divmod(units, generation.units_per_chip)
    by_chips = {_chips(shape): shape for shape in SHAPES[generation.dimensions]}
    if odd or chips not in by_chips:
        sizes = ", ".join(str(size * generation.units_per_chip) for size in by_chips)
        shape = "x".join("ABC"[: generation.dimensions])
        raise ValueError(f"topology {text!r}: no standard {name} slice of that size; sizes: {sizes}; or {name}-{shape}")
    return by_chips[chips]


def _chips(shape: str) -> int:
    return math.prod(int(part) for part in shape.split("x"))

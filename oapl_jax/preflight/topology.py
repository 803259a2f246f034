"""TPU slices by their names in Google Cloud, described without a TPU, and the peak rates of their chips.

The number in a name counts TensorCores for v4 and v5p, which have two per chip (``v5p-64`` has 32 chips), and chips for
v5e and v6e. libtpu takes the shape of a slice instead (``v5p:2x4x4``) and compiles for devices that are only described.
JAX has one device per chip for all of them.
"""

import difflib
import importlib.util
import math
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

from jax.experimental import topologies

LIBTPU_FOLDER = pathlib.Path(sys.prefix) / "tpu" / "libtpu"
"""Where ``make tpu`` puts libtpu. As an installed package it would make JAX search for a TPU at every start and print
warnings."""

WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask Google's metadata server what this machine is
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any value: libtpu complains without one
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # several processes may compile at once
}
"""Environment variables that libtpu reads when it is loaded."""


class Chip(NamedTuple):
    """One device of a kind of TPU. Rates are per second, bandwidths in bytes; ICI and DCN count one direction."""

    usable_bytes: float
    """HBM that programs may use, from the error messages of the compiler in libtpu 0.0.42."""
    flops: float
    """Peak rate of bfloat16 matrix products."""
    hbm_bandwidth: float
    ici_bandwidth: float
    """Sum over all links of the chip."""
    dcn_bandwidth: float
    """The chip's share of its host's network cards."""
    cores: int
    """Units per chip that the number in a name counts."""
    shapes: str
    """In which slices are sold, separated by spaces: chips along each axis of the torus."""
    config_name: str | None = None
    """``chip_config_name`` of ``get_topology_desc``, where it is not libtpu's default."""


GIB = 2**30

# Peak, HBM and ICI: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; the ICI figures there are sums over both directions
# (v5e 400, v5p 1200, v6e 800 GB/s; v4 has six links of 50 GB/s each way). DCN: v5p has 50 Gbit/s per chip; v5e
# has two and v6e four cards (100 and 200 Gbit/s) for eight chips, by the same pages. v4 is assumed to equal v5p.
# Shapes: the same pages, and Google's xpk, src/xpk/core/system_characteristics.py.
GENERATIONS = {
    "v4": Chip(
        *(30.75 * GIB, 275e12, 1.2e12, 300e9, 6.25e9),
        2,
        "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16",
        "megacore",
    ),
    "v5p": Chip(
        *(95.74 * GIB, 459e12, 2.765e12, 600e9, 6.25e9),
        2,
        """
            2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 4x4x20 4x8x12 4x4x28 8x8x8 4x12x12 4x8x20 4x4x44 8x8x12
            4x4x52 4x8x28 4x12x20 8x8x16 4x4x68 8x12x12 4x4x76 8x8x20 4x12x28 4x8x44 4x4x92 8x12x16 4x20x20 4x8x52
            12x12x12 8x8x28 4x4x116 8x12x20 4x4x124 8x16x16 4x12x44 4x8x68 4x20x28 12x12x16 4x4x148 4x8x76 4x12x52
            8x16x20 4x4x164 8x12x28 4x4x172 8x8x44 12x12x20 4x8x92 4x4x188 12x16x16 4x28x28 8x20x20 4x12x68 8x8x52
            4x4x212 12x12x24 4x20x44 8x16x28 4x12x76 4x8x116 4x4x236 12x16x20 4x4x244 4x8x124 12x12x28 16x16x16 4x20x52
            8x12x44 8x8x68 4x12x92 8x20x28 12x16x24 4x8x148 12x20x20 8x8x76 4x28x44 8x12x52 16x16x20 12x12x36 4x8x164
            12x16x28 4x20x68 4x8x172 4x12x116 8x16x44 12x20x24 4x28x52 8x8x92 4x12x124 4x8x188 4x20x76 16x16x24
            12x24x24 16x20x28
            """,
    ),
    "v5e": Chip(15.75 * GIB, 197e12, 0.819e12, 200e9, 3.125e9, 1, "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"),
    "v6e": Chip(31.25 * GIB, 918e12, 1.638e12, 400e9, 12.5e9, 1, "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"),
}


class Topology(NamedTuple):
    """One or several slices of one shape."""

    name: str
    """The name that was requested."""
    generation: str
    shape: str
    """Chips along each axis of the torus, e.g. ``2x4x4``."""
    num_slices: int

    @property
    def chip(self) -> Chip:
        """The kind of its devices."""
        return GENERATIONS[self.generation]

    @property
    def num_devices(self) -> int:
        """Number of devices over all slices."""
        return self.num_slices * _num_chips(self.shape)


def parse(name: str, num_slices: int = 1) -> Topology:
    """Reads ``v5p-64``, or a shape as in ``v5p-2x4x4`` and ``v5p:2x4x4``; raises ValueError with sizes nearby."""
    prefix, _, size = name.strip().lower().replace(":", "-").partition("-")
    generation = "v5e" if prefix == "v5litepod" else prefix  # its name among Google Cloud's accelerator types
    if generation not in GENERATIONS:
        close = difflib.get_close_matches(generation, GENERATIONS, 1, cutoff=0)
        raise ValueError(
            f"topology {name!r}: unknown kind of TPU {prefix!r}; known: {', '.join(GENERATIONS)}."
            f" Write it as in {close[0]}-8"
        )
    cores = GENERATIONS[generation].cores
    shapes = {_num_chips(shape) * cores: shape for shape in GENERATIONS[generation].shapes.split()}
    shape = size if size in shapes.values() else shapes.get(int(size)) if size.isdigit() else None
    if shape is None:
        wanted = math.prod(map(int, re.findall(r"\d+", size))) * (1 if size.isdigit() else cores)
        nearest = sorted(sorted(shapes, key=lambda count: abs(count - wanted))[:4])
        raise ValueError(
            f"topology {name!r}: Google Cloud has no such slice; the number in {generation}-N counts"
            f" {'TensorCores, two per chip' if cores == 2 else 'chips'}; near: "
            + ", ".join(f"{generation}-{count} ({shapes[count]})" for count in nearest)
        )
    if num_slices < 1:
        raise ValueError(f"--num-slices {num_slices}: a run has at least one slice")
    return Topology(name, generation, shape, num_slices)


def devices(topology: Topology) -> list[Any]:
    """The described devices, slice by slice, on which no program can run; raises ValueError where libtpu is missing."""
    options: dict[str, Any] = {"chip_config_name": topology.chip.config_name} if topology.chip.config_name else {}
    if topology.shape == "1x1":
        # By default a host has four or eight chips.
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    library = find_libtpu()
    if library is None:
        raise ValueError(
            "libtpu, the compiler for TPUs, is not installed; run `make tpu`, or `pip install -r requirements-tpu.txt`"
        )
    for variable, value in {**WITHOUT_TPU, "TPU_LIBRARY_PATH": str(library)}.items():
        os.environ.setdefault(variable, value)
    name = f"{topology.generation}:{topology.shape}"
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    return sorted(found, key=slice_of)


def slice_alone(topology: Topology, num_devices: int) -> list[Any] | None:
    """The devices of one slice of the same kind with this number of devices, or None if there is no such slice."""
    shape = next((shape for shape in topology.chip.shapes.split() if _num_chips(shape) == num_devices), None)
    return None if shape is None else devices(topology._replace(shape=shape, num_slices=1))


def find_libtpu() -> pathlib.Path | None:
    """The libtpu library that the environment names, that of the package, or that of ``make tpu``; or None."""
    named, package = os.environ.get("TPU_LIBRARY_PATH"), importlib.util.find_spec("libtpu")
    if named:
        return pathlib.Path(named)
    folder = pathlib.Path(package.origin).parent if package and package.origin else LIBTPU_FOLDER
    library = folder / "libtpu.so"
    return library if library.is_file() else None


def slice_of(device: Any) -> int:
    """The slice of a device; devices of a single slice lack the attribute."""
    return getattr(device, "slice_index", 0)


def _num_chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))

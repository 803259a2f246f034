"""TPU slices by their names in Google Cloud, described without a TPU.

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

from oapl_jax.distributed.chips import GENERATIONS, Chip

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

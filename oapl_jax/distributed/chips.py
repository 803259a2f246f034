"""What the chips that JAX runs on can do at most: TPUs by generation, GPUs by name, the CPU by measurement."""

import re
import time
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh


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

DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""``device_kind`` of JAX to generation."""

# Dense bfloat16, for the T4 float16: NVIDIA's data sheets of these products, of the SXM form where there are several.
GPU_FLOPS = {"T4": 65e12, "L4": 121e12, "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}

_SIDE, _TRIALS = 1024, 4
"""Of the products that measure a CPU: about 0.1 s in all on one core of 100 GFLOP/s."""


def peak_flops(mesh: Mesh) -> float | None:
    """FLOPs a second of matrix products that all devices of a mesh could do together; None for an unknown kind.

    A CPU is measured, in float32; its devices share the machine.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return _measured_flops()
    if device.device_kind in DEVICE_KINDS:
        return mesh.size * GENERATIONS[DEVICE_KINDS[device.device_kind]].flops
    known = [flops for name, flops in GPU_FLOPS.items() if re.search(rf"\b{name}\b", device.device_kind)]
    return mesh.size * known[0] if known else None


def peak_bytes(mesh: Mesh) -> int | None:
    """The most memory that a device of this process in a mesh has had in use; None where devices do not say it."""
    here = [device for device in mesh.devices.flat if device.process_index == device.client.process_index()]
    stats = [found for device in here if (found := device.memory_stats()) is not None]
    return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found), default=None)


def _measured_flops() -> float:
    """The fastest of a few matrix products; the first one starts the threads."""
    factor = np.random.default_rng(0).random((_SIDE, _SIDE), np.float32)
    seconds = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        np.matmul(factor, factor)
        seconds.append(time.perf_counter() - start)
    return 2 * _SIDE**3 / min(seconds)

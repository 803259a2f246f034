"""How much memory a device offers, and what the process itself takes."""

import contextlib
import ctypes
import functools
import pathlib

import numpy as np
from jax.sharding import Mesh

UNKNOWN_HOST_BYTES = 8 << 30
"""What a host is taken to have whose memory cannot be read."""


def usable_bytes(mesh: Mesh) -> int:
    """Memory that a program may use on each device of a mesh: the least that a device of this process has.

    On a CPU the devices share what the host had available when this was called first.
    """
    here = [device for device in np.asarray(mesh.devices).flat if device.process_index == device.client.process_index()]
    sizes = []
    for device in here:
        stats = device.memory_stats() if device.platform != "cpu" else None
        sizes.append(stats["bytes_limit"] if stats else _host_bytes() // mesh.size)
    return min(sizes, default=UNKNOWN_HOST_BYTES)


@functools.cache
def _host_bytes() -> int:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return UNKNOWN_HOST_BYTES


def resident_bytes() -> int | None:
    """Memory of this process that is resident, mapped files included; None where the system does not say it."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return None


def trim_heap() -> None:
    """Gives back to the system what a compilation or a save has freed: the C library of Linux keeps hundreds of MiB of it."""
    with contextlib.suppress(OSError, AttributeError):  # other systems have no such function
        ctypes.CDLL(None).malloc_trim(0)

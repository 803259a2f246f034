"""What devices can do at most: by their names, and by a measurement."""

import dataclasses
import time

import numpy as np
import pytest
from jax.sharding import Mesh

from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed import chips
from oapl_jax.distributed.sharding import make_meshes


@dataclasses.dataclass(frozen=True)
class Device:
    """A described one, as preflight has them."""

    id: int
    device_kind: str
    platform: str = "described"


def mesh_of(kind, num_devices=1):
    return Mesh(np.array([Device(i, kind) for i in range(num_devices)]), ("data",))


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L40S", None),
        ("NVIDIA GH200 480GB", None),
        ("TPU v9", None),
    ],
)
def test_the_peak_of_known_devices_is_that_of_their_makers(kind, flops):
    assert chips.peak_flops(mesh_of(kind)) == flops
    assert chips.peak_flops(mesh_of(kind, 4)) == (None if flops is None else 4 * flops)


def test_a_cpu_is_measured_quickly_and_its_devices_share_it():
    mesh = make_meshes(MeshConfig(trainer="fsdp=8"))[0]
    start = time.process_time()
    found = chips.peak_flops(mesh)
    assert time.process_time() - start < 2.0, "of all threads; about 0.1 s on one idle core"
    assert 1e8 < found < 1e14
    assert chips.peak_bytes(mesh) is None  # a CPU does not report its memory

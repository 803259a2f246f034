"""Names of TPU slices. That libtpu knows the shapes is tested where it is installed."""

import itertools
import math

import pytest

from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.chips import GENERATIONS
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.preflight import topology
from oapl_jax.preflight.topology import parse
from preflight.tpu_compiler import needs_libtpu


@pytest.mark.parametrize(
    ("name", "generation", "shape", "num_devices"),
    [
        # v4 and v5p count TensorCores, two per chip
        ("v5p-8", "v5p", "2x2x1", 4),
        ("v5p-32", "v5p", "2x2x4", 16),
        ("v5p-64", "v5p", "2x4x4", 32),
        ("v5p-128", "v5p", "4x4x4", 64),
        ("v5p-12288", "v5p", "16x16x24", 6144),
        ("v4-32", "v4", "2x2x4", 16),
        ("v4-4096", "v4", "8x16x16", 2048),
        # v5e and v6e count chips
        ("v5e-1", "v5e", "1x1", 1),
        ("v5e-8", "v5e", "2x4", 8),
        ("v5litepod-256", "v5e", "16x16", 256),
        ("v6e-64", "v6e", "8x8", 64),
        # a shape says the same
        ("v5p-2x4x4", "v5p", "2x4x4", 32),
        ("V5E:4x4", "v5e", "4x4", 16),
    ],
)
def test_names(name, generation, shape, num_devices):
    found = parse(name)
    assert (found.generation, found.shape, found.num_devices) == (generation, shape, num_devices)


def test_slices_multiply():
    assert parse("v5p-64", 2).num_devices == 64


@pytest.mark.parametrize("name", GENERATIONS)
def test_each_number_of_chips_is_one_shape(name):
    generation = GENERATIONS[name]
    counts = [math.prod(map(int, shape.split("x"))) for shape in generation.shapes.split()]
    assert len(set(counts)) == len(counts)
    for shape, count in zip(generation.shapes.split(), counts, strict=True):
        assert parse(f"{name}-{count * generation.cores}").shape == shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-60", r"no such slice; the number in v5p-N counts TensorCores, two per chip; near: .*v5p-64 \(2x4x4\)"),
        ("v5e-7", r"counts chips; near: .*v5e-8 \(2x4\)"),
        ("v5p-3x4x4", r"near: .*v5p-64 \(2x4x4\).*v5p-128 \(4x4x4\)"),
        ("v5p", "no such slice"),
        ("v5", r"unknown kind of TPU 'v5'; known: v4, v5p, v5e, v6e. Write it as in v5"),
        ("h100-8", "unknown kind of TPU 'h100'"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_is_near(name, message):
    with pytest.raises(ValueError, match=message):
        parse(name)


def test_no_slices_are_refused():
    with pytest.raises(ValueError, match="--num-slices 0"):
        parse("v5e-8", 0)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(topology, "LIBTPU_FOLDER", tmp_path)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ValueError, match=r"libtpu.*make tpu"):
        topology.devices(parse("v5e-8"))
    (tmp_path / "libtpu.so").touch()
    assert topology.find_libtpu() == tmp_path / "libtpu.so"


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "num_slices", "words"),
    [("v5p-64", 1, "fsdp=8,tensor=4"), ("v6e-64", 1, "data=4,fsdp=4,tensor=4"), ("v5p-64", 2, "fsdp=16,tensor=4")],
)
def test_a_mesh_follows_the_wires(name, num_slices, words):
    """Devices that follow each other on the last axis are one hop apart in the slice; rows of it never leave a slice."""
    devices = topology.devices(parse(name, num_slices))
    mesh, _ = make_meshes(MeshConfig(trainer=words), devices)
    assert {id(device) for device in mesh.devices.flat} == {id(device) for device in devices}
    for ring in mesh.devices.reshape(-1, mesh.shape["tensor"]):
        for one, other in itertools.pairwise(ring):
            assert topology.slice_of(one) == topology.slice_of(other)
            assert sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) == 1
            assert one.process_index == other.process_index  # colocated: a row is a replica of the sampler


@needs_libtpu
def test_only_data_and_fsdp_go_from_slice_to_slice():
    devices = topology.devices(parse("v5p-8", 2))
    with pytest.raises(ValueError, match=r"mesh.trainer='context=8': the devices are 2 slices, and only data or fsdp"):
        make_meshes(MeshConfig(trainer="context=8"), devices)

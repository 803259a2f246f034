"""Meshes for trainer and sampler, the tables from logical axes to mesh axes, and copies between meshes.

``model/qwen.py`` labels the dimensions of each parameter with logical axes such as ``("layers", "embed", "mlp")``. A
role's table says which mesh axis each is split over, so one model serves every mesh.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from oapl_jax.config.mesh import MeshConfig

Tree = TypeVar("Tree")
Rules = Mapping[str, str | None]

AXES = ("data", "fsdp", "context", "tensor")
"""Mesh axes, slowest interconnect first: ``tensor`` talks in every layer, ``data`` once a step."""

BATCH_AXES = ("data", "fsdp")
"""Rows of a batch are split over these, on every mesh."""

TRAINER_RULES: Rules = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": None,
    "head_dim": None,
    "rank": None,
}
"""The trainer: ZeRO-3 over ``fsdp``, Megatron over ``tensor``.

Weights, gradients and optimizer state are what fills a trainer, so every matrix is split over its
``embed`` dimension (each matrix has exactly one) and gathered layer by layer when used; rows of the
batch are split over the same devices. ``tensor`` splits whole heads and ffn columns, so that
attention and the ffn need one all-reduce each. ``layers`` is never split: the scan walks over it.
"""

SAMPLER_RULES: Rules = {**TRAINER_RULES, "embed": None}
"""The sampler: ``tensor`` only. Decoding reads every weight for each token, so a weight that has to be
gathered first (``fsdp``) would cost more on the wire than the whole step."""


def make_meshes(mesh_config: MeshConfig, devices: Sequence[Any] | None = None) -> tuple[Mesh, Mesh]:
    """The trainer's and the sampler's mesh; one and the same object when colocated.

    Both carry all four axes of ``AXES``, absent ones with size 1. ``-1`` means all devices that are left; the
    sampler's devices come after the trainer's. Explicit sizes may leave devices unused. ``devices`` are by default
    ``jax.devices()``.

    Raises:
        ValueError: the axes do not fit the devices; names the words, the sizes and the device count.
    """
    # Those of a process one after the other: a process that only samples takes no part in training.
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: device.process_index)
    trainer = _parse_axes("mesh.trainer", mesh_config.trainer)
    if mesh_config.sampler is None:
        mesh = _make_mesh("mesh.trainer", mesh_config.trainer, trainer, devices, has_replicas=True)
        return mesh, mesh
    sampler = _parse_axes("mesh.sampler", mesh_config.sampler)
    if -1 in trainer.values() and -1 in sampler.values():
        raise ValueError(
            f"mesh.trainer={mesh_config.trainer!r} and mesh.sampler={mesh_config.sampler!r} both take all that is left"
            f" of {len(devices)} devices; give one of them explicit sizes"
        )
    reserved = 0 if -1 in sampler.values() else math.prod(sampler.values())
    if reserved >= len(devices):
        raise ValueError(
            f"mesh.sampler={mesh_config.sampler!r} takes {reserved} of {len(devices)} devices and leaves none for the"
            " trainer; shrink it, or set mesh.sampler=null to share one mesh"
        )
    trainer_mesh = _make_mesh("mesh.trainer", mesh_config.trainer, trainer, devices[: len(devices) - reserved])
    remaining = devices[trainer_mesh.size :]
    sampler_mesh = _make_mesh("mesh.sampler", mesh_config.sampler, sampler, remaining, has_replicas=True)
    return trainer_mesh, sampler_mesh


def processes_of(mesh: Mesh) -> list[int]:
    """Processes that have devices of a mesh, ascending."""
    return sorted({device.process_index for device in np.asarray(mesh.devices).flat})


def is_here(mesh: Mesh) -> bool:
    """Whether this process has devices of a mesh."""
    return jax.process_index() in processes_of(mesh)


def num_processes() -> int:
    """Processes of the JAX job."""
    return jax.process_count()


def check_processes(mesh_config: MeshConfig, trainer: Mesh, sampler: Mesh) -> None:
    """Raises ValueError where the meshes of a run do not follow the borders of its processes."""
    if jax.process_count() == 1:
        return
    words = f"mesh.trainer={mesh_config.trainer!r}, mesh.sampler={mesh_config.sampler!r}"
    counts = f"{jax.process_count()} processes have {jax.device_count()} devices"
    trainers, samplers = processes_of(trainer), processes_of(sampler)
    if trainer is not sampler and (both := set(trainers) & set(samplers)):
        raise ValueError(
            f"{words}: process {min(both)} would have devices of both; {counts}: give each process to one of the two, or"
            " all to both (mesh.sampler=null)"
        )
    if len(trainers) == 1:
        raise ValueError(
            f"{words}: process {trainers[0]} alone would train; {counts}: Orbax cannot save its checkpoints in a job of several"
            " processes: give the trainer devices of two or more, or start samplers apart from it (mode=detached)"
        )
    if idle := set(range(jax.process_count())) - {*trainers, *samplers}:
        raise ValueError(f"{words}: process {min(idle)} would have nothing to do; {counts}: use them all")
    if (owners := _parted_replica(np.asarray(sampler.devices))) is not None:
        raise ValueError(
            f"{words}: a sampler's replica, tensor={sampler.shape['tensor']}, would be of processes {owners}; it has to be"
            " within one"
        )


def _parse_axes(name: str, words: str) -> dict[str, int]:
    """``"fsdp=4,tensor=-1"`` -> sizes of all four axes."""
    pairs = [(axis, int(size)) for axis, size in (word.split("=") for word in words.split(","))]
    sizes = dict.fromkeys(AXES, 1) | dict(pairs)
    if len({axis for axis, _ in pairs}) < len(pairs):
        raise ValueError(f"{name}={words!r} names an axis twice; name each of {', '.join(AXES)} at most once")
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"{name}={words!r} has -1 more than once; only one axis can take all devices that are left")
    return sizes


def _make_mesh(
    name: str, words: str, sizes: dict[str, int], devices: Sequence[Any], *, has_replicas: bool = False
) -> Mesh:
    explicit = math.prod(size for size in sizes.values() if size != -1)
    takes_rest = -1 in sizes.values()
    if explicit > len(devices) or (takes_rest and len(devices) % explicit):
        problem = f"do not divide the {len(devices)} devices" if takes_rest else f"exceed the {len(devices)} devices"
        raise ValueError(
            f"{name}={words!r}: its explicit sizes multiply to {explicit} and {problem} that it may use; choose sizes"
            f" whose product {'divides' if takes_rest else 'is at most'} {len(devices)}, or use -1 for one axis"
        )
    shape = [len(devices) // explicit if size == -1 else size for size in sizes.values()]
    devices = devices[: math.prod(shape)]
    arranged = _arranged(name, words, devices, shape)
    if has_replicas and devices[0].platform == "tpu" and _parted_replica(arranged) is not None:
        arranged = _within_processes(devices, shape)
    return Mesh(arranged, AXES)


def _within_processes(devices: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    """Devices of a process one after the other, each beside its neighbour in the slice; processes in their order."""
    ordered: list[Any] = []
    for _, group in itertools.groupby(devices, key=lambda device: device.process_index):
        first, *rest = group
        ordered.append(first)
        while rest:
            here = ordered[-1].coords
            nearest = min(rest, key=lambda device: sum(abs(a - b) for a, b in zip(device.coords, here, strict=True)))
            rest.remove(nearest)
            ordered.append(nearest)
    return np.array(ordered, dtype=object).reshape(shape)


def _parted_replica(devices: np.ndarray) -> list[int] | None:
    """Processes of the first row of the last axis, ``tensor``, that is not within one; None where all are."""
    rows = devices.reshape(-1, devices.shape[-1])
    owners = ({device.process_index for device in row} for row in rows)
    return next((sorted(row) for row in owners if len(row) > 1), None)


def _arranged(name: str, words: str, devices: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    """Devices in the shape of a mesh: neighbours on its last axes are neighbours in a TPU slice, slices are apart.

    Devices that are not TPUs, or are no whole block of one, stay in their order.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if devices[0].platform != "tpu" or not all(_is_block(part) for part in slices.values()):
        return np.array(devices, dtype=object).reshape(shape)
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    for axis in range(len(BATCH_AXES)):
        if shape[axis] % len(slices) == 0:
            across = [len(slices) if i == axis else 1 for i in range(len(shape))]
            within = [size // parts for size, parts in zip(shape, across, strict=True)]
            return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    raise ValueError(
        f"{name}={words!r}: the devices are {len(slices)} slices, and only data or fsdp goes from one to another; give"
        f" one of them a multiple of {len(slices)}"
    )


def _is_block(devices: Sequence[Any]) -> bool:
    """Whether TPU devices fill a box of their slice."""
    coordinates = np.array([(*device.coords, device.core_on_chip) for device in devices])
    return int(np.prod(np.ptp(coordinates, axis=0) + 1)) == len(devices)


def shardings(abstract_params: Tree, mesh: Mesh, rules: Rules) -> Tree:
    """The sharding of each parameter, as a tree of the same structure with ``NamedSharding`` leaves.

    Reads the logical axes that each ``nnx.Variable`` carries as ``axes``. Leaves that are not variables (an
    optimizer's step count) are replicated. ``kv_heads`` that the mesh axis does not divide are replicated:
    grouped-query models have as few as 2 kv heads, and a copy of them per device is cheap. So are dimensions of size
    1.

    Raises:
        ValueError: another dimension is not divisible by its mesh axis; names the parameter.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, P())
        name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)

        def place(array: Any) -> NamedSharding:
            sizes = zip(leaf.axes, array.shape, strict=True)
            return NamedSharding(mesh, P(*[_mesh_axis(name, axis, size, mesh, rules) for axis, size in sizes]))

        return leaf.replace(jax.tree.map(place, leaf.get_value()))

    return jax.tree_util.tree_map_with_path(one, abstract_params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _mesh_axis(name: str, axis: str, size: int, mesh: Mesh, rules: Rules) -> str | None:
    mesh_axis = rules[axis]
    if mesh_axis is None or size % mesh.shape[mesh_axis] == 0:
        return mesh_axis
    if axis == "kv_heads" or size == 1:
        return None
    raise ValueError(
        f"parameter {name}: its {axis!r} dimension of {size} is not divisible by mesh axis {mesh_axis}="
        f"{mesh.shape[mesh_axis]}; choose a size of {mesh_axis} that divides {size}"
    )


def platform_of(mesh: Mesh | None) -> str:
    """Of a mesh's devices; None: of the default device."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def row_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def on_devices(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A function of the parts of its arguments that each device has (``jax.shard_map``).

    Inside another ``shard_map`` over some axes of the mesh it is over the others: the specs may name all of them.
    """
    context = jax.sharding.get_abstract_mesh()
    in_specs, out_specs = jax.tree.map(free_spec, (in_specs, out_specs), is_leaf=lambda x: isinstance(x, P))
    return jax.shard_map(
        function, mesh=mesh if context.empty else None, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def constrain(x: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
    """``x`` in a sharding, of which axes of a surrounding ``shard_map`` are left out."""
    context = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh if context.empty else context, free_spec(spec)))


def free_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """Mesh axes without those of a surrounding ``shard_map``, of which the code inside sees one part only."""
    taken = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in axes if axis not in taken)


def free_spec(spec: P) -> P:
    """A spec with ``free_axes`` alone."""
    return P(*(None if part is None else free_axes((part,) if isinstance(part, str) else part) for part in spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device of the mesh."""
    return NamedSharding(mesh, P())


def reshard(tree: Tree, target: Any, dtype: DTypeLike | None = None) -> Tree:
    """Copies a tree of ``jax.Array`` to a tree of shardings of the same mesh or another; bit-exact without ``dtype``.

    The copy never shares a buffer with the input: the train step donates its parameters, and a sampler that aliased
    them would read freed or changed memory. Floating leaves are cast to ``dtype`` before they travel: a bf16 sync
    moves half the bytes.
    """
    leaves, structure = jax.tree.flatten(tree)
    targets = tuple(structure.flatten_up_to(target))
    copy, is_there = copy_program(leaves, targets, dtype)
    if copy is not None:
        leaves = copy(leaves)
    # Never donate here: on CPU a donated device_put with equal partitioning crashes the process.
    return jax.tree.unflatten(structure, leaves if is_there else jax.device_put(leaves, list(targets)))


def copy_program(leaves: Sequence[Any], targets: Sequence[Any], dtype: DTypeLike | None) -> tuple[Any, bool]:
    """The jitted program (or None) that ``reshard`` runs on the leaves, and whether they need not travel after it."""
    sources = tuple(leaf.sharding for leaf in leaves)
    dtype = None if dtype is None else jnp.dtype(dtype)
    if _same_devices(sources, tuple(targets)):
        return _copy_fn(tuple(targets), dtype), True
    # Overlapping device sets: device_put may alias the shards that stay where they are, so copy first.
    is_disjoint = not set.union(*(s.device_set for s in sources)) & set.union(*(t.device_set for t in targets))
    return (_copy_fn(sources, dtype) if dtype is not None or not is_disjoint else None), False


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array, also of devices of several processes; these call it together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    mesh = array.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
    return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(mesh))(array))


def to_devices(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that each process has whole, on the devices of them all."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # device_put would compare the values of all processes of the job, also of those that only sample.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def placed(tree: Any, places: Any) -> Any:
    """The shapes of a tree with shardings, of which one may stand for a whole subtree: arguments to compile for."""

    def one(place: Any, part: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), part)

    return jax.tree.map(one, places, tree)


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of arrays, or of shapes that have shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _same_devices(sources: tuple[Any, ...], targets: tuple[Any, ...]) -> bool:
    """One jitted program can go from sources to targets: the same devices in the same order."""

    def order(sharding: Any) -> tuple[Any, ...]:
        if isinstance(sharding, NamedSharding):
            return tuple(np.asarray(sharding.mesh.devices).flat)
        return tuple(sharding.device_set) if len(sharding.device_set) == 1 else (sharding,)

    return len({order(sharding) for sharding in (*sources, *targets)}) == 1


@functools.lru_cache(maxsize=16)
def _copy_fn(targets: tuple[Any, ...], dtype: jnp.dtype | None) -> Callable[[list[Any]], list[Any]]:
    """Jitted copy (and cast); cached, so that a sync every few steps compiles once."""

    def copy(leaves: list[Any]) -> list[Any]:
        is_cast = [dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        return [leaf.astype(dtype) if cast else jnp.copy(leaf) for leaf, cast in zip(leaves, is_cast, strict=True)]

    return jax.jit(copy, out_shardings=list(targets))

"""Arrays from the devices of some processes to those of others, in one JAX job.

``jax.device_put`` does not serve: between processes it wants equal partitionings. Here the bits of a piece (a
parameter, or some layers of it) are laid out as rows of 16-bit words on the devices that have them, travel by one
collective permutation for each round, and are put together on the other mesh. No arithmetic is done on them, so that
-0.0 and NaNs arrive as they are, and nothing more than a piece is ever gathered on a device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt16

LANES = 1024
ROW_MULTIPLE = 16
"""Rows of a device's words: of a multiple of a TPU tile."""
COPIES = 4
"""Of a piece, that a device of the target holds while it is put together: compiled for TPUs, 3 to 4."""
SPLIT_AXES = ("fsdp", "tensor")
"""Mesh axes that parameters are split over; along the others each device has a copy."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter, or some of its layers."""

    leaf: int
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: P
    """On the source mesh."""
    is_stacked: bool
    """It is layers of a parameter, from one on that is said beside it."""


class Transfer:
    """Moves trees of one structure from a source mesh to a target mesh; no process has devices of both.

    Args:
        source: tree of ``nnx.Variable`` with ``jax.ShapeDtypeStruct``, with shardings on the source mesh.
        target: tree of shardings on the target mesh.
        chunk_bytes: about what a device needs beside the arrays; more for a larger layer, or parameter without layers.
        meet: called before each collective of both sides, which must not wait for each other in it.
    """

    def __init__(self, source: Any, target: Any, chunk_bytes: int, meet: Callable[[], None]):
        self._source, self._structure = jax.tree.flatten(source)
        self._targets = jax.tree.leaves(target)
        self._meet = meet
        self.pieces = _pieces(source, chunk_bytes)
        """With the first layer of each; parameters without layers first."""
        self._source_mesh, self._target_mesh = self._source[0].sharding.mesh, self._targets[0].mesh
        without_copies = tuple(slice(None) if axis in SPLIT_AXES else 0 for axis in self._source_mesh.axis_names)
        self._senders = np.asarray(self._source_mesh.devices)[without_copies].reshape(-1)
        self._receivers = np.asarray(self._target_mesh.devices).reshape(-1)
        self._union = Mesh(np.concatenate([self._senders, self._receivers]), ("device",))
        self._num_rounds = -(-len(self._senders) // len(self._receivers))
        self._pack = functools.cache(self._make_pack)
        self._unpack = functools.cache(self._make_unpack)

    def send(self, tree: Any) -> None:
        """The source's part: sends a tree; returns when it is gone."""
        leaves = jax.tree.leaves(tree)
        for start, piece in self.pieces:
            words = self._pack(piece)(leaves[piece.leaf], start)
            self._meet()
            self._move({shard.device: shard.data for shard in words.addressable_shards})

    def receive(self) -> Any:
        """The target's part: returns the tree in its shardings."""
        leaves: dict[int, Array] = {}
        for start, piece in self.pieces:
            rows = self._num_rows(piece)
            mine = [device for device in self._receivers if device.process_index == jax.process_index()]
            nothing = {device: jax.device_put(np.zeros((rows, LANES), np.uint16), device) for device in mine}
            self._meet()
            words = _assemble(self._received(rows), self._move(nothing))
            # Made when its first piece comes: large parameters without layers find room before the others are there.
            leaf = leaves.pop(piece.leaf, None)
            leaf = self._empty(piece.leaf) if leaf is None else leaf
            leaves[piece.leaf] = jax.block_until_ready(self._unpack(piece)(words, leaf, start))
        return jax.tree.unflatten(self._structure, [leaves[i] for i in range(len(leaves))])

    def programs(self, piece: Piece) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """The jitted programs of a piece, and the shapes of their arguments, to compile for."""
        start, rows, leaf = jax.ShapeDtypeStruct((), jnp.int32), self._num_rows(piece), self._source[piece.leaf]
        filled = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._targets[piece.leaf])
        return {
            "pack": (self._pack(piece), (leaf, start)),
            "move": (self._mover, (self._sent(rows),)),
            "unpack": (self._unpack(piece), (self._received(rows), filled, start)),
        }

    def _local_shape(self, piece: Piece) -> tuple[int, ...]:
        """Of a sender's part."""
        return NamedSharding(self._source_mesh, piece.spec).shard_shape(piece.shape)

    def _num_words(self, piece: Piece) -> int:
        return -(-math.prod(self._local_shape(piece)) * piece.dtype.itemsize // 2)

    def _num_rows(self, piece: Piece) -> int:
        return -(-self._num_words(piece) // (LANES * ROW_MULTIPLE)) * ROW_MULTIPLE

    def _sent(self, rows: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self._union, P("device"))
        return jax.ShapeDtypeStruct((self._union.size * rows, LANES), jnp.uint16, sharding=sharding)

    def _received(self, rows: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self._target_mesh, P(self._target_mesh.axis_names))
        shape = (len(self._receivers) * self._num_rounds * rows, LANES)
        return jax.ShapeDtypeStruct(shape, jnp.uint16, sharding=sharding)

    def _move(self, parts: dict[Any, Array]) -> dict[Any, Array]:
        """The collective: what each sender has goes to a receiver. Devices that are neither have no part in it."""
        rows = next(iter(parts.values())).shape[0]
        sent = self._sent(rows)
        if not sent.sharding.addressable_devices:
            return {}
        moved = jax.block_until_ready(self._mover(_assemble(sent, parts)))
        return {shard.device: shard.data for shard in moved.addressable_shards}

    @functools.cached_property
    def _mover(self) -> Any:
        """Jitted: what comes to a receiver in each round, one below the other."""
        num_senders, num_receivers = len(self._senders), len(self._receivers)

        def move(words: UInt16[Array, "rows lanes"]) -> UInt16[Array, "all_rows lanes"]:
            arrived = []
            for first in range(0, num_senders, num_receivers):
                pairs = [(i, num_senders + i - first) for i in range(first, min(first + num_receivers, num_senders))]
                arrived.append(jax.lax.ppermute(words, "device", pairs))
            return jnp.concatenate(arrived)

        return jax.jit(
            jax.shard_map(move, mesh=self._union, in_specs=P("device"), out_specs=P("device"), check_vma=False)
        )

    def _make_pack(self, piece: Piece) -> Any:
        """Jitted ``(parameter, first layer) -> [devices * rows, LANES]``; no device reads another's memory."""
        num_words = self._num_rows(piece) * LANES

        def pack(leaf: Array, start: Array) -> UInt16[Array, "rows lanes"]:
            bits = _bits(leaf)
            if piece.is_stacked:
                bits = jax.lax.dynamic_slice_in_dim(bits, start, piece.shape[0])
            words = _to_words(bits)
            return jnp.pad(words, (0, num_words - words.size)).reshape(-1, LANES)

        rows = P(self._source_mesh.axis_names)
        return jax.jit(
            jax.shard_map(pack, mesh=self._source_mesh, in_specs=(piece.spec, P()), out_specs=rows, check_vma=False)
        )

    def _make_unpack(self, piece: Piece) -> Any:
        """Jitted ``(words, parameter, first layer) -> parameter`` with the piece in place; the parameter is donated."""
        target, num_words = self._targets[piece.leaf], self._num_words(piece)

        def unpack(words: UInt16[Array, "rows lanes"], leaf: Array, start: Array) -> Array:
            bits = self._own_part(words.reshape(self._num_rounds, -1)[:, :num_words], piece, target.spec)
            if piece.is_stacked:
                bits = jax.lax.dynamic_update_slice_in_dim(_bits(leaf), bits, start, 0)
            return jax.lax.bitcast_convert_type(bits, piece.dtype)

        words = P(self._target_mesh.axis_names)
        specs = (words, target.spec, P())
        mapped = jax.shard_map(unpack, mesh=self._target_mesh, in_specs=specs, out_specs=target.spec, check_vma=False)
        return jax.jit(mapped, out_shardings=target, donate_argnums=1)

    def _own_part(self, words: UInt16[Array, "rounds words"], piece: Piece, spec: P) -> Array:
        """On a device of the target: its part of a piece, of which each has the words of one sender of each round."""
        gathered = jax.lax.all_gather(words, self._target_mesh.axis_names, axis=1)
        by_sender = gathered.reshape(-1, words.shape[1])[: len(self._senders)]
        local = self._local_shape(piece)
        sizes = [self._source_mesh.shape[axis] for axis in SPLIT_AXES]
        parts = _from_words(by_sender, local, piece.dtype.itemsize).reshape(*sizes, *local)
        # First the axis that the target splits too, then its own part of it, then the other: little is put together.
        parts = _merged(parts, 1, piece.spec)
        if "tensor" in spec:
            dim = tuple(spec).index("tensor") + 1
            size = parts.shape[dim] // self._target_mesh.shape["tensor"]
            parts = jax.lax.dynamic_slice_in_dim(parts, jax.lax.axis_index("tensor") * size, size, dim)
        return _merged(parts, 0, piece.spec)

    def _empty(self, leaf: int) -> Array:
        shape, dtype = self._source[leaf].shape, self._source[leaf].dtype
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=self._targets[leaf])()


def _pieces(source: Any, chunk_bytes: int) -> list[tuple[int, Piece]]:
    """First layer and piece: parameters that have no layers, then those that have, as many layers at once as may be."""
    whole: list[tuple[int, Piece]] = []
    stacked: list[tuple[int, Piece]] = []
    for variable in jax.tree.leaves(source, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        for leaf in jax.tree.leaves(variable):
            number, is_stacked = len(whole) + len({piece.leaf for _, piece in stacked}), variable.axes[0] == "layers"
            piece = Piece(number, leaf.shape, leaf.dtype, leaf.sharding.spec, is_stacked=is_stacked)
            if not is_stacked:
                whole.append((0, piece))
                continue
            num_layers = leaf.shape[0]
            num_bytes = math.prod(leaf.shape) * leaf.dtype.itemsize
            at_once = max(1, chunk_bytes * num_layers // (COPIES * num_bytes))
            for start in range(0, num_layers, at_once):
                shape = (min(at_once, num_layers - start), *leaf.shape[1:])
                stacked.append((start, dataclasses.replace(piece, shape=shape)))
    return whole + stacked


def _assemble(like: jax.ShapeDtypeStruct, parts: dict[Any, Array]) -> Array:
    """A global array of what lies on this process's devices."""
    mine = [parts[device] for device in like.sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, mine, dtype=like.dtype)


def _bits(array: Array) -> Array:
    """As unsigned integers of the same width: compilers change NaNs, and widen bfloat16, where they see floats."""
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def _to_words(bits: Array) -> UInt16[Array, "words"]:
    """Bits in words: of 32-bit numbers all low halves before all high ones, of bytes two in a word."""
    bits = bits.reshape(-1)
    if bits.dtype.itemsize == 2:
        return bits
    if bits.dtype.itemsize == 4:
        return jnp.concatenate([bits.astype(jnp.uint16), (bits >> 16).astype(jnp.uint16)])
    low, high = jnp.pad(bits, (0, bits.size % 2)).astype(jnp.uint16).reshape(2, -1)
    return low | high << 8


def _from_words(words: UInt16[Array, "senders words"], shape: tuple[int, ...], itemsize: int) -> Array:
    """``_to_words`` backwards: ``[senders, *shape]``."""
    if itemsize == 2:
        bits = words
    elif itemsize == 4:
        low, high = jnp.split(words.astype(jnp.uint32), 2, axis=1)
        bits = low | high << 16
    else:
        bits = jnp.concatenate([words & 0xFF, words >> 8], axis=1).astype(jnp.uint8)[:, : math.prod(shape)]
    return bits.reshape(-1, *shape)


def _merged(parts: Array, axis: int, spec: P) -> Array:
    """Parts along the mesh axis ``SPLIT_AXES[axis]``, one after the other in the dimension that it splits.

    ``parts`` has the mesh axes up to this one, then the dimensions of a part. Where ``spec`` lacks the axis, they are
    copies.
    """
    if SPLIT_AXES[axis] not in spec:
        return jax.lax.index_in_dim(parts, 0, axis, keepdims=False)
    dim = axis + tuple(spec).index(SPLIT_AXES[axis])
    moved = jnp.moveaxis(parts, axis, dim)
    return moved.reshape(*moved.shape[:dim], -1, *moved.shape[dim + 2 :])

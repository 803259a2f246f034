"""Arrays from the devices of some processes to those of others, in one JAX job.

``jax.device_put`` does not serve: between processes it wants equal partitionings. Here the bits of a chunk are laid
out as rows of 16-bit words on the devices that have them, travel by one collective permutation for each round, and are
put together on the other mesh. No arithmetic is done on them, so that -0.0 and NaNs arrive as they are. Beside the old
and the new arrays a device holds one chunk: nothing is gathered whole but a chunk of layers.
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
"""Rows of a device's part: of a multiple of a TPU tile."""
SPLIT_AXES = ("fsdp", "tensor")
"""Mesh axes that parameters are split over; along the others each device has a copy."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter, or some of its layers."""

    leaf: int
    shape: tuple[int, ...]
    """Of the piece."""
    dtype: np.dtype
    spec: P
    """On the source mesh."""
    is_stacked: bool
    """It is layers of a parameter, from a place on that the chunk says."""


class Transfer:
    """Moves trees of one structure from a source mesh to a target mesh; no process has devices of both.

    Args:
        source: tree of ``nnx.Variable`` with ``jax.ShapeDtypeStruct``, with shardings on the source mesh.
        target: tree of shardings on the target mesh.
        chunk_bytes: of a chunk at most, but for a single layer, or a single parameter that has none.
        meet: called before each collective of both sides, which must not wait for each other in it.
    """

    def __init__(self, source: Any, target: Any, chunk_bytes: int, meet: Callable[[], None]):
        self._source, self._structure = jax.tree.flatten(source)
        self._targets = jax.tree.leaves(target)
        self._meet = meet
        self.chunks = _chunks(source, chunk_bytes)
        """First layer and pieces of each."""
        self._source_mesh = self._source[0].sharding.mesh
        without_copies = tuple(slice(None) if axis in SPLIT_AXES else 0 for axis in self._source_mesh.axis_names)
        self._senders = np.asarray(self._source_mesh.devices)[without_copies].reshape(-1)
        self._receivers = np.asarray(self._targets[0].mesh.devices).reshape(-1)
        self._union = Mesh(np.concatenate([self._senders, self._receivers]), ("device",))
        self._num_rounds = -(-len(self._senders) // len(self._receivers))
        self._packs: dict[tuple[Piece, ...], Any] = {}
        self._unpacks: dict[tuple[Piece, ...], Any] = {}

    def send(self, tree: Any) -> None:
        """The source's part: sends a tree; returns when it is gone."""
        leaves = jax.tree.leaves(tree)
        for start, pieces in self.chunks:
            words = self._pack(pieces)([leaves[piece.leaf] for piece in pieces], start)
            self._meet()
            self._move({shard.device: shard.data for shard in words.addressable_shards})

    def receive(self) -> Any:
        """The target's part: returns the tree in its shardings."""
        leaves = self._empty()
        for start, pieces in self.chunks:
            rows = self._num_rows(pieces)
            mine = [device for device in self._receivers if device.process_index == jax.process_index()]
            nothing = {device: jax.device_put(np.zeros((rows, LANES), np.uint16), device) for device in mine}
            self._meet()
            words = _assemble(self._received(rows), self._move(nothing))
            filled = self._unpack(pieces)(words, [leaves[piece.leaf] for piece in pieces], start)
            for piece, leaf in zip(pieces, jax.block_until_ready(filled), strict=True):
                leaves[piece.leaf] = leaf
        return jax.tree.unflatten(self._structure, leaves)

    def programs(self, pieces: tuple[Piece, ...]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """The jitted programs of a chunk, and the shapes of their arguments, to compile for."""
        start, rows = jax.ShapeDtypeStruct((), jnp.int32), self._num_rows(pieces)
        leaves = [self._source[piece.leaf] for piece in pieces]
        targets = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._targets[piece.leaf])
            for piece, leaf in zip(pieces, leaves, strict=True)
        ]
        return {
            "pack": (self._pack(pieces), (leaves, start)),
            "move": (self._mover, (self._sent(rows),)),
            "unpack": (self._unpack(pieces), (self._received(rows), targets, start)),
        }

    def _local_shape(self, piece: Piece) -> tuple[int, ...]:
        """Of a sender's part."""
        return NamedSharding(self._source_mesh, piece.spec).shard_shape(piece.shape)

    def _num_rows(self, pieces: tuple[Piece, ...]) -> int:
        """Rows of words of a sender's part of a chunk."""
        words = sum(_num_words(self._local_shape(piece), piece.dtype) for piece in pieces)
        return -(-words // (LANES * ROW_MULTIPLE)) * ROW_MULTIPLE

    def _sent(self, rows: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self._union, P("device"))
        return jax.ShapeDtypeStruct((self._union.size * rows, LANES), jnp.uint16, sharding=sharding)

    def _received(self, rows: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(Mesh(self._receivers, ("device",)), P("device"))
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

    def _pack(self, pieces: tuple[Piece, ...]) -> Any:
        """Jitted ``(leaves, first layer) -> [devices * rows, LANES]``; no device reads another's memory."""
        if pieces in self._packs:
            return self._packs[pieces]
        num_words = self._num_rows(pieces) * LANES

        def pack(leaves: list[Array], start: Array) -> UInt16[Array, "rows lanes"]:
            parts = [
                jax.lax.dynamic_slice_in_dim(bits, start, piece.shape[0]) if piece.is_stacked else bits
                for piece, bits in zip(pieces, map(_bits, leaves), strict=True)
            ]
            words = jnp.concatenate([_to_words(part) for part in parts])
            return jnp.pad(words, (0, num_words - words.size)).reshape(-1, LANES)

        specs = [piece.spec for piece in pieces]
        rows = P(self._source_mesh.axis_names)
        self._packs[pieces] = jax.jit(
            jax.shard_map(pack, mesh=self._source_mesh, in_specs=(specs, P()), out_specs=rows, check_vma=False)
        )
        return self._packs[pieces]

    def _unpack(self, pieces: tuple[Piece, ...]) -> Any:
        """Jitted ``(words, leaves, first layer) -> leaves`` with the pieces in place; the leaves are donated."""
        if pieces in self._unpacks:
            return self._unpacks[pieces]
        num_senders, num_receivers = len(self._senders), len(self._receivers)
        sizes = [self._source_mesh.shape[axis] for axis in SPLIT_AXES]
        receivers = Mesh(self._receivers, ("device",))

        def unpack(words: UInt16[Array, "rows lanes"], leaves: list[Array], start: Array) -> list[Array]:
            # Any receiver may need a part of any sender: all of them get the chunk, and keep what is theirs.
            words = jax.lax.with_sharding_constraint(words, NamedSharding(receivers, P()))
            # A receiver had the words of one sender of each round.
            by_sender = words.reshape(num_receivers, self._num_rounds, -1).swapaxes(0, 1)
            by_sender = by_sender.reshape(num_receivers * self._num_rounds, -1)[:num_senders]
            filled, offset = [], 0
            for piece, leaf in zip(pieces, leaves, strict=True):
                local = self._local_shape(piece)
                end = offset + _num_words(local, piece.dtype)
                parts = _from_words(by_sender[:, offset:end], local, piece.dtype.itemsize)
                bits = _joined(parts.reshape(*sizes, *local), piece.spec)
                if piece.is_stacked:
                    bits = jax.lax.dynamic_update_slice_in_dim(_bits(leaf), bits, start, 0)
                filled.append(jax.lax.bitcast_convert_type(bits, piece.dtype))
                offset = end
            return filled

        placed = [self._targets[piece.leaf] for piece in pieces]
        self._unpacks[pieces] = jax.jit(unpack, out_shardings=placed, donate_argnums=1)
        return self._unpacks[pieces]

    def _empty(self) -> list[Array]:
        """What is filled."""

        def zeros() -> list[Array]:
            return [jnp.zeros(leaf.shape, leaf.dtype) for leaf in self._source]

        return jax.jit(zeros, out_shardings=self._targets)()


def _chunks(source: Any, chunk_bytes: int) -> list[tuple[int, tuple[Piece, ...]]]:
    """First layer and pieces of each chunk: parameters that have no layers, or some layers of all that have."""
    pieces = []
    for variable in jax.tree.leaves(source, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        for leaf in jax.tree.leaves(variable):
            is_stacked = variable.axes[0] == "layers"
            pieces.append(Piece(len(pieces), leaf.shape, leaf.dtype, leaf.sharding.spec, is_stacked=is_stacked))
    chunks: list[tuple[int, tuple[Piece, ...]]] = []
    whole: list[Piece] = []
    for piece in pieces:
        if not piece.is_stacked:
            if whole and sum(map(_num_bytes, [*whole, piece])) > chunk_bytes:
                chunks.append((0, tuple(whole)))
                whole = []
            whole.append(piece)
    chunks.append((0, tuple(whole)))
    stacked = [piece for piece in pieces if piece.is_stacked]
    num_layers = stacked[0].shape[0]
    layers_at_once = max(1, chunk_bytes * num_layers // sum(map(_num_bytes, stacked)))
    for start in range(0, num_layers, layers_at_once):
        number = min(layers_at_once, num_layers - start)
        chunks.append((start, tuple(dataclasses.replace(p, shape=(number, *p.shape[1:])) for p in stacked)))
    return chunks


def _num_bytes(piece: Piece) -> int:
    return math.prod(piece.shape) * piece.dtype.itemsize


def _assemble(like: jax.ShapeDtypeStruct, parts: dict[Any, Array]) -> Array:
    """A global array of what lies on this process's devices."""
    mine = [parts[device] for device in like.sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, mine, dtype=like.dtype)


def _num_words(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // 2)


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


def _joined(parts: Array, spec: P) -> Array:
    """The whole of parts ``[fsdp, tensor, *local shape]``: copies are dropped, the others put one after the other."""
    for axis in reversed(range(len(SPLIT_AXES))):
        dims = [dim for dim, name in enumerate(spec) if name == SPLIT_AXES[axis]]
        if not dims:
            parts = jax.lax.index_in_dim(parts, 0, axis, keepdims=False)
            continue
        (dim,) = dims
        moved = jnp.moveaxis(parts, axis, axis + dim)
        parts = moved.reshape(*moved.shape[: axis + dim], -1, *moved.shape[axis + dim + 2 :])
    return parts

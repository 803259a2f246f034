"""The weight sync: the trainer's parameters to the sampler's mesh, sharding and precision."""

import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from oapl_jax.distributed.sharding import SAMPLER_RULES, Rules, copy_program, device_bytes, reshard, shardings
from oapl_jax.model import lora
from oapl_jax.model.quantized import quantize_weights
from oapl_jax.types import Metrics

Path = tuple[Any, ...]


class WeightSync:
    """Copies parameters for the sampler, chunk by chunk; the copy never shares memory with the trainer's.

    They take the sampler's precision on the trainer's devices, before they travel: an int8 sampler costs
    a quarter of the bytes of float32 between meshes, and never holds the floats. Adapters are merged there.
    A chunk is in place before the next is begun, so no device holds more than one beside the old and the new weights.
    For a sampler of other processes the copy is made on the trainer's own mesh, and goes from there (``transfer.py``).

    ``abstract_params`` are the trainer's, ``mesh`` is the sampler's or the trainer's own, ``rules`` are that mesh's; the
    ``dtype`` int8 is that of matrices (``quantize_weights``). A chunk has at most ``chunk_mib`` MiB on a device, but for a
    single larger parameter (of all layers).
    """

    def __init__(
        self, abstract_params: Any, mesh: Mesh, dtype: DTypeLike, chunk_mib: int = 1024, rules: Rules = SAMPLER_RULES
    ):
        is_int8, has_adapters = jnp.dtype(dtype) == jnp.int8, lora.has_adapters(abstract_params)
        self._dtype = None if is_int8 else dtype

        def convert(params: Any) -> Any:
            params = lora.merged(params) if has_adapters else params
            return quantize_weights(params) if is_int8 else jax.tree.map(lambda leaf: leaf.astype(dtype), params)

        self._convert = jax.jit(convert) if is_int8 or has_adapters else None
        self.shardings = shardings(self._sampler_shapes(abstract_params), mesh, rules)
        self.chunks = _chunks(self.abstract(abstract_params), chunk_mib * 2**20)

    def abstract(self, abstract_params: Any) -> Any:
        """Shapes, dtype and shardings of what ``__call__`` returns, for loading a checkpoint of it."""

        def one(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype if self._dtype is None else self._dtype, sharding=sharding
            )

        return jax.tree.map(one, self._sampler_shapes(abstract_params), self.shardings)

    def __call__(self, params: Any) -> tuple[Any, Metrics]:
        """Returns the sampler's copy, complete on its devices, and the sync's metrics."""
        start = time.perf_counter()
        copied: dict[Path, Any] = {}
        for chunk in self.chunks:
            part, target = _select(params, chunk), _select(self.shardings, chunk)
            part = part if self._convert is None else self._convert(part)
            copied |= dict(nnx.to_flat_state(jax.block_until_ready(reshard(part, target, self._dtype))))
        whole = nnx.from_flat_state(copied)
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
        return whole, {"sync/seconds": time.perf_counter() - start, "sync/bytes": num_bytes}

    def program(self, params: Any) -> tuple[Any, Any] | None:
        """The jitted program of the largest chunk and its argument, to compile for; None where there is only a transfer.

        A sync to int8, or of adapters, is two programs; this is the one that holds the floats. ``params`` are shapes
        with shardings on the trainer's mesh.
        """
        chunk = max(self.chunks, key=lambda chunk: device_bytes(_select(params, chunk)))
        part = _select(params, chunk)
        if self._convert is not None:
            return self._convert, part
        leaves = jax.tree.leaves(part)
        copy, _ = copy_program(leaves, jax.tree.leaves(_select(self.shardings, chunk)), self._dtype)
        return None if copy is None else (copy, leaves)

    def _sampler_shapes(self, abstract_params: Any) -> Any:
        return abstract_params if self._convert is None else jax.eval_shape(self._convert, abstract_params)


def _select(params: Any, chunk: frozenset[Path]) -> Any:
    """The parameters of a chunk, their adapters included."""
    leaves = nnx.to_flat_state(params)
    return nnx.from_flat_state({path: leaf for path, leaf in leaves if lora.merged_path(path, leaf) in chunk})


def _chunks(abstract_params: Any, limit: int) -> list[frozenset[Path]]:
    """Paths of the sampler's parameters, in groups of at most ``limit`` bytes a device."""
    chunks: list[list[Path]] = []
    free = 0
    for path, leaf in nnx.to_flat_state(abstract_params):
        size = device_bytes(leaf)
        if size > free:
            chunks.append([])
            free = limit
        chunks[-1].append(path)
        free -= size
    return [frozenset(chunk) for chunk in chunks]

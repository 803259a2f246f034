"""The weight sync: the trainer's parameters to the sampler's mesh, sharding and precision."""

import time
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from oapl_jax.sharding import SAMPLER_RULES, reshard, shardings
from oapl_jax.types import Metrics


class WeightSync:
    """Copies parameters for the sampler; the copy never shares memory with the trainer's.

    Args:
        abstract_params: the trainer's parameters, for their logical axes and shapes.
        sampler_mesh: where the sampler runs; may be the trainer's own mesh.
        dtype: precision of the sampler's weights.
    """

    def __init__(self, abstract_params: Any, sampler_mesh: Mesh, dtype: DTypeLike):
        self.shardings = shardings(abstract_params, sampler_mesh, SAMPLER_RULES)
        self._dtype = dtype

    def abstract(self, abstract_params: Any) -> Any:
        """Shapes, dtype and shardings of what ``__call__`` returns, for loading a checkpoint of it."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, self._dtype, sharding=sharding),
            abstract_params,
            self.shardings,
        )

    def __call__(self, params: Any) -> tuple[Any, Metrics]:
        """Returns the sampler's copy, complete on its devices, and the sync's metrics."""
        start = time.perf_counter()
        copied = jax.block_until_ready(reshard(params, self.shardings, self._dtype))
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(copied))
        return copied, {"sync/seconds": time.perf_counter() - start, "sync/bytes": num_bytes}

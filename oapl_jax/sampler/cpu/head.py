"""The output matrix of a decode step on a CPU: a row for each id, read in the order of memory.

The draw takes logits with ids first, ``[V, B]``. With few sequences a CPU is fastest where the product goes through a
matrix ``[V, D]`` row by row. That is the embedding where it is tied, and a transposed copy of the output matrix elsewhere.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.model.quantized import Int8
from oapl_jax.model.qwen import Qwen


def head_by_id(model: Qwen) -> Float[Array, "V D"] | None:
    """The output matrix, ids first; None where it is quantised."""
    head = model.embedding if model.lm_head is None else model.lm_head
    if isinstance(head.get_value(), Int8):
        return None
    return head[...] if model.lm_head is None else head[...].T


def logits_by_id(hidden: Float[Array, "B D"], head: Float[Array, "V D"]) -> Float[Array, "V B"]:
    """Float32 logits of one token a sequence; ``head`` is of ``head_by_id``."""
    with jax.named_scope("logits"):
        return jnp.einsum("VD,BD->VB", head.astype(hidden.dtype), hidden, preferred_element_type=jnp.float32)

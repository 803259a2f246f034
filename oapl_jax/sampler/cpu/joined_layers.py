"""The weights of a policy for many steps of few tokens: layers apart from their stack, fewer products, the head by id.

A scan cuts each layer out of the stack before it multiplies: in a decode step that reads the weights twice and writes
them once. A step on a CPU also pays for every product that it starts. So the layers are copied out of the stack once
for each policy version, with the matrices that multiply the same activations joined, for a CPU and for a single GPU.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from oapl_jax.model.matmul import einsum
from oapl_jax.model.quantized import Int8
from oapl_jax.model.qwen import Attention, Layer, Mlp, Qwen, layer_params, project_heads


class JoinedAttention(Attention):
    """An ``Attention`` that has queries, keys and values from one product."""

    def __init__(self, attention: Attention) -> None:
        self.eps, self.output = attention.eps, attention.output
        self.query_norm, self.key_norm = attention.query_norm, attention.key_norm
        self.num_heads, self.num_kv_heads = (p.get_value().shape[1] for p in (attention.query, attention.key))
        self.qkv = _join(attention.query, attention.key, attention.value, axis=-2)
        biases = attention.query_bias, attention.key_bias, attention.value_bias
        self.qkv_bias = None if attention.query_bias is None else _join(*biases, axis=-2)

    def project(self, x: Array) -> Sequence[Array]:
        """Queries ``[B, T, H, C]``, keys and values ``[B, T, K, C]``, before norm and rope."""
        heads = project_heads(x, self.qkv, self.qkv_bias)
        return jnp.split(heads, (self.num_heads, self.num_heads + self.num_kv_heads), axis=2)


class JoinedMlp(Mlp):
    """An ``Mlp`` that has gate and up from one product."""

    def __init__(self, mlp: Mlp) -> None:
        self.gate_up, self.down = _join(mlp.gate, mlp.up, axis=-1), mlp.down

    def project(self, x: Array) -> Sequence[Array]:
        """Gate and up, ``[B, T, F]`` each."""
        return jnp.split(einsum("BTD,DF->BTF", x, self.gate_up), 2, axis=-1)


def join_layers(model: Qwen) -> list[Layer]:
    """Copies of a model's layers, joined."""
    graphdef, stacked = nnx.split(model.layers)
    layers = [nnx.merge(graphdef, layer_params(stacked, i)) for i in range(model.config.num_hidden_layers)]
    for layer in layers:
        layer.attention = JoinedAttention(layer.attention)
        if isinstance(layer.mlp, Mlp):
            layer.mlp = JoinedMlp(layer.mlp)
    return layers


def _join(*matrices: Any, axis: int) -> nnx.Param:
    """Matrices that multiply the same activations, float or ``Int8``, side by side as one."""
    values = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis), *[matrix.get_value() for matrix in matrices])
    return matrices[0].replace(values)


def head_by_id(model: Qwen) -> Float[Array, "V D"] | None:
    """The output matrix, ids first, which a CPU reads fastest for the draw's ``[V, B]``; None where it is quantised."""
    head = model.embedding if model.lm_head is None else model.lm_head
    if isinstance(head.get_value(), Int8):
        return None
    return head[...] if model.lm_head is None else head[...].T


def logits_by_id(hidden: Float[Array, "B D"], head: Float[Array, "V D"]) -> Float[Array, "V B"]:
    """Float32 logits of one token a sequence."""
    with jax.named_scope("logits"):
        return jnp.einsum("VD,BD->VB", head.astype(hidden.dtype), hidden, preferred_element_type=jnp.float32)

"""The weights of a policy for many steps of few tokens: layers apart from their stack, fewer products, the head by id.

A scan cuts each layer out of the stack before it multiplies: in a decode step that reads the weights twice and writes
them once. A step on a CPU also pays for every product that it starts. So the layers are copied out of the stack once
for each policy version, with the matrices that multiply the same activations joined, for a CPU and for a single GPU.
For a large model on a CPU the products are what costs, and the layers stay in the memory of the stack, unjoined.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def split_layers(model: Qwen) -> list[Layer]:
    """Copies of a model's layers, apart."""
    graphdef, stacked = nnx.split(model.layers)
    return [nnx.merge(graphdef, layer_params(stacked, i)) for i in range(model.config.num_hidden_layers)]


def join_layers(model: Qwen) -> list[Layer]:
    """Copies of a model's layers, joined."""
    layers = split_layers(model)
    for layer in layers:
        layer.attention = JoinedAttention(layer.attention)
        if isinstance(layer.mlp, Mlp):
            layer.mlp = JoinedMlp(layer.mlp)
    return layers


def layers_in_place(model: Qwen) -> list[Layer]:
    """A model's layers, apart, in the memory of their stack, which lies on one CPU device and is not donated."""
    graphdef, stacked = nnx.split(model.layers)
    device = next(iter(jax.tree.leaves(stacked)[0].devices()))
    host = jax.tree.map(np.asarray, stacked)  # the device is the host: neither this nor the way back copies
    layers = [jax.device_put(layer_params(host, i), device) for i in range(model.config.num_hidden_layers)]
    return [nnx.merge(graphdef, layer) for layer in layers]


def _join(*matrices: Any, axis: int) -> nnx.Param:
    """Matrices that multiply the same activations, float or ``Int8``, side by side as one."""
    values = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis), *[matrix.get_value() for matrix in matrices])
    return matrices[0].replace(values)


def turned_head(model: Qwen) -> Float[Array, "V D"] | None:
    """For ``head_by_id``, once for each policy version; None where the embedding is tied, or the matrix quantised."""
    head = model.lm_head
    return None if head is None or isinstance(head.get_value(), Int8) else head[...].T


def head_by_id(model: Qwen, turned: Float[Array, "V D"] | None) -> Float[Array, "V D"] | None:
    """The output matrix, ids first, which a CPU reads fastest for the draw's ``[V, B]``; None where it is quantised."""
    if model.lm_head is not None:
        return turned
    return None if isinstance(model.embedding.get_value(), Int8) else model.embedding[...]


def logits_by_id(hidden: Float[Array, "B D"], head: Float[Array, "V D"]) -> Float[Array, "V B"]:
    """Float32 logits of one token a sequence."""
    with jax.named_scope("logits"):
        return jnp.einsum("VD,BD->VB", head.astype(hidden.dtype), hidden, preferred_element_type=jnp.float32)

"""Low-rank adapters (LoRA, arXiv 2106.09685): two thin matrices beside a frozen one are trained in its place.

A target's parameter ``W`` in the tree of ``nnx.split(Qwen(...))[1]`` becomes three: ``base`` (W, frozen), ``down`` and
``up``; the layer multiplies by ``base + alpha / rank * down @ up`` without making that matrix. ``merged`` makes it, for
the sampler and for exports, whose trees are those of a model without adapters.

qwix and ``nnx.LoRA`` wrap one matrix of a module; ours are stacked over layers, and keep heads as a dimension.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from oapl_jax.config.model import LoraConfig
from oapl_jax.model.quantized import CONTRACTED, STACKED

MODULES = {
    "q_proj": ("attention", "query"),
    "k_proj": ("attention", "key"),
    "v_proj": ("attention", "value"),
    "o_proj": ("attention", "output"),
    "gate_proj": ("mlp", "gate"),
    "up_proj": ("mlp", "up"),
    "down_proj": ("mlp", "down"),
}
"""Hugging Face's name of a layer's matrix -> where it is in ``Layer``."""


class LowRank(nnx.Module):
    """A matrix with an adapter.

    Attributes:
        base: the frozen parameter, ``[layers, *inputs, *outputs]``.
        down: ``[layers, *inputs, rank]``, float32; uniform as in PEFT, variance 1 / (3 inputs).
        up: ``[layers, rank, *outputs]``, float32; zeros: training starts at the base. Its ``scale`` is alpha / rank.
    """

    def __init__(self, base: nnx.Param, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
        axes = dict(zip(base.axes, base.shape, strict=True))
        stacked = {axis: size for axis, size in axes.items() if axis in STACKED}
        summed = CONTRACTED[tuple(axis for axis in axes if axis not in STACKED)]
        inputs = {axis: size for axis, size in axes.items() if axis in summed}
        outputs = {axis: size for axis, size in axes.items() if axis not in stacked | inputs}
        limit = 1 / math.sqrt(math.prod(inputs.values()))
        self.base = base
        down, up = stacked | inputs | {"rank": rank}, stacked | {"rank": rank} | outputs
        numbers = jax.random.uniform(rngs.params(), tuple(down.values()), jnp.float32, -limit, limit)
        self.down = nnx.LoRAParam(numbers, axes=tuple(down))
        self.up = nnx.LoRAParam(jnp.zeros(tuple(up.values()), jnp.float32), axes=tuple(up), scale=alpha / rank)


def adapt(layer: Any, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Puts a ``LowRank`` in the place of each target of a ``Layer``; raises ValueError for a mixture of experts."""
    for target in config.targets:
        module_name, name = MODULES[target]
        module = getattr(layer, module_name)
        base = getattr(module, name)
        if "experts" in base.axes:
            raise ValueError(f"lora.targets: {target} of a mixture of experts is not implemented; remove it")
        setattr(module, name, LowRank(base, config.rank, config.alpha, rngs))


def trained(params: Any) -> Any:
    """The part of a policy's parameters that training changes: the adapters; without any, everything."""
    return nnx.split_state(params, nnx.LoRAParam, ...)[0] if has_adapters(params) else params


def with_trained(params: Any, new: Any) -> Any:
    """The policy whose trained part, see ``trained``, is another."""
    return nnx.merge_state(nnx.split_state(params, nnx.LoRAParam, ...)[1], new) if has_adapters(params) else new


def base_policy(params: Any) -> Any:
    """The policy that training started from, of one with adapters: theirs are zero, and it shares what is frozen."""
    return with_trained(params, jax.tree.map(jnp.zeros_like, trained(params)))


def attached(base: Any, adapters: Any) -> Any:
    """The parameters of a policy with adapters, of those without and ``trained`` ones."""
    adapted = {path[:-1] for path, _ in nnx.to_flat_state(adapters)}
    moved = [((*path, "base") if path in adapted else path, leaf) for path, leaf in nnx.to_flat_state(base)]
    return nnx.merge_state(nnx.from_flat_state(moved), adapters)


def merged(params: Any) -> Any:
    """The parameters of the same policy as a model without adapters has them; computed in float32, for ``jit``."""
    leaves = dict(nnx.to_flat_state(params))
    plain = {}
    for path, leaf in leaves.items():
        if path[-1] == "base":
            down, up = leaves[(*path[:-1], "down")], leaves[(*path[:-1], "up")]
            plain[path[:-1]] = leaf.replace(_merge(leaf.get_value(), down, up))
        elif not isinstance(leaf, nnx.LoRAParam):
            plain[path] = leaf
    return nnx.from_flat_state(plain)


def merged_path(path: tuple[Any, ...], leaf: Any) -> tuple[Any, ...]:
    """Where in the tree of ``merged`` a parameter goes."""
    return path[:-1] if isinstance(leaf, nnx.LoRAParam) or path[-1] == "base" else path


def has_adapters(params: Any) -> bool:
    """Whether the tree of a policy has any."""
    return any(isinstance(leaf, nnx.LoRAParam) for _, leaf in nnx.to_flat_state(params))


def _merge(base: Array, down: nnx.Variable, up: nnx.Variable) -> Array:
    inputs, outputs = "abc"[: down.axes.index("rank") - 1], "xyz"[: len(up.axes) - 2]
    product = jnp.einsum(f"l{inputs}r,lr{outputs}->l{inputs}{outputs}", down.get_value(), up.get_value())
    return (base.astype(jnp.float32) + up.scale * product).astype(base.dtype)

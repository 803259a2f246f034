"""Qwen2, Qwen2.5, Qwen3, Qwen3-MoE and Llama decoders: configuration and modules.

Layers are stacked: each parameter of a layer is one array with a leading ``layers`` axis, and the layers
run as one ``lax.scan``, so that compile time does not grow with depth. Every parameter carries the
logical names of its dimensions as ``axes``; ``oapl_jax/distributed/sharding.py`` maps them to a mesh.

    graphdef, params = nnx.split(Qwen(config, rngs=nnx.Rngs(0)))
    hidden, _ = nnx.merge(graphdef, params).hidden(tokens, positions)

What a layer's queries see is a function that the caller may pass in (``Attend``), so that training rows,
prompts and decode steps over any kind of cache run through the same layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from oapl_jax.config.model import LoraConfig
from oapl_jax.distributed.sharding import BATCH_AXES, SAMPLER_RULES, constrain, free_axes, on_devices, shardings
from oapl_jax.model import lora as low_rank
from oapl_jax.model import row_attention
from oapl_jax.model.grouped_matmul import Experts, InStack, ragged_dot
from oapl_jax.model.lora import LowRank
from oapl_jax.model.matmul import einsum, lookup
from oapl_jax.model.rope import RopeScaling, rope_tables, rotate
from oapl_jax.model.row_attention import RowAttentionKind
from oapl_jax.model.segments import Segments

ARCHITECTURES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "llama": "Llama"}
"""Hugging Face's ``model_type`` -> the beginning of its class names."""

COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts")
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size")
LARGEST = dict.fromkeys(COUNTS, 2**14) | dict.fromkeys(WIDTHS, 2**24) | {"max_position_embeddings": 2**31 - 1}
"""Sizes of a model: what is larger, or below 1, is a damaged file. Checked before anything is made of them."""
MOST_PARAMS = 2**42

CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"
"""JAX's primitive for the forward pass of cuDNN's attention: its result, and the sums that its backward pass needs."""


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Architecture of a decoder. Field names are Hugging Face's where it has one."""

    model_type: str
    """One of ``ARCHITECTURES``; Qwen2.5 says ``qwen2``. Decides qkv bias, qk-norm and the kind of ffn."""
    vocab_size: int
    """Rows of the embedding; may exceed the tokenizer's length (padded vocabulary)."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    num_experts: int = 0
    """0: a dense ffn."""
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    """The weights of a token's experts are normalised to 1."""

    @property
    def qkv_bias(self) -> bool:
        """Query, key and value projections have a bias."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Queries and keys are RMS-normalised per head."""
        return self.model_type in ("qwen3", "qwen3_moe")

    @property
    def num_params(self) -> int:
        """Number of weights; tied embeddings count once."""
        D, H, K, C = self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        attention = 2 * D * (H + K) * C + self.qkv_bias * (H + 2 * K) * C + self.qk_norm * 2 * C
        mlp = 3 * D * self.intermediate_size
        if self.num_experts:
            mlp = self.num_experts * (3 * D * self.moe_intermediate_size + D)  # each expert has a column of the router
        layer = attention + mlp + 2 * D
        num_embeddings = 1 if self.tie_word_embeddings else 2
        return num_embeddings * self.vocab_size * D + self.num_hidden_layers * layer + D

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> "QwenConfig":
        """Reads the content of a Hugging Face ``config.json``, as written by transformers 4 or 5.

        Raises:
            ValueError: an unknown model type, a missing key, or a feature that is not implemented; names
                the key and the value.
        """
        model_type = values.get("model_type")
        if model_type not in ARCHITECTURES:
            raise ValueError(f"model_type={model_type!r} is unknown; known: {', '.join(ARCHITECTURES)}")
        _refuse_unimplemented(values)
        # transformers' own defaults, for keys that older files leave out.
        defaults = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": None}
        defaults["max_position_embeddings"] = 2048 if model_type == "llama" else 32768
        config = {key: values.get(key, default) for key, default in defaults.items()}
        eos = values.get("eos_token_id")
        config |= {
            "model_type": model_type,
            "head_dim": values.get("head_dim") or (128 if model_type == "qwen3" else None),
            "rope_theta": _rope_theta(values),
            "rope_scaling": _rope_scaling(values, config["max_position_embeddings"]),
            "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        }
        required = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
        required += ["num_attention_heads", "num_key_value_heads"]
        if model_type == "qwen3_moe":
            values = {"num_experts": values.get("num_local_experts"), **values}
            required += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"]
            config["norm_topk_prob"] = values.get("norm_topk_prob", False)
        missing = [key for key in required if values.get(key) is None]
        if missing:
            raise ValueError(f"model config lacks {', '.join(missing)}; model_type={model_type!r} needs it")
        config |= {key: values[key] for key in required}
        _refuse_absurd(config)
        config["head_dim"] = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
        if config["head_dim"] < 2 or config["head_dim"] % 2:
            raise ValueError(f"head_dim={config['head_dim']} is no positive even number, as rotary embeddings need")
        if config["num_attention_heads"] % config["num_key_value_heads"]:
            raise ValueError(
                f"num_attention_heads={config['num_attention_heads']} is not a multiple of"
                f" num_key_value_heads={config['num_key_value_heads']}"
            )
        made = cls(**config)
        if made.num_params > MOST_PARAMS:
            raise ValueError(
                f"its sizes make {made.num_params:.3g} parameters, above the {MOST_PARAMS:.3g} of any model"
            )
        return made

    def check_positions(self, num_tokens: int) -> None:
        """Raises a ValueError where a prompt with its response, together at most ``num_tokens``, has too few positions."""
        positions, scaling = self.max_position_embeddings, self.rope_scaling
        if scaling is not None and scaling.rope_type == "yarn":  # files name those of before or after the stretching
            positions = max(positions, int(scaling.factor * (scaling.original_max_position_embeddings or 0)))
        if num_tokens > positions:
            raise ValueError(
                f"prompt and response may have {num_tokens} tokens together, and the model only has positions for"
                f" {positions} (max_position_embeddings); lower max_prompt_tokens or max_response_tokens"
            )

    def to_hf(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers 4 and 5 read."""
        values = dataclasses.asdict(self)
        values["eos_token_id"] = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        values |= {
            "architectures": [f"{ARCHITECTURES[self.model_type]}ForCausalLM"],
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "rope_scaling": self.rope_scaling and self.rope_scaling.to_hf(),
            "use_sliding_window": False,
            "sliding_window": None,
            "use_cache": True,
        }
        if self.model_type == "qwen3_moe":
            return values | {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
        for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
            del values[key]
        if self.model_type == "llama":
            return values | {"attention_bias": False, "mlp_bias": False}
        return values | ({"attention_bias": False} if self.model_type == "qwen3" else {})


def _refuse_absurd(config: dict[str, Any]) -> None:
    """Numbers that no model has."""
    for key, largest in LARGEST.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            raise ValueError(f"{key}={value!r:.40} is no size of a model; it is an integer from 1 to {largest}")
    if (chosen := config.get("num_experts_per_tok")) not in (None, *range(1, config.get("num_experts", 0) + 1)):
        raise ValueError(f"num_experts_per_tok={chosen!r:.40} is no number from 1 to num_experts")
    for key in ("rope_theta", "rms_norm_eps", "initializer_range"):
        if not isinstance(config[key], int | float) or not 0 < config[key] < math.inf:
            raise ValueError(f"{key}={config[key]!r:.40} is no positive number")


def _refuse_unimplemented(values: dict[str, Any]) -> None:
    """Features that would change the numbers and that this file does not compute."""
    implemented = {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_mrope": False,
    }
    for key, value in implemented.items():
        if values.get(key, value) not in (value, None):
            raise ValueError(f"{key}={values[key]!r} is not implemented; only {value!r} is")
    if any(kind != "full_attention" for kind in values.get("layer_types") or []):
        raise ValueError(f"layer_types={values['layer_types']!r} is not implemented; only 'full_attention' is")


def _rope_scaling(values: dict[str, Any], max_position_embeddings: int) -> RopeScaling | None:
    """Transformers 4 writes ``rope_scaling``, 5 ``rope_parameters``."""
    for key in ("rope_parameters", "rope_scaling"):
        try:
            scaling = RopeScaling.from_hf(values.get(key) or {}, max_position_embeddings)
        except ValueError as error:
            raise ValueError(f"{key}={values[key]!r}: {error}") from error
        if scaling is not None:
            return scaling
    return None


def _rope_theta(values: dict[str, Any]) -> float:
    """Transformers 4 writes it at the top, 5 inside ``rope_parameters``; both default to 10,000."""
    for scope in (values.get("rope_parameters") or {}, values, values.get("rope_scaling") or {}):
        if scope.get("rope_theta") is not None:
            return float(scope["rope_theta"])
    return 10_000.0


Cache = Any
"""What an ``Attend`` carries from layer to layer, a tree of arrays; None where it keeps nothing."""


@dataclasses.dataclass(frozen=True)
class Remat:
    """What the backward pass finds and what it recomputes; by default it finds every activation."""

    is_on: bool = False
    """Recompute each layer from its input and from what is saved by name."""
    saved: tuple[str, ...] = ()
    """Values of a layer that are kept, by their names in ``checkpoint_name``."""
    offload: bool = False
    """Save them in the host's memory, not in the device's."""

    @property
    def policy(self) -> Any:
        """For ``jax.checkpoint``."""
        policies = jax.checkpoint_policies
        if self.offload:
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=list(self.saved),
                offload_src="device",
                offload_dst="pinned_host",
            )
        by_name = policies.save_only_these_names(*self.saved)
        if "attention" not in self.saved:
            return by_name
        # With its result alone the backward pass would run cuDNN's forward pass again, for sums that have no name.
        return policies.save_from_both_policies(by_name, lambda primitive, *_, **__: primitive.name == CUDNN_ATTENTION)


Attend = Callable[[Any, Array, Array, Array, Cache], tuple[Array, Cache]]
"""``(layer, query [B, T, H, C], key [B, T, K, C], value [B, T, K, C], cache) -> (output [B, T, H, C], cache)``.

Queries and keys come after norm and rope. ``layer`` is the layer's index: an array where the layers are
scanned, an ``int`` where they are a Python loop.
"""


class _Init:
    """Makes the parameters of one model: dtype, random stream and, for stacked layers, the leading axis."""

    def __init__(self, rngs: nnx.Rngs, dtype: DTypeLike, num_layers: int | None = None) -> None:
        self.rngs, self.dtype = rngs, dtype
        self.stack = {} if num_layers is None else {"layers": num_layers}

    def normal(self, std: float, **axes: int) -> nnx.Param:
        """Normal weights; ``axes`` are logical names and sizes, in order."""
        return self._param(lambda shape: std * jax.random.normal(self.rngs.params(), shape, jnp.float32), axes)

    def ones(self, **axes: int) -> nnx.Param:
        return self._param(jnp.ones, axes)

    def zeros(self, **axes: int) -> nnx.Param:
        return self._param(jnp.zeros, axes)

    def _param(self, make: Callable[[tuple[int, ...]], Array], axes: dict[str, int]) -> nnx.Param:
        axes = self.stack | axes
        # A metadata key of our own: flax's ``sharding_names`` is applied eagerly and needs a mesh in scope.
        return nnx.Param(make(tuple(axes.values())).astype(self.dtype), axes=tuple(axes))


def rms_norm(x: Float[Array, "..."], scale: Float[Array, " D"], eps: float) -> Float[Array, "..."]:
    """RMS norm over the last axis: statistics in float32, the result in the dtype of ``x``."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Projections, norms and rope around ``attention.attend``."""

    def __init__(self, config: QwenConfig, init: _Init) -> None:
        self.eps = config.rms_norm_eps
        D, H, K, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        std = config.initializer_range
        self.query = init.normal(std, embed=D, heads=H, head_dim=C)
        self.key = init.normal(std, embed=D, kv_heads=K, head_dim=C)
        self.value = init.normal(std, embed=D, kv_heads=K, head_dim=C)
        self.output = init.normal(_residual_std(config), heads=H, head_dim=C, embed=D)
        self.query_bias = init.zeros(heads=H, head_dim=C) if config.qkv_bias else None
        self.key_bias = init.zeros(kv_heads=K, head_dim=C) if config.qkv_bias else None
        self.value_bias = init.zeros(kv_heads=K, head_dim=C) if config.qkv_bias else None
        self.query_norm = init.ones(head_dim=C) if config.qk_norm else None
        self.key_norm = init.ones(head_dim=C) if config.qk_norm else None

    def __call__(
        self, x: Array, rope: tuple[Array, Array], attend: Attend, layer: Any, cache: Cache
    ) -> tuple[Array, Cache]:
        """``[B, T, D]`` to the same, and the cache that ``attend`` made."""
        with jax.named_scope("qkv"):
            query, key, value = map(checkpoint_name, self.project(x), ("query", "key", "value"))
            if self.query_norm is not None and self.key_norm is not None:
                query = rms_norm(query, self.query_norm[...], self.eps)
                key = rms_norm(key, self.key_norm[...], self.eps)
            query, key = rotate(query, rope), rotate(key, rope)
        output, cache = attend(layer, query, key, value, cache)
        output = checkpoint_name(output, "attention")
        with jax.named_scope("attention_output"):
            return einsum("BTHC,HCD->BTD", output, self.output), cache

    def project(self, x: Array) -> Sequence[Array]:
        """Queries ``[B, T, H, C]``, keys and values ``[B, T, K, C]``, before norm and rope."""
        weights, biases = (self.query, self.key, self.value), (self.query_bias, self.key_bias, self.value_bias)
        return [project_heads(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def project_heads(
    x: Float[Array, "B T D"], weight: nnx.Param | LowRank, bias: nnx.Param | None
) -> Float[Array, "B T N C"]:
    """Activations to N heads."""
    heads = einsum("BTD,DNC->BTNC", x, weight)
    return heads if bias is None else heads + bias[...].astype(x.dtype)


class Mlp(nnx.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, config: QwenConfig, init: _Init) -> None:
        D, F = config.hidden_size, config.intermediate_size
        self.gate = init.normal(config.initializer_range, embed=D, mlp=F)
        self.up = init.normal(config.initializer_range, embed=D, mlp=F)
        self.down = init.normal(_residual_std(config), mlp=F, embed=D)

    def __call__(self, x: Array) -> Array:
        """``[B, T, D]`` to the same."""
        with jax.named_scope("mlp"):
            gate, up = map(checkpoint_name, self.project(x), ("gate", "up"))
            return einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, self.down)

    def project(self, x: Array) -> Sequence[Array]:
        """Gate and up, ``[B, T, F]`` each."""
        return [einsum("BTD,DF->BTF", x, weight) for weight in (self.gate, self.up)]


class ExpertMlp(nnx.Module):
    """Mixture of SwiGLU experts: each token goes to its top-k, none is dropped (Qwen3-MoE).

    On a mesh each device sorts and multiplies its own tokens, with the columns of all experts that ``tensor`` leaves it,
    gathered over ``fsdp`` as those of other layers: sorted over all devices, every token would go to each of them.
    """

    def __init__(self, config: QwenConfig, init: _Init, mesh: Mesh | None) -> None:
        self.config, self.mesh = config, None if mesh is None or mesh.size == 1 else mesh
        D, E, F = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.router = init.normal(config.initializer_range, embed=D, experts=E)
        self.gate = init.normal(config.initializer_range, experts=E, embed=D, mlp=F)
        self.up = init.normal(config.initializer_range, experts=E, embed=D, mlp=F)
        self.down = init.normal(_residual_std(config), experts=E, mlp=F, embed=D)

    def __call__(self, x: Array) -> Array:
        """``[B, T, D]`` to the same."""
        router, *matrices = (param.get_value() for param in (self.router, self.gate, self.up, self.down))
        with jax.named_scope("experts"):
            if self.mesh is None:
                return self._mix(x, router, *matrices)
            tokens, columns, rows = P(BATCH_AXES, "context"), (None, None, "tensor"), (None, "tensor", None)
            split = [
                jax.tree.map(functools.partial(_matrix_spec, axes=axes), each)
                for each, axes in zip(matrices, (columns, columns, rows), strict=True)
            ]
            mix = on_devices(
                lambda *arrays: jax.lax.psum(self._mix(*arrays), "tensor"), self.mesh, (tokens, P(), *split), tokens
            )
            return mix(x, router, *matrices)

    def read_in(self, stacked: Any, layer: Array | int) -> None:
        """Lets the products read a layer's matrices in their stack; quantised ones stay those of the scan."""
        for name in ("gate", "up", "down"):
            param = getattr(stacked, name)
            if isinstance(param.get_value(), Array):
                setattr(self, name, param.replace(InStack(param.get_value(), jnp.asarray(layer))))

    def _mix(self, x: Array, router: Array, gate: Experts, up: Experts, down: Experts) -> Array:
        """Sorts the (token, expert) pairs by expert, multiplies each expert's run of rows, sorts back."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, experts = self._route(tokens, router)
        k = experts.shape[-1]
        order = jnp.argsort(experts.ravel(), stable=True)
        sizes = jnp.bincount(experts.ravel(), length=self.config.num_experts)
        sorted_rows, sorted_experts = tokens[order // k], experts.ravel()[order]
        gates, ups = (ragged_dot(sorted_rows, matrices, sizes, sorted_experts) for matrices in (gate, up))
        outputs = ragged_dot(jax.nn.silu(gates) * ups, down, sizes, sorted_experts)
        outputs = outputs[jnp.argsort(order)].reshape(*experts.shape, -1)
        return jnp.einsum("NkD,Nk->ND", outputs, weights.astype(x.dtype)).reshape(x.shape)

    def _route(self, rows: Array, router: Array) -> tuple[Array, Array]:
        """Weights (float32) and ids ``[N, k]`` of each row's experts."""
        scores = jnp.einsum("ND,DE->NE", rows, router.astype(rows.dtype))
        probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(probabilities, self.config.num_experts_per_tok)
        if self.config.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts


def _matrix_spec(array: Array, axes: tuple[str | None, ...]) -> P:
    """Of experts' matrices, or a stack of them, or their scales, which are not split along dimensions of size 1."""
    axes = (*[None] * (array.ndim - len(axes)), *axes)
    return P(*(axis if size > 1 else None for axis, size in zip(axes, array.shape, strict=False)))


def _residual_std(config: QwenConfig) -> float:
    """Matrices that add to the residual stream start smaller, so that its size does not grow with depth."""
    return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)


class Layer(nnx.Module):
    """One decoder layer; in ``Qwen`` its parameters are stacked, in the scan they are one layer's."""

    def __init__(self, config: QwenConfig, init: _Init, mesh: Mesh | None = None) -> None:
        self.eps = config.rms_norm_eps
        self.attention_norm = init.ones(embed=config.hidden_size)
        self.attention = Attention(config, init)
        self.mlp_norm = init.ones(embed=config.hidden_size)
        self.mlp = ExpertMlp(config, init, mesh) if config.num_experts else Mlp(config, init)

    def __call__(
        self, x: Array, rope: tuple[Array, Array], attend: Attend, layer: Any, cache: Cache
    ) -> tuple[Array, Cache]:
        """Residual stream ``[B, T, D]`` to the same, and the cache that ``attend`` made."""
        x = checkpoint_name(x, "layer_input")
        output, cache = self.attention(rms_norm(x, self.attention_norm[...], self.eps), rope, attend, layer, cache)
        x = x + output
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps)), cache


class Qwen(nnx.Module):
    """A decoder-only language model.

    The residual stream has ``compute_dtype``, as in transformers; norms, rope, attention's softmax, the
    router and logits are float32.

    Attributes:
        embedding: ``[V, D]``.
        layers: one ``Layer`` whose parameters have a leading ``layers`` axis.
        final_norm: ``[D]``.
        lm_head: ``[D, V]``; None where the embedding is tied.
    """

    def __init__(
        self,
        config: QwenConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
        lora: LoraConfig | None = None,
        remat: Remat = Remat(),
        attention: RowAttentionKind | None = None,
        scan_layers: bool = True,
        mesh: Mesh | None = None,
    ) -> None:
        """Random weights: normal with ``initializer_range``, norms 1, biases 0.

        ``attention`` is that of training rows; None: the fastest for the device and the shape. Without a mesh the
        model runs on one device; with one, rows are split over its data and fsdp axes, and their tokens over context.
        ``scan_layers=False`` runs the layers as a Python loop, for debugging, with the same numbers.
        """
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat, self.scan_layers, self.mesh = remat, scan_layers, mesh
        self.attention: RowAttentionKind | None = attention
        V, D = config.vocab_size, config.hidden_size
        init = _Init(rngs, param_dtype)
        self.embedding = init.normal(config.initializer_range, vocab=V, embed=D)
        self.layers = Layer(config, _Init(rngs, param_dtype, config.num_hidden_layers), mesh)
        if lora is not None and lora.rank:
            low_rank.adapt(self.layers, lora, rngs)
        self.final_norm = init.ones(embed=D)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else init.normal(config.initializer_range, embed=D, vocab=V)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend | None = None,
        cache: Cache = None,
        layers: Sequence[Layer] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """States after the final norm, in the compute dtype, and the cache after the last layer.

        Positions are those of each token in its sequence, from 0. Without ``attend`` it is ``attend_rows()``. ``layers``
        are used in place of the model's own, one by one, on one device.
        """
        with jax.named_scope("embedding"):
            x = self._constrain(self._embed(tokens))
        config = self.config
        rope = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        attend = self.attend_rows() if attend is None else attend
        for index, layer in enumerate(layers or ()):
            x, cache = layer(x, rope, attend, index, cache)
        graphdef, stacked = nnx.split(self.layers)

        def run_layer(carry: tuple[Array, Cache], xs: tuple[Any, Any]) -> tuple[Any, None]:
            x, cache = carry
            params, index = xs
            layer = nnx.merge(graphdef, self._gathered(params))
            if cache is not None and isinstance(layer.mlp, ExpertMlp):  # with a cache nothing has a gradient
                layer.mlp.read_in(self.layers.mlp, index)
            x, cache = layer(x, rope, attend, index, cache)
            return (self._constrain(x), cache), None

        if layers is None:
            x, cache = self._run_layers(run_layer, (x, cache), stacked)
        return rms_norm(x, self.final_norm[...], self.config.rms_norm_eps), cache

    def attend_rows(self, segments: Segments | None = None) -> Attend:
        """Each token sees its own rollout up to itself; no segments: a row is one rollout, padded on the right."""

        def attend(layer: Any, query: Array, key: Array, value: Array, cache: Cache) -> tuple[Array, Cache]:
            kind = self.attention
            if kind is None:
                context = 1 if self.mesh is None else self.mesh.shape["context"]
                kind = row_attention.choose(
                    jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0],
                    query.dtype,
                    query.shape[1] // context,
                    key.shape[1],
                    query.shape[3],
                    is_packed=segments is not None,
                )
            return row_attention.attend_rows(query, key, value, segments, kind=kind, mesh=self.mesh), cache

        return attend

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of every id, padding ids included."""
        with jax.named_scope("logits"):
            tied = "...D,VD->...V", self.embedding
            spec, weight = tied if self.lm_head is None else ("...D,DV->...V", self.lm_head)
            return einsum(spec, hidden, weight, preferred_element_type=jnp.float32)

    def unembedding(self) -> tuple[Float[Array, "_D _V"], str]:
        """The output matrix of float weights, in their dtype, and its letters: the embedding, ``VD``, where tied."""
        return (self.embedding[...], "VD") if self.lm_head is None else (self.lm_head[...], "DV")

    def _run_layers(self, run_layer: Any, carry: Any, stacked: Any) -> Any:
        num_layers = self.config.num_hidden_layers
        if self.remat.is_on:
            # prevent_cse guards against the compiler undoing remat, which it cannot do across a scan.
            run_layer = jax.checkpoint(run_layer, prevent_cse=not self.scan_layers, policy=self.remat.policy)
        if self.scan_layers:
            return jax.lax.scan(run_layer, carry, (stacked, jnp.arange(num_layers)))[0]
        for index, params in enumerate([layer_params(stacked, i) for i in range(num_layers)]):
            carry, _ = run_layer(carry, (params, index))
        return carry

    def _gathered(self, params: Any) -> Any:
        """A layer's parameters, split over ``tensor`` alone.

        Left to itself, XLA multiplies by one part of a matrix after the other as they arrive, and reads and writes the
        sum of the products, which is as large as the activations, each time.
        """
        mesh = self.mesh
        if mesh is None or mesh.shape["fsdp"] == 1:
            return params
        places = shardings(nnx.split(self.layers)[1], mesh, SAMPLER_RULES)
        return jax.tree.map(lambda x, place: constrain(x, mesh, P(*place.spec[1:])), params, places)

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        if self.mesh is None or free_axes(BATCH_AXES) == BATCH_AXES:
            return lookup(self.embedding, tokens, self.compute_dtype)

        # Inside a shard_map over ``data`` XLA's partitioner cannot split a gather over two axes: it aborts.
        def look_up(table: Float[Array, "_V _D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T _D"]:
            ids = tokens - jax.lax.axis_index("tensor") * len(table)
            is_here = (ids >= 0) & (ids < len(table))
            found = table[jnp.clip(ids, 0, len(table) - 1)].astype(self.compute_dtype)
            return jax.lax.psum(jnp.where(is_here[..., None], found, 0), "tensor")

        columns = P(None, "context", "fsdp")
        look_up_fn = on_devices(look_up, self.mesh, (P("tensor", "fsdp"), P(None, "context")), columns)
        return look_up_fn(self.embedding.get_value(), tokens)

    def _constrain(self, x: Array) -> Array:
        return x if self.mesh is None else constrain(x, self.mesh, P(BATCH_AXES, "context"))


def layer_params(stacked: Any, index: int) -> Any:
    """The parameters of one layer, copied from the stacked ones."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def abstract(config: QwenConfig, **options: Any) -> tuple[Any, Any]:
    """``(graphdef, params)`` of ``Qwen`` with these options, with shapes in place of arrays."""
    return nnx.split(nnx.eval_shape(lambda: Qwen(config, rngs=nnx.Rngs(0), **options)))


def initialize(config: QwenConfig, key: PRNGKeyArray, shardings: Any, **options: Any) -> Any:
    """Random parameters, made directly in their shardings; the values do not depend on the mesh."""

    def make(key: PRNGKeyArray) -> Any:
        return nnx.split(Qwen(config, rngs=nnx.Rngs(params=key), **options))[1]

    return jax.jit(make, out_shardings=shardings)(key)

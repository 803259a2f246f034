"""The policy that is trained, and its adapters."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from oapl_jax.config.applies import AppliesWhen, one_of
from oapl_jax.config.section import CountOrZero, Positive, Section

LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""A matrix of each layer, by Hugging Face's name."""

SavedName = Literal["layer_input", "query", "key", "value", "attention", "gate", "up"]
"""A value of a layer that the backward pass may find saved."""


def _has_template(tokenizer: str) -> bool:
    """``tokenizer`` is not ``characters``."""
    return tokenizer != "characters"


class ModelConfig(Section):
    """Which policy is trained. Exactly one of ``path``, ``config`` and ``warm_start``."""

    path: str | None = None
    """Hugging Face model folder, also in an object store, or the name of one on the hub."""
    config: str | None = None
    """Hugging Face ``config.json`` of a model that is built with random weights."""
    warm_start: str | None = None
    """Config of ``oapl-jax sft``; its model is the start. It is trained first where it does not exist yet."""
    tokenizer: str = "model"
    """``model``: the tokenizer in ``path``; ``characters``: the toy tasks' own; else a folder or hub name."""
    chat_template_kwargs: Annotated[dict[str, Any], AppliesWhen("tokenizer", condition=_has_template)] = Field(
        default={}
    )
    """Options of the chat template, such as ``enable_thinking: false``. They become defaults of the template itself, so
    published policies, exports, and what is served or evaluated from them render with them too."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products; softmax, norms, losses and reductions are always float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights. bfloat16 is for weights that are frozen (``lora.rank``) or only evaluated: steps of 1e-6
    vanish in its rounding, so trained weights and the optimizer state are float32."""
    remat: Literal["none", "layer", "names", "offload"] = "none"
    """What the backward pass recomputes. none: nothing, all activations are kept; layer: all of a layer but its input;
    names: all but ``remat_names``; offload: the same, and these are kept in the host's memory."""
    remat_names: Annotated[tuple[SavedName, ...], AppliesWhen("remat", condition=one_of("names", "offload"))] = ()
    """For ``names`` and ``offload``: a layer's input, and results of its matmuls. With all of them saved, the backward pass
    recomputes only norms, rope and scores."""
    attention: Literal["xla", "splash", "cudnn", "triton"] | None = None
    """Attention of training rows: plain XLA, the TPU's Pallas kernel, cuDNN's or Triton's on GPUs; null: the device's
    own."""
    scan_layers: bool = True
    """False: a Python loop over layers, for debugging."""

    def find_mistakes(self) -> Iterator[str]:
        """One source, with a tokenizer; names where they are needed."""
        given = [name for name in ("path", "config", "warm_start") if getattr(self, name) is not None]
        if len(given) != 1:
            yield f"give exactly one of path, config, warm_start; got {', '.join(given) or 'none'}"
        elif self.tokenizer == "model" and self.config is not None:
            yield "tokenizer: a model built from a bare config has none; name one, or 'characters'"
        if self.remat in ("names", "offload") and not self.remat_names:
            yield f"remat_names: remat={self.remat} needs names of activations to keep"


class LoraConfig(Section):
    """Low-rank adapters, trained in place of the weights. ``model.param_dtype`` is then that of the frozen weights."""

    rank: CountOrZero = 0
    """Rank of an adapter; 0: no adapters, all weights are trained."""
    alpha: Annotated[Positive, AppliesWhen("rank")] = 32.0
    """An adapter's product is multiplied by alpha / rank."""
    targets: Annotated[tuple[LoraTarget, ...], Field(min_length=1), AppliesWhen("rank")] = get_args(LoraTarget)
    """Matrices that get an adapter."""

"""Rotary position embeddings, and the ways to stretch them to more positions than a model was trained on.

The frequencies are those of transformers (``modeling_rope_utils.py``). All ways keep some frequencies, divide others by
``factor``, and take a weighted mean in between: ``linear`` keeps none, ``llama3`` decides by wavelength, and ``yarn``
(arXiv 2309.00071) by the number of turns within the original context.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

NEEDED = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
OPTIONAL = {"yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """``rope_scaling`` of a config.json; the names are Hugging Face's. What a type does not use is None."""

    rope_type: str
    """``linear``, ``llama3`` or ``yarn``."""
    factor: float
    original_max_position_embeddings: int | None = None
    """Positions that the model was trained on before it was stretched."""
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    """Factor of cosines and sines; None: as YaRN's paper computes it from ``factor``."""
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    @classmethod
    def from_hf(cls, values: dict[str, Any], max_position_embeddings: int) -> "RopeScaling | None":
        """Reads ``rope_scaling`` or ``rope_parameters``; None for the type ``default``.

        Raises:
            ValueError: an unknown type or key, a missing key, or a value that is no positive number.
        """
        kind = values.get("rope_type", values.get("type", "default"))
        if kind == "default":
            return None
        if kind not in NEEDED:
            raise ValueError(f"rope type {kind!r} is not implemented; known: default, {', '.join(NEEDED)}")
        names = values.keys() - {"type", "rope_type", "rope_theta"}
        given = {key: values[key] for key in names if values[key] is not None}
        if kind != "linear":
            given.setdefault("original_max_position_embeddings", max_position_embeddings)
        lacking, unknown = NEEDED[kind] - given.keys(), given.keys() - NEEDED[kind] - OPTIONAL.get(kind, set())
        if lacking or unknown:
            words = f"lacks {', '.join(sorted(lacking))}" if lacking else f"{min(unknown)!r} is not implemented"
            raise ValueError(f"rope type {kind!r}: {words}")
        for key, value in given.items():
            if key != "truncate" and (type(value) not in (int, float) or not 0 < value < math.inf):
                raise ValueError(f"rope type {kind!r}: {key}={value!r} is not a positive number")
        return cls(kind, **given)

    def to_hf(self) -> dict[str, Any]:
        """The values that ``from_hf`` reads."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def table_factor(self) -> float:
        """Factor of cosines and sines."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def mscale(weight: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.mscale is not None and self.mscale_all_dim is not None:
            return mscale(self.mscale) / mscale(self.mscale_all_dim)
        return mscale(1.0)

    def kept_share(self, head_dim: int, theta: float) -> Float[np.ndarray, "_C"]:
        """For each of the C/2 frequencies 1 where it is kept, 0 where it is divided by ``factor``, or in between."""
        exponents = np.arange(0, head_dim, 2) / head_dim
        if self.rope_type == "linear":
            return np.zeros_like(exponents)
        context: Any = self.original_max_position_embeddings
        if self.rope_type == "llama3":
            low: Any = self.low_freq_factor
            high: Any = self.high_freq_factor
            turns = context * theta**-exponents / (2 * math.pi)
            return np.clip((turns - low) / (high - low), 0, 1)

        def index_at(turns: float) -> float:
            """The frequency, as a fractional index, that makes this number of turns within the original context."""
            return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = index_at(self.beta_fast or 32), index_at(self.beta_slow or 1)
        if self.truncate is not False:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        return 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 0.001), 0, 1)


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """Cosines and sines ``[B, T, 1, C/2]``, float32: bf16 angles are wrong by whole turns at long positions."""
    frequencies, factor = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim), 1.0
    if scaling is not None:
        kept = jnp.asarray(scaling.kept_share(head_dim, theta), jnp.float32)
        frequencies, factor = frequencies * (kept + (1 - kept) / scaling.factor), scaling.table_factor
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotate(x: Float[Array, "B T N C"], rope: tuple[Array, Array]) -> Float[Array, "B T N C"]:
    """Rotary embedding in the half-split layout of Llama and Qwen; N heads of either kind."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

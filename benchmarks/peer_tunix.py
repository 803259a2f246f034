"""google-tunix's sampler as a contender of ``benchmarks/sampler.py``, which starts this with tunix's own Python.

One call samples one batch, as its rollouts do: every copy of a prompt is prefilled, and all rows run to the longest.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig, Qwen3

from sampler import MODEL, Report, Workload, make_workload, serve, versions

VOCAB = MODEL["vocab_size"]


class Numbers:
    """A tokenizer for texts that are token ids. Its end and padding tokens are none of the vocabulary's."""

    def encode(self, text: str, **_) -> list[int]:
        """Text to ids."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_) -> str:
        """Ids to text."""
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        """No token begins a text."""
        return

    def eos_id(self) -> int:
        """Never drawn."""
        return VOCAB

    def pad_id(self) -> int:
        """Never drawn."""
        return VOCAB + 1


def tunix(workload: Workload):
    """Returns the run that is timed."""
    group_size = workload.lengths.shape[1]
    prompt_length, max_length = workload.prompts.shape[1], workload.max_length
    cache = CacheConfig(
        cache_size=prompt_length + max_length,
        num_layers=MODEL["num_hidden_layers"],
        num_kv_heads=MODEL["num_key_value_heads"],
        head_dim=MODEL["head_dim"],
    )
    sampler = Sampler(make_model(), Numbers(), cache)
    texts = [" ".join(map(str, prompt)) for prompt in workload.prompts for _ in range(group_size)]
    lengths = workload.lengths.reshape(-1)

    def run(seed: int) -> Report:
        output = sampler(
            texts,
            max_generation_steps=max_length,
            max_prompt_length=prompt_length,
            return_logprobs=True,
            temperature=1.0,
            top_p=1.0,
            seed=seed,
        )
        for tokens, logprobs, length in zip(output.tokens, output.logprobs, lengths, strict=True):
            assert len(tokens) == len(logprobs) == max_length >= length
            assert np.isfinite(logprobs).all()
        return {}

    return run


def make_model() -> Qwen3:
    """Random weights. Tunix begins with zeros in the ffn, which get values so that nothing is degenerate."""
    config = ModelConfig(
        num_layers=MODEL["num_hidden_layers"],
        vocab_size=VOCAB,
        embed_dim=MODEL["hidden_size"],
        hidden_dim=MODEL["intermediate_size"],
        num_heads=MODEL["num_attention_heads"],
        num_kv_heads=MODEL["num_key_value_heads"],
        head_dim=MODEL["head_dim"],
        rope_theta=int(MODEL["rope_theta"]),
        norm_eps=MODEL["rms_norm_eps"],
        use_tied_embedding=MODEL["tie_word_embeddings"],
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    model = Qwen3(config, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 3 * len(model.layers)))
    for layer in model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            projection.kernel.value = 0.02 * jax.random.normal(next(keys), projection.kernel.value.shape)
    return model


if __name__ == "__main__":
    serve(tunix, make_workload(sys.argv[1]), versions("google-tunix", "jax", "jaxlib", "flax", "numpy"))

"""How tokens are drawn, in training and in evaluations."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from oapl_jax.config.section import Count, CountOrZero, Fraction, FractionOrZero, Positive, PositiveOrZero, Section


class SamplingConfig(Section):
    """The distribution that tokens are drawn from."""

    temperature: PositiveOrZero = 1.0
    """Temperature; 0: greedy."""
    top_k: CountOrZero = 0
    """Keep the k likeliest tokens; 0: all."""
    top_p: Fraction = 1.0
    """Keep the smallest set of likeliest tokens with at least this mass; 1: all."""
    min_p: FractionOrZero = 0.0
    """Keep tokens whose probability is at least this fraction of the likeliest one's; 0: all."""


class EngineConfig(SamplingConfig):
    """The same, and the engine that draws."""

    max_response_tokens: Count
    """Limit of a response."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A response ends with the token that completes one of these, besides the model's own stop tokens. It is trained on up
    to that token; the text that is graded and logged ends before the string. Evaluations use the same."""
    stop_token_ids: tuple[CountOrZero, ...] = ()
    """Further tokens that end a response, by their ids."""
    decode_steps: Count = 32
    """Most tokens of a rollout decoded per call to the device."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Precision of the sampler's weights, products and cache. int8: of its matrices, with a scale for each output
    channel; products and cache then have ``model.compute_dtype``."""
    kv_dtype: Literal["int8"] | None = None
    """int8: keys and values of the cache, with a scale for each token and head; read by plain XLA, slower than the TPU's
    kernel. null: the cache has the precision of the products."""
    kv_memory: Fraction = 0.8
    """Most of a replica's free memory that its KV cache may take; never more than the rows need at full length."""

    def find_mistakes(self) -> Iterator[str]:
        r"""A newline that YAML has not read as one: ``'\n'`` is a backslash and an n."""
        for string in self.stop_strings:
            if re.fullmatch(r"(\\[nrt])+", string):
                yield f"stop_strings: {string!r} is a backslash and a letter; write it in double quotes"


class SamplerConfig(EngineConfig):
    """How rollouts are drawn."""

    temperature: Positive = 1.0
    """Temperature of the sampled distribution; the learner's log-probabilities use the same."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """G: rollouts per prompt; V* of a single rollout is its reward, so 1 teaches nothing."""
    truncated: Literal["wrong", "graded", "left_out"] = "wrong"
    """What happens to a response that is cut at the limit. wrong: its reward is 0; graded: it is graded as it stands;
    left_out: it is wrong, and neither trained on nor counted in V*."""
    groups_in_flight: Count = 16
    """Groups decoded at once: groups_in_flight x group_size rows, over all replicas."""


class EvaluateSamplerConfig(EngineConfig):
    """How samples are drawn; the defaults are the paper's for mathematics."""

    temperature: PositiveOrZero = 0.6
    """Temperature; 0: greedy."""
    top_p: Fraction = 0.95
    """Keep the smallest set of likeliest tokens with at least this mass; 1: all."""
    max_response_tokens: Count = 16_384
    """Limit of a response (the paper: 16,384, and 65,536 for LiveCodeBench)."""
    truncated: Literal["wrong", "graded"] = "wrong"
    """What happens to a response that is cut at the limit: it is wrong, or it is graded as it stands."""
    samples: Count = 10
    """n: samples of each problem (the paper: 10, and 20 for LiveCodeBench)."""
    rows: Count = 64
    """Samples that are decoded at once, over all replicas."""

"""Prefill, insert and generate: the device programs of the sampler, after JetStream's engine API.

An ``Engine`` holds no weights and no cache: ``params`` and the decode state are passed in, as in
JetStream, so the same compiled programs serve every policy version. A prompt is prefilled once and
inserted into as many rows of the decode state as it has rollouts. ``generate`` decodes up to
``decode_steps`` tokens of every row in one program and stops early when all rows are done.

``sampler/jetstream.py`` is the subclass of JetStream's own class over these programs; this file
does not import JetStream, because that imports TensorFlow.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from oapl_jax.model.qwen import KVCache, QwenConfig, make_cache
from oapl_jax.sampler.sampling import SamplingParams, draw

Params = Any
"""The state half of ``nnx.split(Qwen(...))``."""


class Prefix(NamedTuple):
    """A prefilled prompt: its keys and values, and the logits after its last token."""

    cache: KVCache
    logits: Float[Array, "1 V"]
    length: Int[Array, ""]


class DecodeState(NamedTuple):
    """All rows that are being decoded."""

    cache: KVCache
    token: Int[Array, "B"]
    """The last token drawn; it enters the cache in the next step."""
    logprob: Float[Array, "B"]
    position: Int[Array, "B"]
    """Position of ``token``."""
    end: Int[Array, "B"]
    """First position that is beyond the limit of the response."""
    is_fresh: Bool[Array, "B"]
    """``token`` was drawn by ``insert`` and ``generate`` has not returned it yet."""
    is_done: Bool[Array, "B"]
    key: Key[Array, "B"]


class Decoded(NamedTuple):
    """What ``generate`` returns: the new tokens of every row, in order, where ``is_valid``."""

    tokens: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    is_valid: Bool[Array, "B N"]
    is_done: Bool[Array, "B"]


class Engine:
    """The compiled programs for one architecture, one law and one shape of the decode state.

    Args:
        graphdef: structure half of ``nnx.split(Qwen(...))``, at the sampler's compute precision.
        model_config: for the shape of the cache.
        sampling: the law.
        stop_ids: tokens that end a response; the one drawn belongs to it.
        num_rows: B, sequences decoded at once.
        max_prompt_tokens: limit of a prompt; prompts are padded to a few lengths up to it.
        max_response_tokens: limit of a response.
        decode_steps: tokens per call of ``generate``.
        mesh: devices of the sampler; rows go over ``data``, kv heads over ``tensor``.
        cache_dtype: precision of keys and values.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        model_config: QwenConfig,
        sampling: SamplingParams,
        *,
        stop_ids: Sequence[int],
        num_rows: int,
        max_prompt_tokens: int,
        max_response_tokens: int,
        decode_steps: int,
        mesh: Mesh,
        cache_dtype: DTypeLike = jnp.float32,
    ):
        outside = [i for i in stop_ids if not 0 <= i < sampling.vocab_size]
        if outside or not stop_ids:
            raise ValueError(f"stop ids {list(stop_ids)}: need at least one, each in 0..{sampling.vocab_size - 1}")
        if num_rows % mesh.shape["data"]:
            raise ValueError(f"{num_rows} rows of the sampler do not divide over data={mesh.shape['data']} of its mesh")
        self.model_config, self.sampling = model_config, sampling
        self.stop_ids = tuple(stop_ids)
        self.num_rows, self.decode_steps = num_rows, decode_steps
        self.max_prompt_tokens, self.max_response_tokens = max_prompt_tokens, max_response_tokens
        self.mesh, self._cache_dtype = mesh, cache_dtype
        self._prefill = jax.jit(functools.partial(_prefill, graphdef, model_config, cache_dtype))
        self._insert = jax.jit(
            functools.partial(_insert, sampling, self.stop_ids),
            donate_argnames="state",
            out_shardings=self._shardings(),
        )
        self._generate = jax.jit(
            functools.partial(_generate, graphdef, sampling, self.stop_ids, decode_steps),
            donate_argnames="state",
            out_shardings=(self._shardings(), NamedSharding(mesh, PartitionSpec())),
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values over all devices."""
        config, length = self.model_config, self.max_prompt_tokens + self.max_response_tokens
        cache = jax.eval_shape(lambda: make_cache(config, self.num_rows, length, self._cache_dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    def init_decode_state(self) -> DecodeState:
        """A state with all rows free."""
        rows, length = self.num_rows, self.max_prompt_tokens + self.max_response_tokens

        def make() -> DecodeState:
            integers = jnp.zeros(rows, jnp.int32)
            return DecodeState(
                cache=make_cache(self.model_config, rows, length, self._cache_dtype),
                token=integers,
                logprob=jnp.zeros(rows, jnp.float32),
                position=integers,
                end=integers,
                is_fresh=jnp.zeros(rows, bool),
                is_done=jnp.ones(rows, bool),
                key=jax.vmap(jax.random.key)(integers),
            )

        return jax.jit(make, out_shardings=self._shardings())()

    def padded_length(self, num_tokens: int) -> int:
        """The length that a prompt is padded to: a power of two from 16 on, or the limit."""
        return min(max(16, 1 << (num_tokens - 1).bit_length()), self.max_prompt_tokens)

    def prefill(
        self,
        *,
        params: Params,
        existing_prefix: Prefix | None = None,
        padded_tokens: Int[np.ndarray, "P"],
        true_length: int,
    ) -> Prefix:
        """Runs a right-padded prompt through the model (JetStream's signature).

        Raises:
            ValueError: for an empty prompt, one beyond the limit, or an existing prefix.
        """
        if existing_prefix is not None:
            raise ValueError("existing_prefix: prefilling onto another prefix is not supported")
        if not 0 < true_length <= min(len(padded_tokens), self.max_prompt_tokens):
            raise ValueError(f"prompt of {true_length} tokens; the limit is 1 to {self.max_prompt_tokens}")
        return self._prefill(params, np.asarray(padded_tokens, np.int32)[None], np.int32(true_length))

    def insert_rows(
        self,
        prefix: Prefix,
        state: DecodeState,
        rows: Int[np.ndarray, "G"],
        seed: UInt32[np.ndarray, "3"],
        max_response_tokens: int | None = None,
    ) -> DecodeState:
        """Starts G rollouts of a prefilled prompt in the given rows, and draws their first tokens.

        Args:
            prefix: may be inserted any number of times.
            state: is consumed.
            rows: free rows.
            seed: three uint32: the root seed, a stream and an index in it; rollout g of the group
                draws with ``fold_in(fold_in(fold_in(key(seed), stream), index), g)``.
            max_response_tokens: limit of these responses, at most the engine's.
        """
        limit = np.int32(min(max_response_tokens or self.max_response_tokens, self.max_response_tokens))
        return self._insert(
            prefix, state=state, rows=np.asarray(rows, np.int32), seed=np.asarray(seed, np.uint32), limit=limit
        )

    def generate(self, params: Params, decode_state: DecodeState) -> tuple[DecodeState, Decoded]:
        """Decodes up to ``decode_steps`` tokens of every row; the state is consumed."""
        return self._generate(params, state=decode_state)

    def free(self, state: DecodeState, rows: Int[np.ndarray, "G"] | None = None) -> DecodeState:
        """Abandons the given rows, or all."""
        where = slice(None) if rows is None else rows
        return state._replace(is_done=state.is_done.at[where].set(True), is_fresh=state.is_fresh.at[where].set(False))

    def _shardings(self) -> DecodeState:
        rows: Any = NamedSharding(self.mesh, PartitionSpec("data"))
        heads_divide = self.model_config.num_key_value_heads % self.mesh.shape["tensor"] == 0
        keys_values = PartitionSpec(None, "data", None, "tensor" if heads_divide else None, None)
        slots: Any = NamedSharding(self.mesh, keys_values)
        cache = KVCache(slots, slots)
        return DecodeState(cache, *[rows] * (len(DecodeState._fields) - 1))


def _prefill(
    graphdef: nnx.GraphDef,
    config: QwenConfig,
    cache_dtype: DTypeLike,
    params: Params,
    tokens: Int[Array, "1 P"],
    length: Int[Array, ""],
) -> Prefix:
    with jax.named_scope("prefill"):
        model = nnx.merge(graphdef, params)
        cache = make_cache(config, 1, tokens.shape[1], cache_dtype)
        hidden, cache = model.hidden(tokens, jnp.arange(tokens.shape[1])[None], cache)
        # Padding comes after the prompt: causal attention never looks at it, and decode steps
        # overwrite its cache slots before any query could.
        last = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1)
        return Prefix(cache, model.logits(last)[:, 0], length)


def _insert(
    sampling: SamplingParams,
    stop_ids: tuple[int, ...],
    prefix: Prefix,
    state: DecodeState,
    rows: Int[Array, "G"],
    seed: UInt32[Array, "3"],
    limit: Int[Array, ""],
) -> DecodeState:
    with jax.named_scope("insert"):
        group_size, prompt_slots = rows.shape[0], prefix.cache.k.shape[2]
        group_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), seed[2])
        keys = jax.vmap(lambda g: jax.random.fold_in(group_key, g))(jnp.arange(group_size))
        positions = jnp.broadcast_to(prefix.length, (group_size,))
        logits = jnp.broadcast_to(prefix.logits, (group_size, prefix.logits.shape[-1]))
        token, logprob = draw(keys, positions, logits, sampling)
        end = positions + limit
        cache = jax.tree.map(lambda whole, one: whole.at[:, rows, :prompt_slots].set(one), state.cache, prefix.cache)
        return DecodeState(
            cache=cache,
            token=state.token.at[rows].set(token),
            logprob=state.logprob.at[rows].set(logprob),
            position=state.position.at[rows].set(positions),
            end=state.end.at[rows].set(end),
            is_fresh=state.is_fresh.at[rows].set(True),
            is_done=state.is_done.at[rows].set(_is_last(token, positions, end, stop_ids)),
            key=state.key.at[rows].set(keys),
        )


def _generate(
    graphdef: nnx.GraphDef,
    sampling: SamplingParams,
    stop_ids: tuple[int, ...],
    num_steps: int,
    params: Params,
    state: DecodeState,
) -> tuple[DecodeState, Decoded]:
    model = nnx.merge(graphdef, params)
    num_rows = state.token.shape[0]

    def step(carry: tuple[Array, DecodeState, Decoded]) -> tuple[Array, DecodeState, Decoded]:
        i, state, out = carry
        hidden, cache = model.hidden(state.token[:, None], state.position[:, None], state.cache)
        token, logprob = draw(state.key, state.position + 1, model.logits(hidden)[:, 0], sampling)
        is_live = ~state.is_done
        position = jnp.where(is_live, state.position + 1, state.position)
        out = Decoded(
            out.tokens.at[:, i].set(token),
            out.logprobs.at[:, i].set(logprob),
            out.is_valid.at[:, i].set(is_live),
            state.is_done | _is_last(token, position, state.end, stop_ids),
        )
        state = state._replace(
            cache=cache,
            token=jnp.where(is_live, token, state.token),
            position=position,
            is_done=out.is_done,
        )
        return i + 1, state, out

    # Column 0 is for the tokens that insert drew since the last call.
    out = Decoded(
        jnp.zeros((num_rows, num_steps + 1), jnp.int32).at[:, 0].set(state.token),
        jnp.zeros((num_rows, num_steps + 1), jnp.float32).at[:, 0].set(state.logprob),
        jnp.zeros((num_rows, num_steps + 1), bool).at[:, 0].set(state.is_fresh),
        state.is_done,
    )
    state = state._replace(is_fresh=jnp.zeros_like(state.is_fresh))
    with jax.named_scope("decode"):
        _, state, out = jax.lax.while_loop(
            lambda carry: (carry[0] <= num_steps) & ~jnp.all(carry[1].is_done), step, (jnp.int32(1), state, out)
        )
    return state, out


def _is_last(
    token: Int[Array, "B"], position: Int[Array, "B"], end: Int[Array, "B"], stop_ids: tuple[int, ...]
) -> Bool[Array, "B"]:
    """Whether a token ends its response: a stop token, or the last position that the limit allows."""
    return jnp.isin(token, jnp.asarray(stop_ids)) | (position + 1 >= end)

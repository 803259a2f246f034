"""Prefill, insert and generate: the device programs of the sampler, after JetStream's engine API.

An ``Engine`` holds no weights and no cache: the policy, of ``prepare``, and the decode state are passed in, so the
same compiled programs serve every policy version. The state has *slots*, one for each sequence that has been started,
and pages of keys and values. A prompt is prefilled once and inserted into as many slots as it has rollouts.
``generate`` decodes the sequences of some of the slots, up to ``decode_steps`` tokens of each in one program. The
caller chooses slots and pages: ``sampler/scheduler.py``, or JetStream's orchestrator through
``sampler/jetstream/engine.py``.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from oapl_jax.distributed.sharding import placed
from oapl_jax.model.qwen import Attend, Layer, QwenConfig, abstract
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.sampler import kv_cache
from oapl_jax.sampler.cpu import dense_cache, joined_layers
from oapl_jax.sampler.draw import Distributions, Draw, draw, uniforms
from oapl_jax.sampler.kv_cache import KVPages, PromptKV
from oapl_jax.sampler.paged_attention import choose_implementation, joined_heads, paged_attend

Params = Any
"""The state half of ``nnx.split(Qwen(...))``."""

AttentionKind = Literal["dense", "xla", "tpu", "gpu"]
"""How decode steps read the cache: ``dense`` as in ``sampler/cpu``, or paged by one of ``paged_attend``'s kernels."""

LARGE_PARAMS = 2**26
"""Parameters from which on memory is what a CPU is short of: the sampler makes no copy of the layers (they are not
joined), and its programs take turns with the learner's, so that the temporaries of both are never there at once."""

PREFILL_TOKENS = 1024
"""Tokens of a prompt that go through the model at once: longer prompts go in parts, and need no more temporaries."""

SHORTEST_DENSE = 64
"""Tokens that dense attention covers at least: longer ones are summed in an order that padding does not change."""


class Prepared(NamedTuple):
    """A policy version as the programs read it; what is None they take from ``params``."""

    params: Params
    layers: list[Layer] | None
    """For ``dense``, and on a GPU; see ``joins_layers``."""
    head: Float[Array, "V D"] | None
    """For ``dense``, where the embedding is not tied."""


class Prefix(NamedTuple):
    """A prefilled prompt: its keys and values, and the logits after its last token."""

    kv: PromptKV
    logits: Float[Array, "1 V"]
    length: Int[Array, "1"]


class Start(NamedTuple):
    """The sequences that ``insert`` starts after one prompt, host arrays."""

    slots: Any
    """int32 ``[B]``, free slots; out of range: the entry is padding."""
    seeds: Any
    """uint32 ``[B, 4]``: root seed, stream, index in it, rollout; the key is ``key(root)`` folded with the other three."""
    ends: Any
    """int32 ``[B]``, first position beyond the limit of the response."""
    given: Any
    """int32 ``[B]``, the token that follows the prompt, for a sequence that goes on; -1: it is drawn."""
    distribution: Distributions
    full_pages: Any
    """int32 ``[M]``, page id of each page of the padded prompt; out of range: not written (it is not full)."""
    tail_pages: Any
    """int32 ``[B]``, page id of each sequence's own copy of its prompt's partial page; out of range: there is none."""


class DecodeState(NamedTuple):
    """The cache, and for each slot what the next decode step needs."""

    pages: KVPages
    token: Int[Array, "B"]
    """The last token drawn; it enters the cache in the next step."""
    first: Draw
    """What ``insert`` drew."""
    position: Int[Array, "B"]
    """Position of ``token``."""
    end: Int[Array, "B"]
    is_fresh: Bool[Array, "B"]
    """``token`` was drawn by ``insert`` and ``generate`` has not returned it yet."""
    is_done: Bool[Array, "B"]
    key: Key[Array, "B"]
    distribution: Distributions


class Decoded(NamedTuple):
    """What ``generate`` returns for each sequence asked for: the new tokens, in order, where ``is_valid``."""

    tokens: Any
    """int32 ``[B, N]``; column 0 is for the token that ``insert`` drew."""
    logprobs: Any
    """float32 ``[B, N]``."""
    is_valid: Any
    is_done: Any
    """bool ``[B]``."""
    num_steps: Any
    """int32 ``[]``: decode steps that were run."""


def is_large_on_cpu(model: QwenConfig, mesh: Mesh) -> bool:
    """Whether the one device is a CPU of which each program of this model keeps all cores busy."""
    is_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return is_cpu and model.num_params >= LARGE_PARAMS


def num_slots(num_rows: int) -> int:
    """Slots of an engine: one for each row, and as many for sequences that wait for a row."""
    return 2 * num_rows


def joins_layers(mesh: Mesh) -> bool:
    """Whether decode steps read a copy of the layers for another reason than ``dense``: see ``sampler/cpu/joined_layers.py``.

    Layers that are split over devices are not joined.
    """
    return mesh.size == 1 and mesh.devices.flat[0].platform == "gpu"


class Engine:
    """The compiled programs for one architecture and one shape of the decode state.

    ``graphdef`` is the structure half of ``nnx.split(Qwen(...))``, at the sampler's compute precision. ``vocab_size`` is
    the tokenizer's length: embedding rows from it on are padding and never drawn. One of ``stop_ids`` ends a response,
    and belongs to it. ``num_rows`` sequences are decoded at once, at most ``decode_steps`` tokens of each per call of
    ``generate``; there are twice as many slots, where sequences of a group wait for their turn. By default the cache has
    pages for ``num_rows`` sequences of full length. ``mesh`` has the devices of one replica: kv heads go over
    ``tensor``, the other axes have size 1. Only ``dense`` and ``xla`` read a cache of int8.

    By default ``attention`` is ``dense`` on a CPU, and else what ``choose_implementation`` says, and decode steps read a
    copy of the layers (``join_layers``) where ``joins_layers`` says so. With ``dense`` they always do, or read the
    layers in the memory of their stack, where ``is_large_on_cpu`` says so (``share_layers``). Without ``can_truncate``
    no request has a top-k or a top-p, and there is less to compile.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        model_config: QwenConfig,
        *,
        vocab_size: int,
        stop_ids: Sequence[int],
        num_rows: int,
        max_prompt_tokens: int,
        max_response_tokens: int,
        decode_steps: int,
        mesh: Mesh,
        num_pages: int | None = None,
        page_size: int = 16,
        cache_dtype: DTypeLike = jnp.float32,
        attention: AttentionKind | None = None,
        join_layers: bool | None = None,
        share_layers: bool | None = None,
        can_truncate: bool = True,
    ):
        self.model_config, self.vocab_size = model_config, vocab_size
        self._abstract_params = abstract(model_config)[1]
        self.stop_ids = tuple(stop_ids)
        self.can_truncate = can_truncate
        self.num_rows, self.num_slots, self.decode_steps = num_rows, num_slots(num_rows), decode_steps
        self.max_prompt_tokens, self.max_response_tokens = max_prompt_tokens, max_response_tokens
        self.page_size, self.mesh, self._cache_dtype = page_size, mesh, cache_dtype
        self.max_pages = self.pages_of(max_prompt_tokens + max_response_tokens)
        self.num_pages = num_rows * self.max_pages if num_pages is None else num_pages
        if self.num_pages < self.max_pages:
            raise ValueError(
                f"no room for one sequence: {max_prompt_tokens} + {max_response_tokens} tokens need {self.max_pages} pages"
                f" of {page_size} tokens, the cache has {self.num_pages}; shorten the limits, or give the cache more"
            )
        platform = mesh.devices.flat[0].platform
        heads = model_config.num_key_value_heads, model_config.head_dim, mesh.shape["tensor"]
        paged = choose_implementation(mesh.devices.flat[0], cache_dtype, *heads)
        self.attention: AttentionKind = attention or ("dense" if platform == "cpu" else paged)
        self._joined = max(1, joined_heads(*heads)) if self.attention == "tpu" else 1
        self._is_joined = joins_layers(mesh) if join_layers is None else join_layers
        self._is_joined |= self.attention == "dense"
        self._is_shared = is_large_on_cpu(model_config, mesh) if share_layers is None else share_layers
        self._is_shared &= self.attention == "dense"
        is_sharded = mesh.shape["tensor"] > 1
        self._draw = functools.partial(draw, vocab_size=vocab_size, is_sharded=is_sharded, can_truncate=can_truncate)
        self._graphdef, self._stops = graphdef, jnp.asarray(self.stop_ids)
        replicated: Any = NamedSharding(mesh, PartitionSpec())
        state, prompt = self._shardings(), PromptKV(self._kv_sharding(3, 5), self._kv_sharding(3, 5))
        self._join, self._turn_head = jax.jit(self._join_program), jax.jit(self._turn_head_program)
        self._prefill = jax.jit(self._prefill_program, out_shardings=Prefix(prompt, replicated, replicated))
        self._insert = jax.jit(self._insert_program, donate_argnames="state", out_shardings=state)
        self._generate = jax.jit(self._generate_program, donate_argnames="state", out_shardings=(state, replicated))

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values over all devices."""
        return self.num_pages * kv_cache.page_bytes(self.model_config, self.page_size, self._cache_dtype)

    def pages_of(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def init_decode_state(self) -> DecodeState:
        """A state with all slots free."""
        slots = self.num_slots

        def make() -> DecodeState:
            integers, floats = jnp.zeros(slots, jnp.int32), jnp.zeros(slots, jnp.float32)
            return DecodeState(
                pages=kv_cache.make_pages(
                    self.model_config, self.num_pages, self.page_size, self._cache_dtype, self._joined
                ),
                token=integers,
                first=Draw(integers, floats),
                position=integers,
                end=integers,
                is_fresh=jnp.zeros(slots, bool),
                is_done=jnp.ones(slots, bool),
                key=jax.vmap(jax.random.key)(integers),
                distribution=Distributions(floats, integers, floats, floats),
            )

        return jax.jit(make, out_shardings=self._shardings())()

    def padded_length(self, num_tokens: int) -> int:
        """The length that a prompt is padded to: 1 or 1.5 times a power of two of pages, or the limit's pages."""
        return self._padded(self.pages_of(num_tokens)) * self.page_size

    def padded_pages(self, num_pages: int) -> int:
        """Columns of the page table for sequences of ``num_pages`` pages: as many as those of a padded prompt, or the limit."""
        if self.attention != "dense":
            return self.max_pages
        return self._padded(max(num_pages, self.pages_of(SHORTEST_DENSE)))

    def _padded(self, num_pages: int) -> int:
        power = 1 << (num_pages - 1).bit_length()
        return min(self.max_pages, 3 * power // 4 if num_pages <= 3 * power // 4 else power)

    def prepare(self, params: Params) -> Prepared:
        """A policy version in the form that ``prefill`` and ``generate`` take; once for each version.

        Raises:
            ValueError: the parameters are those of another architecture; names the first that differs.
        """
        expected, given = _shapes(self._abstract_params), _shapes(params)
        for name in expected | given:
            if expected.get(name) != given.get(name):
                shapes = [list(tree[name]) if name in tree else "no such parameter" for tree in (given, expected)]
                raise ValueError(f"parameter {name} is {shapes[0]}, the engine's model has {shapes[1]}")
        if not self._is_shared:
            return self._prepared(params, self._join)
        layers = joined_layers.layers_in_place(nnx.merge(self._graphdef, params))
        return Prepared(params, layers, self._turn_head(params))

    def prefill(self, policy: Prepared, prompt: Int[np.ndarray, "_P"]) -> Prefix:
        """Runs a prompt, padded, through the model."""
        tokens = np.zeros((1, self.padded_length(len(prompt))), np.int32)
        tokens[0, : len(prompt)] = prompt
        return self._prefill(policy.params, tokens, np.array([len(prompt)], np.int32))

    def insert(self, prefix: Prefix, state: DecodeState, start: Start) -> DecodeState:
        """Starts sequences of a prefilled prompt in free slots and draws their first tokens; the state is consumed."""
        return self._insert(prefix, state=state, start=start)

    def generate(
        self,
        policy: Prepared,
        state: DecodeState,
        slots: Int[np.ndarray, "B"],
        page_table: Int[np.ndarray, "B M"],
    ) -> tuple[DecodeState, Int[Array, "B X"]]:
        """Decodes a chunk of the sequences in some slots, until all have ended; the state is consumed.

        A slot is named at most once; out of range it is padding. The table has enough pages of each sequence for the
        tokens that the chunk may add. Returns the new state, and all else in one array for ``unpack``: one copy to the
        host.
        """
        return self._generate(policy, np.asarray(slots, np.int32), page_table, state=state)

    def unpack(self, packed: Int[np.ndarray, "B X"]) -> Decoded:
        """What ``generate`` returned, on the host."""
        n = self.decode_steps + 1
        tokens, logprobs, flags = np.split(packed, (n, 2 * n), axis=1)
        is_fresh, num_new = flags[:, :1].astype(bool), flags[:, 1:2]
        is_valid = np.concatenate([is_fresh, np.arange(n - 1) < num_new], axis=1)
        return Decoded(tokens, logprobs.view(np.float32), is_valid, flags[:, 2].astype(bool), int(flags[0, 3]))

    def lower_prefill(self, params: Params) -> jax.stages.Lowered:
        """``prefill`` of the longest prompt, to be compiled for parameters that are shapes with shardings."""
        length = self.padded_length(self.max_prompt_tokens)
        return self._prefill.lower(params, self._integers(1, length), self._integers(1))

    def lower_generate(self, params: Params) -> jax.stages.Lowered:
        """``generate`` of all rows, to be compiled for parameters that are shapes with shardings."""
        state = placed(jax.eval_shape(self.init_decode_state), self._shardings())
        rows, table = self._integers(self.num_rows), self._integers(self.num_rows, self.max_pages)
        policy = self._prepared(params, functools.partial(jax.eval_shape, self._join_program))
        return self._generate.lower(policy, rows, table, state=state)

    def _prepared(self, params: Params, join: Any) -> Prepared:
        return Prepared(params, *(join(params) if self._is_joined else (None, None)))

    def distributions(self, sampling: Sequence[SamplingDistribution]) -> Distributions:
        """Host arrays of the distributions of several sequences."""
        fields = ("temperature", np.float32), ("top_k", np.int32), ("top_p", np.float32), ("min_p", np.float32)
        columns: list[Any] = [np.array([getattr(params, name) for params in sampling], kind) for name, kind in fields]
        return Distributions(*columns)

    def _integers(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def _kv_sharding(self, axis: int, ndim: int) -> Any:
        """Kv heads over ``tensor``, where it divides them."""
        spec: list[str | None] = [None] * ndim
        if self.model_config.num_key_value_heads % self.mesh.shape["tensor"] == 0:
            spec[axis] = "tensor"
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def _shardings(self) -> DecodeState:
        replicated: Any = NamedSharding(self.mesh, PartitionSpec())
        pages: Any = self._kv_sharding(0, 4)
        return DecodeState(KVPages(pages, pages), *[replicated] * (len(DecodeState._fields) - 1))

    def _join_program(self, params: Params) -> tuple[list[Layer], Float[Array, "V D"] | None]:
        model = nnx.merge(self._graphdef, params)
        layers = joined_layers.split_layers(model) if self._is_shared else joined_layers.join_layers(model)
        return layers, self._turn_head_program(params)

    def _turn_head_program(self, params: Params) -> Float[Array, "V D"] | None:
        return joined_layers.turned_head(nnx.merge(self._graphdef, params)) if self.attention == "dense" else None

    def _prefill_program(self, params: Params, tokens: Int[Array, "1 P"], length: Int[Array, "1"]) -> Prefix:
        with jax.named_scope("prefill"):
            model = nnx.merge(self._graphdef, params)
            # Padding comes after the prompt: causal attention never sees it, and decode steps overwrite its keys and
            # values before any query could.
            num_tokens = tokens.shape[1]
            size = min(num_tokens, PREFILL_TOKENS)
            tokens = jnp.pad(tokens, ((0, 0), (0, -num_tokens % size)))

            def run(start: Any, cache: PromptKV) -> tuple[Float[Array, "1 D"], PromptKV]:
                """A part of the prompt; the state of its last token."""
                part = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
                attend = functools.partial(kv_cache.attend_prompt, start=start, mesh=self.mesh)
                hidden, cache = model.hidden(part, start + jnp.arange(size)[None], attend, cache)
                return hidden[:, jnp.minimum(length[0] - 1 - start, size - 1)], cache

            cache = kv_cache.make_prompt_kv(self.model_config, tokens.shape[1], self._cache_dtype)
            if size == num_tokens:
                last, cache = run(0, cache)
            else:
                last = jnp.zeros((1, self.model_config.hidden_size), model.compute_dtype)
                num_parts = -(-length[0] // size)
                parts = jax.lax.fori_loop(0, num_parts, lambda i, done: run(i * size, done[1]), (last, cache))
                last, cache = parts[0], jax.tree.map(lambda kv: kv[:, :, :num_tokens], parts[1])
            return Prefix(cache, model.logits(last), length)

    def _insert_program(self, prefix: Prefix, state: DecodeState, start: Start) -> DecodeState:
        with jax.named_scope("insert"):
            slots = start.slots
            keys = jax.vmap(_sequence_key)(start.seeds)
            positions = jnp.broadcast_to(prefix.length, slots.shape)
            logits = jnp.broadcast_to(prefix.logits.T, (prefix.logits.shape[1], len(slots)))
            first = self._draw(uniforms(keys, positions), logits, start.distribution)
            is_fresh = start.given < 0
            token = jnp.where(is_fresh, first.token, start.given)
            pages = kv_cache.write_prompt(state.pages, prefix.kv, start.full_pages, prefix.length[0], start.tail_pages)
            new = (token, first, positions, start.ends, is_fresh, self._is_last(token, positions, start.ends))
            state_of_slots = (*new, keys, start.distribution)
            return DecodeState(
                pages,
                *jax.tree.map(
                    lambda whole, part: whole.at[slots].set(part, mode="drop"), tuple(state)[1:], state_of_slots
                ),
            )

    def _generate_program(
        self, policy: Prepared, slots: Int[Array, "B"], table: Int[Array, "B M"], state: DecodeState
    ) -> tuple[DecodeState, Int[Array, "B X"]]:
        model, num_steps = nnx.merge(self._graphdef, policy.params), self.decode_steps
        logits_fn = lambda hidden: model.logits(hidden).T  # noqa: E731
        if self.attention == "dense" and (head := joined_layers.head_by_id(model, policy.head)) is not None:
            logits_fn = functools.partial(joined_layers.logits_by_id, head=head)
        num_layers, pages = self.model_config.num_hidden_layers, state.pages
        own: Any = jax.tree.map(lambda whole: whole.at[slots].get(mode="clip"), tuple(state)[1:])
        rows = DecodeState(None, *own)  # pyright: ignore[reportArgumentType]
        rows = rows._replace(is_done=rows.is_done | (slots >= state.token.shape[0]))
        started, cache, old = rows, pages, None
        if self.attention == "dense":
            old = dense_cache.gather(pages, table, num_layers, model.compute_dtype)
            cache = dense_cache.make_empty(pages, num_layers, table.shape[0], num_steps)
        positions = started.position + jnp.arange(1, num_steps + 1)[:, None]
        # For all steps at once: random bits cost a CPU their loop of rounds, whatever their number.
        uniform = jax.vmap(uniforms, in_axes=(None, 0))(started.key, positions)

        def step(carry: Any) -> Any:
            i, rows, cache, out = carry
            attend = (
                self._attend_pages(table, rows.position, ~rows.is_done)
                if old is None
                else dense_cache.attend_chunk(old, started.position, i - 1)
            )
            hidden, cache = model.hidden(rows.token[:, None], rows.position[:, None], attend, cache, policy.layers)
            drawn = self._draw(uniform[i - 1], logits_fn(hidden[:, 0]), rows.distribution)
            is_live = ~rows.is_done
            position = jnp.where(is_live, rows.position + 1, rows.position)
            rows = rows._replace(
                token=jnp.where(is_live, drawn.token, rows.token),
                position=position,
                is_done=rows.is_done | self._is_last(drawn.token, position, rows.end),
            )
            return i + 1, rows, cache, jax.tree.map(lambda whole, one: whole.at[:, i].set(one), out, drawn)

        def goes_on(carry: Any) -> Array:
            i, rows, _, _ = carry
            return (i <= num_steps) & ~jnp.all(rows.is_done)

        # Column 0 is for the tokens that insert drew since the last call.
        out = jax.tree.map(
            lambda one: jnp.zeros((one.shape[0], num_steps + 1, *one.shape[1:]), one.dtype).at[:, 0].set(one),
            rows.first,
        )
        with jax.named_scope("decode"):
            i, rows, cache, out = jax.lax.while_loop(goes_on, step, (jnp.int32(1), rows, cache, out))
        if self.attention == "dense":
            cache = dense_cache.scatter(pages, cache, table, started.position, rows.position)
        num_new = rows.position - started.position
        num_done_steps = jnp.full_like(num_new, i - 1)
        flags = jnp.stack([started.is_fresh, num_new, rows.is_done, num_done_steps], axis=1).astype(jnp.int32)
        packed = [_bits(leaf.reshape(leaf.shape[0], -1)) for leaf in jax.tree.leaves(out)]
        rows = rows._replace(is_fresh=jnp.zeros_like(rows.is_fresh))
        own = jax.tree.map(
            lambda whole, part: whole.at[slots].set(part, mode="drop"), tuple(state)[1:], tuple(rows)[1:]
        )
        return DecodeState(cache, *own), jnp.concatenate([*packed, flags], axis=1)

    def _attend_pages(self, table: Array, positions: Array, is_live: Array) -> Attend:
        """For one token a sequence over ``KVPages``."""
        num_layers, kind = self.model_config.num_hidden_layers, self.attention
        assert kind != "dense"

        def attend(layer: Any, query: Array, key: Array, value: Array, cache: KVPages) -> tuple[Array, KVPages]:
            k = kv_cache.put_tokens(cache.k, layer, num_layers, table, positions, is_live, key)
            v = kv_cache.put_tokens(cache.v, layer, num_layers, table, positions, is_live, value)
            in_layer = table + layer * (k.shape[1] // num_layers)
            lengths = jnp.where(is_live, positions + 1, 0)
            output = paged_attend(query[:, 0], k, v, in_layer, lengths, mesh=self.mesh, implementation=kind)
            return output[:, None], KVPages(k, v)

        return attend

    def _is_last(self, token: Int[Array, "B"], position: Int[Array, "B"], end: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Whether a token ends its response: a stop token, or the last position that the limit allows."""
        return jnp.isin(token, self._stops) | (position + 1 >= end)


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its name; a quantised one has that of its values."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return {"/".join(str(key.key) for key in path): param.get_value().shape for path, param in leaves}


def _sequence_key(seed: UInt32[Array, "4"]) -> Key[Array, ""]:
    key = jax.random.key(seed[0])
    for value in seed[1:]:
        key = jax.random.fold_in(key, value)
    return key


def _bits(array: Array) -> Int[Array, "..."]:
    return jax.lax.bitcast_convert_type(array, jnp.int32)

"""A policy served by JetStream: its own ``Engine`` class over the programs of ``sampler/engine.py``.

    engine = JetStreamEngine(engine, params, tokenizer, samples_per_slot=8, sampling=SamplingDistribution(), seed=0)
    driver = orchestrator.Driver(prefill_engines=[engine], generate_engines=[engine], ...)

For JetStream 0.2.2, the last on PyPI; the arguments that its last commit on GitHub (0.3.0) adds are taken
too. This file and ``server.py`` alone import it, because it imports TensorFlow (seconds, and
gigabytes on disk); training imports neither. What to know of its orchestrator:

* A row whose column is not valid has ended, so every column of a row in flight must be valid; see
  ``generate``. Stop tokens are not passed on to the client.
* ``max_tokens`` of a request is looked at once a chunk: a response gets at most that many tokens,
  and up to ``decode_steps - 1`` fewer. ``server.py`` is exact.
* An error in one of its threads kills the process.
"""

import contextlib
import functools
import itertools
import logging
import queue
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt32
from jetstream.engine import engine_api, token_utils, tokenizer_api, tokenizer_pb2

from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.sampler.draw import Distributions, Draw, draw, uniforms
from oapl_jax.sampler.engine import DecodeState, Engine, Params, Prefix, Prepared, Start

# The one name that JetStream's orchestrator uses and jax has removed.
jax.tree_map = jax.tree.map  # pyright: ignore[reportAttributeAccessIssue]

NO_BOS = -1
"""JetStream puts a token before every prompt, which Qwen was not trained with: this one, and ``prefill`` takes it off."""

SERVING_STREAM = 2**32 - 3
"""Stream of the sampling keys, see ``evaluation.held_out.EVALUATION_STREAM``."""

LONGEST_PREFILL = 32768
"""JetStream pads prompts to powers of two up to this."""


@struct.dataclass
class ScoredTokens(engine_api.ResultTokens):
    """JetStream's result with log-probabilities: their bits are further columns of ``data``, for one copy to the host."""

    logprobs_idx: tuple[int, int] = struct.field(pytree_node=False, default=(0, 0))
    """The range of columns that hold log-probabilities."""

    def convert_to_numpy(self) -> "ScoredTokens":
        """The base class would return a base class."""
        return self.replace(data=np.array(self.data))  # pyright: ignore[reportAttributeAccessIssue]

    def get_logprobs_at_slot(self, slot: int) -> Float[np.ndarray, "G K"]:
        """Log-probabilities of the tokens of ``get_result_at_slot``, where these are valid."""
        rows = np.asarray(self.data)[slot * self.samples_per_slot : (slot + 1) * self.samples_per_slot]
        return rows[:, slice(*self.logprobs_idx)].view(np.float32)


@struct.dataclass
class PromptPrefix:
    """What ``prefill`` returns: a prompt in the cache's form, and how its responses are drawn."""

    prefix: Prefix
    first_tokens: Int[Array, "S"] | None = None
    """The responses' first tokens, where ``prefill_multisampling`` has drawn them."""
    length: int = struct.field(pytree_node=False, default=0)
    sampling: SamplingDistribution = struct.field(pytree_node=False, default_factory=SamplingDistribution)
    index: int | None = struct.field(pytree_node=False, default=None)
    """Index of the random stream; None: the next one when it is inserted."""


class JetStreamTokenizer(tokenizer_api.Tokenizer):
    """A tokenizer of ours in JetStream's interface.

    Args:
        tokenizer: the policy's.
        stop_ids: the engine's.
        is_chat: text is what the user says in a chat; False: it is encoded as it stands.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...], *, is_chat: bool = False):
        self._tokenizer, self._stop_ids, self._is_chat = tokenizer, stop_ids, is_chat

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a request's text.

        Raises:
            ValueError: the tokenizer has no token for it.
        """
        return self._tokenizer.encode_prompt(text) if self._is_chat else self._tokenizer.encode(text)

    def encode(self, s: str, **kwargs: Any) -> tuple[Shaped[np.ndarray | Array, "P"], int]:
        """Padded token ids and their number, whatever ``is_bos`` says."""
        kwargs["is_bos"] = False
        return token_utils.pad_tokens(np.array(self.encode_text(s), np.int32), NO_BOS, self.pad_id, **kwargs)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """Text; JetStream asks token by token, so a character made of several tokens is not whole."""
        return self._tokenizer.decode(token_ids)

    @property
    def pad_id(self) -> int:
        """Fills prompts up."""
        return self._tokenizer.pad_id

    @property
    def eos_id(self) -> int:
        """The stop id that a demonstration ends with."""
        return self._tokenizer.eos_id

    @property
    def bos_id(self) -> int:
        """No token."""
        return NO_BOS

    @property
    def stop_tokens(self) -> set[int]:
        """The engine's stop ids; unlike JetStream's default, a sampled pad is none."""
        return set(self._stop_ids)


class JetStreamEngine(engine_api.Engine):
    """JetStream's engine: slot ``i`` owns the rows from ``i * samples_per_slot`` on, rollouts of one prompt.

    Args:
        engine: the programs; ``num_rows`` is a multiple of ``samples_per_slot``.
        params: the policy, on the engine's mesh.
        tokenizer: the policy's.
        samples_per_slot: G, rollouts of a request.
        sampling: the distribution of every request that does not bring its own.
        seed: root of all draws; the i-th request inserted draws from ``(seed, SERVING_STREAM, i)``.
        is_chat: see ``JetStreamTokenizer``.
    """

    def __init__(
        self,
        engine: Engine,
        params: Params,
        tokenizer: Tokenizer,
        *,
        samples_per_slot: int,
        sampling: SamplingDistribution,
        seed: int,
        is_chat: bool = False,
    ):
        if engine.num_rows % samples_per_slot:
            raise ValueError(
                f"{engine.num_rows} rows of the engine are no multiple of samples_per_slot={samples_per_slot}"
            )
        if engine.max_prompt_tokens >= LONGEST_PREFILL:
            raise ValueError(
                f"max_prompt_tokens={engine.max_prompt_tokens}: JetStream takes less than {LONGEST_PREFILL}"
            )
        self._engine, self._policy = engine, engine.prepare(params)
        self._tokenizer = JetStreamTokenizer(tokenizer, engine.stop_ids, is_chat=is_chat)
        self._samples_per_slot, self._sampling, self._seed = samples_per_slot, sampling, seed
        # JetStream has no word in which pages a slot gets, so each row has its own for good.
        rows = np.arange(engine.num_rows, dtype=np.int32)
        self._own_pages = rows[:, None] * engine.max_pages + np.arange(engine.max_pages, dtype=np.int32)
        self._page_table = self._own_pages.copy()
        if engine.num_pages < self._own_pages.size:
            raise ValueError(f"{engine.num_pages} pages: every row needs its own, {self._own_pages.size} in all")
        self._num_inserted = itertools.count()
        self._abandoned: queue.SimpleQueue[int] = queue.SimpleQueue()
        # JetStream prefills and generates in two threads; see Scheduler for why they must take turns.
        self._is_shared = engine.mesh.size > 1
        self._device_lock = threading.Lock() if self._is_shared else contextlib.nullcontext()
        self._report = jax.jit(functools.partial(_report, engine.decode_steps, engine.max_response_tokens))
        self._draw_first = jax.jit(functools.partial(_draw_first, engine.vocab_size, self._is_shared))

    @property
    def programs(self) -> Engine:
        """The programs that this adapts, with all limits."""
        return self._engine

    def load_params(self, *args: Any, **kwargs: Any) -> Prepared:
        """The policy in the form that the programs take."""
        return self._policy

    def init_decode_state(self, *args: Any, **kwargs: Any) -> DecodeState:
        """A state with all slots free."""
        with self._device_lock:
            return self._finished(self._engine.init_decode_state())

    def warm_up(self) -> None:
        """Compiles what every request needs, by a short one: what does not fit in memory fails here."""
        prefix = self.prefill(params=self._policy, padded_tokens=np.zeros(1, np.int32), true_length=1)
        state = self._insert_rollouts(prefix, self.init_decode_state(), 0, 0, 0)
        jax.block_until_ready(self.generate(self._policy, state)[1].data)

    def prefill(
        self,
        *,
        params: Prepared,
        existing_prefix: PromptPrefix | None = None,
        padded_tokens: Shaped[np.ndarray | Array, "P"],
        true_length: int,
        sampler: Any = None,
        request_id: Any = None,
    ) -> PromptPrefix:
        """Runs a prompt through the model; of one beyond the limit the last tokens, as JetStream does.

        Args:
            params: of ``load_params``.
            existing_prefix: not supported.
            padded_tokens: the prompt, padded to any length.
            true_length: without padding.
            sampler: ``SamplingDistribution`` of this request's responses (after 0.2.2, where it is any function).
            request_id: the caller's own (after 0.2.2); nothing here needs it.

        Raises:
            ValueError: for an empty prompt, an existing prefix, or a sampler that is no ``SamplingDistribution``.
        """
        if existing_prefix is not None:
            raise ValueError("existing_prefix: prefilling onto another prefix is not supported")
        if not isinstance(sampler, SamplingDistribution | None):
            raise ValueError(
                f"sampler={sampler!r}: give SamplingDistribution; the draw is part of the compiled programs"
            )
        token_ids = np.asarray(padded_tokens, np.int32)[:true_length]
        token_ids = token_ids[token_ids != NO_BOS]
        if len(token_ids) > self._engine.max_prompt_tokens:
            limit = self._engine.max_prompt_tokens
            logging.getLogger(__name__).warning("prompt of %d tokens: only the last %d are used", true_length, limit)
            token_ids = token_ids[-limit:]
        with self._device_lock:
            prefix = self._finished(self._engine.prefill(params, [token_ids]))
        return PromptPrefix(prefix, length=len(token_ids), sampling=sampler or self._sampling)

    def prefill_multisampling(
        self,
        *,
        params: Prepared,
        existing_prefix: PromptPrefix | None = None,
        padded_tokens: Shaped[np.ndarray | Array, "P"],
        true_length: int,
        sampler: Any = None,
        rng: Any = None,
        num_samples: int = 1,
        request_id: Any = None,
    ) -> tuple[PromptPrefix, ScoredTokens]:
        """Runs a prompt through the model and draws the first tokens of its responses (after 0.2.2).

        Args:
            params: see ``prefill``, as those that are not named here.
            existing_prefix: see there.
            padded_tokens: see there.
            true_length: see there.
            sampler: see there.
            rng: a key of jax.random that the draws follow from; None: the engine's seed.
            num_samples: responses: ``samples_per_slot`` for each slot that ``bulk_insert`` then gets.
            request_id: see there.

        Returns:
            The prefix, and the first tokens; ``generate`` goes on with the second.
        """
        prefix = self.prefill(
            params=params,
            existing_prefix=existing_prefix,
            padded_tokens=padded_tokens,
            true_length=true_length,
            sampler=sampler,
            request_id=request_id,
        )
        index = next(self._num_inserted) if rng is None else int(jax.random.bits(rng, dtype=jnp.uint32))
        seeds, distribution = (
            self._seeds(index, 0, num_samples),
            self._engine.distributions([prefix.sampling] * num_samples),
        )
        with self._device_lock:
            first, data = self._finished(self._draw_first(prefix.prefix, seeds, distribution))
        columns = {"tokens_idx": (0, 1), "valid_idx": (1, 2), "logprobs_idx": (2, 3), "length_idx": (3, 4)}
        result = ScoredTokens(data=data, **columns, samples_per_slot=num_samples)
        return prefix.replace(first_tokens=first.token, index=index), result  # pyright: ignore[reportAttributeAccessIssue]

    def insert(self, prefix: PromptPrefix, decode_state: DecodeState, slot: int, request_id: Any = None) -> DecodeState:
        """Starts the rollouts of a slot and draws their first tokens; the state is consumed."""
        return self.bulk_insert(prefix, decode_state, [slot], request_id)

    def bulk_insert(
        self, prefix: PromptPrefix, decode_state: DecodeState, slots: Sequence[int], request_id: Any = None
    ) -> DecodeState:
        """Starts the rollouts of one prompt in several slots (after 0.2.2); the state is consumed.

        Raises:
            ValueError: the numbers of first tokens and of rollouts differ.
        """
        num_rollouts = len(slots) * self._samples_per_slot
        if prefix.first_tokens is not None and len(prefix.first_tokens) != num_rollouts:
            raise ValueError(
                f"{len(slots)} slots x {self._samples_per_slot} rollouts; the prefix has first tokens of"
                f" {len(prefix.first_tokens)}: ask prefill_multisampling for num_samples={num_rollouts}"
            )
        index = next(self._num_inserted) if prefix.index is None else prefix.index
        for i, slot in enumerate(slots):
            decode_state = self._insert_rollouts(prefix, decode_state, slot, index, i * self._samples_per_slot)
        return decode_state

    def generate(
        self, params: Prepared, decode_state: DecodeState, sampler: Any = None
    ) -> tuple[DecodeState, ScoredTokens]:
        """Returns the next ``decode_steps`` tokens of every row, fewer where it ends; the state is consumed.

        Our engine returns one token more in the first chunk, the one that ``insert`` drew. JetStream
        would take the column that is empty in later chunks for the end of the response, so the last
        token of every chunk is held back as if it had just been inserted: it comes first in the next.
        Rows whose first token ``prefill_multisampling`` returned have no such column and hold none back.

        Raises:
            ValueError: a sampler was given, which is for ``prefill`` (here it is an argument after 0.2.2).
        """
        if sampler is not None:
            raise ValueError(f"sampler={sampler!r}: each request has its own; give it to prefill")
        engine = self._engine
        k = engine.decode_steps
        slots = np.arange(engine.num_rows, dtype=np.int32)
        with self._device_lock:
            # A copy, because the program may read it after insert has changed the table.
            table = self._page_table.copy()
            state, packed = engine.generate(params, self._free_abandoned(decode_state), slots, table)
            first, is_fresh, data = self._report(state.first, state.position, state.end, state.is_fresh, packed)
            state = state._replace(first=first, is_fresh=is_fresh)
            self._finished((state, data))
        columns = {"tokens_idx": (0, k), "valid_idx": (k, 2 * k), "logprobs_idx": (2 * k, 3 * k)}
        result = ScoredTokens(
            data=data, **columns, length_idx=(3 * k, 3 * k + 1), samples_per_slot=self._samples_per_slot
        )
        return state, result

    def free_resource(self, slot: int) -> None:
        """Abandons what is left of a slot's rollouts (after 0.2.2); from any thread, before the slot is offered again."""
        self._abandoned.put(slot)

    def get_prefix_destination_sharding(self) -> NamedSharding:
        """Every device gets the whole prefix; used only between a prefill engine and another generate engine."""
        return NamedSharding(self.mesh, PartitionSpec())

    def get_tokenizer(self) -> tokenizer_pb2.TokenizerParameters:  # pyright: ignore[reportAttributeAccessIssue]
        """Empty: ``build_tokenizer`` needs no file."""
        return tokenizer_pb2.TokenizerParameters()  # pyright: ignore[reportAttributeAccessIssue]

    def build_tokenizer(self, metadata: Any) -> JetStreamTokenizer:
        """The policy's tokenizer."""
        return self._tokenizer

    @property
    def max_concurrent_decodes(self) -> int:
        """Slots."""
        return self._engine.num_rows // self._samples_per_slot

    @property
    def samples_per_slot(self) -> int:
        """G."""
        return self._samples_per_slot

    @property
    def max_prefill_length(self) -> int:
        """The power of two that holds the longest prompt and ``NO_BOS``; JetStream knows powers of two only."""
        return max(16, 1 << self._engine.max_prompt_tokens.bit_length())

    @property
    def mesh(self) -> Mesh:
        """The sampler's devices."""
        return self._engine.mesh

    @property
    def colocated_cpus(self) -> None:
        """Not used."""
        return

    def _insert_rollouts(
        self, prefix: PromptPrefix, state: DecodeState, slot: int, index: int, first: int
    ) -> DecodeState:
        """Starts rollouts ``first``, ``first + 1`` ... of a request in the rows of a slot."""
        engine, rows, length = self._engine, self._rows(slot), prefix.length
        num_full = length // engine.page_size
        # The rollouts share the pages that the prompt fills.
        self._page_table[rows] = self._own_pages[rows]
        self._page_table[rows, :num_full] = self._own_pages[rows[0], :num_full]
        full_pages = np.full((1, prefix.prefix.kv.k.shape[2] // engine.page_size), engine.num_pages, np.int32)
        full_pages[0, :num_full] = self._own_pages[rows[0], :num_full]
        has_tail = length % engine.page_size > 0
        tail_pages = self._own_pages[rows, num_full] if has_tail else np.full(len(rows), engine.num_pages, np.int32)
        given = np.full(len(rows), -1, np.int32)
        if prefix.first_tokens is not None:
            given = np.asarray(prefix.first_tokens)[first : first + len(rows)]
        start = Start(
            slots=rows.astype(np.int32),
            source=np.zeros(len(rows), np.int32),
            seeds=self._seeds(index, first, len(rows)),
            ends=np.full(len(rows), length + engine.max_response_tokens, np.int32),
            given=given,
            distribution=engine.distributions([prefix.sampling] * len(rows)),
            full_pages=full_pages,
            tail_pages=tail_pages,
        )
        with self._device_lock:
            return self._finished(engine.insert(prefix.prefix, self._free_abandoned(state), start))

    def _seeds(self, index: int, first: int, count: int) -> UInt32[np.ndarray, "_ 4"]:
        return np.array([[self._seed, SERVING_STREAM, index, first + g] for g in range(count)], np.uint32)

    def _rows(self, slot: int) -> Int[np.ndarray, "G"]:
        return np.arange(slot * self._samples_per_slot, (slot + 1) * self._samples_per_slot)

    def _free_abandoned(self, state: DecodeState) -> DecodeState:
        """Called before every insert and generate, so that a slot's new request is never the one abandoned."""
        with contextlib.suppress(queue.Empty):
            while True:
                rows = self._rows(self._abandoned.get_nowait())
                state = state._replace(
                    is_done=state.is_done.at[rows].set(True), is_fresh=state.is_fresh.at[rows].set(False)
                )
        return state

    def _finished(self, result: Any) -> Any:
        return jax.block_until_ready(result) if self._is_shared else result


def _draw_first(
    vocab_size: int, is_sharded: bool, prefix: Prefix, seeds: UInt32[Array, "S 4"], distribution: Distributions
) -> tuple[Draw, Int[Array, "S 4"]]:
    """The draw of ``Engine.insert``, and the columns of ``ScoredTokens``."""

    def key_of(seed: UInt32[Array, "4"]) -> Key[Array, ""]:
        return functools.reduce(jax.random.fold_in, seed[1:], jax.random.key(seed[0]))

    num_samples = seeds.shape[0]
    uniform = uniforms(jax.vmap(key_of)(seeds), jnp.broadcast_to(prefix.length, num_samples))
    logits = jnp.broadcast_to(prefix.logits.T, (prefix.logits.shape[1], num_samples))
    drawn = draw(uniform, logits, distribution, vocab_size=vocab_size, is_sharded=is_sharded)
    ones = jnp.ones_like(drawn.token)
    bits = jax.lax.bitcast_convert_type(drawn.logprob, jnp.int32)
    return drawn, jnp.stack([drawn.token, ones, bits, ones], axis=1)


def _report(
    k: int,
    limit: int,
    first: Draw,
    position: Int[Array, "N"],
    end: Int[Array, "N"],
    is_fresh: Bool[Array, "N"],
    packed: Int[Array, "B X"],
) -> tuple[Draw, Bool[Array, "N"], Int[Array, "B Y"]]:
    """The state's first draws with the tokens that are held back, and the columns of ``ScoredTokens``."""
    tokens, bits, flags = packed[:, : k + 1], packed[:, k + 1 : 2 * k + 2], packed[:, -4:]
    rows = slice(0, packed.shape[0])
    was_fresh, num_new = flags[:, :1] > 0, flags[:, 1]
    # A row with a token from before the chunk has it in column 0, another one has nothing there.
    tokens, held_tokens = jnp.where(was_fresh, tokens[:, :-1], tokens[:, 1:]), tokens[:, -1]
    bits, held_bits = jnp.where(was_fresh, bits[:, :-1], bits[:, 1:]), bits[:, -1]
    is_held = was_fresh[:, 0] & (num_new == k)
    is_valid = jnp.arange(k) < (num_new + was_fresh[:, 0])[:, None]
    num_drawn = position[rows] + 1 - (end[rows] - limit)
    length = jnp.where(end[rows] > 0, num_drawn - is_held, 0)
    first = first._replace(
        token=first.token.at[rows].set(held_tokens),
        logprob=first.logprob.at[rows].set(jax.lax.bitcast_convert_type(held_bits, jnp.float32)),
    )
    columns = [tokens, is_valid.astype(jnp.int32), bits, length[:, None]]
    return first, is_fresh.at[rows].set(is_held), jnp.concatenate(columns, axis=1)

"""A policy served by JetStream: its own ``Engine`` class over the programs of ``sampler/engine.py``.

    engine = JetStreamEngine(engine, params, tokenizer, samples_per_slot=8, sampling=SamplingDistribution(), seed=0)
    driver = orchestrator.Driver(prefill_engines=[engine], generate_engines=[engine], ...)

For JetStream 0.2.2, the last on PyPI. This file and ``server.py`` alone import it, because it imports TensorFlow
(seconds, and gigabytes on disk); training imports neither. What to know of its orchestrator:

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
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped
from jetstream.engine import engine_api, token_utils, tokenizer_api, tokenizer_pb2

from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.sampler.draw import Draw
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
    """What ``prefill`` returns: a prompt in the cache's form, its number of tokens, and how its responses are drawn."""

    prefix: Prefix
    length: int = struct.field(pytree_node=False)
    sampling: SamplingDistribution = struct.field(pytree_node=False)


class JetStreamTokenizer(tokenizer_api.Tokenizer):
    """A tokenizer of ours in JetStream's interface; with ``is_chat``, text is what the user says in a chat."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...], *, is_chat: bool = False):
        self._tokenizer, self._stop_ids, self._is_chat = tokenizer, stop_ids, is_chat

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a request's text; raises ValueError where the tokenizer has no token for it."""
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

    The i-th request that is inserted draws from ``(seed, SERVING_STREAM, i)``; ``sampling`` is the distribution of those
    that do not bring their own. ``is_chat`` is that of ``JetStreamTokenizer``. The engine has a multiple of
    ``samples_per_slot`` rows, with pages of full length for each.
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
        if engine.max_prompt_tokens >= LONGEST_PREFILL:
            raise ValueError(
                f"max_prompt_tokens={engine.max_prompt_tokens}: JetStream takes less than {LONGEST_PREFILL}"
            )
        self.programs, self._policy = engine, engine.prepare(params)
        self._tokenizer = JetStreamTokenizer(tokenizer, engine.stop_ids, is_chat=is_chat)
        self._samples_per_slot, self.sampling, self._seed = samples_per_slot, sampling, seed
        # JetStream has no word in which pages a slot gets, so each row has its own for good.
        rows = np.arange(engine.num_rows, dtype=np.int32)
        self._own_pages = rows[:, None] * engine.max_pages + np.arange(engine.max_pages, dtype=np.int32)
        self._page_table = self._own_pages.copy()
        self._num_inserted = itertools.count()
        # JetStream prefills and generates in two threads; see Scheduler for why they must take turns.
        self._is_shared = engine.mesh.size > 1
        self._device_lock = threading.Lock() if self._is_shared else contextlib.nullcontext()
        self._report = jax.jit(functools.partial(_report, engine.decode_steps, engine.max_response_tokens))

    def load_params(self, *args: Any, **kwargs: Any) -> Prepared:
        """The policy in the form that the programs take."""
        return self._policy

    def init_decode_state(self, *args: Any, **kwargs: Any) -> DecodeState:
        """A state with all slots free."""
        with self._device_lock:
            return self._finished(self.programs.init_decode_state())

    def warm_up(self) -> None:
        """Compiles what every request needs, by a short one: what does not fit in memory fails here."""
        prefix = self.prefill(params=self._policy, padded_tokens=np.zeros(1, np.int32), true_length=1)
        state = self._insert(prefix, self.init_decode_state(), slot=0, index=0)
        jax.block_until_ready(self.generate(self._policy, state)[1].data)

    def prefill(
        self,
        *,
        params: Prepared,
        existing_prefix: Any = None,
        padded_tokens: Shaped[np.ndarray | Array, "P"],
        true_length: int,
        sampler: Any = None,
    ) -> PromptPrefix:
        """Runs a prompt through the model; of one beyond the limit the last tokens, as JetStream does.

        ``sampler`` is a ``SamplingDistribution``, that of this request's responses.

        Raises:
            ValueError: for an existing prefix, or another kind of sampler.
        """
        if existing_prefix is not None:
            raise ValueError("existing_prefix: prefilling onto another prefix is not supported")
        if not isinstance(sampler, SamplingDistribution | None):
            raise ValueError(
                f"sampler={sampler!r}: give SamplingDistribution; the draw is part of the compiled programs"
            )
        token_ids, limit = np.asarray(padded_tokens, np.int32)[:true_length], self.programs.max_prompt_tokens
        token_ids = token_ids[token_ids != NO_BOS]
        if len(token_ids) > limit:
            logging.getLogger(__name__).warning("prompt of %d tokens: only the last %d are used", true_length, limit)
            token_ids = token_ids[-limit:]
        with self._device_lock:
            prefix = self._finished(self.programs.prefill(params, token_ids))
        return PromptPrefix(prefix, len(token_ids), sampler or self.sampling)

    def insert(self, prefix: PromptPrefix, decode_state: DecodeState, slot: int) -> DecodeState:
        """Starts the rollouts of a slot and draws their first tokens; the state is consumed."""
        return self._insert(prefix, decode_state, slot, next(self._num_inserted))

    def generate(self, params: Prepared, decode_state: DecodeState) -> tuple[DecodeState, ScoredTokens]:
        """Returns the next ``decode_steps`` tokens of every row, fewer where it ends; the state is consumed.

        Our engine returns one token more in the first chunk, the one that ``insert`` drew. JetStream
        would take the column that is empty in later chunks for the end of the response, so the last
        token of every chunk is held back as if it had just been inserted: it comes first in the next.
        """
        engine, k = self.programs, self.programs.decode_steps
        slots = np.arange(engine.num_rows, dtype=np.int32)
        with self._device_lock:
            # A copy, because the program may read it after insert has changed the table.
            table = self._page_table.copy()
            state, packed = engine.generate(params, decode_state, slots, table)
            first, is_fresh, data = self._report(state.first, state.is_fresh, state.position, state.end, packed)
            state = state._replace(first=first, is_fresh=is_fresh)
            self._finished((state, data))
        columns = {"tokens_idx": (0, k), "valid_idx": (k, 2 * k), "logprobs_idx": (2 * k, 3 * k)}
        length = (3 * k, 3 * k + 1)
        return state, ScoredTokens(data=data, **columns, length_idx=length, samples_per_slot=self._samples_per_slot)

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
        return self.programs.num_rows // self._samples_per_slot

    @property
    def samples_per_slot(self) -> int:
        """G."""
        return self._samples_per_slot

    @property
    def max_prefill_length(self) -> int:
        """The power of two that holds the longest prompt and ``NO_BOS``; JetStream knows powers of two only."""
        return max(16, 1 << self.programs.max_prompt_tokens.bit_length())

    @property
    def mesh(self) -> Mesh:
        """The sampler's devices."""
        return self.programs.mesh

    @property
    def colocated_cpus(self) -> None:
        """Not used."""
        return

    def _insert(self, prefix: PromptPrefix, state: DecodeState, slot: int, index: int) -> DecodeState:
        """Starts the rollouts of request ``index`` in the rows of a slot."""
        engine, G, num_full = self.programs, self._samples_per_slot, prefix.length // self.programs.page_size
        rows = np.arange(slot * G, (slot + 1) * G, dtype=np.int32)
        # The rollouts share the pages that the prompt fills.
        self._page_table[rows] = self._own_pages[rows]
        self._page_table[rows, :num_full] = self._own_pages[rows[0], :num_full]
        full_pages = np.full(prefix.prefix.kv.k.shape[2] // engine.page_size, engine.num_pages, np.int32)
        full_pages[:num_full] = self._own_pages[rows[0], :num_full]
        has_tail = prefix.length % engine.page_size > 0
        start = Start(
            slots=rows,
            seeds=np.array([[self._seed, SERVING_STREAM, index, g] for g in range(G)], np.uint32),
            ends=np.full(G, prefix.length + engine.max_response_tokens, np.int32),
            given=np.full(G, -1, np.int32),
            distribution=engine.distributions([prefix.sampling] * G),
            full_pages=full_pages,
            tail_pages=self._own_pages[rows, num_full] if has_tail else np.full(G, engine.num_pages, np.int32),
        )
        with self._device_lock:
            return self._finished(engine.insert(prefix.prefix, state, start))

    def _finished(self, result: Any) -> Any:
        return jax.block_until_ready(result) if self._is_shared else result


def _report(
    k: int,
    limit: int,
    first: Draw,
    is_fresh: Bool[Array, "N"],
    position: Int[Array, "N"],
    end: Int[Array, "N"],
    packed: Int[Array, "B X"],
) -> tuple[Draw, Bool[Array, "N"], Int[Array, "B Y"]]:
    """The state's first draws with the tokens that are held back, and the columns of ``ScoredTokens``."""
    tokens, bits = packed[:, : k + 1], packed[:, k + 1 : 2 * k + 2]
    rows = slice(0, packed.shape[0])
    was_fresh, num_new = packed[:, -4], packed[:, -3]
    is_held = (was_fresh > 0) & (num_new == k)
    is_valid = jnp.arange(k) < (num_new + was_fresh)[:, None]
    num_drawn = position[rows] + 1 - (end[rows] - limit)
    length = jnp.where(end[rows] > 0, num_drawn - is_held, 0)
    first = first._replace(
        token=first.token.at[rows].set(tokens[:, k]),
        logprob=first.logprob.at[rows].set(jax.lax.bitcast_convert_type(bits[:, k], jnp.float32)),
    )
    columns = [tokens[:, :k], is_valid.astype(jnp.int32), bits[:, :k], length[:, None]]
    return first, is_fresh.at[rows].set(is_held), jnp.concatenate(columns, axis=1)

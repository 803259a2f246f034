"""A policy served by JetStream: its own ``Engine`` class over the programs of ``sampler/engine.py``.

    engine = JetStreamEngine(job.engine, params, job.tokenizer, samples_per_slot=8, seed=0)
    driver = orchestrator.Driver(prefill_engines=[engine], generate_engines=[engine], ...)

For JetStream 0.2.2, the last on PyPI. This file alone imports it, because it imports TensorFlow
(seconds, and gigabytes on disk); training does not import this file. What to know of its orchestrator:

* A row whose column is not valid has ended, so every column of a row in flight must be valid; see
  ``generate``. Stop tokens are not passed on to the client.
* ``max_tokens`` of a request is looked at once a chunk: a response gets at most that many tokens,
  and up to ``decode_steps - 1`` fewer.
* An error in one of its threads kills the process, and importing it sets the root logger to DEBUG.
"""

import contextlib
import itertools
import logging
import queue
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped
from jetstream.engine import engine_api, token_utils, tokenizer_api, tokenizer_pb2

from oapl_jax.sampler.engine import Decoded, DecodeState, Engine, Params, Prefix
from oapl_jax.tokenizer import Tokenizer

# The one name that JetStream's orchestrator uses and jax has removed.
jax.tree_map = jax.tree.map  # pyright: ignore[reportAttributeAccessIssue]

NO_BOS = -1
"""JetStream puts a token before every prompt, which Qwen was not trained with: this one, and ``prefill`` takes it off."""

SERVING_STREAM = 2**32 - 3
"""Stream of the sampling keys, see ``evaluate.EVALUATION_STREAM``."""

LONGEST_PREFILL = 32768
"""JetStream pads prompts to powers of two up to this."""


@struct.dataclass
class ScoredTokens(engine_api.ResultTokens):
    """JetStream's result with log-probabilities: their bits are further columns of ``data``, for one copy to the host."""

    logprobs_idx: tuple[int, int] = struct.field(pytree_node=False)
    """The range of columns that hold log-probabilities."""

    def convert_to_numpy(self) -> "ScoredTokens":
        """The base class would return a base class."""
        return self.replace(data=np.array(self.data))  # pyright: ignore[reportAttributeAccessIssue]

    def get_logprobs_at_slot(self, slot: int) -> Float[np.ndarray, "G K"]:
        """Log-probabilities of the tokens of ``get_result_at_slot``, where these are valid."""
        rows = np.asarray(self.data)[slot * self.samples_per_slot : (slot + 1) * self.samples_per_slot]
        return rows[:, slice(*self.logprobs_idx)].view(np.float32)


class JetStreamTokenizer(tokenizer_api.Tokenizer):
    """A tokenizer of ours in JetStream's interface; text is encoded as it stands, without a chat template."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]):
        self._tokenizer, self._stop_ids = tokenizer, stop_ids

    def encode(self, s: str, **kwargs: Any) -> tuple[Shaped[np.ndarray | Array, "P"], int]:
        """Padded token ids and their number, whatever ``is_bos`` says."""
        kwargs["is_bos"] = False
        return token_utils.pad_tokens(np.array(self._tokenizer.encode(s), np.int32), NO_BOS, self.pad_id, **kwargs)

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
    """JetStream's engine: slot ``i`` owns the rows from ``i * samples_per_slot`` on, all rollouts of one prompt.

    Args:
        engine: the programs; ``num_rows`` is a multiple of ``samples_per_slot``.
        params: the policy, on the engine's mesh.
        tokenizer: the policy's.
        samples_per_slot: G, rollouts of a request.
        seed: root of all draws; the i-th request inserted draws from ``(seed, SERVING_STREAM, i)``.
    """

    def __init__(self, engine: Engine, params: Params, tokenizer: Tokenizer, *, samples_per_slot: int, seed: int):
        if engine.num_rows % samples_per_slot:
            raise ValueError(
                f"{engine.num_rows} rows of the engine are no multiple of samples_per_slot={samples_per_slot}"
            )
        if engine.max_prompt_tokens >= LONGEST_PREFILL:
            raise ValueError(
                f"max_prompt_tokens={engine.max_prompt_tokens}: JetStream takes less than {LONGEST_PREFILL}"
            )
        self._engine, self._params, self._tokenizer = engine, params, tokenizer
        self._samples_per_slot, self._seed = samples_per_slot, seed
        self._num_inserted = itertools.count()
        self._abandoned: queue.SimpleQueue[int] = queue.SimpleQueue()
        # JetStream prefills and generates in two threads; see Scheduler for why they must take turns.
        self._is_shared = engine.mesh.size > 1
        self._device_lock = threading.Lock() if self._is_shared else contextlib.nullcontext()
        self._report = jax.jit(_report, static_argnames="limit")

    def load_params(self, *args: Any, **kwargs: Any) -> Params:
        """The policy's weights."""
        return self._params

    def init_decode_state(self, *args: Any, **kwargs: Any) -> DecodeState:
        """A state with all slots free."""
        with self._device_lock:
            return self._finished(self._engine.init_decode_state())

    def prefill(
        self,
        *,
        params: Params,
        existing_prefix: Prefix | None = None,
        padded_tokens: Shaped[np.ndarray | Array, "P"],
        true_length: int,
    ) -> Prefix:
        """Runs a prompt through the model; of one beyond the limit the last tokens, as JetStream does.

        Raises:
            ValueError: for an empty prompt, or an existing prefix.
        """
        token_ids = np.asarray(padded_tokens, np.int32)[:true_length]
        token_ids = token_ids[token_ids != NO_BOS]
        if len(token_ids) > self._engine.max_prompt_tokens:
            limit = self._engine.max_prompt_tokens
            logging.getLogger(__name__).warning("prompt of %d tokens: only the last %d are used", true_length, limit)
            token_ids = token_ids[-limit:]
        length = len(token_ids)
        padded = np.pad(token_ids, (0, self._engine.padded_length(length) - length))
        with self._device_lock:
            return self._finished(
                self._engine.prefill(
                    params=params, existing_prefix=existing_prefix, padded_tokens=padded, true_length=length
                )
            )

    def insert(self, prefix: Prefix, decode_state: DecodeState, slot: int) -> DecodeState:
        """Starts the rollouts of a slot and draws their first tokens; the state is consumed."""
        seed = np.array([self._seed, SERVING_STREAM, next(self._num_inserted)], np.uint32)
        with self._device_lock:
            state = self._free_abandoned(decode_state)
            return self._finished(self._engine.insert_rows(prefix, state, self._rows(slot), seed))

    def generate(self, params: Params, decode_state: DecodeState) -> tuple[DecodeState, ScoredTokens]:
        """Returns the next ``decode_steps`` tokens of every row, fewer where it ends; the state is consumed.

        Our engine returns one token more in the first chunk, the one that ``insert`` drew. JetStream
        would take the column that is empty in later chunks for the end of the response, so the last
        token of every chunk is held back as if it had just been inserted: it comes first in the next.
        """
        with self._device_lock:
            state, decoded = self._engine.generate(params, self._free_abandoned(decode_state))
            data, logprob, is_held = self._report(state, decoded, limit=self._engine.max_response_tokens)
            rows = state.logprob.sharding
            state = state._replace(logprob=jax.device_put(logprob, rows), is_fresh=jax.device_put(is_held, rows))
            self._finished((state, data))
        k = self._engine.decode_steps
        columns = {"tokens_idx": (0, k), "valid_idx": (k, 2 * k), "logprobs_idx": (2 * k, 3 * k)}
        result = ScoredTokens(
            data=data, **columns, length_idx=(3 * k, 3 * k + 1), samples_per_slot=self._samples_per_slot
        )
        return state, result

    def free_resource(self, slot: int) -> None:
        """Abandons what is left of a slot's rollouts, from any thread; JetStream after 0.2.2 calls it."""
        self._abandoned.put(slot)

    def get_prefix_destination_sharding(self) -> NamedSharding:
        """Every device gets the whole prefix; used only between a prefill engine and another generate engine."""
        return NamedSharding(self.mesh, PartitionSpec())

    def get_tokenizer(self) -> tokenizer_pb2.TokenizerParameters:  # pyright: ignore[reportAttributeAccessIssue]
        """Empty: ``build_tokenizer`` needs no file."""
        return tokenizer_pb2.TokenizerParameters()  # pyright: ignore[reportAttributeAccessIssue]

    def build_tokenizer(self, metadata: Any) -> JetStreamTokenizer:
        """The policy's tokenizer."""
        return JetStreamTokenizer(self._tokenizer, self._engine.stop_ids)

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

    def _rows(self, slot: int) -> Int[np.ndarray, "G"]:
        return np.arange(slot * self._samples_per_slot, (slot + 1) * self._samples_per_slot)

    def _free_abandoned(self, state: DecodeState) -> DecodeState:
        """Called before every insert and generate, so that a slot's new request is never the one abandoned."""
        with contextlib.suppress(queue.Empty):
            while True:
                state = self._engine.free(state, self._rows(self._abandoned.get_nowait()))
        return state

    def _finished(self, result: Any) -> Any:
        return jax.block_until_ready(result) if self._is_shared else result


def _report(
    state: DecodeState, decoded: Decoded, limit: int
) -> tuple[Int[Array, "B X"], Float[Array, "B"], Bool[Array, "B"]]:
    """Columns of ``ScoredTokens``, and log-probability and presence of the token that is held back."""
    is_held = decoded.is_valid[:, -1]
    num_drawn = state.position + 1 - (state.end - limit)
    length = jnp.where(state.end > 0, num_drawn - is_held, 0)
    bits = jax.lax.bitcast_convert_type(decoded.logprobs[:, :-1], jnp.int32)
    columns = [decoded.tokens[:, :-1], decoded.is_valid[:, :-1].astype(jnp.int32), bits, length[:, None]]
    return jnp.concatenate(columns, axis=1), decoded.logprobs[:, -1], is_held

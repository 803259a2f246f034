"""JetStream's gRPC server over a policy; server, queues and threads are JetStream's own.

``CheckedOrchestrator`` stands between them and the client. JetStream 0.2.2 has no answer to a request that it cannot
serve (an error in one of its threads kills the process), looks at ``max_tokens`` only once a chunk, and decodes text
token by token, which breaks characters of several tokens: so it gets token ids, and returns them. Nor does it notice
that a client is gone: its queues drop such requests here, and a request that is decoded gives up its slot.
"""

import asyncio
import contextlib
import logging
import queue
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
from jetstream.core.proto import jetstream_pb2

from oapl_jax.rollouts.stops import before_stop, stop_length
from oapl_jax.sampler.jetstream.engine import JetStreamEngine, JetStreamTokenizer


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """JetStream's orchestrator sets the root logger to DEBUG, on standard output, when it is imported."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers = handlers


with _root_logger_kept():
    from jetstream.core import config_lib, orchestrator, server_lib

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How a tokenizer shows a character whose bytes have not all come."""
BYTES_PER_TOKEN = 256
"""Longer than any token: a text with more bytes for each token of the longest prompt is refused before it is encoded."""


class _LiveQueue(queue.Queue):
    """A queue of requests that leaves out those whose client is gone."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next request; None is JetStream's sign that the server stops."""
        while (request := super().get(block, timeout)) is not None:
            if request.return_channel is None or not request.return_channel.cancelled():
                break
        return request


class _Request(orchestrator.ActiveRequest):
    """A request that ends with the chunk in which its client goes."""

    def enqueue_samples(self, generated_samples: list[Any]) -> None:
        """Called after each chunk, before JetStream looks whether ``complete`` frees the slot."""
        super().enqueue_samples(generated_samples)
        if self.return_channel.cancelled():
            self.complete = np.ones_like(self.complete)


class CheckedOrchestrator(orchestrator.LLMOrchestrator):
    """JetStream's servicer: refuses what cannot be served, keeps ``max_tokens`` exactly, decodes text whole."""

    def __init__(self, driver: orchestrator.Driver):
        super().__init__(driver)
        for backlog in (driver._prefill_backlog, *driver._generate_backlogs.values()):
            backlog.__class__ = _LiveQueue  # the driver has made its queues, and its threads wait in them
        orchestrator.ActiveRequest = _Request
        self._engine: Any = driver._generate_engines[0]
        self._tokenizer: JetStreamTokenizer = self._engine.build_tokenizer(self._engine.get_tokenizer())

    async def Decode(self, request: Any, context: Any = None) -> AsyncIterator[Any]:  # noqa: N802 - JetStream's
        """Streams the responses to a prompt; a request that is refused ends with ``INVALID_ARGUMENT``."""
        programs = self._engine.programs
        try:
            prompt = await asyncio.to_thread(self._prompt, request)
        except ValueError as error:
            await orchestrator._abort_or_raise(context, grpc.StatusCode.INVALID_ARGUMENT, str(error)[:1000])
            return
        limit = min(request.max_tokens, programs.max_response_tokens)
        # The end of a chunk: with less the orchestrator would keep back all of the last one.
        max_tokens = -(-limit // programs.decode_steps) * programs.decode_steps
        has_text = request.HasField("text_content")
        strings = self._engine.sampling.stop_strings
        outputs = [_Output(self._tokenizer, limit, strings, has_text) for _ in range(self._engine.samples_per_slot)]
        message: Any = jetstream_pb2.DecodeRequest  # pyright: ignore[reportAttributeAccessIssue]
        checked = message(token_content=message.TokenContent(token_ids=prompt), max_tokens=max_tokens)
        stream: Any = super().Decode(checked, context)
        async with contextlib.aclosing(stream) as responses:
            async for response in responses:
                for output, sample in zip(outputs, response.stream_content.samples, strict=True):
                    output.take(sample)
                yield response
                if all(output.is_full for output in outputs):
                    break
        if any(output.rest for output in outputs):
            yield _response([output.rest for output in outputs])

    def _prompt(self, request: Any) -> list[int]:
        """The prompt of a request; raises ValueError where it cannot be served."""
        programs = self._engine.programs
        if request.session_cache:
            raise ValueError(f"session_cache={request.session_cache!r} is not supported; leave it out")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens={request.max_tokens}; ask for at least 1")
        if request.HasField("text_content"):
            text, most = request.text_content.text, BYTES_PER_TOKEN * programs.max_prompt_tokens
            if (size := len(text.encode())) > most:
                raise ValueError(f"text of {size} bytes; the limit is {most}, for {programs.max_prompt_tokens} tokens")
            token_ids = self._tokenizer.encode_text(text)
        elif request.HasField("token_content"):
            token_ids = list(request.token_content.token_ids)
        else:
            raise ValueError("the request is empty; give text_content or token_content")
        if not 0 < len(token_ids) <= programs.max_prompt_tokens:
            raise ValueError(f"prompt of {len(token_ids)} tokens; the limit is 1 to {programs.max_prompt_tokens}")
        outside = [i for i in token_ids if not 0 <= i < programs.vocab_size]
        if outside:
            raise ValueError(f"token id {outside[0]} of the prompt; the tokenizer has 0 to {programs.vocab_size - 1}")
        return token_ids


class _Output:
    """What one response of a request has said so far."""

    def __init__(self, tokenizer: JetStreamTokenizer, limit: int, strings: tuple[str, ...], has_text: bool):
        self._tokenizer, self._limit, self._strings, self._has_text = tokenizer, limit, strings, has_text
        self._token_ids: list[int] = []
        self._text = ""
        self.rest = ""
        """The end of the text, as long as it may be a part of a character or of a stop string."""

    @property
    def is_full(self) -> bool:
        return len(self._token_ids) == self._limit

    def take(self, sample: Any) -> None:
        """Cuts what the orchestrator sends to the limit or the stop string, and adds its text."""
        num_before, is_over = len(self._token_ids), self.is_full
        known = (self._token_ids + list(sample.token_ids))[: self._limit]
        length = stop_length(known, num_before, self._strings, self._tokenizer.decode)
        self._limit = self._limit if length is None else length
        self._token_ids = known[: self._limit]
        sample.token_ids[:] = self._token_ids[num_before:]
        if self._has_text and not is_over:
            whole = sure = before_stop(self._tokenizer.decode(self._token_ids), self._strings)
            if length is None:
                sure = whole.rstrip(UNFINISHED)
                begun = [n for string in self._strings for n in range(1, len(string)) if sure.endswith(string[:n])]
                sure = sure[: len(sure) - max(begun, default=0)]
            sample.text, self.rest = sure[len(self._text) :], whole[len(sure) :]
            self._text = sure


def _response(texts: list[str]) -> Any:
    message: Any = jetstream_pb2.DecodeResponse  # pyright: ignore[reportAttributeAccessIssue]
    samples = [message.StreamContent.Sample(text=text) for text in texts]
    return message(stream_content=message.StreamContent(samples=samples))


def start(engine: JetStreamEngine, host: str, port: int) -> Any:
    """Starts JetStream's server on a port of an address, without encryption. What it returns has ``stop``."""
    # server_lib makes the servicer itself and chooses the address; these names are where it looks.
    orchestrator.LLMOrchestrator = CheckedOrchestrator
    server_lib._HOST = f"[{host}]" if ":" in host else host
    devices = list(engine.mesh.devices.flat)
    config: Any = config_lib.ServerConfig(
        interleaved_slices=(f"devices={len(devices)}",), interleaved_engine_create_fns=(lambda _: engine,)
    )
    return server_lib.run(port, config=config, devices=devices)

"""A program: JetStream's own orchestrator serves a tiny policy, and what happened is printed as JSON.

A program of its own, because importing the orchestrator sets the root logger to DEBUG, and an error
in one of its threads kills the process. Run by test_jetstream.py.
"""

import asyncio
import json
import logging
import threading
import time

import numpy as np
from jaxtyping import install_import_hook

# Before the orchestrator sets the root logger to DEBUG.
logging.disable(logging.INFO)

with install_import_hook("oapl_jax", "typecheck.checker"):
    from jetstream.core import orchestrator
    from jetstream.core.proto import jetstream_pb2

    from oapl_jax.data.tokenizer import CharacterTokenizer
    from oapl_jax.rollouts.sampling import SamplingDistribution
    from oapl_jax.sampler.jetstream import server as jetstream_server
    from oapl_jax.sampler.jetstream.engine import JetStreamEngine, JetStreamTokenizer
    from test_engine import PARAMS
    from test_jetstream import (
        DEADLINE,
        DISTRIBUTION,
        GROUP_SIZE,
        OVERLONG,
        PROMPTS,
        SEED,
        STREAMED,
        TEXT,
        make_programs,
    )


class RecordingEngine(JetStreamEngine):
    """Keeps the results and the slots, which the orchestrator consumes."""

    def insert(self, prefix, decode_state, slot):
        calls.append({"insert": slot})
        return super().insert(prefix, decode_state, slot)

    def generate(self, params, decode_state):
        state, result = super().generate(params, decode_state)
        calls.append(result)
        return state, result


calls = []


def by_slot(result):
    result = result.convert_to_numpy()
    slots = []
    for slot in range(result.data.shape[0] // GROUP_SIZE):
        data, logprobs = result.get_result_at_slot(slot), result.get_logprobs_at_slot(slot)
        slots.append({name: value.tolist() for name, value in (*vars(data).items(), ("logprobs", logprobs))})
    return {"generate": slots}


async def ask(client, **content):
    request = jetstream_pb2.DecodeRequest(max_tokens=content.pop("max_tokens", 1000), **content)
    responses = [response.stream_content.samples async for response in client.Decode(request)]
    return [
        {"token_ids": [i for r in responses for i in r[g].token_ids], "text": "".join(r[g].text for r in responses)}
        for g in range(GROUP_SIZE)
    ]


def tokens(ids):
    return {"token_content": jetstream_pb2.DecodeRequest.TokenContent(token_ids=ids)}


def text(string):
    return {"text_content": jetstream_pb2.DecodeRequest.TextContent(text=string)}


async def session(client):
    # All at once through two slots; asked in this order, so inserted in this order.
    requests = [ask(client, **tokens(ids)) for ids in (*PROMPTS, OVERLONG)]
    answers = await asyncio.gather(*requests, ask(client, **text(TEXT)))
    # A limit of the client's, on a chunk's border.
    return [*answers, await ask(client, **tokens(PROMPTS[0]), max_tokens=4)]


class Bytes(CharacterTokenizer):
    """A token for each byte, as byte-level tokenizers have for rare characters."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


def stream(string, limit, strings=()):
    """What a client gets of a response, message for message, three tokens at a time."""
    output = jetstream_server._Output(JetStreamTokenizer(Bytes(), (1,)), limit, strings, True)
    ids, texts = list(string.encode()), []
    for first in range(0, len(ids), 3):
        sample = jetstream_pb2.DecodeResponse.StreamContent.Sample(token_ids=ids[first : first + 3])
        output.take(sample)
        texts.append(sample.text)
    return [*texts, output.rest]


def make_driver(engine):
    return orchestrator.Driver(
        prefill_engines=[engine],
        generate_engines=[engine],
        prefill_params=[engine.load_params()],
        generate_params=[engine.load_params()],
        interleaved_mode=True,
    )


def serve(engine):
    """What clients were answered, and the threads that were left."""
    before = set(threading.enumerate())
    driver = make_driver(engine)

    async def run():
        answers = await asyncio.wait_for(session(orchestrator.LLMOrchestrator(driver)), DEADLINE)
        # Its threads use the event loop until they end.
        await asyncio.to_thread(driver.stop)
        return answers

    answers = asyncio.run(run())
    return answers, [thread.name for thread in set(threading.enumerate()) - before]


class GatedEngine(JetStreamEngine):
    """Decodes nothing before the gate is open, and looks after the first chunk whether the slots become free."""

    inserts, chunks, gate, slots, are_free = 0, 0, threading.Event(), None, False

    def insert(self, prefix, decode_state, slot):
        self.inserts += 1
        return super().insert(prefix, decode_state, slot)

    def generate(self, params, decode_state):
        self.gate.wait(DEADLINE)
        end = time.monotonic() + DEADLINE / 4
        while self.chunks == 1 and not self.are_free and time.monotonic() < end:
            self.are_free = self.slots.qsize() == self.max_concurrent_decodes
        self.chunks += 1
        return super().generate(params, decode_state)


class Client:
    """gRPC's context of a call, as far as a servicer needs it."""

    def __init__(self):
        self._callbacks = []

    def add_done_callback(self, callback):
        self._callbacks.append(callback)

    async def ask(self, servicer):
        request = jetstream_pb2.DecodeRequest(max_tokens=1000, **text(TEXT))
        return [response async for response in servicer.Decode(request, self)]

    def leave(self):
        for callback in self._callbacks:
            callback(self)


def abandon(engine):
    """Twenty clients go while two are served: how many requests were started, and whether the two gave up their slots."""
    driver = make_driver(engine)
    engine.slots = driver._generate_slots[0]

    async def run():
        servicer, clients = jetstream_server.CheckedOrchestrator(driver), [Client() for _ in range(20)]
        calls = [asyncio.create_task(client.ask(servicer)) for client in clients]
        while engine.inserts < 2:
            await asyncio.sleep(0.01)
        for client, call in zip(clients, calls, strict=True):
            client.leave()
            call.cancel()
        engine.gate.set()
        answer = await asyncio.wait_for(Client().ask(servicer), DEADLINE)
        await asyncio.to_thread(driver.stop)
        return {"answered": bool(answer), "started": engine.inserts, "are_free": engine.are_free}

    return asyncio.run(run())


def prefill(engine, **options):
    ids = np.array([5, 6], np.int32)
    return engine.prefill(params=engine.load_params(), padded_tokens=ids, true_length=len(ids), **options)


def greedy_tokens(engine):
    """The first chunk of a slot whose request brings its distribution."""
    state = engine.insert(prefill(engine, sampler=SamplingDistribution(0)), engine.init_decode_state(), 0)
    _, result = engine.generate(engine.load_params(), state)
    return result.convert_to_numpy().get_result_at_slot(0).tokens.tolist()


def refusals(engine):
    for options in ({"sampler": "greedy"}, {"existing_prefix": prefill(engine)}):
        try:
            prefill(engine, **options)
        except ValueError as error:
            yield str(error)


def main():
    def make_engine(kind, mesh):
        options = {"samples_per_slot": GROUP_SIZE, "sampling": DISTRIBUTION, "seed": SEED}
        return kind(make_programs(mesh), PARAMS, CharacterTokenizer(), **options)

    engine = make_engine(RecordingEngine, "tensor=1")
    answers, threads_left = serve(engine)
    result = {
        "answers": answers,
        "threads_left": threads_left,
        "calls": [call if isinstance(call, dict) else by_slot(call) for call in calls],
        "streamed": stream(STREAMED, 1000),
        "streamed_to_a_stop": [
            stream(text, 1000, ("END", "\n\n")) for text in ("EN E\nENx END tail END", "a\n\nEN", "aEN")
        ],
        "streamed_in_part": stream(STREAMED, len(STREAMED.encode()) - 1),
        "greedy": greedy_tokens(engine),
        "refused": list(refusals(engine)),
        "sharded_answers": serve(make_engine(JetStreamEngine, "tensor=2"))[0],
        "abandoned": abandon(make_engine(GatedEngine, "tensor=1")),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

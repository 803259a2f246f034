"""A program: JetStream's own orchestrator serves a tiny policy, and what happened is printed as JSON.

A program of its own, because importing the orchestrator sets the root logger to DEBUG, and an error
in one of its threads kills the process. Run by test_jetstream.py.
"""

import asyncio
import json
import logging
import sys
import threading

from jaxtyping import install_import_hook

# Before the orchestrator sets the root logger to DEBUG.
logging.disable(logging.INFO)

with install_import_hook("oapl_jax", "typecheck.checker"):
    from jetstream.core import orchestrator
    from jetstream.core.proto import jetstream_pb2

    from oapl_jax.sampler.jetstream import JetStreamEngine
    from oapl_jax.tokenizer import CharacterTokenizer
    from test_engine import PARAMS, make_engine
    from test_jetstream import DEADLINE, GROUP_SIZE, LAW, OVERLONG, PROMPTS, SEED, STOPS, TEXT


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
        data = result.get_result_at_slot(slot)
        logprobs = result.get_logprobs_at_slot(slot)
        slots.append({name: value.tolist() for name, value in (*vars(data).items(), ("logprobs", logprobs))})
    return {"generate": slots}


def abandon(engine):
    """Rows of both slots that return a token when slot 0 was abandoned, and when it was then taken again."""
    tokens, length = engine.build_tokenizer(engine.get_tokenizer()).encode(TEXT, max_prefill_length=32)

    def insert(state, slot):
        prefix = engine.prefill(params=PARAMS, padded_tokens=tokens, true_length=length)
        return engine.insert(prefix, state, slot)

    def rows_with_a_token(result):
        result = result.convert_to_numpy()
        return [int(result.get_result_at_slot(slot).valid[:, 0].sum()) for slot in (0, 1)]

    state = insert(insert(engine.init_decode_state(), 0), 1)
    engine.free_resource(0)
    state, abandoned = engine.generate(PARAMS, state)
    engine.free_resource(0)
    _, taken_again = engine.generate(PARAMS, insert(state, 0))
    return rows_with_a_token(abandoned), rows_with_a_token(taken_again)


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


def main():
    before = set(threading.enumerate())
    programs = make_engine(LAW, decode_steps=4, stop_ids=STOPS, sampler_mesh=sys.argv[1])
    tokenizer = CharacterTokenizer()
    engine = RecordingEngine(programs, PARAMS, tokenizer, samples_per_slot=GROUP_SIZE, seed=SEED)
    driver = orchestrator.Driver(
        prefill_engines=[engine],
        generate_engines=[engine],
        prefill_params=[engine.load_params()],
        generate_params=[engine.load_params()],
        interleaved_mode=True,
    )
    answers = asyncio.run(asyncio.wait_for(session(orchestrator.LLMOrchestrator(driver)), DEADLINE))
    driver.stop()
    left = [thread.name for thread in set(threading.enumerate()) - before]
    recorded = [call if isinstance(call, dict) else by_slot(call) for call in calls]
    abandoned = abandon(engine)
    print(json.dumps({"answers": answers, "calls": recorded, "threads_left": left, "abandoned": abandoned}))


if __name__ == "__main__":
    main()

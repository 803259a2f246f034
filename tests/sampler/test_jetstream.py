"""JetStream's own Driver and LLMOrchestrator serve a policy as our own scheduler samples it."""

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from oapl_jax.config.mesh import MeshConfig
from oapl_jax.data.tokenizer import CHARS, CharacterTokenizer
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.rollouts.sampling import Request, SamplingDistribution
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.scheduler import Scheduler
from oapl_jax.types import FinishReason
from test_engine import CONFIG, GRAPHDEF, MAX_PROMPT, MAX_RESPONSE, run

SERVING_STREAM = 2**32 - 3
DEADLINE = 120.0
GROUP_SIZE, SEED = 4, 11
DISTRIBUTION = SamplingDistribution(0.9, top_p=0.98)
PROMPTS = [[3], [2, 3, 4, 5, 6, 7, 8], list(range(2, 18)), [17, *range(2, 18), 4, 5, 6], [9, 8, 7]]
assert len(PROMPTS[3]) == MAX_PROMPT
OVERLONG = [5, 6, 7, *PROMPTS[3]]
TEXT = "12+3="
STREAMED = "né 你好 🙂"
TESTS = pathlib.Path(__file__).parents[1]


def make_programs(mesh):
    """An engine of two slots."""
    return Engine(
        GRAPHDEF,
        CONFIG,
        vocab_size=len(CHARS),
        stop_ids=CharacterTokenizer().stop_ids,
        num_rows=2 * GROUP_SIZE,
        max_prompt_tokens=MAX_PROMPT,
        max_response_tokens=MAX_RESPONSE,
        decode_steps=4,
        mesh=make_meshes(MeshConfig(trainer=mesh))[0],
        page_size=16,
    )


@pytest.fixture(scope="module")
def session():
    """What the program printed."""
    return json.loads(run_program("jetstream_session.py").stdout.splitlines()[-1])


def run_program(name, **environment):
    if importlib.util.find_spec("jetstream") is None:
        pytest.skip("google-jetstream is not installed")
    paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.run(
        [sys.executable, str(TESTS / "sampler" / name)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process


@functools.cache
def our_own():
    """The session's requests by our scheduler, in the order in which it inserts them."""
    asked = [*PROMPTS, PROMPTS[3], CharacterTokenizer().encode(TEXT), PROMPTS[0]]
    requests = [
        Request(i, np.array(ids, np.int32), GROUP_SIZE, (SEED, SERVING_STREAM, i), DISTRIBUTION)
        for i, ids in enumerate(asked)
    ]
    done = run(Scheduler(make_programs("tensor=1"), contextlib.nullcontext()), requests)
    return [done[i] for i in sorted(done)]


def without_stop(rollout):
    ids = rollout.token_ids.tolist()
    return ids[:-1] if rollout.finish_reason is FinishReason.STOP else ids


@pytest.mark.slow
def test_every_response_is_the_one_that_our_scheduler_draws(session):
    """One request is longer than the limit: its last tokens count, as everywhere in JetStream."""
    *groups, _ = our_own()
    assert {r.finish_reason for group in groups for r in group} == set(FinishReason), "must see both ends"
    for answer, group in zip(session["answers"], groups, strict=False):
        assert [sample["token_ids"] for sample in answer] == [without_stop(rollout) for rollout in group]
    assert [sample["text"] for sample in session["answers"][6]] == [
        CharacterTokenizer().decode(rollout.token_ids) for rollout in groups[6]
    ]


@pytest.mark.slow
def test_a_request_may_ask_for_fewer_tokens(session):
    expected = [without_stop(rollout)[:4] for rollout in our_own()[-1]]
    assert any(len(ids) == 4 for ids in expected), "the limit must have cut"
    assert [sample["token_ids"] for sample in session["answers"][-1]] == expected


@pytest.mark.slow
def test_results_carry_stop_tokens_logprobs_and_lengths(session):
    """Assembled from the raw results: what a program gets that drives the engine without the orchestrator."""
    groups, live, finished = our_own(), {}, []
    for call in session["calls"]:
        if "insert" in call:
            live[call["insert"]] = [([], []) for _ in range(GROUP_SIZE)]
            finished.append(live[call["insert"]])
            continue
        for slot, group in live.items():
            data = call["generate"][slot]
            for g, (ids, logprobs) in enumerate(group):
                valid = np.array(data["valid"][g], bool)
                assert (np.diff(valid.astype(int)) <= 0).all(), "an empty column ends a response"
                ids += np.array(data["tokens"][g])[valid].tolist()
                logprobs += np.array(data["logprobs"][g])[valid].tolist()
                assert data["lengths"][g] == len(ids) <= MAX_RESPONSE
    for group, expected in zip(finished[:-1], groups[:-1], strict=True):
        for (ids, logprobs), rollout in zip(group, expected, strict=True):
            assert ids == rollout.token_ids.tolist()
            np.testing.assert_array_equal(np.float32(logprobs), rollout.logprobs)


@pytest.mark.slow
def test_requests_share_two_slots_and_one_prompt_draws_differently_each_time(session):
    inserts = [call["insert"] for call in session["calls"] if "insert" in call]
    assert len(inserts) == len(PROMPTS) + 3
    assert set(inserts) == {0, 1}
    assert session["answers"][3] != session["answers"][5], "the overlong prompt ends in the third one"


@pytest.mark.slow
def test_requests_whose_client_is_gone_are_forgotten(session):
    """Those in the queue at once, those in the two slots after the chunk that they are in."""
    assert session["abandoned"] == {"answered": True, "started": 3, "are_free": True}


@pytest.mark.slow
def test_no_thread_of_the_driver_is_left(session):
    assert session["threads_left"] == []


@pytest.mark.slow
def test_a_sharded_engine_serves_the_same_responses(session):
    assert session["sharded_answers"] == session["answers"]


@pytest.mark.slow
def test_a_request_may_bring_its_distribution(session):
    assert len({tuple(tokens) for tokens in session["greedy"]}) == 1, "greedy responses of one prompt are the same"
    assert session["refused"] == [
        "sampler='greedy': give SamplingDistribution; the draw is part of the compiled programs",
        "existing_prefix: prefilling onto another prefix is not supported",
    ]


@pytest.mark.slow
def test_a_character_of_several_tokens_is_sent_whole(session):
    assert "".join(session["streamed"]) == STREAMED
    assert len([text for text in session["streamed"] if text]) > 2, "it must come in parts"
    assert "".join(session["streamed_in_part"]) == STREAMED[:-1] + "\N{REPLACEMENT CHARACTER}"


@pytest.mark.slow
def test_the_text_that_is_sent_ends_before_a_stop_string(session):
    assert ["".join(parts) for parts in session["streamed_to_a_stop"]] == ["EN E\nENx ", "a", "aEN"]


@pytest.mark.slow
@pytest.mark.long
def test_jetstreams_own_tests_of_its_orchestrator_and_server_pass():
    """As they are in its wheel; see jetstream_suite.py for what takes the place of its mock engine."""
    output = run_program("jetstream_suite.py", XLA_FLAGS="").stderr
    assert re.search(r"^Ran 8 tests in .*\n\nOK$", output, re.MULTILINE), output[-3000:]

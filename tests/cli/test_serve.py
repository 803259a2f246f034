"""A policy on JetStream's real gRPC server: a server process, JetStream's own client, and what they say."""

import asyncio
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading

import grpc
import jax
import numpy as np
import pytest
from flax import nnx
from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc

from oapl_jax.cli import serve
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.data.tokenizer import CHARS, CharacterTokenizer
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.io import console
from oapl_jax.model import hf, qwen
from oapl_jax.rollouts import sampling
from oapl_jax.rollouts.sampling import Request, SamplingDistribution
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.sampler import JaxSampler
from oapl_jax.types import FinishReason

ROOT = pathlib.Path(__file__).parents[2]
DEADLINE = 120
SERVING_STREAM = 2**32 - 3
GROUP_SIZE, SEED, MAX_PROMPT, MAX_RESPONSE = 2, 4, 24, 40
DISTRIBUTION = SamplingDistribution(0.9, top_p=0.95)
QUESTIONS = ["12+3=", "7", "3*4="]
CONFIG = qwen.QwenConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
    }
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A toy policy's folder; its vocabulary has padding, which must never be drawn."""
    graphdef, params = nnx.split(qwen.Qwen(CONFIG, rngs=nnx.Rngs(0)))
    folder = tmp_path_factory.mktemp("policy") / "model"
    hf.save_folder(folder, CONFIG, params, CharacterTokenizer())
    return folder, graphdef, params


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Server:
    """A server process, and what it printed (TensorFlow's own messages go to the error output)."""

    def __init__(self, folder):
        self.port, self.lines = free_port(), []
        limits = f"--max-prompt-tokens {MAX_PROMPT} --max-response-tokens {MAX_RESPONSE} --slots 2 --seed {SEED}"
        distribution = (
            f"--group-size {GROUP_SIZE} --temperature {DISTRIBUTION.temperature} --top-p {DISTRIBUTION.top_p}"
        )
        arguments = f"--model {shlex.quote(str(folder))} --port {self.port} {limits} {distribution}"
        # On one device, as on most machines, instead of the 8 of the tests.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "oapl_jax", "serve", *shlex.split(arguments)],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=(folder.parent / "stderr").open("w"),
            text=True,
        )
        is_ready = threading.Event()

        def read():
            for line in self.process.stdout:
                self.lines.append(line.rstrip())
                if line.startswith("serving "):
                    is_ready.set()
            is_ready.set()

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()
        assert is_ready.wait(DEADLINE), f"not ready after {DEADLINE} s: {self.lines}"
        assert self.lines, (folder.parent / "stderr").read_text()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return code


@pytest.fixture(scope="module")
def server(policy):
    server = Server(policy[0])
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()


async def decode(stub, max_tokens, **content):
    request = jetstream_pb2.DecodeRequest(max_tokens=max_tokens, **content)
    responses = [response.stream_content.samples async for response in stub.Decode(request, timeout=DEADLINE)]
    return [
        ("".join(r[g].text for r in responses), [i for r in responses for i in r[g].token_ids])
        for g in range(GROUP_SIZE)
    ]


def text(string):
    return {"text_content": jetstream_pb2.DecodeRequest.TextContent(text=string)}


def tokens(ids):
    return {"token_content": jetstream_pb2.DecodeRequest.TokenContent(token_ids=ids)}


def our_own(policy):
    """What our scheduler draws for ``QUESTIONS``, asked in this order; without the stop token."""
    _, graphdef, params = policy
    engine = Engine(
        graphdef,
        CONFIG,
        vocab_size=len(CHARS),
        stop_ids=CharacterTokenizer().stop_ids,
        num_rows=2 * GROUP_SIZE,
        max_prompt_tokens=MAX_PROMPT,
        max_response_tokens=MAX_RESPONSE,
        decode_steps=serve.DECODE_STEPS,
        mesh=make_meshes(MeshConfig(trainer="tensor=1"), jax.devices()[:1])[0],
    )
    requests = [
        Request(
            i,
            np.array(CharacterTokenizer().encode(question), np.int32),
            GROUP_SIZE,
            (SEED, SERVING_STREAM, i),
            DISTRIBUTION,
        )
        for i, question in enumerate(QUESTIONS)
    ]
    sampler = JaxSampler([engine], engine.mesh)
    sampler.set_weights(params)
    done = dict(sampling.run(sampler, requests))
    return [
        [r.token_ids[: -1 if r.finish_reason is FinishReason.STOP else None].tolist() for r in done[i]]
        for i in sorted(done)
    ]


@pytest.mark.slow
def test_a_server_says_what_our_scheduler_draws(policy, server):
    """From the first request to the end of the process, in one order, because draws follow from it."""

    async def session():
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = jetstream_pb2_grpc.OrchestratorStub(channel)
            refused = []
            for max_tokens, content in (
                (9, text("")),
                (9, text("what?")),
                (9, text("1" * (MAX_PROMPT + 1))),
                (9, text("1" * 4_000_000)),
                (9, tokens([3, len(CHARS)])),
                (9, {}),
                (0, text("1")),
                (9, {"session_cache": "x", **text("1")}),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await decode(stub, max_tokens, **content)
                refused.append((error.value.code(), error.value.details()))
            assert (await stub.HealthCheck(jetstream_pb2.HealthCheckRequest())).is_live
            whole = await decode(stub, 1000, **text(QUESTIONS[0]))
            short = await decode(stub, 3, **tokens(CharacterTokenizer().encode(QUESTIONS[1])))
            return refused, whole, short

    refused, whole, short = asyncio.run(asyncio.wait_for(session(), DEADLINE))
    assert {code for code, _ in refused} == {grpc.StatusCode.INVALID_ARGUMENT}
    reasons = [
        "prompt of 0 tokens",
        "'w' at index 0",
        "prompt of 25 tokens; the limit is 1 to 24",
        "text of 4000000 bytes; the limit is 6144, for 24 tokens",
        "token id 18",
        "the request is empty",
        "max_tokens=0",
        "session_cache='x'",
    ]
    for (_, details), reason in zip(refused, reasons, strict=True):
        assert reason in details

    first, second, third = our_own(policy)
    assert [ids for _, ids in whole] == first
    assert [said for said, _ in whole] == [CharacterTokenizer().decode(ids) for ids in first]
    assert any(len(ids) > serve.DECODE_STEPS for ids in first), "the test must have seen more than one chunk"
    assert [ids for _, ids in short] == [ids[:3] for ids in second]
    assert {said for said, _ in short} == {""}, "who sends token ids gets token ids"

    # The third request is by the command that the server printed.
    (line,) = server.lines
    _, _, command = line.partition("send it a prompt: ")
    program, *arguments = shlex.split(command.replace("12+3=", QUESTIONS[2]))
    assert program == "python"
    answer = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    expected = [f"[{i}] {CharacterTokenizer().decode(ids)}" for i, ids in enumerate(third)]
    assert (answer.returncode, answer.stdout.splitlines()) == (0, expected), answer.stderr

    assert server.stop() == 0
    assert server.lines[1:] == ["stopped"], "JetStream's log must not be shown"
    assert not re.search("DEBUG|INFO|Traceback", (policy[0].parent / "stderr").read_text())


def exit_code(words):
    """Exit code of the command; argparse exits by itself."""
    try:
        return console.run(serve.main, words)
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model /no/such/folder", "model folder '/no/such/folder' does not exist"),
        ("--model {folder} --temperature -1", "temperature=-1.0 is out of range"),
        ("--model {folder} --top-p 0", "top_p=0.0 is out of range"),
        ("--model {folder} --slots 0", "0: at least 1"),
        ("--model {folder} --port 70000", "--port 70000: give 1 to 65535"),
        ("--model {folder} --port {taken}", "--host 127.0.0.1 --port {taken} cannot be used: Address already in use"),
        ("--model {folder} --max-prompt-tokens 32 --max-response-tokens 32 --slots 4000000000", "lower --slots"),
        ("--model {folder} --tokenizer /no/such/tokenizer", "/no/such/tokenizer"),
        ("--port 9000", "one of the arguments --model --ask is required"),
    ],
)
def test_mistakes_are_named_before_anything_is_served(policy, capsys, arguments, message):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        names = {"folder": policy[0], "taken": other.getsockname()[1]}
        words = shlex.split(f"--port {free_port()} " * ("--port" not in arguments) + arguments.format(**names))
        assert exit_code(words) == 2
    assert message.format(**names) in capsys.readouterr().err


def test_no_server_to_ask(capsys):
    assert exit_code(["--ask", "1", "--port", str(free_port())]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err

"""Serves a policy by JetStream's gRPC server, for tests by hand and for clients of JetStream.

    python -m oapl_jax serve --model PATH [--host 127.0.0.1] [--port 9000] [--group-size 1] [--temperature 1.0] ...
    python -m oapl_jax serve --ask TEXT [--port 9000] [--max-tokens 64]

The first command serves a Hugging Face folder, such as the ``export`` of a run, until it is stopped. The second one
sends it a prompt. Each request gets ``--group-size`` responses. The i-th request draws with the keys of
``Request(seed=(SEED, SERVING_STREAM, i))``, so a restarted server gives the same responses to the same requests.
JetStream's server has neither encryption nor authentication, so it listens on the loopback address unless ``--host``
names another.
"""

import argparse
import importlib.util
import json
import os
import signal
import socket
import threading
from typing import Any

import jax
import jax.numpy as jnp

from oapl_jax.build import policy
from oapl_jax.build.account import size
from oapl_jax.build.sampler import cache_bytes, num_prepared, structure
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.config.model import ModelConfig
from oapl_jax.distributed.memory import usable_bytes
from oapl_jax.distributed.sharding import device_bytes, make_meshes
from oapl_jax.io.terminal import say
from oapl_jax.model import qwen
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.stops import Stops
from oapl_jax.sampler.engine import Engine
from oapl_jax.types import RunError

DECODE_STEPS = 16
"""Tokens of a response between two messages to its client."""

ASK_DEADLINE = 600.0
"""Most seconds until a response is complete."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="oapl-jax serve",
        description="Serves a policy by JetStream's gRPC server, or sends a prompt to one.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="PATH", help="serve this Hugging Face folder, or name on the hub")
    what.add_argument(
        "--ask", metavar="TEXT", help="send this prompt to the server on --host and --port, and print its responses"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (0.0.0.0: all, for anyone who reaches them), or to ask",
    )
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--max-tokens", type=_count, default=64, help="with --ask: most tokens of each response")
    parser.add_argument("--group-size", type=_count, default=1, help="responses to each request")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--stop", nargs="*", default=[], metavar="TEXT", help="responses end before these")
    parser.add_argument("--stop-token-ids", nargs="*", default=[], type=int, metavar="ID", help="the same for tokens")
    parser.add_argument("--max-prompt-tokens", type=_count, default=1024)
    parser.add_argument("--max-response-tokens", type=_count, default=1024)
    parser.add_argument("--slots", type=_count, default=8, help="requests that are served at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="model", help="model (the one in PATH), characters, a folder or a name")
    parser.add_argument("--chat", action="store_true", help="put prompts into the chat template, if there is one")
    parser.add_argument(
        "--chat-template-kwargs", type=json.loads, default={}, metavar="JSON", help='such as {"enable_thinking": false}'
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on CPU, else bfloat16")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.port < 2**16:
        parser.error(f"--port {arguments.port}: give 1 to 65535")
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed {arguments.seed}: give 0 to {2**32 - 1}")
    return arguments


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return number


def load(arguments: argparse.Namespace) -> Any:
    """The ``JetStreamEngine`` that the arguments describe, on all devices of this machine that it can use.

    Raises:
        ValueError: the model does not exist, the cache does not fit, or the port cannot be used.
    """
    sampling = SamplingDistribution(
        arguments.temperature,
        top_p=arguments.top_p,
        stop_strings=tuple(arguments.stop),
        stop_token_ids=tuple(arguments.stop_token_ids),
    )
    _check_address(arguments.host, arguments.port)
    dtype = arguments.dtype or ("float32" if jax.devices()[0].platform == "cpu" else "bfloat16")
    options = {"tokenizer": arguments.tokenizer, "chat_template_kwargs": arguments.chat_template_kwargs}
    model = ModelConfig(path=arguments.model, param_dtype=dtype, compute_dtype=dtype, **options)
    config, tokenizer = policy.outline(model, arguments.model)
    config.check_positions(arguments.max_prompt_tokens + arguments.max_response_tokens)
    mesh = make_meshes(MeshConfig(trainer=f"tensor={_num_devices(config)}"))[0]
    params = policy.load_params(model, arguments.model, config, mesh, arguments.seed)
    engine = Engine(
        structure(config, mesh, dtype),
        config,
        vocab_size=tokenizer.vocab_size,
        stop_ids=Stops(tokenizer, sampling).ids,
        num_rows=arguments.slots * arguments.group_size,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_response_tokens=arguments.max_response_tokens,
        decode_steps=DECODE_STEPS,
        mesh=mesh,
        cache_dtype=jnp.dtype(dtype),
    )
    copies = 1 + num_prepared(config, mesh) / config.num_params
    weights, cache, usable = copies * device_bytes(params), cache_bytes(engine), usable_bytes(mesh)
    if weights + cache > usable:
        raise ValueError(
            f"the KV cache of {arguments.slots} slots x {arguments.group_size} responses x {arguments.max_prompt_tokens} +"
            f" {arguments.max_response_tokens} tokens takes {size(cache)} of each device, the weights leave"
            f" {size(usable - weights)}; lower --slots, --group-size, --max-prompt-tokens or --max-response-tokens"
        )
    from oapl_jax.sampler.jetstream.engine import JetStreamEngine

    served = JetStreamEngine(
        engine,
        params,
        tokenizer,
        samples_per_slot=arguments.group_size,
        sampling=sampling,
        seed=arguments.seed,
        is_chat=arguments.chat,
    )
    served.warm_up()
    return served


def _check_address(host: str, port: int) -> None:
    """Raises a ValueError if the address cannot be bound; gRPC would silently share a port between two servers."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"--host {host} --port {port} cannot be used: {error.strerror}; choose another") from error


def _num_devices(config: qwen.QwenConfig) -> int:
    """The largest number of devices that divides the model's heads, vocabulary and ffn width."""
    widths = [config.num_attention_heads, config.vocab_size, config.moe_intermediate_size or config.intermediate_size]
    counts = range(jax.local_device_count(), 0, -1)
    return next(count for count in counts if not any(width % count for width in widths))


def serve(arguments: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT; a second signal ends the process at once."""
    engine = load(arguments)
    from oapl_jax.sampler.jetstream import server as jetstream_server

    is_stopped = threading.Event()

    def stop(number: int, frame: Any) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)
        is_stopped.set()

    server = jetstream_server.start(engine, arguments.host, arguments.port)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)
    say(
        f"serving {arguments.model} on {arguments.host}, port {arguments.port}; send it a prompt: python -m oapl_jax"
        f" serve --host {arguments.host} --port {arguments.port} --ask '12+3=' --max-tokens 64"
    )
    is_stopped.wait()
    server.stop()
    say("stopped")


def ask(text: str, host: str, port: int, max_tokens: int) -> list[str]:
    """The responses of a server to a prompt.

    Raises:
        RunError: there is no server, or it refuses the request; the message says why.
    """
    import grpc
    from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc

    message: Any = jetstream_pb2.DecodeRequest  # pyright: ignore[reportAttributeAccessIssue]
    request = message(text_content=message.TextContent(text=text), max_tokens=max_tokens)
    outputs: list[str] = []
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with grpc.insecure_channel(address) as channel:
        try:
            for response in jetstream_pb2_grpc.OrchestratorStub(channel).Decode(request, timeout=ASK_DEADLINE):
                samples = response.stream_content.samples
                outputs = outputs or [""] * len(samples)
                outputs = [output + sample.text for output, sample in zip(outputs, samples, strict=True)]
        except grpc.RpcError as error:
            status: Any = error
            raise RunError(f"{address}: {status.code().name}: {status.details()}") from error
    return outputs


def main(argv: list[str]) -> None:
    """Serves a policy, or prints the responses of a server."""
    arguments = parse(argv)
    missing = [name for name in ("grpc", "jetstream") if importlib.util.find_spec(name) is None]
    if missing:  # said before the model is loaded
        raise ValueError(f"serve: {' and '.join(missing)} not installed; pip install 'oapl-jax[serve]'")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if arguments.ask is None:
        serve(arguments)
        return
    outputs = ask(arguments.ask, arguments.host, arguments.port, arguments.max_tokens)
    for i, output in enumerate(outputs):
        say(output if len(outputs) == 1 else f"[{i}] {output}")

"""The program in another engine's interpreter: it runs what a sampling process asks of the engine (engine_process.py).

It needs the standard library alone, and the engines beside it their engine: they run where JAX, or what else this package
requires, is not installed or has another version. Messages are JSON objects, one a line. In: ``do``, a method of the
engine, and its arguments. Out: ``done`` or ``failed`` for each but ``submit``; number and responses of a finished request.
An engine is the class ``Engine`` of a module, made without arguments, with these methods:

    start(folder, settings)  loads a published policy; returns the engine's name, version and settings, for the log.
                             settings: ``dtype``; ``max_tokens`` of prompt and response together; ``vocab_size``, from
                             which on ids are never drawn; ``stop_token_ids``, ``stop_strings``; ``options`` of the user
    reload(folder)           takes another version in place and forgets what it has computed; raises where it cannot
    probe(ids)               the log-probability of each of these tokens but the first, given those before it
    submit(number, prompt, num, max_tokens, distribution)
                             queues ``num`` responses, drawn from a ``SamplingDistribution`` with these fields
    step()                   decodes for a while; returns numbers and responses of finished requests. A response has
                             ``ids``, the stop token included; ``logprobs`` in nats, of the distribution that was
                             sampled (after temperature, top-k, top-p, min-p, masks); ``is_stopped``: not cut at the limit
    abort()                  drops all requests
"""

import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any


def serve(engine: Any, inbox: "queue.Queue[dict[str, Any]]", send: Callable[[dict[str, Any]], None]) -> None:
    """Answers messages, and decodes while there are requests; never returns."""
    waiting: set[int] = set()
    while True:
        while not waiting or not inbox.empty():
            message = inbox.get()
            method = message.pop("do")
            if method == "submit":
                waiting.add(message["number"])
                engine.submit(**message)
                continue
            if method == "abort":
                waiting.clear()
            try:
                send({"done": getattr(engine, method)(**message)})
            except Exception as error:
                traceback.print_exc()
                send({"failed": f"{type(error).__name__}: {error}"})
        for number, responses in engine.step():
            waiting.discard(number)
            send({"number": number, "responses": responses})


def main(module: str) -> None:
    """Runs the engine of a module until standard input ends. What it prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    inbox: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            inbox.put(json.loads(line))
        os.killpg(os.getpgid(0), signal.SIGKILL)  # with the processes that the engine has started

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")

    threading.Thread(target=read, daemon=True).start()
    serve(importlib.import_module(module).Engine(), inbox, send)

"""An engine in another interpreter as the engine of a detached sampler, such as vLLM (docs/bring_your_own_sampler.md).

``EngineProcess`` starts ``runner.py`` there, hands it requests as they come, and proves by a probe, the log-probabilities
of a fixed sequence, that each version's weights were really loaded.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from oapl_jax.config.commands import TrainConfig
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.io.terminal import say
from oapl_jax.rollouts.sampling import Request, SamplingDistribution, Stats
from oapl_jax.rollouts.stops import Stops
from oapl_jax.types import FinishReason, Rollout, RunError

INTERPRETER = "OAPL_JAX_VLLM"
"""Environment variable that names the Python interpreter that has vLLM; unset: this one."""
PROBE_TOKENS = 64
START_DEADLINE = 1800.0
"""Seconds for an engine to load its weights and to compile."""
POLL_SECONDS = 0.2
BOOT = """
import importlib.util, sys
root, module = sys.argv[1:]
found = importlib.util.spec_from_file_location("oapl_jax", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["oapl_jax"] = importlib.util.module_from_spec(found)
from oapl_jax.sampler.runner import main
main(module)
"""
"""Imports this package, and nothing else of this interpreter's libraries, in the other one."""


class EngineProcess:
    """A ``Sampler`` whose engine is the ``Engine`` of a module (runner.py), in a process of the interpreter ``python``."""

    def __init__(
        self, module: str, python: str, config: TrainConfig, tokenizer: Tokenizer, options: dict[str, Any] | None = None
    ):
        sampler, self._module, self._python = config.sampler, module, python
        self._stops = Stops(tokenizer, SamplingDistribution.of(sampler))
        self._num_rows, self._limit = sampler.groups_in_flight * sampler.group_size, sampler.max_response_tokens
        self._settings = {
            "dtype": sampler.dtype,
            "max_tokens": config.data.max_prompt_tokens + sampler.max_response_tokens,
            "vocab_size": tokenizer.vocab_size,
            "stop_token_ids": self._stops.ids,
            "stop_strings": self._stops.strings,
            "options": options or {},
        }
        size = min(PROBE_TOKENS, self._settings["max_tokens"] - 1)
        self._probe = np.random.default_rng(0).integers(tokenizer.vocab_size, size=size).tolist()
        self._process: subprocess.Popen[str] | None = None
        self._inbox: queue.Queue[dict[str, Any]] = queue.Queue()
        self._requests: dict[int, Request] = {}
        self._numbers = itertools.count()
        self._policy: pathlib.Path | None = None
        self._scores: list[float] = []
        """The probe's log-probabilities with the weights that are loaded."""
        self._reloads, self._is_proven = True, False
        """Whether weights are loaded in place, and whether a new engine has shown that this works."""
        self._about: dict[str, Any] = {}
        self.facts: dict[int, dict[str, Any]] = {}
        """Of policy versions, for the log: engine, its version and settings, how the policy was loaded, mean of the probe."""
        self.stats = Stats()

    def set_weights(self, weights: pathlib.Path) -> None:
        """Loads a published policy in place, if that works, or starts an engine with it. Its folder is named by the version.

        The first reload, and each one after which the probe is what it was, is compared with a new engine that has the
        same weights. If they differ, weights stay stale in a reload, and from then on each version gets a new engine.

        Raises:
            RunError: the engine does not start.
        """
        if weights is self._policy:
            return
        before: list[float] = self._scores
        after: Any = None
        if self._process is not None and self._reloads:
            self.abort()
            try:
                self._ask("reload", folder=str(weights))
                after = self._ask("probe", ids=self._probe)
            except RunError as error:
                self._reloads = False
                say(f"weights cannot be loaded in place ({error}): each version gets a new engine")
        is_new = after is None or after == before or not self._is_proven
        if is_new:
            self._start(weights)
        else:
            self._scores = after or []
        if is_new and after is not None and (verdict := is_reloaded(before, after, self._scores)) is not None:
            self._reloads = self._is_proven = verdict
            say(f"weights loaded in place are {'those' if verdict else 'not those'} of a new engine")
        self._policy, mean, manner = weights, float(np.mean(self._scores)), "a new engine" if is_new else "in place"
        say(f"version {int(weights.name)} loaded, {manner}; probe {mean:.6f} nats a token")
        probe = {"tokens": len(self._scores), "mean_logprob": mean}
        self.facts[int(weights.name)] = {**self._about, "loaded": manner, "probe": probe}

    def _start(self, weights: pathlib.Path) -> None:
        """A new engine, once the last one has freed its memory."""
        self.release()
        command = [self._python, "-P", "-c", BOOT, str(pathlib.Path(__file__).parents[1]), self._module]
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1, start_new_session=True)
        except OSError as error:
            raise ValueError(f"{INTERPRETER}: {self._python} cannot be started: {error}") from error
        self._process, self._inbox = process, queue.Queue()
        threading.Thread(target=_read, args=(process, self._inbox), daemon=True).start()
        self._about = self._ask("start", folder=str(weights), settings=self._settings)
        self._scores = self._ask("probe", ids=self._probe)

    def _send(self, method: str, **arguments: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": method, **arguments}) + "\n")
        except OSError:  # it has ended, and the next message says how
            self._next(START_DEADLINE)

    def _ask(self, method: str, **arguments: Any) -> Any:
        """What a method of the engine returns.

        Raises:
            RunError: it has failed, or the runner has ended.
            TimeoutError: there is no answer within ``START_DEADLINE``.
        """
        self._send(method, **arguments)
        while (answer := self._next(START_DEADLINE)) is not None:
            if "failed" in answer:
                raise RunError(f"{self._module}: {method}: {answer['failed']}")
            if "done" in answer:  # and not a request that was finished before it was dropped
                return answer["done"]
        raise TimeoutError(f"{self._module} did not answer {method!r} within {START_DEADLINE:g} s")

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None after this time."""
        try:
            message = self._inbox.get(timeout=seconds)
        except queue.Empty:
            return None
        if "code" in message:
            raise RunError(f"{self._module} in {self._python} has ended with code {message['code']}; see above")
        return message

    def release(self) -> None:
        """Ends the engine, and all processes that it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):  # a message that was not read
                self._process.stdin.close()
        self._process = self._policy = None
        self._requests.clear()

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not self._requests

    @property
    def wants_more(self) -> bool:
        """Whether another request would keep it busier."""
        return self.num_live < self._num_rows

    @property
    def num_live(self) -> int:
        """Rollouts that are asked for."""
        return sum(request.num_rollouts for request in self._requests.values())

    def submit(self, request: Request) -> None:
        """Sends a request; raises ValueError for one with a limit for each response."""
        limit = self._limit if request.max_tokens is None else request.max_tokens
        if not isinstance(limit, int):
            raise ValueError(f"request {request.tag!r}: a limit for each response needs --engine jax")
        number = next(self._numbers)
        self._requests[number] = request
        prompt, distribution = request.prompt_token_ids.tolist(), dataclasses.asdict(request.distribution)
        asked = {"number": number, "prompt": prompt, "num": request.num_rollouts, "max_tokens": limit}
        self._send("submit", **asked, distribution=distribution)

    def abort(self) -> None:
        """Drops all requests."""
        if self._requests:
            self._requests.clear()
            self._ask("abort")

    def warm_up(self, prompt_lengths: Iterable[int], group_size: int) -> None:
        """Does nothing: the engine has compiled when it has started."""

    def step(self) -> list[tuple[Any, list[Rollout]]]:
        """Waits a while for finished requests."""
        finished = []
        while (message := self._next(0.001 if finished else POLL_SECONDS)) is not None:
            request = self._requests.pop(message["number"])
            self.stats.prefill_tokens += len(request.prompt_token_ids)
            finished.append((request.tag, [self._rollout(**response) for response in message["responses"]]))
        return finished

    def _rollout(self, ids: list[int], logprobs: list[float], is_stopped: bool) -> Rollout:
        if len(ids) != len(logprobs):
            raise ValueError(f"{self._module}: {len(ids)} tokens with {len(logprobs)} log-probabilities")
        length = self._stops.length(ids)
        if is_stopped and length is None:
            raise ValueError(f"{self._module}: it has ended a response at no stop of the run: {ids[-8:]}")
        reason = FinishReason.LENGTH if length is None else FinishReason.STOP
        self.stats.tokens += len(ids)
        return Rollout(np.array(ids[:length], np.int32), np.array(logprobs[:length], np.float32), reason)


def is_reloaded(before: list[float], after: list[float], fresh: list[float]) -> bool | None:
    """Whether an engine has new weights after a reload, by its probe before and after, and that of a new engine.

    None where the new engine's probe is the one before: the weights are the same, or the probe does not show the difference.
    A reload that works may differ from a new engine by a thousandth of what the weights have changed, for rounding. With
    a tenth, one of vLLM 0.32 passed that had left the output matrix as it was.
    """
    if before == after == fresh:
        return None
    old, new = np.abs(np.subtract([before, after], fresh)).mean(axis=1)
    return bool(new <= old / 1000)


def make_vllm(config: TrainConfig, tokenizer: Tokenizer, **options: Any) -> tuple[EngineProcess, Any]:
    """The sampler of a process with vLLM, and what loads a folder for it, itself; ``options`` are for ``EngineArgs``."""
    python = os.environ.get(INTERPRETER, sys.executable)
    return EngineProcess("oapl_jax.sampler.vllm_engine", python, config, tokenizer, options), pathlib.Path


def _read(process: "subprocess.Popen[str]", inbox: "queue.Queue[dict[str, Any]]") -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            inbox.put(json.loads(line))
    inbox.put({"code": process.wait()})

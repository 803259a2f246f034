"""vLLM as the engine of a detached sampler (docs/bring_your_own_sampler.md).

    PYTHONPATH=examples python -m oapl_jax sample --run RUN --engine vllm_sampler:make

``EngineSampler`` is the part that every engine shares, and is tested; ``VllmEngine`` needs a GPU and was not run by us.
"""

import functools
import gc
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from oapl_jax.config.commands import TrainConfig
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.rollouts.sampling import Request, SamplingDistribution, Stats
from oapl_jax.rollouts.stops import Stops
from oapl_jax.types import FinishReason, Rollout


class Response(NamedTuple):
    """One response as an engine gives it."""

    token_ids: list[int]
    """With the stop token, where one was drawn, or the tokens of the stop string."""
    logprobs: list[float]
    """Of each token under the distribution that was sampled: after temperature, top-k, top-p and masks."""
    is_stopped: bool
    """It ended at a stop, and not at the limit."""


class Engine(Protocol):
    """What is asked of an engine that has one policy version loaded."""

    def generate(
        self, prompts: list[list[int]], group_size: int, distribution: SamplingDistribution
    ) -> list[list[Response]]:
        """``group_size`` independent responses to each prompt."""
        ...


class EngineSampler:
    """Hands requests to an engine in batches; ``oapl-jax sample`` leases, grades and writes.

    Args:
        start: makes an engine of what ``load_policy`` has returned.
        num_rows: rollouts of a batch.
        max_response_tokens: limit of a response.
    """

    def __init__(self, start: Callable[[Any], Engine], num_rows: int, max_response_tokens: int):
        self._start, self._num_rows, self._limit = start, num_rows, max_response_tokens
        self._policy: Any = None
        self._engine: Engine | None = None
        self._waiting: list[Request] = []
        self.stats = Stats()

    def set_weights(self, weights: Any) -> None:
        """Starts an engine with this policy, when the last one has freed its memory."""
        if weights is not self._policy:
            self.release()
            self._policy, self._engine = weights, self._start(weights)

    def release(self) -> None:
        """Ends the engine."""
        self._policy = self._engine = None
        gc.collect()

    @property
    def is_idle(self) -> bool:
        """Whether no request waits; none is under way between two steps."""
        return not self._waiting

    @property
    def wants_more(self) -> bool:
        """Whether the next batch has room."""
        return self.num_live < self._num_rows

    @property
    def num_live(self) -> int:
        """Rollouts that are asked for."""
        return sum(request.num_rollouts for request in self._waiting)

    def submit(self, request: Request) -> None:
        """Queues a request."""
        self._waiting.append(request)

    def abort(self) -> None:
        """Drops all requests."""
        self._waiting.clear()

    def warm_up(self, prompt_lengths: Iterable[int], group_size: int) -> None:
        """Does nothing."""

    def step(self) -> list[tuple[Any, list[Rollout]]]:
        """Generates what waits. All requests of a run have one group size and one distribution."""
        assert self._engine is not None
        requests, self._waiting = self._waiting, []
        prompts = [request.prompt_token_ids.tolist() for request in requests]
        groups = self._engine.generate(prompts, requests[0].num_rollouts, requests[0].distribution)
        return [(request.tag, list(map(self._rollout, group))) for request, group in zip(requests, groups, strict=True)]

    def _rollout(self, response: Response) -> Rollout:
        ids = np.array(response.token_ids, np.int32)
        if not len(ids) == len(response.logprobs) <= self._limit:
            raise ValueError(f"{len(ids)} tokens, {len(response.logprobs)} log-probabilities, limit {self._limit}")
        reason = FinishReason.STOP if response.is_stopped else FinishReason.LENGTH
        self.stats.tokens += len(ids)
        return Rollout(ids, np.array(response.logprobs, np.float32), reason)


class VllmEngine:
    """A policy version in vLLM (0.10.2 or later)."""

    def __init__(self, policy: tempfile.TemporaryDirectory, config: TrainConfig, tokenizer: Tokenizer):
        import vllm  # pyright: ignore[reportMissingImports]

        self._vllm, self._config, self._tokenizer = vllm, config, tokenizer
        self._stops = Stops(tokenizer, SamplingDistribution.of(config.sampler))
        self._llm = vllm.LLM(
            model=policy.name,
            dtype=config.sampler.dtype,
            max_model_len=config.data.max_prompt_tokens + config.sampler.max_response_tokens,
            # Without this they are those of the raw logits, before temperature and truncation.
            logprobs_mode="processed_logprobs",
            # The folder's generation_config.json may truncate the distribution.
            generation_config="vllm",
        )

    def generate(
        self, prompts: list[list[int]], group_size: int, distribution: SamplingDistribution
    ) -> list[list[Response]]:
        """See ``Engine``."""
        params = self._vllm.SamplingParams(
            n=group_size,
            temperature=distribution.temperature,
            top_k=distribution.top_k,
            top_p=distribution.top_p,
            min_p=distribution.min_p,
            max_tokens=self._config.sampler.max_response_tokens,
            stop_token_ids=list(self._stops.ids),
            stop=list(distribution.stop_strings),
            # The embedding may have more rows than the tokenizer has ids.
            allowed_token_ids=list(range(self._tokenizer.vocab_size)),
            logprobs=0,  # of the drawn token only
            detokenize=bool(distribution.stop_strings),
        )
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [[self._response(one) for one in output.outputs] for output in outputs]

    def _response(self, one: Any) -> Response:
        ids = list(one.token_ids)
        logprobs = [by_token[token].logprob for by_token, token in zip(one.logprobs, ids, strict=True)]
        return Response(ids, logprobs, one.finish_reason == "stop")


def load_policy(folder: pathlib.Path) -> tempfile.TemporaryDirectory:
    """A copy of a published folder, which may be gone by the time that the last engine has ended."""
    copy = tempfile.TemporaryDirectory(prefix="vllm-policy-")
    shutil.copytree(folder, copy.name, dirs_exist_ok=True)
    return copy


def make(config: TrainConfig, tokenizer: Tokenizer) -> tuple[EngineSampler, Callable[[pathlib.Path], Any]]:
    """The sampler of a process, and what loads a published policy for it."""
    start = functools.partial(VllmEngine, config=config, tokenizer=tokenizer)
    num_rows = config.sampler.groups_in_flight * config.sampler.group_size
    return EngineSampler(start, num_rows, config.sampler.max_response_tokens), load_policy

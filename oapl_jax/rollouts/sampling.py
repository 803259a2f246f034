"""What is asked of a sampler, and what every sampler is: our engine, PyTorch, vLLM.

A sampler draws rollouts and does not grade them. Callers know this file, not the engines.
"""

import dataclasses
import operator
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int

from oapl_jax.config.sampling import EngineConfig, SamplingConfig
from oapl_jax.types import Rollout

Tag = TypeVar("Tag")

COLDEST, HOTTEST = 1e-6, 1e6
"""Temperatures whose inverse and whose quotients are float32 numbers."""


@dataclasses.dataclass(frozen=True)
class SamplingDistribution:
    """One request's distribution: temperature first, then top-k, then top-p of what top-k kept, then min-p.

    Tokens that tie with the last one kept are kept too.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    """Keeps the fewest likeliest tokens whose mass reaches it; 1: all."""
    min_p: float = 0.0
    """Keeps tokens whose probability is at least this fraction of the likeliest one's; 0: all."""
    stop_strings: tuple[str, ...] = ()
    """A response ends with the token that completes one of them (``rollouts/stops.py``)."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, besides the model's own."""

    @classmethod
    def of(cls, sampler: EngineConfig, section: SamplingConfig | None = None) -> "SamplingDistribution":
        """The distribution of the section ``sampler``, or of another section whose responses end as the sampler's."""
        draw = section or sampler
        ends = tuple(sorted(sampler.stop_strings)), tuple(sorted(sampler.stop_token_ids))  # their order means nothing
        return cls(draw.temperature, draw.top_k, draw.top_p, draw.min_p, *ends)

    @property
    def truncates(self) -> bool:
        """Has a top-k or a top-p, whose cuts have to be searched for."""
        return self.top_k > 0 or self.top_p < 1

    def __post_init__(self):
        temperature_fits = self.temperature == 0 or COLDEST <= self.temperature <= HOTTEST
        for name, fits, range_ in (
            ("temperature", temperature_fits, f"0 (greedy), or {COLDEST:g} to {HOTTEST:g}"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (all) to 2147483647"),
            ("top_p", 0 < self.top_p <= 1, "above 0, to 1 (all)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (all) to 1"),
        ):
            if not fits:
                raise ValueError(f"sampling: {name}={getattr(self, name)!r} is out of range; give {range_}")


@dataclasses.dataclass(frozen=True)
class Request(Generic[Tag]):
    """G rollouts of one prompt."""

    tag: Tag
    """Whatever the caller knows the group by; comes back with its rollouts."""
    prompt_token_ids: Int[np.ndarray, "_P"]
    num_rollouts: int
    seed: tuple[int, int, int]
    """Root seed, stream, index in it; rollout g draws with ``key(root)`` folded with stream, index and g."""
    distribution: SamplingDistribution = SamplingDistribution()
    max_tokens: int | tuple[int, ...] | None = None
    """Limit of the responses, or of each; None: the engine's."""
    needs_logprobs: bool = True
    """False for greedy requests, whose rollouts have NaN for log-probabilities."""
    expected_tokens: float | None = None
    """Likely length of a response, for the order; None: the limit."""


@dataclasses.dataclass
class Stats:
    """What a scheduler has done since it was made."""

    tokens: int = 0
    prefill_tokens: int = 0
    """Prompt tokens run through the model, without padding."""
    row_steps: int = 0
    """Decode steps x rows of the programs that ran."""
    live_row_steps: int = 0
    """Those that drew a token of a rollout."""
    preemptions: int = 0
    host_gap_seconds: float = 0.0
    """Time in which nothing was enqueued on the device although sequences were live."""

    def __add__(self, other: "Stats") -> "Stats":
        return Stats(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __sub__(self, other: "Stats") -> "Stats":
        return Stats(*map(operator.sub, dataclasses.astuple(self), dataclasses.astuple(other)))

    @property
    def slot_use(self) -> float:
        """Share of the decoded rows that drew a token of a rollout."""
        return self.live_row_steps / max(1, self.row_steps)


@runtime_checkable
class Sampler(Protocol):
    """Draws rollouts with the weights that it was given last; ``SamplerTurns`` gives it to one caller at a time.

    A caller sets weights, submits requests and steps until they are finished. A rollout depends on its request and on
    the weights only, not on what else is under way.
    """

    @property
    def stats(self) -> Stats:
        """What it has done since it was made."""
        ...

    def set_weights(self, weights: Any) -> None:
        """Uses these weights from now on: parameters on its devices, or whatever it loads. Nothing may be in flight."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or is in flight."""
        ...

    @property
    def wants_more(self) -> bool:
        """Whether another request would keep it busier."""
        ...

    @property
    def num_live(self) -> int:
        """Number of rollouts that are being decoded."""
        ...

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: the request cannot be run; names what is wrong.
        """
        ...

    def step(self) -> list[tuple[Any, list[Rollout]]]:
        """Decodes for a while; returns the tags and rollouts of the requests that are finished."""
        ...

    def abort(self) -> None:
        """Drops all requests."""
        ...

    def warm_up(self, prompt_lengths: Iterable[int], group_size: int) -> None:
        """Compiles what requests of these prompt lengths and this group size need."""
        ...

    def release(self) -> None:
        """Frees the weights and the cache until weights are set again. Nothing may be in flight."""
        ...


def run(sampler: Sampler, requests: Iterable[Request[Tag]]) -> Iterator[tuple[Tag, list[Rollout]]]:
    """Runs requests to their end, and yields each one as it is finished."""
    waiting = iter(requests)
    request = next(waiting, None)
    while request is not None or not sampler.is_idle:
        while request is not None and sampler.wants_more:
            sampler.submit(request)
            request = next(waiting, None)
        yield from sampler.step()

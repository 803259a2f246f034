"""Evaluations in the course of a run, and the metrics that wait for them."""

import collections
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from oapl_jax.evaluation.held_out import Counts, summarize
from oapl_jax.io.json_lines import LineFile
from oapl_jax.io.metrics import MetricsWriter
from oapl_jax.io.trackers import Distributions
from oapl_jax.types import Metrics, Prompt


class Evaluator:
    """Evaluates policies on the held-out prompts, one after the other, while the learner may go on.

    ``count`` samples and grades with some weights, as ``SamplingSetup.count_held_out``. A collective of several
    processes must not be called from a thread of its own: without one, evaluations are over when they are started.
    ``record`` is the file that gets the counts of each prompt; None in a process that another one leads.
    """

    def __init__(
        self,
        count: Callable[[Any, int], Counts],
        prompts: list[Prompt],
        record: LineFile | None = None,
        *,
        has_thread: bool,
    ):
        self._count, self._prompts, self._record = count, prompts, record
        self._thread = ThreadPoolExecutor(1, "evaluation") if has_thread else None

    def start(self, weights: Any, num_samples: int, step: int) -> "Future[Metrics]":
        """Begins to evaluate these weights, which must not change; without prompts there are no metrics."""
        if self._thread is not None:
            return self._thread.submit(self._evaluate, weights, num_samples, step)
        done: Future[Metrics] = Future()
        done.set_result(self._evaluate(weights, num_samples, step))
        return done

    def close(self) -> None:
        """Waits for the evaluation that is under way."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _evaluate(self, weights: Any, num_samples: int, step: int) -> Metrics:
        if not self._prompts:
            return {}
        start = time.perf_counter()
        counts = self._count(weights, num_samples)
        if self._record is not None:
            of_prompts = {"graded": counts.graded.tolist(), "correct": counts.correct.tolist()}
            ids = [prompt.id for prompt in self._prompts]
            self._record.append({"step": step, "prompts": ids, **of_prompts})
        metrics = summarize(counts, self._prompts)
        return {**metrics, "evaluation/seconds": time.perf_counter() - start}


class StepLog:
    """Writes the metrics of each step in order; a step whose evaluation goes on keeps the later ones waiting.

    In a process that another one leads the writer is None.
    """

    def __init__(self, writer: MetricsWriter | None):
        self._writer = writer
        self._waiting: collections.deque[tuple[int, Metrics, Future[Metrics] | None, Distributions | None]]
        self._waiting = collections.deque()

    def add(
        self,
        step: int,
        metrics: Metrics,
        evaluation: "Future[Metrics] | None" = None,
        distributions: Distributions | None = None,
    ) -> None:
        """Takes what a step has, and writes what is complete."""
        self._waiting.append((step, metrics, evaluation, distributions))
        self._write(may_wait=False)

    def flush(self) -> None:
        """Waits for evaluations, and writes everything: a checkpoint must not be ahead of the metrics."""
        self._write(may_wait=True)
        if self._writer is not None:
            self._writer.flush()

    def _write(self, *, may_wait: bool) -> None:
        while self._waiting:
            step, metrics, evaluation, distributions = self._waiting[0]
            if evaluation is not None:
                if not may_wait and not evaluation.done():
                    return
                metrics = metrics | evaluation.result()
            self._waiting.popleft()
            if self._writer is not None:
                self._writer.write(step, metrics, distributions)

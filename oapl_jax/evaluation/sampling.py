"""Samples of benchmark problems, graded and written to a rollout log as they come: a killed evaluation goes on."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jax.sharding import Mesh

from oapl_jax.build.engines import make_replica_engines
from oapl_jax.config.schema import EvaluateConfig
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.evaluation import tally
from oapl_jax.evaluation.benchmarks import Graded
from oapl_jax.evaluation.held_out import EVALUATION_STREAM
from oapl_jax.io.progress_bar import ProgressBar
from oapl_jax.model import qwen
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Request, SamplingDistribution
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.replicas import Replicas, replica_meshes
from oapl_jax.types import GradedRollout, Prompt, Rollout, RolloutGroup, Verdict

MAX_UNWRITTEN = 64
"""Problems whose samples may wait for the grader before the sampler waits too."""


def make_engines(
    config: EvaluateConfig, model: qwen.QwenConfig, tokenizer: Tokenizer, mesh: Mesh, max_prompt_tokens: int
) -> tuple[Engine, ...]:
    """An engine for each replica of the mesh.

    Raises:
        ValueError: the rows do not divide over the replicas; the memory has no room for one sample.
    """
    sampler, replicas = config.sampler, replica_meshes(mesh)
    if sampler.rows % len(replicas):
        raise ValueError(f"sampler.rows={sampler.rows} do not divide over the {len(replicas)} replicas of the mesh")
    return make_replica_engines(
        sampler,
        model,
        replicas,
        num_rows=sampler.rows,
        compute_dtype=config.model.compute_dtype,
        vocab_size=tokenizer.vocab_size,
        stop_ids=tokenizer.stop_ids,
        max_prompt_tokens=max_prompt_tokens,
        can_truncate=SamplingDistribution.of(sampler).truncates,
    )


def sample(
    config: EvaluateConfig,
    problems: Sequence[Graded],
    engines: Sequence[Engine],
    params: Any,
    tokenizer: Tokenizer,
    directory: pathlib.Path,
    version: int,
) -> None:
    """Samples the problems that the log at ``directory`` lacks under this version.

    A problem's samples are in the log when all of them are graded, and then survive a kill.
    """
    done = tally.prompt_ids(directory, version)
    sampling = SamplingDistribution.of(config.sampler)
    log = RolloutLog(directory, dataclasses.asdict(sampling))
    directory.mkdir(parents=True, exist_ok=True)
    requests = [
        Request(
            i,
            problem.prompt.token_ids,
            config.sampler.samples,
            (config.run.seed, EVALUATION_STREAM, i),
            sampling,
            needs_logprobs=False,
        )
        for i, problem in enumerate(problems)
        if problem.prompt.id not in done
    ]

    def write(index: int, rollouts: list[Rollout]) -> tuple[int, int]:
        group = _group(problems[index], index, version, rollouts, tokenizer)
        log.append([group])
        return sum(item.grade.verdict is Verdict.CORRECT for item in group.rollouts), len(rollouts)

    replicas: Replicas[int] = Replicas(engines, contextlib.nullcontext())
    finished, correct, total = len(problems) - len(requests), 0, 0
    with ProgressBar(len(problems), enabled=config.logging.progress) as progress, ThreadPoolExecutor(1) as grader:
        if finished:
            progress.note(f"{finished} of {len(problems)} problems are in {directory} already")
        waiting: list[Future[tuple[int, int]]] = []
        for index, rollouts in replicas.run(params, requests):
            waiting.append(grader.submit(write, index, rollouts))
            while waiting and (waiting[0].done() or len(waiting) > MAX_UNWRITTEN):
                right, drawn = waiting.pop(0).result()
                finished, correct, total = finished + 1, correct + right, total + drawn
                progress.update(finished, {"rollouts/pass_rate": correct / total})
        for future in waiting:
            right, drawn = future.result()
            finished, correct, total = finished + 1, correct + right, total + drawn
            progress.update(finished, {"rollouts/pass_rate": correct / total})


def _group(
    problem: Graded, index: int, version: int, rollouts: Sequence[Rollout], tokenizer: Tokenizer
) -> RolloutGroup:
    """Graded, and without advantages: nothing is trained on these."""
    prompt: Prompt = problem.prompt
    texts = [tokenizer.decode(rollout.token_ids.tolist()) for rollout in rollouts]
    grades = problem.grader.grade([(prompt, t, r.finish_reason) for t, r in zip(texts, rollouts, strict=True)])
    graded = tuple(map(GradedRollout, rollouts, texts, grades, [math.nan] * len(grades)))
    return RolloutGroup(index, version, prompt, graded, math.nan)


def longest(problems: Sequence[Graded]) -> int:
    """Tokens of the longest prompt."""
    return int(np.max([len(problem.prompt.token_ids) for problem in problems]))

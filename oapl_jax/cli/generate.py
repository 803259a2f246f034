"""``oapl-jax generate --config C.yaml``: responses of a policy to the prompts of a data set (docs/offline.md).

The same command, in any number of processes on any number of hosts that share ``run.dir``, shares the work and goes on
with what is missing (``sources/generation.py``).
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from oapl_jax.build import policy
from oapl_jax.build.checks import CHECKS
from oapl_jax.build.sampler import make_sampler
from oapl_jax.config import config_file
from oapl_jax.config.applies import changed
from oapl_jax.config.commands import GenerateConfig
from oapl_jax.data.prompts import describe as describe_prompts
from oapl_jax.data.prompts import load_prompts
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.distributed.compile_cache import use_compile_cache
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.io import run_dir, storage
from oapl_jax.io.lease import Leases
from oapl_jax.io.preemption import StopSignals
from oapl_jax.io.progress_bar import ProgressBar
from oapl_jax.io.storage import SharedPath
from oapl_jax.io.terminal import say
from oapl_jax.objectives import oapl
from oapl_jax.rewards.grader import Grader, make_grader
from oapl_jax.rollouts import filters, published
from oapl_jax.rollouts.grading import Advantages, Grading
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.stops import Stops
from oapl_jax.run import export
from oapl_jax.run.start import is_run, make_warm_start, model_path, sampled_outline
from oapl_jax.sources.generation import Generation, generate
from oapl_jax.sources.turns import SamplerTurns
from oapl_jax.types import PreemptedError, Prompt
from oapl_jax.weights.sync import WeightSync

POLL_SECONDS = 0.5
BETA1 = 1.0
"""Temperature of the V* that is logged; offline training computes its own."""
LEASES_FOLDER = "leases"
POLICY_FOLDER = "policy"
WORK_FILE = "generation.json"
SUMMARY_FILE = "summary.json"


def main(argv: list[str]) -> None:
    """Exit codes: 0 all is in the log, 2 the config is wrong, 42 stopped by SIGTERM."""
    config, arguments = config_file.from_command_line(GenerateConfig, "generate", argv, checks=CHECKS)
    if arguments.dry_run:
        say(config_file.to_yaml(config))
        say(_plan(config))
        return
    use_compile_cache(config.run.compile_cache)
    summary = run(config)
    if summary is None:
        raise PreemptedError
    say(describe(summary, storage.shared_path(config.run.dir) / "rollouts"))


def run(config: GenerateConfig) -> dict[str, Any] | None:
    """Does this process's share of the work; returns the summary, or None where it was stopped before the end.

    Raises:
        ValueError: the config or the data got something wrong; the message says what.
        TimeoutError: see ``generation.generate``.
    """
    run_dir.check_run(config)
    directory, deadline = storage.shared_path(config.run.dir), config.generation.deadline
    with contextlib.ExitStack() as stack:
        leases = stack.enter_context(Leases(directory / LEASES_FOLDER, config.generation.lease_seconds))
        is_stopped = stack.enter_context(StopSignals()).is_set
        with _alone(leases, "policy", deadline):
            path = _start(config, stack.enter_context(storage.local_folder(directory / POLICY_FOLDER)))
        trainer_mesh, mesh = make_meshes(config.mesh)
        architecture, tokenizer = policy.outline(config.model, path)
        prompts, grader, stops, lines = _load(config, tokenizer)
        grading = Grading(
            stops.text,
            grader,
            Advantages(
                lambda rewards, _: oapl.advantages(rewards, BETA1),
                functools.partial(oapl.optimal_value, beta1=BETA1),
                config.sampler.truncated,
            ),
        )
        stack.callback(grading.close)
        sampler = make_sampler(config, architecture, mesh, tokenizer, config.data.max_prompt_tokens)
        params = policy.load_params(config.model, path, architecture, trainer_mesh, config.run.seed)
        weights, _ = WeightSync(params, mesh, config.sampler.dtype)(params)
        del params
        log = RolloutLog(directory / "rollouts", dataclasses.asdict(SamplingDistribution.of(config.sampler)))
        size = config.generation.groups_per_file
        work = Generation(log, leases, config.generation.policy_version, prompts, size, deadline)
        with _alone(leases, "work", deadline):
            _check_work(directory / WORK_FILE, work)
            run_dir.open_run(config)
        progress = stack.enter_context(ProgressBar(len(prompts), enabled=config.logging.progress, unit="group"))
        for line in lines:
            progress.note(line)
        is_done = generate(
            work,
            SamplerTurns(sampler),
            grading,
            weights,
            config.sampler,
            config.run.seed,
            report=lambda done, speed: progress.update(done, {"learner/tokens_per_second": speed}),
            is_stopped=is_stopped,
        )
        if not is_done:
            return None
        with _alone(leases, "summary", deadline):
            return _summarize(config, directory, work)


def _plan(config: GenerateConfig) -> str:
    """Reads all but the weights, and says what there is to do."""
    architecture, tokenizer = sampled_outline(config.model)
    architecture.check_positions(config.data.max_prompt_tokens + config.sampler.max_response_tokens)
    _, grader, _, lines = _load(config, tokenizer)
    grader.close()
    return "\n".join(lines)


def _load(config: GenerateConfig, tokenizer: Tokenizer) -> tuple[list[Prompt], Grader, Stops, list[str]]:
    """The prompts of the work, their grader, which has tried their gold answers, and what there is to say of both."""
    stops = Stops(tokenizer, SamplingDistribution.of(config.sampler))
    source = load_prompts(config.data, tokenizer, config.run.seed)
    prompts, grader = _choose(source, config), make_grader(config)
    try:
        grader.check_golds(prompts)
    except BaseException:
        grader.close()
        raise
    described = describe_prompts(config.data, source).items()
    lines = [f"prompts{' of ' if name else ''}{name}: {text}" for name, text in described]
    return prompts, grader, stops, [f"responses {stops}", *lines]


def _start(config: GenerateConfig, folder: pathlib.Path) -> str | None:
    """The folder of the weights, None: random ones; those of a run's checkpoint and of a warm start are made first."""
    path = config.model.path
    if not is_run(path):
        make_warm_start(config)
        return model_path(config.model)
    if not folder.exists():
        export.export(storage.shared_path(str(path)), folder)
    return str(folder)


def _choose(source: Any, config: GenerateConfig) -> list[Prompt]:
    """The prompts of the work, in the order of the data."""
    number = config.generation.prompts
    if config.data.task is not None:
        assert number is not None  # the config says so
        return [source[i] for i in range(number)]
    if number is None:
        return list(source.items)
    if number > len(source.items):
        raise ValueError(
            f"generation.prompts={number}: the data has only {len(source.items)} prompts; lower it, or say null"
        )
    chosen = set(filters.choose([prompt.id for prompt in source.items], number, config.run.seed))
    return [prompt for prompt in source.items if prompt.id in chosen]


def _check_work(path: SharedPath, work: Generation) -> None:
    """Ties the directory to the prompts: data that was changed in between would mix two works.

    Raises:
        ValueError: the prompts are not those that the work was begun with.
    """
    checksum = 0
    for prompt in work.prompts:
        for part in (prompt.id.encode(), prompt.answer.encode(), np.asarray(prompt.token_ids, np.int32).tobytes()):
            checksum = zlib.crc32(part, checksum)
    now = {"prompts": len(work.prompts), "groups_per_file": work.groups_per_file, "checksum": checksum}
    if not storage.exists(path):
        storage.replace(path, json.dumps(now).encode() + b"\n")
    elif (before := storage.read_object(path)) != now:
        raise ValueError(
            f"{path}: this directory was begun with other prompts ({before}, now {now}); the data or its order was"
            " changed. Choose another run.dir"
        )


def _summarize(config: GenerateConfig, directory: SharedPath, work: Generation) -> dict[str, Any]:
    """Counts of the log, and of what the filters would leave; writes the published layout where it is wanted."""
    path, is_filtered = directory / SUMMARY_FILE, changed(config.filter) or config.generation.published
    if storage.exists(path) and not is_filtered:  # another process was the first to end
        return storage.read_object(path)
    summary: dict[str, Any] = work.log.count(work.version)
    if is_filtered:
        kept, counts = filters.apply(work.log.read(work.version), config.filter, config.run.seed)
        summary["filter"] = dataclasses.asdict(counts)
        if config.generation.published:
            published.write(pathlib.Path(config.generation.published), kept)
    storage.replace(path, json.dumps(summary, indent=2).encode() + b"\n")
    return summary


@contextlib.contextmanager
def _alone(leases: Leases, name: str, deadline: float) -> Iterator[None]:
    """Holds a lease while the block runs; waits for the process that has it."""
    end = time.monotonic() + deadline
    while (lease := leases.claim(name)) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"waited {deadline:g} s (generation.deadline) for another process to finish {name!r}")
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        lease.release()


def describe(summary: dict[str, Any], log: SharedPath) -> str:
    """The summary for people."""
    lines = [
        f"{summary['groups']:,} groups, {summary['rollouts']:,} responses in {log}",
        f"correct {summary['correct']:.3f}  reward {summary['reward']:.3f}  truncated {summary['truncated']:.3f}"
        f"  invalid {summary['invalid']:.3f}",
    ]
    if "filter" in summary:
        lines.append(f"filter: {filters.FilterCounts(**summary['filter'])}")
    return "\n".join(lines)

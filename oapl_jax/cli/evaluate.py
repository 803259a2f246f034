"""pass@k, avg@k and maj@k of policies on benchmarks: sampled, or read from rollout logs.

    python -m oapl_jax evaluate --config configs/evaluate_math.yaml [section.key=value ...] [--watch]
    python -m oapl_jax evaluate --log [LABEL=]LOG [--log [LABEL=]LOG ...] --out DIR

The first command samples a policy (a Hugging Face folder, or a run's checkpoint) on benchmarks; with ``--watch`` each new
checkpoint of a run until the run ends. The second one reads the rollout logs of evaluations, generations or runs, and
compares every other log with the first. Both write results.json, results.csv and pictures (docs/evaluation.md).
"""

import argparse
import contextlib
import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence

import numpy as np

from oapl_jax.build import policy
from oapl_jax.build.checks import CHECKS
from oapl_jax.build.sampler import make_sampler
from oapl_jax.config import config_file
from oapl_jax.config.commands import EvaluateConfig
from oapl_jax.data.prompts import HeldOut, dropped
from oapl_jax.distributed.compile_cache import use_compile_cache
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.evaluation import benchmarks, plots, sampling, scores, tables, tally
from oapl_jax.io import run_dir, storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.io.terminal import say
from oapl_jax.rollouts.grading import Advantages, Grading
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.stops import Stops
from oapl_jax.run import export
from oapl_jax.run.start import is_run, model_path, sampled_outline
from oapl_jax.sources.follower import POLICY_FOLDER
from oapl_jax.types import Prompt
from oapl_jax.weights.policies import PolicyGoneError, PolicyStore
from oapl_jax.weights.sync import WeightSync

ROLLOUTS = "rollouts"
POLL_SECONDS = 2.0


def evaluate(config: EvaluateConfig, *, watch: bool = False) -> str:
    """Samples what is not sampled yet, writes tables and pictures, and returns the table.

    Raises:
        ValueError: what the config got wrong.
        TimeoutError: with ``watch``, no new version came in time.
    """
    run_dir.check_run(config)
    log = storage.shared_path(config.run.dir) / ROLLOUTS
    label = config.run.label or _label(str(config.model.path or config.model.config or config.model.warm_start))
    distribution, sampler = SamplingDistribution.of(config.sampler), None
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(storage.local_folder(log.parent))
        for version, path in _versions(config, scratch, watch):
            architecture, tokenizer = policy.outline(config.model, path)
            mesh, sampler_mesh = make_meshes(config.mesh)
            if sampler is None:  # with the first policy; the next ones have its shapes
                prompts, grader = benchmarks.load(config, tokenizer)
                stops = Stops(tokenizer, distribution)
                # Nothing is trained on these samples, so they have no advantages.
                none = Advantages(
                    lambda rewards, _: np.full(len(rewards), math.nan), lambda _: math.nan, config.sampler.truncated
                )
                grading = Grading(stops.text, grader, none)
                stack.callback(grading.close)
                say(_describe(prompts, stops))
                lengths = [len(prompt.token_ids) for prompt in prompts]
                sampler = make_sampler(config, architecture, sampler_mesh, tokenizer, max(lengths), lengths)
            params = policy.load_params(config.model, path, architecture, mesh, config.run.seed)
            run_dir.open_run(config)
            sampler.set_weights(WeightSync(params, sampler_mesh, config.sampler.dtype)(params)[0])
            del params
            samples = RolloutLog(log, dataclasses.asdict(distribution))
            sampling.sample(sampler, prompts, grading, samples, version, config)
            table = report([(label, log)], log.parent)
            if watch:
                say(f"\nversion {version}:\n{table}")
    return table


def _label(path: str) -> str:
    """The last part of a path; of an export of a run the run's name."""
    place = pathlib.PurePath(path)
    return place.parent.name if place.name.startswith("export") and place.parent.name else place.name


def _longest(prompts: Sequence[Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts)


def _describe(prompts: HeldOut, stops: Stops) -> str:
    """Where responses end, and which data sets have rows that are left out."""
    left_out = [f"{name or 'data'}: {dropped(number)}" for name, number in prompts.dropped.items() if number]
    return "\n".join([f"responses {stops}", *left_out])


def _versions(config: EvaluateConfig, scratch: pathlib.Path, watch: bool) -> Iterator[tuple[int, str | None]]:
    """Each policy to evaluate, with its version: of a run the step of the checkpoint, else 0."""
    path = config.model.path
    if not is_run(path):
        if watch or config.run.step is not None:
            raise ValueError(f"{'--watch' if watch else 'run.step'} needs a run directory; model.path={path!r} is none")
        yield 0, model_path(config.model)
        return
    source = storage.shared_path(str(path))
    run_dir.check_release(source)
    if watch:
        yield from _followed(config, source, scratch)
    else:
        yield from _exported(source, export.choose_step(source, config.run.step), scratch)


def _exported(source: SharedPath, step: int, scratch: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The checkpoint as a folder, for as long as it is sampled."""
    folder = scratch / f"policy-{step}"
    export.export(source, folder, step)
    try:
        yield step, str(folder)
    finally:
        shutil.rmtree(folder)


def _followed(config: EvaluateConfig, source: SharedPath, scratch: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The versions of a run as they appear, until the run has ended: its published policies, else its checkpoints."""
    store = PolicyStore(source / POLICY_FOLDER) if storage.names(source / POLICY_FOLDER) else None
    seen: set[int] = set()
    last = time.monotonic()
    while True:
        # Before the look at the steps, or the last could be missed.
        has_ended = storage.exists(source / run_dir.SUMMARY_FILE)
        new = [version for version in _present(source, store) if version not in seen]
        for version in new:
            seen.add(version)
            try:
                if store is None:
                    yield from _exported(source, version, scratch)
                else:
                    yield version, str(store.fetch(version, scratch / "fetched"))
            except (ValueError, PolicyGoneError):
                if version in _present(source, store):
                    raise
                say(f"version {version}: the run has removed it before it was its turn; left out")
            last = time.monotonic()
        if new:
            continue
        if has_ended and seen:
            return
        if has_ended:
            raise ValueError(f"{str(source)!r} has ended and has no checkpoint; there is nothing to evaluate")
        if time.monotonic() > last + config.run.watch_deadline:
            problem = f"within run.watch_deadline={config.run.watch_deadline:g} s, and no {run_dir.SUMMARY_FILE}"
            raise TimeoutError(f"{source}: no new version {problem}")
        time.sleep(POLL_SECONDS)


def _present(source: SharedPath, store: PolicyStore | None) -> list[int]:
    """Versions that a run has now, without published ones that are not whole."""
    if store is None:
        return export.steps(source)
    found = []
    for version in store.versions():
        with contextlib.suppress(PolicyGoneError):
            store.manifest(version)
            found.append(version)
    return found


def report(logs: Sequence[tuple[str, SharedPath]], out: SharedPath) -> str:
    """Reads rollout logs, writes tables and pictures into ``out``, and returns the table.

    ``logs`` have labels; a log of several versions gives a policy for each.

    Raises:
        ValueError: two logs of one label, no rollouts, or a file that cannot be read.
    """
    tallies: dict[str, list[tally.Tally]] = {}
    by_version: dict[int, list[scores.Score]] = {}
    found: list[scores.Score] = []
    for label, log in logs:
        numbers = tally.versions(log)
        for version in numbers:
            name = label if len(numbers) == 1 else f"{label}@{version}"
            if name in tallies:
                raise ValueError(f"two logs are called {name!r}; name them by --log LABEL=LOG")
            tallies[name] = tally.read(log, version)
            by_version[version] = scores.score(name, tallies[name])
            found += by_version[version]
    (baseline, base), *others = tallies.items()
    comparisons = [item for label, mine in others for item in scores.compare(label, mine, baseline, base)]
    tables.write(out, found, comparisons)
    plots.draw_pass(out / plots.PASS_FILE, found)
    if comparisons:
        plots.draw_differences(out / plots.DIFFERENCE_FILE, comparisons)
    if len(logs) == 1 and len(by_version) > 1:
        plots.draw_versions(out / plots.VERSIONS_FILE, by_version)
    lines = [line for label, mine in tallies.items() for line in tables.shortages(label, mine)]
    return "\n".join([tables.render(found, comparisons), *([""] if lines else []), *lines])


def _plan(config: EvaluateConfig) -> str:
    """Loads the problems and their graders, and says how many samples there will be."""
    architecture, tokenizer = sampled_outline(config.model)
    prompts, grader = benchmarks.load(config, tokenizer)
    grader.close()
    sampler = config.sampler
    architecture.check_positions(_longest(prompts) + sampler.max_response_tokens)
    return (
        f"{_describe(prompts, Stops(tokenizer, SamplingDistribution.of(sampler)))}\n"
        f"{len(prompts):,} problems x {sampler.samples} samples of at most {sampler.max_response_tokens:,} tokens;"
        f" the longest prompt has {_longest(prompts):,}"
    )


def _parse_log(word: str) -> tuple[str, SharedPath]:
    """``LABEL=LOG`` or ``LOG``, which may also be the directory of a run or of an evaluation."""
    label, equals, rest = word.partition("=")
    path = storage.shared_path(rest if equals else word)
    log = path / ROLLOUTS if storage.names(path / ROLLOUTS) else path
    return (label if equals else path.name), log


def main(argv: list[str]) -> None:
    """Command line; exit codes: 0 done, 1 nothing new came in time, 2 the arguments are wrong."""
    if "--log" in argv:
        parser = argparse.ArgumentParser(prog="oapl-jax evaluate", description="Evaluates rollout logs.")
        parser.add_argument("--log", action="append", required=True, metavar="[LABEL=]LOG", help="a log, or a run")
        parser.add_argument("--out", type=storage.shared_path, required=True, help="folder of tables and pictures")
        arguments = parser.parse_args(argv)
        say(report([_parse_log(word) for word in arguments.log], arguments.out))
        return

    def add_watch(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--watch", action="store_true", help="evaluate each new version of the run at model.path")

    config, arguments = config_file.from_command_line(EvaluateConfig, "evaluate", argv, add_watch, checks=CHECKS)
    use_compile_cache(config.run.compile_cache)
    if arguments.dry_run:
        say(config_file.to_yaml(config))
        say(_plan(config))
        return
    table = evaluate(config, watch=arguments.watch)
    if not arguments.watch:
        say(table)

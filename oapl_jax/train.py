"""OAPL (paper Algorithm 1): sample, grade, train, and every ``sync_every`` steps sync.

    python -m oapl_jax.train --config configs/quickstart.yaml [--dry-run] [section.key=value ...]

The source of groups fills the current window with graded groups of one policy version, beside this loop or in other
processes (``sources/``). ``run/run.py`` has what the loop opens, restores and saves. Departures from the paper are in
docs/departures.md. The same command again resumes; SIGTERM saves and exits with code 42.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from oapl_jax.io import interrupt

if __name__ == "__main__":  # Ctrl-C ends the process from here on: what follows takes seconds to import
    signal.signal(signal.SIGINT, interrupt.leave)

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.distributed import start
from oapl_jax.distributed.compile_cache import use_compile_cache
from oapl_jax.distributed.messages import reporting_failures
from oapl_jax.distributed.team import Team
from oapl_jax.io import console
from oapl_jax.io.non_finite import check_finite
from oapl_jax.io.storage import shared_path
from oapl_jax.io.terminal import say
from oapl_jax.rollouts.source import GroupSource
from oapl_jax.run.summary import finished, table
from oapl_jax.types import Metrics

if TYPE_CHECKING:  # the rest of the program takes seconds to import: a finished run and a wrong config need not wait
    import oapl_jax.run.run

GUARDED = ("learner/loss", "learner/grad_norm")


def run(config: TrainConfig, make_source: Callable[[Any], GroupSource] | None = None) -> dict[str, Any]:
    """Trains to the last step and returns the summary: the Python entry of ``oapl-jax train``.

    Args:
        config: of the run; ``config_file.load(TrainConfig, path, overrides, CHECKS)`` reads one (``build/checks.py``).
        make_source: makes the source of groups from the process's ``SamplingSetup``; None: the one of ``config.mode``.

    Returns:
        ``before`` and ``after`` (pass@k), ``steps``, ``rollouts``, ``seconds``, ``policy_versions``.

    Raises:
        ValueError: the config got something wrong; the message says what.
        RunError, TimeoutError, RuntimeError: the run cannot go on; the message says why.
        PreemptedError: after SIGTERM, with the state saved.
    """
    if (summary := finished(config)) is not None:
        say(f"{config.run.dir} has ended; with run.steps above {summary['planned_steps']} it goes on")
        return summary
    from oapl_jax.run.results import write_results
    from oapl_jax.run.run import open_run

    with open_run(config, make_source) as opened:
        while not opened.is_over:
            if opened.plan is None:
                opened.open_window()
            elif opened.ends_window:  # the run was over here, and goes on with more steps
                opened.sync()
            else:
                with opened.profiler.step(opened.progress.step + 1):
                    _step(opened)
        after = opened.finish()
        return write_results(opened, after)


def _step(run: "oapl_jax.run.run.Run") -> None:
    """One step of the learner: take, train, sync, evaluate, save."""
    config, start = run.config, time.perf_counter()
    groups = run.take()
    wait_seconds = time.perf_counter() - start

    # Train on the batch (paper Eq. 3).
    lag = run.progress.step - run.progress.window_step
    version = run.progress.policy_version
    metrics: Metrics = {"window/version": version, "window/lag": lag}
    if config.window.max_version_lag:
        metrics["window/previous_groups"] = sum(group.policy_version < version for group in groups)
    trained, num_tokens = run.train(groups)
    metrics |= trained
    step = run.progress.step
    check_finite(step, metrics, GUARDED)

    # Offline, after each epoch over a round's data: pass@k, and the model as a folder.
    if run.ends_epoch:
        metrics |= run.end_epoch()

    # Every L steps: sync, and a new window.
    is_next_slow = run.plan is not None and run.plan.is_next_slow
    if run.ends_window and not run.is_over:
        metrics |= run.sync()
        if not is_next_slow:
            run.open_window()

    evaluation, every = None, config.evaluation.every if config.evaluation.prompts else 0
    if every and step % every == 0 and not run.is_over:
        evaluation = run.evaluate(config.evaluation.samples)
    metrics |= run.report() | {"learner/wait_seconds": wait_seconds}
    metrics["learner/seconds"] = time.perf_counter() - start
    metrics["learner/tokens_per_second"] = num_tokens / metrics["learner/seconds"]
    run.log.add(step, metrics, evaluation, run.distributions)
    run.bar.update(step, metrics)

    is_kept = config.window.keep_checkpoints and step == run.progress.window_step
    if config.checkpoint.keep_best and evaluation is not None:
        is_kept |= run.is_best(evaluation.result())
    if step % config.checkpoint.every == 0 or run.is_over or run.plan is None or is_kept:
        run.save()


def main(argv: list[str]) -> int | None:
    """Command line; exit codes: 0 done, 1 the run failed, 2 the config is wrong, 42 saved after SIGTERM."""
    try:
        config, arguments = config_file.from_command_line(TrainConfig, "train", argv, start.add_options, checks=CHECKS)
    except config_file.ConfigError as error:
        if error.rest is not None:
            from oapl_jax.run.start import load

            load(error.rest, error)  # raises it with the mistakes in data, graders and devices
        raise
    if finished(config) is not None and not arguments.dry_run:
        summary = run(config)  # which only says so
    else:
        start.initialize(arguments)
        use_compile_cache(config.run.compile_cache)
        if arguments.dry_run:
            say(config_file.to_yaml(config))
            for text in describe(config):
                say(text)
            return None
        say(f"{config.run.dir}: starting")
        from oapl_jax.distributed.sharding import is_here, make_meshes
        from oapl_jax.run.run import serve

        with reporting_failures():
            _check_single_process(config)
            if not is_here(make_meshes(config.mesh)[0]):
                return serve(config)
            summary = run(config)
        if not Team.job().is_leader:
            return None
    say(table(summary, shared_path(config.run.dir)))
    return None


def describe(config: TrainConfig) -> Iterator[str]:
    """The plan of a run for people, then its peak of memory: everything is checked and compiled, and nothing is trained."""
    import oapl_jax.run.run  # noqa: F401 - what it loads is of the process's memory
    from oapl_jax.build.account import size
    from oapl_jax.build.advice import advice
    from oapl_jax.build.peak import expected_peak
    from oapl_jax.distributed.memory import usable_bytes
    from oapl_jax.run.start import load

    assembly, inputs = load(config)
    inputs.grader.close()
    yield _lines(assembly.describe() | inputs.describe(config))
    yield from (f"{'advice':>14}  {text}" for text in advice(config))
    shortage = assembly.account.shortage(usable_bytes(assembly.trainer_mesh))
    if shortage > 0:
        yield _lines({"peak": f"a device lacks {size(shortage)} before a program runs, so none is compiled"})
    else:
        yield _lines(expected_peak(assembly).describe())


def _lines(texts: dict[str, str]) -> str:
    return "\n".join(f"{name:>14}  {text}" for name, text in texts.items())


def _check_single_process(config: TrainConfig) -> None:
    """Refuses what one process alone can do."""
    if (num_processes := Team.job().size) == 1:
        return
    problems = {
        "mode=offline": config.mode == "offline",
        "window.max_groups_ahead": config.window.max_groups_ahead is not None,
        "window.max_version_lag": config.window.max_version_lag > 0,
        "window.unfinished=finish": config.window.unfinished == "finish",
        "window.imports": config.window.imports is not None,
    }
    if found := [name for name, is_wanted in problems.items() if is_wanted]:
        raise ValueError(f"{found[0]}: not in a job of {num_processes} processes; remove it, or use one process")


if __name__ == "__main__":
    sys.exit(console.run(main, sys.argv[1:]))

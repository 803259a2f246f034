"""OAPL (paper Algorithm 1): sample, grade, train, and every ``sync_every`` steps sync.

    python -m oapl_jax.train --config configs/quickstart.yaml [--dry-run] [section.key=value ...]

A sampler thread fills the buffer of the current window with graded groups of one policy version
(``worker.py``); this file is the learner's thread, top to bottom, and ``session.py`` what it opens and saves.
Departures from the paper are in docs/departures.md. The same command again resumes; SIGTERM saves and exits with code 42.
"""

import contextlib
import functools
import json
import pathlib
import sys
import time
from typing import Any

import jax

from oapl_jax.build.job import describe, is_trainer, make_job
from oapl_jax.config import config_file
from oapl_jax.config.schema import TrainConfig
from oapl_jax.distributed import processes
from oapl_jax.distributed.compile_cache import use_compile_cache
from oapl_jax.io import console, run_dir
from oapl_jax.io.non_finite import check_finite
from oapl_jax.io.stopwatch import Stopwatch
from oapl_jax.learner import batch as batches
from oapl_jax.model import hf, lora
from oapl_jax.report import report
from oapl_jax.run.parity import check_parity, draw
from oapl_jax.run.session import Place, Session, open_session, serve
from oapl_jax.sources.local import Worker
from oapl_jax.sources.offline import Rounds
from oapl_jax.types import Metrics, PreemptedError
from oapl_jax.weights.model_card import write_card

GUARDED = ("learner/loss", "learner/grad_norm")
SUMMARY_FILE = "summary.json"
EXPORT_FOLDER = "export"
EPOCHS_FOLDER = "epochs"


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains to the last step and returns the summary.

    Raises:
        ValueError: the config got something wrong; the message says what.
        ParityError, NonFiniteError, TimeoutError, RuntimeError: the run cannot go on; it says why.
        PreemptedError: after SIGTERM, with the state saved.
    """
    started = time.perf_counter()
    run_dir.check_run(config, TrainConfig)
    job, state = make_job(config)
    directory = pathlib.Path(config.run.dir)
    if job.trainers.is_leader:
        run_dir.open_run(config, TrainConfig)
    with contextlib.ExitStack() as stack:
        session = open_session(stack, job, state, directory, started)
        is_new = session.sampler_params is None
        if is_new:
            session.sampler_params = session.sampler_copy()
        _warm_up(session)
        if is_new:
            _begin(session)
        session.buffer.num_dropped = session.place.num_dropped
        session.open_window()
        session.source.start()
        _learn(session)
        session.source.finish(session.place.policy_version)
        session.source.stop()
        after = session.evaluate(session.sampler_copy(), config.evaluation.final_samples)
        session.count_seconds()
    summary = _summarize(session.place, after)
    params = lora.merged(session.state.params)
    exported = hf.save_folder(directory / EXPORT_FOLDER, job.model_config, params, job.tokenizer, writers=job.trainers)
    if job.trainers.is_leader:
        (directory / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
        write_card(exported, config, directory, session.place.step, config.model.param_dtype)
        report.write_report(directory)
    return summary


def _check_alone(config: TrainConfig) -> None:
    """Refuses what one process alone can do."""
    if jax.process_count() == 1:
        return
    problems = {
        "mode=offline": config.mode == "offline",
        "window.max_groups_ahead": config.window.max_groups_ahead is not None,
        "window.unfinished=finish": config.window.unfinished == "finish",
    }
    if found := [name for name, is_wanted in problems.items() if is_wanted]:
        raise ValueError(f"{found[0]}: not in a job of {jax.process_count()} processes; remove it, or use one process")


def _warm_up(session: Session) -> None:
    """Compiles the sampler's programs before the first group, for the lengths of the first prompts."""
    if not isinstance(session.source, Worker):
        return
    start, job = time.perf_counter(), session.job
    session.source.warm_up(session.sampler_params, job.first_lengths)
    session.progress.note(f"sampler: compiled in {time.perf_counter() - start:.1f} s")


def _begin(session: Session) -> None:
    """Before step 1: the parity gate, pass@k of the start, the first checkpoint."""
    job, place = session.job, session.place
    drawn = session.crew.draw if session.crew is not None else functools.partial(draw, job)
    parity = check_parity(job, session.state.params, drawn(session.sampler_params))
    session.progress.note(f"parity gate: sampler and learner differ by {parity:.2g} nats a token")
    place.before = session.evaluate(session.sampler_params, job.config.evaluation.final_samples)
    session.write(0, place.before)
    session.save()
    session.checkpoints.wait()  # before the first group is logged: a checkpoint ties the log to this config


def _learn(session: Session) -> None:
    """The learner's loop: take, train, sync, evaluate, save."""
    job, place, buffer, config = session.job, session.place, session.buffer, session.job.config
    timer = Stopwatch()
    while place.step < session.last_step:
        if not session.is_open:  # offline: the next round's data take long to make; what was learned is saved
            session.open_window()
        start = time.perf_counter()
        step = place.step + 1
        with timer("learner/wait_seconds"):
            groups = session.take(step)
        if groups is None:
            if session.checkpoints.latest_step != place.step:
                session.save()
            session.progress.note(f"SIGTERM: saved at step {place.step}; the same command again goes on from here")
            raise PreemptedError

        # Train on the batch (paper Eq. 3).
        batch = batches.from_groups(groups, job.rows)
        with job.trainer_lock:
            session.state, device_metrics = job.train_step(session.state, batches.place(batch, job.rows))
            metrics: Metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
            jax.block_until_ready(session.state)  # on all devices, before the lock is left
        check_finite(step, metrics, GUARDED)
        metrics |= batches.describe(groups)
        metrics |= {"window/version": place.policy_version, "window/lag": step - 1 - place.window_step}
        metrics["window/ready_groups"] = buffer.num_ready
        place.step, place.cursor, place.left_over = step, buffer.cursor, buffer.left_over
        place.num_rollouts += int(batch.segment_mask.sum())

        # Offline, after each pass over a round's data: pass@k, and the model as a folder.
        if isinstance(session.source, Rounds) and session.source.ends_epoch(step - place.window_step):
            with timer("evaluation/seconds"):
                metrics |= _end_epoch(session, session.source)

        # Every L steps: sync, and clear the buffer.
        last_step = session.last_step
        if step - place.window_step == session.window_steps and step < last_step:
            metrics |= _sync(session)
        place.num_dropped = metrics["window/dropped_groups"] = buffer.num_dropped

        if config.evaluation.every and step % config.evaluation.every == 0 and step < last_step:
            with timer("evaluation/seconds"):
                metrics |= session.evaluate(session.sampler_copy(), config.evaluation.samples)
        metrics |= timer.collect() | session.source.report()
        metrics["learner/seconds"] = time.perf_counter() - start
        metrics["learner/padding"] = batches.padding(batch, job.rows)
        metrics["learner/tokens_per_second"] = float(batch.response_mask.sum()) / metrics["learner/seconds"]
        session.write(step, metrics)
        session.progress.update(step, metrics)
        is_kept = config.window.keep_checkpoints and step == place.window_step
        if step % config.checkpoint.every == 0 or step == last_step or not session.is_open or is_kept:
            session.save()


def _sync(session: Session) -> Metrics:
    """New weights for the sampler, a new version, a new window."""
    with session.job.sampler_lock:
        session.sampler_params, metrics = session.job.sync(session.state.params)
    session.place.next_window(session.place.policy_version + 1)
    session.is_open = False
    if not isinstance(session.source, Rounds):
        session.open_window()
    return metrics


def _end_epoch(session: Session, rounds: Rounds) -> Metrics:
    """Evaluates the model, writes it as a Hugging Face folder, and notes both."""
    place, job = session.place, session.job
    metrics = session.evaluate(session.sampler_copy(), job.config.evaluation.samples)
    epoch = (place.step - place.window_step) // rounds.steps_per_epoch
    folder = pathlib.Path(job.config.run.dir) / EPOCHS_FOLDER / f"{rounds.number:02}-{epoch:02}"
    hf.save_folder(folder, job.model_config, lora.merged(session.state.params), job.tokenizer)
    done = {"round": rounds.number, "epoch": epoch, "step": place.step, "folder": str(folder)}
    place.epochs.append({**done, **_pass_at(metrics)})
    session.progress.note(f"round {rounds.number}, epoch {epoch}: pass@1 {metrics['evaluation/pass@1']:.3f}")
    return metrics


def _summarize(place: Place, after: Metrics) -> dict[str, Any]:
    epochs = place.epochs
    return {
        **({"epochs": epochs, "best": max(epochs, key=lambda epoch: epoch["pass@1"])} if epochs else {}),
        "before": _pass_at(place.before),
        "after": _pass_at(after),
        "steps": place.step,
        "seconds": round(place.seconds, 1),
        "rollouts": place.num_rollouts,
        "policy_versions": place.policy_version + 1,
        "dropped_groups": place.num_dropped,
    }


def _pass_at(metrics: Metrics) -> dict[str, float]:
    return {name.removeprefix("evaluation/"): value for name, value in metrics.items() if "pass@" in name}


def _table(summary: dict[str, Any], directory: pathlib.Path) -> str:
    ks = [k for k in summary["after"] if k in summary["before"]]
    lines = ["", f"{'':>8}" + "".join(f"{k:>9}" for k in ks)]
    rows = {"before": summary["before"]}
    rows |= {f"{epoch['round']}-{epoch['epoch']}": epoch for epoch in summary.get("epochs", ())}
    rows["after"] = summary["after"]
    lines += [
        f"{when:>8}" + "".join(f"{row[k]:9.3f}" if k in row else 9 * " " for k in ks) for when, row in rows.items()
    ]
    if "best" in summary:
        lines.append(f"\nbest epoch by pass@1: {summary['best']['folder']}")
    lines.append(
        f"\n{summary['steps']} steps, {summary['rollouts']:,} rollouts, {summary['seconds']:.0f} s;"
        f" curves in {directory / 'report.html'}"
    )
    return "\n".join(lines)


def main(argv: list[str]) -> int | None:
    """Command line; exit codes: 0 done, 1 the run failed, 2 the config is wrong, 42 saved after SIGTERM."""
    config, arguments = config_file.from_command_line(TrainConfig, "train", argv, processes.add_options)
    processes.initialize(arguments)
    use_compile_cache(config.run.compile_cache)
    if arguments.dry_run:
        job, state = make_job(config, make_warm_start=False)
        job.grader.close()
        print(config_file.to_yaml(config))
        print(describe(job, state))
        return None
    with processes.telling_failures():
        _check_alone(config)
        if not is_trainer(config):
            return serve(config)
        summary = run(config)
    if jax.process_index() == 0:
        print(_table(summary, pathlib.Path(config.run.dir)))
    return None


if __name__ == "__main__":
    sys.exit(console.run(main, sys.argv[1:]))

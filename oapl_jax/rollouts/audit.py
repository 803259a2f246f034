"""Proves from the files of a run that it trained on what it should have.

    python -m oapl_jax audit RUN

Reads the rollout log, the record of the batches and the metrics, and checks every step: its groups are in the
log, are those that were trained on, complete, of the policy version of its window or as far before it as
``window.max_version_lag`` says, with tokens of the vocabulary up to a stop or the limit, log-probabilities, and the
advantages that their rewards give (``checks.py``); none was trained on more often than the config says; the lag is below
``sync_every``. It also says where rewarded responses look as if the grader was gamed (``surface.py``).
Exit code 1 names the first mistake and the file and line that it is in. It needs no devices and changes nothing.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

from oapl_jax.config.commands import TrainConfig
from oapl_jax.data import tokenizer as tokenizers
from oapl_jax.io import json_lines, run_dir, storage
from oapl_jax.io.metrics import METRICS_FILE, read_metrics
from oapl_jax.io.run_dir import BATCHES_FILE, EXPORT_FOLDER
from oapl_jax.io.storage import SharedPath
from oapl_jax.rollouts.checks import GroupCheck
from oapl_jax.rollouts.filters import FEWEST_ROLLOUTS
from oapl_jax.rollouts.grading import advantages_of
from oapl_jax.rollouts.import_rollouts import IMPORTS_FOLDER
from oapl_jax.rollouts.log import RolloutLog, digest, digests_of
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.stops import Stops
from oapl_jax.rollouts.surface import SurfaceWatch
from oapl_jax.types import RolloutGroup, RunError


def audit(run: SharedPath) -> str:
    """Checks a run, finished or not; returns what was proved as a sentence.

    Raises:
        RunError: the first thing that is not as it should be.
        ValueError: there is no such run, or it is of another release.
    """
    config = run_dir.read_config(run, TrainConfig)
    drawn = dataclasses.asdict(SamplingDistribution.of(config.sampler))
    log = RolloutLog(storage.shared_path(config.run.shared_dir or run) / "rollouts", drawn)
    check = _group_check(run, config)
    most_steps = config.window.sync_every if config.offline is None else math.inf
    uses: collections.Counter[str] = collections.Counter()
    surface, signs = SurfaceWatch(), []
    before, num_steps, step, num_rollouts, num_windows, num_damaged = -1, 0, 0, 0, 0, 0
    oldest = min(log.versions(), default=math.inf) if config.checkpoint.keep_rollouts else 0
    records = (pathlib.PurePath(name) for name in storage.names(run / IMPORTS_FOLDER))
    imported = {int(path.stem) for path in records if path.match("[0-9]*.json")}
    recorded = list(_batches(run))
    for version, window in itertools.groupby(recorded, key=lambda found: found[1]["policy_version"]):
        batches = list(window)
        is_free = config.offline is not None or before in imported
        is_due = before < 0 or is_free or num_steps == config.window.sync_every
        _require(
            version > before and is_due,
            batches[0][0],
            f"step {step + 1} is of version {version}, {num_steps} steps after the sync to {before};"
            f" window.sync_every is {config.window.sync_every}",
        )
        groups, damaged = _read(log, version)
        if config.window.max_version_lag:
            groups |= _read(log, version - 1)[0]
        before, num_steps, num_windows, num_damaged = version, len(batches), num_windows + 1, num_damaged + len(damaged)
        for lag, (where, line) in enumerate(batches):
            step += 1
            _require(line["step"] == step, where, f"step {line['step']} follows step {step - 1}")
            most = math.inf if version in imported else most_steps
            _require(lag < most, where, f"step {step} lags {lag}, not below {most:g}")
            if min((int(name.partition("-")[0]) for name in line["groups"]), default=version) < oldest:
                continue  # its rollouts were removed
            absent = [name for name in line["groups"] if name not in groups]
            _require(not absent or not damaged, where, f"group {absent[:1]} was trained on, and {'; '.join(damaged)}")
            own_check = check._replace(is_imported=version in imported)
            _check_batch(own_check, line["groups"], groups, version, where)
            uses.update(list(line["groups"]))
            num_rollouts += sum(len(groups[name].usable) for name in line["groups"])
            signs += [f"step {step}: {sign}" for sign in surface.add([groups[name] for name in line["groups"]])[1]]
    most = max(config.window.epochs, config.window.max_uses)
    if config.offline is not None:
        most = max(data.epochs for data in config.offline.rounds)
    for name, times in uses.items():
        _require(times <= most, BATCHES_FILE, f"group {name} was trained on {times} times; the config says {most}")
    if config.window.order == "index" and most == 1:
        _check_order(recorded)
    _check_metrics(run, recorded, most_steps, imported)
    left = f"; damaged files, of which nothing was trained on: {num_damaged}" if num_damaged else ""
    if oldest:
        left += f"; not checked: rollouts of versions before {oldest}, which were removed (checkpoint.keep_rollouts)"
    if check.stops is None:
        left += "; not checked: token ids and the ends of responses, whose tokenizer cannot be read"
    proved = f"{step} steps, {num_windows} windows, {len(uses)} groups, {num_rollouts} rollouts: all as recorded{left}"
    return "\n".join([proved, *signs])


def _check_batch(
    check: GroupCheck, names: dict[str, str], groups: dict[str, RolloutGroup], version: int, where: str
) -> None:
    config = check.config
    wanted = config.learner.batch_rollouts // config.sampler.group_size
    _require(len(names) == wanted, where, f"{len(names)} groups; a batch has {wanted}")
    folders = [f"rollouts/{version - lag:06d}" for lag in range(config.window.max_version_lag + 1)]
    for name in names:
        _require(name in groups, where, f"group {name} is not in {' or '.join(folders)}")
        group = groups[name]
        folder = f"rollouts/{group.policy_version:06d}"
        which = f"{folder}, group {name}"
        try:
            check.check(group)
        except ValueError as error:
            raise RunError(f"{folder}, {error}") from error
        _require(len(group.usable) >= FEWEST_ROLLOUTS, which, "has fewer than two usable rollouts and was trained on")
        _require(digest(group) == names[name], which, "is not the one that was trained on: its digest is another")


def _group_check(run: SharedPath, config: TrainConfig) -> GroupCheck:
    """The run's check, with the vocabulary where the tokenizer can be read: the model's, or the one that the run wrote."""
    stops, exported = None, run / EXPORT_FOLDER
    folder = config.model.path or (str(exported) if storage.is_local(run) and storage.exists(exported) else None)
    with contextlib.suppress(OSError, ValueError):  # the tokenizer may be gone, or on another machine
        tokenizer = tokenizers.load(config.model.tokenizer, folder, config.model.chat_template_kwargs)
        stops = Stops(tokenizer, SamplingDistribution.of(config.sampler))
    return GroupCheck(config, stops, advantages_of(config))


def _check_order(recorded: list[tuple[str, Any]]) -> None:
    """In the order of the index the groups of a window ascend."""
    last = (-1, -1)
    for where, line in recorded:
        places = [last, *(tuple(map(int, name.split("-"))) for name in line["groups"])]  # version and index
        _require(places == sorted(set(places)), where, "the groups are not in the order of their index")
        last = places[-1]


def _check_metrics(run: SharedPath, recorded: list[tuple[str, Any]], most_steps: float, imported: set[int]) -> None:
    """Each step has one line, whose version and lag are those of its batch; a killed run lacks the last ones."""
    steps = len(recorded)
    for line, row in enumerate((row for row in read_metrics(run / METRICS_FILE) if row["step"] > 0), start=1):
        where = f"{METRICS_FILE}, step {row['step']}"
        _require(row["step"] == line and line <= steps, where, f"is line {line} of {steps} recorded steps")
        version = recorded[line - 1][1]["policy_version"]
        same = row["window/version"] == version
        _require(same, where, f"is of version {row['window/version']:g}, its batch of {version}")
        is_due = version in imported or row["window/lag"] < most_steps
        _require(is_due, where, f"lags {row['window/lag']:g}")


def _read(log: RolloutLog, version: int) -> tuple[dict[str, RolloutGroup], list[str]]:
    """The groups of a version by id, and the errors of files that cannot be read, which no batch may need."""
    groups: dict[str, RolloutGroup] = {}
    damaged: list[str] = []
    for part in log.parts(version):
        try:
            read = log.read_part(version, part)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for group in read:
            _require(group.id not in groups, str(log.path(version, part)), f"group {group.id} is in the log twice")
            groups[group.id] = group
    return groups, damaged


def _batches(run: SharedPath) -> Iterator[tuple[str, Any]]:
    """Each recorded batch with its file and line."""
    try:
        for number, line in enumerate(json_lines.read(run / BATCHES_FILE), start=1):
            where = f"{BATCHES_FILE}, line {number}"
            yield where, {**line, "groups": digests_of(line, where)}
    except ValueError as error:
        raise RunError(str(error)) from error


def _require(is_so: bool, where: str, problem: str) -> None:
    if not is_so:
        raise RunError(f"{where}: {problem}")

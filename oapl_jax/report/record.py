"""What a page shows of a run, read from its directory; a missing file leaves its part empty."""

import dataclasses
import itertools
from typing import Any

import yaml

from oapl_jax.config.config_file import flat
from oapl_jax.io import json_lines, storage
from oapl_jax.io.metrics import METRICS_FILE
from oapl_jax.io.run_dir import BATCHES_FILE, CONFIG_FILE, EVALUATIONS_FILE, STARTS_FILE, SUMMARY_FILE
from oapl_jax.io.storage import SharedPath
from oapl_jax.report import curves, reservoir
from oapl_jax.report.evaluations import Evaluation, Scores, by_k, read_evaluations, score
from oapl_jax.rollouts import diagnostics
from oapl_jax.rollouts.diagnostics import GroupLogprobs
from oapl_jax.rollouts.log import digests_of

MOST_WINDOWS = 20
"""Whose token log-probabilities are read."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The contents of a run directory."""

    directory: SharedPath
    config: str
    settings: dict[str, str]
    """The config's values by ``section.key``."""
    summary: dict[str, Any]
    metrics: curves.Metrics
    evaluations: list[Evaluation]
    scores: list[Scores]
    rollouts_dir: SharedPath
    log: reservoir.LogRecord
    trained_at: dict[str, list[int]]
    """Steps whose batch had a group, by the ids of those that are shown."""
    num_trained: int | None
    """Groups that were trained on; None where this is not recorded."""
    starts: list[int]
    """The step from which each start of the trainer went on."""
    token_logprobs: dict[str, GroupLogprobs]
    """Of some groups, by id."""


def read_run(run_dir: SharedPath, most_rollouts: int = reservoir.MOST_ROLLOUTS) -> RunRecord:
    """Reads the files of a run, those that grow with it line by line.

    Raises:
        ValueError: summary.json, metrics.jsonl, evaluations.jsonl or starts.jsonl is damaged.
    """
    config_file, summary_file = run_dir / CONFIG_FILE, run_dir / SUMMARY_FILE
    config = storage.read(config_file).decode("utf-8-sig") if storage.exists(config_file) else ""
    settings = _settings(config)
    summary = storage.read_object(summary_file) if storage.exists(summary_file) else {}
    metrics = curves.read_metrics(run_dir / METRICS_FILE)
    _add_ends(metrics, summary)
    evaluated = read_evaluations(run_dir / EVALUATIONS_FILE)
    shared = settings.get("run.shared_dir", "None")
    rollouts_dir = storage.shared_path(run_dir if shared == "None" else shared) / "rollouts"
    token_logprobs, problem = _read_token_logprobs(run_dir)
    log = reservoir.read_log(rollouts_dir, most_rollouts, token_logprobs)
    log.damaged += problem
    trained_at, num_trained = _read_batches(run_dir / BATCHES_FILE, log)
    return RunRecord(
        directory=run_dir,
        config=config,
        settings=settings,
        summary=summary,
        metrics=metrics,
        evaluations=evaluated,
        scores=score(evaluated, summary, metrics.curves),
        rollouts_dir=rollouts_dir,
        log=log,
        trained_at=trained_at,
        num_trained=num_trained,
        starts=[line["step"] for line in json_lines.stream(run_dir / STARTS_FILE)],
        token_logprobs=token_logprobs,
    )


def differences(records: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """Settings in which runs differ, each with its values by run; where a run lies is none."""
    keys = dict.fromkeys(itertools.chain.from_iterable(record.settings for record in records))
    rows = [(key, [record.settings.get(key, "-") for record in records]) for key in keys if key != "run.dir"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _add_ends(metrics: curves.Metrics, summary: dict[str, Any]) -> None:
    """Adds the evaluations before and after the run, which are in summary.json, to those of metrics.jsonl."""
    for when, step in (("before", 0), ("after", metrics.last_step or 0)):
        for k, value in by_k(summary.get(when, {})).items():
            metrics.curves.setdefault(f"evaluation/pass@{k}", curves.Curve()).add(step, value)


def _settings(config: str) -> dict[str, str]:
    try:
        sections = yaml.safe_load(config)
    except (yaml.YAMLError, ValueError, RecursionError):  # it is shown as it is
        return {}
    return {key: str(value) for key, value in flat(sections).items()} if isinstance(sections, dict) else {}


def _read_token_logprobs(run_dir: SharedPath) -> tuple[dict[str, GroupLogprobs], list[str]]:
    """Of some windows; and why they cannot be read."""
    try:
        return diagnostics.read(run_dir / diagnostics.TOKEN_LOGPROBS_FILE, MOST_WINDOWS), []
    except ValueError as error:  # the page has more than this file
        return {}, [str(error)]


def _read_batches(path: SharedPath, log: reservoir.LogRecord) -> tuple[dict[str, list[int]], int | None]:
    """Steps of the groups that are shown, and the number of all that were trained on; why not goes to ``log.damaged``."""
    steps: dict[str, list[int]] = {group.id: [] for group in log.groups}
    trained = set[int]()
    try:
        for line in json_lines.stream(path):
            for name in digests_of(line, f"{path}: step {line['step']}"):
                trained.add(hash(name))  # eight bytes instead of a text
                if name in steps:
                    steps[name].append(line["step"])
    except ValueError as error:
        log.damaged.append(str(error))
    return steps, len(trained) if storage.exists(path) else None

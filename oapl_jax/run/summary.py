"""The summary that a run leaves at its end: whether it has ended, and its table."""

import json
from typing import Any

from oapl_jax.config.commands import TrainConfig
from oapl_jax.io import run_dir, storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.types import Metrics


def finished(config: TrainConfig) -> dict[str, Any] | None:
    """The summary of a run of this config that is over; None where steps are left, or ``run.dir`` is of another run."""
    path = storage.shared_path(config.run.dir) / run_dir.SUMMARY_FILE
    try:
        is_this_run = storage.exists(path) and run_dir.check_run(config)
    except ValueError:  # said when the run starts, with what else is wrong
        return None
    if not is_this_run:
        return None
    summary = json.loads(storage.read(path))
    return summary if config.run.steps <= summary.get("planned_steps", 0) else None


def pass_at(metrics: Metrics) -> dict[str, float]:
    """The ``pass@k`` among evaluation metrics, by their short names."""
    return {name.removeprefix("evaluation/"): value for name, value in metrics.items() if "pass@" in name}


def table(summary: dict[str, Any], directory: SharedPath) -> str:
    """The summary for people."""
    ks = [k for k in summary["after"] if k in summary["before"] and "/" not in k]
    sets = dict.fromkeys(name.rpartition("pass@")[0] for name in summary["after"])  # '' is all, 'NAME/' a held-out set
    width = 8 if len(sets) == 1 else 24
    lines = ["", " " * width + "".join(f"{k:>9}" for k in ks)] if ks else []
    rows = {"before": summary["before"]}
    rows |= {f"{epoch['round']}-{epoch['epoch']}": epoch for epoch in summary.get("epochs", ())}
    rows["after"] = summary["after"]
    lines += [
        f"{f'{when} {name[:-1]}'.strip():>{width}}"
        + "".join(f"{row[name + k]:9.3f}" if name + k in row else 9 * " " for k in ks)
        for when, row in rows.items()
        for name in sets
    ]
    if "best" in summary:
        lines.append(f"\nbest epoch by pass@1: {summary['best']['folder']}")
    if best := summary.get("best_checkpoint"):
        step = f"{best['step']:.0f}"
        lines.append(f"\nbest checkpoint: step {step}, {best['value']:.3f}; oapl-jax export {directory} --step {step}")
    for key, what in (("dropped_prompts", "prompts"), ("dropped_held_out", "held-out prompts")):
        if dropped := summary.get(key):
            lines.append(f"\n{dropped:,} {what} were left out: over data.max_prompt_tokens, or without an answer")
    lines.append(
        f"\n{summary['steps']} steps, {summary['rollouts']:,} rollouts, {summary['seconds']:.0f} s;"
        f" curves in {directory / 'report.html'}"
    )
    return "\n".join(lines)

"""What a run leaves at its end: the trained model, ``summary.json``, the report."""

import json
import pathlib
from typing import Any

from oapl_jax.io import storage
from oapl_jax.report import report
from oapl_jax.run.run import Run, pass_at
from oapl_jax.types import Metrics, RunError
from oapl_jax.weights.model_card import write_card

SUMMARY_FILE = "summary.json"
EXPORT_FOLDER = "export"


def write_results(run: Run, after: Metrics) -> dict[str, Any]:
    """Writes the model folder, the summary and the report of a run at its last step; returns the summary."""
    config, directory, progress = run.config, pathlib.Path(run.config.run.dir), run.progress
    epochs = progress.epochs
    summary = {
        **({"epochs": epochs, "best": max(epochs, key=lambda epoch: epoch["pass@1"])} if epochs else {}),
        "before": pass_at(progress.before),
        "after": pass_at(after),
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "rollouts": progress.num_rollouts,
        "policy_versions": progress.policy_version + 1,
        "dropped_groups": progress.num_dropped,
    }
    exported = run.save_folder(directory / EXPORT_FOLDER)
    if run.setup.trainers.is_leader:
        storage.replace(directory / SUMMARY_FILE, json.dumps(summary, indent=2).encode() + b"\n")
        write_card(exported, config, directory, progress.step, config.model.param_dtype)
        try:
            report.write_report(directory)
        except RunError as error:  # the run itself has ended well
            run.bar.note(str(error))
    return summary


def table(summary: dict[str, Any], directory: pathlib.Path) -> str:
    """The summary for people."""
    ks = [k for k in summary["after"] if k in summary["before"] and "/" not in k]
    sets = dict.fromkeys(name.rpartition("pass@")[0] for name in summary["after"])  # '' is all, 'NAME/' a held-out set
    width = 8 if len(sets) == 1 else 24
    lines = ["", " " * width + "".join(f"{k:>9}" for k in ks)]
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
    lines.append(
        f"\n{summary['steps']} steps, {summary['rollouts']:,} rollouts, {summary['seconds']:.0f} s;"
        f" curves in {directory / 'report.html'}"
    )
    return "\n".join(lines)

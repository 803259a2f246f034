"""What a run leaves at its end: the trained model, its summary, the report."""

import json
from typing import Any

from oapl_jax.io import storage
from oapl_jax.io.run_dir import EXPORT_FOLDER, SUMMARY_FILE
from oapl_jax.io.storage import SharedPath
from oapl_jax.run.run import Run
from oapl_jax.run.summary import pass_at
from oapl_jax.types import Metrics, RunError
from oapl_jax.weights.model_card import write_card


def write_results(run: Run, after: Metrics) -> dict[str, Any]:
    """Writes the model folder, the summary and the report of a run at its last step; returns the summary."""
    from oapl_jax.report import report  # matplotlib takes a second, which a start need not wait for

    config, directory, progress = run.config, run.directory, run.progress
    epochs = progress.epochs
    summary = {
        **({"epochs": epochs} if epochs else {}),
        **({"best": max(epochs, key=lambda epoch: epoch["pass@1"])} if epochs and after else {}),
        **({"best_checkpoint": progress.best} if progress.best else {}),
        "before": pass_at(progress.before),
        "after": pass_at(after),
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "rollouts": progress.num_rollouts,
        "policy_versions": progress.policy_version + 1,
        "dropped_groups": progress.num_dropped,
        "dropped_prompts": run.setup.prompts.num_dropped,
        "dropped_held_out": sum(run.setup.held_out.dropped.values()),
    }
    ended = summary | {"planned_steps": config.run.steps}
    folder, trainers = directory / EXPORT_FOLDER, run.setup.trainers
    run.bar.note(f"writing {folder} and the report")
    if trainers.is_leader and not storage.is_local(folder):
        storage.remove(folder)  # the model of fewer steps; on a disk the new one takes its place at once
    trainers.wait()
    with storage.folder_for(folder) as exported:
        run.save_folder(exported)
        if trainers.is_leader:
            _write(directory, summary)
            write_card(exported, config, directory, progress.step, config.model.param_dtype)
    trainers.wait()  # all files are there
    if trainers.is_leader:
        try:
            report.write_report(directory)
        except RunError as error:  # the run itself has ended well
            run.bar.note(str(error))
        _write(directory, ended)  # nothing is left to do
    return ended


def _write(directory: SharedPath, summary: dict[str, Any]) -> None:
    storage.replace(directory / SUMMARY_FILE, json.dumps(summary, indent=2).encode() + b"\n")

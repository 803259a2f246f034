"""What a constant added to V* does: offline training on one log of countdown, with the V* of its groups, shifted.

    python -m experiments.value_shift --out runs/value_shift

The model and its warm start are those of ``paper.yaml``. The log has 8 responses to each of 4,096 prompts, and A*-PO
regresses onto r - V* with the model that drew them as its reference: OAPL's loss, with V* from a file. A run that is
there is not trained again.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.grid import config_path, load, warm_starts
from experiments.records import read
from experiments.runner import Runner
from oapl_jax.io import console

ROOT = pathlib.Path(__file__).parents[1]
SHIFTS = (-0.3, -0.1, 0.0, 0.1, 0.3)
BATCH, PROMPTS = 128, 128


def main(argv: list[str]) -> None:
    """Trains what is missing and prints a table in Markdown."""
    parser = argparse.ArgumentParser("python -m experiments.value_shift")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of all runs")
    out = parser.parse_args(argv).out.resolve()
    warm = next(run for run in warm_starts(load(ROOT / "experiments/paper.yaml"), out) if "countdown" in run.name)
    Runner(out, 1).run([warm])
    model = f"model.warm_start={config_path(warm, out)}"
    log = out / "log"
    _oapl_jax("generate", "countdown_generate", model, f"run.dir={log}", "generation.prompts=4096")
    print("| added to V* | pass@1 | pass@10 | pass@64 | entropy of a response, first and last tenth, nats |")
    print("|---|---|---|---|---|")
    for shift in SHIFTS:
        run, values = out / f"run{shift:+g}", out / f"values{shift:+g}"
        if not (run / "summary.json").exists():
            shift_rewards(log, values, shift)
            _oapl_jax(
                *("train", "countdown_two_round", model, f"run.dir={run}", f"objective.values={values}"),
                "objective.name=a_star_po",  # with the temperatures and the learning rate of the config
                f"offline.rounds=[{{log: {log / 'rollouts'}, epochs: 3, filter: {{min_correct: 1}}}}]",
                *(f"learner.batch_rollouts={BATCH}", f"evaluation.prompts={PROMPTS}", "evaluation.final_samples=64"),
            )
        record = read(run, BATCH, slice(PROMPTS))
        cells = [f"{record.value(f'pass@{k}', 'final'):.3f}" for k in (1, 10, 64)]
        entropies = [f"{record.value('entropy', moment):.2f}" for moment in ("start", "final")]
        print(f"| {shift:+g} | {' | '.join(cells)} | {', '.join(entropies)} |", flush=True)


def _oapl_jax(command: str, config: str, *overrides: str) -> None:
    words = [sys.executable, "-m", "oapl_jax", command, "--config", str(ROOT / f"configs/{config}.yaml"), *overrides]
    subprocess.run(words, check=True, stdout=sys.stderr)


def shift_rewards(log: pathlib.Path, target: pathlib.Path, shift: float) -> None:
    """A copy of a log with a constant added to each reward, and so to the V* of each prompt."""
    shutil.copytree(log / "rollouts", target / "rollouts", dirs_exist_ok=True)
    for path in (target / "rollouts").rglob("*.parquet"):
        table = pq.read_table(path)
        place = table.schema.get_field_index("reward")
        rewards = pa.array(np.asarray(table["reward"]) + shift, table.schema.field(place).type)
        pq.write_table(table.set_column(place, table.schema.field(place), rewards), path)


if __name__ == "__main__":
    sys.exit(console.run(main, sys.argv[1:]))

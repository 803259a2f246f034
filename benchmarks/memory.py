"""Whether the memory of trainer and samplers stays flat: thousands of steps of a tiny run, and their resident memory.

    python benchmarks/memory.py --json [--steps 10000] [--mode online|detached]
    python benchmarks/memory.py --json --model FOLDER [section.key=value ...]

The model is the toy tasks' one with random weights, a window has ten steps, and each step trains on two groups of two
short responses, so that whatever grows with steps, groups, prompts, files or versions grows quickly beside the rest.

* ``trainer_growth``, ``sampler_growth``: slope of the anonymous resident memory over the last two thirds of the steps, in
  MiB per 1,000 steps (least squares).
* ``trainer_mib``, ``sampler_mib``: at a third of the steps and at the end.

With ``--model`` it is one short online run of that model in float32, with batches of 64 rollouts of at most 192 tokens: start,
evaluation, steps, a sync and saves. Overrides change its config.

* ``expected_mib``: what ``--dry-run`` says of this config. ``ratio`` is ``peak_mib`` over it.
* ``peak_mib``: most resident memory of the run's process, mapped files included, as the kernel counts it.
* ``peaks_mib``: the same of each learner step, seen twenty times a second; step 0 is the start, with the evaluation and the
  save before step 1.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from overlap import start

from oapl_jax.io.metrics import METRICS_FILE
from sampler import ROOT, machine

DEADLINE = 7200
SAMPLE_SECONDS = 1.0
CONFIG = """
run: {dir: %s, steps: %d}
mode: %s
model: {config: %s, tokenizer: characters, scan_layers: false}
data: {task: chain, max_prompt_tokens: 12}
sampler: {group_size: 2, max_response_tokens: 2, groups_in_flight: 4, decode_steps: 1}
learner: {batch_rollouts: 4, learning_rate: 1.0e-5}
objective: {beta2: 0.1}
window: {sync_every: 10, parity_tolerance: 1.0}
checkpoint: {every: 1000}
evaluation: {every: 0, prompts: 4, final_samples: 1}
"""
MODEL_SAMPLE_SECONDS = 0.05
MODEL_CONFIG = """
run: {dir: %s, steps: 4}
model: {path: %s, remat: layer}
data: {task: countdown, max_prompt_tokens: 96}
sampler: {group_size: 8, max_response_tokens: 96, groups_in_flight: 8}
learner: {batch_rollouts: 64, micro_batch_rows: 4, learning_rate: 1.0e-6}
objective: {beta2: 0.1}
window: {sync_every: 2, parity_tolerance: 0.01}
checkpoint: {every: 2}
evaluation: {every: 2, prompts: 8, samples: 1, final_samples: 1}
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--steps", type=int, default=10_000, help="learner steps")
    parser.add_argument("--mode", choices=["online", "detached"], help="default: both, one after the other")
    parser.add_argument(
        "--model", type=pathlib.Path, metavar="FOLDER", help="peak of a short run of this model instead"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="with --model: of the run's config")
    arguments = parser.parse_args(argv)
    if arguments.model:
        peaks = watch_peaks(arguments.model.absolute(), arguments.overrides)
        if arguments.json:
            print(json.dumps(peaks | {"model": arguments.model.name, "machine": machine(1)}, indent=2))
        return
    modes = [arguments.mode] if arguments.mode else ["online", "detached"]
    result: dict[str, Any] = {mode: watch(mode, arguments.steps) for mode in modes}
    if arguments.json:
        print(json.dumps(result | {"steps": arguments.steps, "machine": machine(1)}, indent=2))


def watch(mode: str, steps: int) -> dict[str, Any]:
    """Makes a run and polls the memory of its processes once a second."""
    with tempfile.TemporaryDirectory(prefix="oapl-memory-") as folder:
        run_dir, config = pathlib.Path(folder, "run"), pathlib.Path(folder, "config.yaml")
        config.write_text(CONFIG % (run_dir, steps, mode, ROOT / "configs/toy_qwen3.json"))
        processes = {"trainer": start(["oapl_jax.train", "--config", str(config)], None)}
        if mode == "detached":
            processes["sampler"] = start(["oapl_jax", "sample", "--run", str(run_dir)], None)
        try:
            samples = observe(processes, run_dir / METRICS_FILE)
        finally:
            for process in processes.values():
                process.kill()
    result: dict[str, Any] = {}
    for name, points in samples.items():
        late = np.array([point for point in points if steps / 3 <= point[0] < steps])  # the export is not counted
        result[f"{name}_growth"] = round(float(np.polyfit(late[:, 0], late[:, 1], 1)[0] * 1000), 3)
        result[f"{name}_mib"] = [round(late[0, 1], 1), round(late[-1, 1], 1)]
    return result


def watch_peaks(model: pathlib.Path, overrides: list[str]) -> dict[str, Any]:
    """Asks what a run will take, makes it, and follows its resident memory."""
    with tempfile.TemporaryDirectory(prefix="oapl-memory-") as folder:
        run_dir, config = pathlib.Path(folder, "run"), pathlib.Path(folder, "config.yaml")
        config.write_text(MODEL_CONFIG % (run_dir, model))
        words = ["oapl_jax.train", "--config", str(config), "logging.progress=false", *overrides]
        expected = expected_mib(start([*words, "--dry-run"], None).communicate(timeout=DEADLINE)[0])
        process = start(words, None)
        peaks: dict[int, float] = {}
        peak, end = 0.0, time.monotonic() + DEADLINE
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    raise TimeoutError(f"the run did not end within {DEADLINE} s; peaks of its steps: {peaks}")
                time.sleep(MODEL_SAMPLE_SECONDS)
                step = last_step(run_dir / METRICS_FILE)
                peaks[step] = max(peaks.get(step, 0.0), resident_mib(process.pid, "VmRSS") or 0.0)
                peak = resident_mib(process.pid, "VmHWM") or peak
        finally:
            process.kill()
        output, _ = process.communicate(timeout=60)
        if process.returncode:
            raise RuntimeError(f"{process.args}: exit code {process.returncode}\n{output[-3000:]}")
    return {
        "expected_mib": round(expected),
        "peak_mib": round(peak),
        "ratio": round(peak / expected, 3),
        "peaks_mib": {step: round(mib) for step, mib in peaks.items()},
    }


def expected_mib(plan: str) -> float:
    """The peak of the process in the output of ``--dry-run``."""
    found = re.search(r"([\d.]+) ([KMG]iB) of the process", plan)
    if found is None:
        raise RuntimeError(f"--dry-run does not say what the process will take:\n{plan[-3000:]}")
    return float(found[1]) * {"KiB": 2**-10, "MiB": 1, "GiB": 2**10}[found[2]]


def observe(processes: dict[str, subprocess.Popen[str]], metrics: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """Pairs of learner step and MiB of each process, until the trainer ends."""
    samples: dict[str, list[tuple[int, float]]] = {name: [] for name in processes}
    end, step = time.monotonic() + DEADLINE, 0
    while processes["trainer"].poll() is None and not any(process.poll() for process in processes.values()):
        if time.monotonic() > end:
            raise TimeoutError(f"the run did not end within {DEADLINE} s; it is at step {step}")
        time.sleep(SAMPLE_SECONDS)
        step = last_step(metrics)
        for name, process in processes.items():
            if step and (mib := resident_mib(process.pid)) is not None:
                samples[name].append((step, mib))
    for process in sorted(processes.values(), key=lambda process: not process.poll()):  # those that failed first
        output, _ = process.communicate(timeout=60)
        if process.returncode:
            raise RuntimeError(f"{process.args}: exit code {process.returncode}\n{output[-3000:]}")
    return samples


def last_step(metrics: pathlib.Path) -> int:
    """The last whole line's."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 10_000))
        lines = [line for line in file.read().split(b"\n")[1:-1] if line]
    return json.loads(lines[-1])["step"] if lines else 0


def resident_mib(pid: int, kind: str = "RssAnon") -> float | None:
    """Anonymous memory, not the files that are mapped; or another line of the kernel's account."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in status.splitlines() if line.startswith(kind)]
    return sizes[0] / 1024 if sizes else None


if __name__ == "__main__":
    main(sys.argv[1:])

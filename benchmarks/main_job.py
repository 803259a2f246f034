"""What an online run costs and learns: a run in a temporary run directory, alone or in turns with a peer's trainer.

    PYTHONPATH=. python benchmarks/main_job.py --json --config configs/quickstart.yaml run.steps=60 window.sync_every=20
    PYTHONPATH=. python benchmarks/main_job.py --json --config configs/sums_smollm2.yaml --peer trl run.steps=10 window.sync_every=5

Steps of the first window hold the compilations and are not measured. There is no evaluation unless overrides ask for
one: the sampler fills the buffer while it goes on.

With ``--peer trl`` TRL's GRPOTrainer does the same job, with ``--peer tunix`` google-tunix's GRPOLearner: the same
weights, prompts in the same order, rollouts, limits, precision, optimizer and reward, each with its own loss. The job is
a built-in task with one stop string, or, with TRL, math problems without one: rewards that the peer can import. Each turn
is a process of ours and then one of the peer, with another seed. What counts is CPU seconds, those of grading processes
included:

* ``cpu_seconds_per_step``, ``peak_mib``: of the median turn.
* ``reward_after_rollouts``: the mean reward of a quarter of the run's rollouts, those before this number.
* ``reward_after_cpu_seconds``: the same after as many steps as these CPU seconds pay for.

``--profile`` holds sampling and training apart by a lock, so that each CPU second of the process belongs to one of them,
and says where they go. The peers have requirements of their own:

    python3 -m venv ../trl && ../trl/bin/pip install torch==2.13.0 trl==1.16.0
    python3 -m venv ../tunix && ../tunix/bin/pip install google-tunix==0.1.7
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from sampler import ENVIRONMENT, ROOT, Contender, bind_to_cores, machine, versions

POLL_SECONDS = 0.02
TURN_SECONDS = 7200
"""Deadline of a run."""
INSTALL = {
    "trl": "python3 -m venv ../trl && ../trl/bin/pip install torch==2.13.0 trl==1.16.0 (or --peer-python PATH)",
    "tunix": "python3 -m venv ../tunix && ../tunix/bin/pip install google-tunix==0.1.7 (or --peer-python PATH)",
}
PROGRAMS = {"trl": "peer_trl.py", "tunix": "peer_tunix_main.py"}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of oapl_jax.train")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--profile", action="store_true", help="say which part of the program uses the CPU seconds")
    parser.add_argument("--peer", choices=sorted(INSTALL), help="trainer that does the same job, in turns with ours")
    parser.add_argument("--peer-python", metavar="PATH", help="its interpreter; default: ../PEER/bin/python")
    parser.add_argument(
        "--peer-setting",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one of its own, instead of the fastest",
    )
    parser.add_argument("--turns", type=int, default=1, help="runs of each")
    parser.add_argument("--threads", type=int, default=2, help="cores that each is bound to")
    parser.add_argument("--child", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    bind_to_cores(arguments.threads)
    overrides = ["evaluation.prompts=0", *arguments.overrides]
    if arguments.child:
        arguments.child.write_text(json.dumps(measure(arguments.config, overrides, arguments.profile)))
        return
    result = {"config": arguments.config, "overrides": overrides, **compare(arguments, overrides)}
    result |= {"machine": machine(arguments.threads) | {"flops_per_cpu_second": matrix_rate()}}
    if arguments.json:
        print(json.dumps(result, indent=2))


# One of our runs, in a process of its own.


def measure(path: str, overrides: list[str], is_profiled: bool) -> dict[str, Any]:
    """Runs the config and returns its figures.

    Raises:
        ValueError: the config is wrong, or has no step after its first window.
    """
    from oapl_jax import train
    from oapl_jax.io.metrics import METRICS_FILE, read_metrics

    with tempfile.TemporaryDirectory(prefix="oapl-benchmark-") as folder:
        config = load(path, [*overrides, f"run.dir={folder}/run"])
        metrics_file = pathlib.Path(folder, "run", METRICS_FILE)
        parts = Parts() if is_profiled else None
        clock = CpuClock(metrics_file, config.run.steps)
        clock.start()
        summary = train.run(config)
        clock.join()
        lines = [line for line in read_metrics(metrics_file) if line["step"] > 0]
    steps = [(clock.seconds[line["step"]], line["rollouts/reward"]) for line in lines]
    measured = [line for line in lines if line["step"] > config.window.sync_every]
    return {
        **figures(steps, config.window.sync_every, config.learner.batch_rollouts),
        **rates(measured, config),
        "seconds_in_all": summary["seconds"],
        "dropped_groups": summary["dropped_groups"],
        "profile": parts and parts.shares(),
        "versions": versions("jax", "jaxlib", "numpy"),
    }


def load(path: str, overrides: list[str]) -> Any:
    """The config.

    Raises:
        ValueError: it is wrong, or has no step after its first window.
    """
    from oapl_jax.build.checks import CHECKS
    from oapl_jax.config import config_file
    from oapl_jax.config.commands import TrainConfig

    config = config_file.load(TrainConfig, path, overrides, CHECKS)
    if config.run.steps <= config.window.sync_every:
        raise ValueError(
            f"run.steps={config.run.steps} ends in the first window of {config.window.sync_every} steps, which is not"
            " measured; raise run.steps or lower window.sync_every"
        )
    return config


def figures(steps: list[tuple[float, float]], num_first: int, batch_rollouts: int) -> dict[str, Any]:
    """What is said of every trainer.

    Args:
        steps: CPU seconds of the process at the end of each step, and mean reward of its rollouts.
        num_first: steps that are not measured.
        batch_rollouts: rollouts of a step.
    """
    return {
        "cpu_seconds_per_step": (steps[-1][0] - steps[num_first - 1][0]) / (len(steps) - num_first),
        "cpu_seconds_in_all": cpu_seconds(),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "batch_rollouts": batch_rollouts,
        "measured_steps": len(steps) - num_first,
        "steps": [{"cpu_seconds": round(cpu, 2), "reward": round(reward, 4)} for cpu, reward in steps],
    }


class CpuClock(threading.Thread):
    """Notes the CPU seconds used when the metrics of each step have been written."""

    def __init__(self, metrics_file: pathlib.Path, num_steps: int):
        super().__init__(daemon=True)
        self._file, self._num_steps = metrics_file, num_steps
        self._stopped = threading.Event()
        self.seconds: dict[int, float] = {}

    def run(self) -> None:
        """Looks until all is noted."""
        while len(self.seconds) < self._num_steps and not self._stopped.wait(POLL_SECONDS):
            self._look()

    def join(self, timeout: float | None = None) -> None:
        """Ends the thread after a last look."""
        self._stopped.set()
        super().join(timeout)
        self._look()

    def _look(self) -> None:
        # The first line is of step 0, before training.
        done = self._file.read_bytes().count(b"\n") - 1 if self._file.exists() else -1
        for step in range(len(self.seconds) + 1, min(done, self._num_steps) + 1):
            self.seconds[step] = cpu_seconds()


def cpu_seconds() -> float:
    """User and system time of this process, and of those that it has started, grading processes for example."""
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    live = sum(_ticks(pathlib.Path(f"/proc/{pid}/stat")) for pid in _children(os.getpid()))
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + live / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # a thread that has ended
            continue
    return found + [child for parent in found for child in _children(parent)]


def _ticks(stat: pathlib.Path) -> int:
    try:
        cells = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, cells[11:15]))  # its own, and that of its children that have ended


class Parts:
    """CPU seconds of the parts of a run. A lock holds them apart, and nothing is left running when one ends."""

    def __init__(self):
        import jax

        from oapl_jax.run.run import Run
        from oapl_jax.sampler.engine import Engine
        from oapl_jax.sampler.sampler import JaxSampler

        jax.config.update("jax_cpu_enable_async_dispatch", False)
        self._lock = threading.RLock()
        self._seconds: collections.Counter[str] = collections.Counter()
        self._above: list[str] = []
        for kind, method, name in (
            (JaxSampler, "set_weights", "sampling: weights"),
            (JaxSampler, "step", "sampling: schedule"),
            (Engine, "prepare", "sampling: weights"),
            (Engine, "prefill", "sampling: prefill"),
            (Engine, "insert", "sampling: insert"),
            (Engine, "generate", "sampling: decode"),
            (Run, "train", "train step"),
            (Run, "sync", "sync"),
            (Run, "save", "save"),
        ):
            setattr(kind, method, self._timed(name, getattr(kind, method)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self._above.append(name)
                begin = time.process_time()
                try:
                    return function(*arguments, **options)
                finally:
                    used = time.process_time() - begin
                    self._above.pop()
                    self._seconds[name] += used
                    if self._above:  # a part of another part is not counted twice
                        self._seconds[self._above[-1]] -= used

        return timed

    def shares(self) -> dict[str, float]:
        """CPU seconds from the start of the process to now, by part."""
        rest = time.process_time() - sum(self._seconds.values())
        return {**{name: round(seconds, 2) for name, seconds in self._seconds.most_common()}, "other": round(rest, 2)}


def rates(lines: list[dict[str, Any]], config: Any) -> dict[str, float]:
    """Medians and shares over the measured steps."""
    # An evaluation, where there is one, is part of learner/seconds but not of the step's work.
    seconds = [line["learner/seconds"] - line.get("evaluation/seconds", 0.0) for line in lines]
    tokens = sum(line["learner/tokens_per_second"] * line["learner/seconds"] for line in lines)
    idle = sum(line["sampler/idle_seconds"] for line in lines) / sum(line["learner/seconds"] for line in lines)
    return {
        "seconds_per_step": statistics.median(seconds),
        "rollouts_per_second": len(lines) * config.learner.batch_rollouts / sum(seconds),
        "response_tokens_per_second": tokens / sum(seconds),
        "learner_wait_fraction": sum(line["learner/wait_seconds"] for line in lines) / sum(seconds),
        # A wait is counted in the step in which it ends, so the sum may be a little too high.
        "sampler_idle_fraction": min(idle, 1.0),
    }


# Both in turns.


def compare(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Runs ours, and the peer where one is named, in turns; the figures of both."""
    reports: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="oapl-benchmark-") as folder:
        job, out = pathlib.Path(folder, "job.json"), pathlib.Path(folder, "report.json")
        for turn in range(arguments.turns):
            seeded = [*arguments.overrides, *([f"run.seed={turn}"] if arguments.turns > 1 else [])]
            ours = [sys.executable, __file__, "--config", arguments.config, "--threads", str(arguments.threads)]
            profile = ["--profile"] if arguments.profile else []
            reports["ours"].append(run([*ours, *profile, "--child", str(out), *seeded], out))
            if arguments.peer:
                job.write_text(json.dumps(make_job(arguments, seeded)))
                python = arguments.peer_python or str(ROOT.parent / arguments.peer / "bin/python")
                if not os.access(python, os.X_OK):
                    raise SystemExit(f"{arguments.peer}: {python} is not there; {INSTALL[arguments.peer]}")
                peer = str(pathlib.Path(__file__).with_name(PROGRAMS[arguments.peer]))
                reports[arguments.peer].append(run([python, peer, str(job), str(out)], out))
    result = {name: summary(turns) for name, turns in reports.items()}
    return result | (headline(result["ours"], result[arguments.peer]) if arguments.peer else {})


def run(command: list[str], out: pathlib.Path) -> dict[str, Any]:
    """Starts a process and returns the report that it writes."""
    subprocess.run(command, check=True, timeout=TURN_SECONDS, env={**os.environ, **ENVIRONMENT}, stdout=sys.stderr)
    report = json.loads(out.read_text())
    out.unlink()
    print(
        f"{report['cpu_seconds_per_step']:.2f} CPU s a step, {report['peak_mib']:.0f} MiB: {command[1:3]}", flush=True
    )
    return report


def make_job(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """What a peer is to do, in numbers and texts."""
    from oapl_jax.data import tokenizer as tokenizers
    from oapl_jax.data.prompts import load_prompts

    config = load(arguments.config, overrides)
    num_stops = len(config.sampler.stop_strings)
    is_task = config.data.task is not None and num_stops == 1
    is_math = arguments.peer == "trl" and config.reward.functions == {"math": 1.0} and not num_stops
    if config.model.path is None or not (is_task or is_math):
        raise SystemExit(
            "--peer: needs model.path, and data.task with one stop string (or, with trl, math without one)"
        )
    tokenizer = tokenizers.load(config.model.tokenizer, config.model.path)
    prompts = load_prompts(config.data, tokenizer, config.run.seed)
    groups = config.learner.batch_rollouts // config.sampler.group_size
    learner, sampler = config.learner, config.sampler
    return {
        "model": config.model.path,
        "dtype": config.model.compute_dtype,
        "task": config.data.task,
        "prompts": [
            {"text": prompt.text, "token_ids": prompt.token_ids.tolist(), "gold": prompt.answer}
            for prompt in (prompts[position] for position in range(config.run.steps * groups))
        ],
        "group_size": sampler.group_size,
        "groups": groups,
        "steps": config.run.steps,
        "first_steps": config.window.sync_every,
        "max_response_tokens": sampler.max_response_tokens,
        "stop": next(iter(sampler.stop_strings), None),
        "temperature": sampler.temperature,
        "seed": config.run.seed,
        "threads": arguments.threads,
        "optimizer": {
            "learning_rate": learner.learning_rate,
            "adam_beta1": learner.adam_b1,
            "adam_beta2": learner.adam_b2,
            "weight_decay": learner.weight_decay,
            "max_grad_norm": learner.clip_norm,
        },
        "settings": dict(map(_setting, arguments.peer_setting)),
    }


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the turn with the median CPU seconds, and those of all turns."""
    ranked = sorted(turns, key=lambda turn: turn["cpu_seconds_per_step"])
    return ranked[len(ranked) // 2] | {"turns": [turn["cpu_seconds_per_step"] for turn in turns]}


def headline(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Ratios, the peer's over ours, and rewards, ours and the peer's, after the same rollouts and CPU seconds."""
    num_steps, batch = len(ours["steps"]), ours["batch_rollouts"]
    marks = sorted({num_steps // 4, num_steps // 2, num_steps} - {0})
    prices = [report["cpu_seconds_per_step"] for report in (ours, peer)]

    def reward(report: dict[str, Any], step: int) -> float | None:
        last = report["steps"][max(0, step - max(1, num_steps // 4)) : step]
        return round(statistics.mean(line["reward"] for line in last), 3) if last else None

    paid = [mark * min(prices) for mark in marks]
    return {
        "cpu_ratio": prices[1] / prices[0],
        "memory_ratio": peer["peak_mib"] / ours["peak_mib"],
        "reward_after_rollouts": {mark * batch: [reward(ours, mark), reward(peer, mark)] for mark in marks},
        "reward_after_cpu_seconds": {
            round(seconds): [
                reward(report, round(seconds / price)) for report, price in zip((ours, peer), prices, strict=True)
            ]
            for seconds in paid
        },
    }


def matrix_rate() -> float:
    """Floating-point operations of a matrix product that this machine makes in a CPU second."""
    contender = Contender("peak", [sys.executable, str(ROOT / "benchmarks/sampler.py"), "--child", "peak", "uniform"])
    try:
        return contender.report()["flops_per_cpu_second"]
    finally:
        contender.close()


if __name__ == "__main__":
    main(sys.argv[1:])

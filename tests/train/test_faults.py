"""Random faults: the run ends by itself, as if nothing had happened, bit for bit."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from oapl_jax import train
from oapl_jax.rollouts.audit import audit
from runs import ROOT, make_config, read_lines, weights, write_config

pytestmark = pytest.mark.slow

DEADLINE, LEASE_SECONDS, QUOTA_SECONDS = 900.0, 5.0, 1.5
EVENTS = {"kill trainer": 3, "kill sampler": 6, "stop sampler": 6, "join": 5, "torn file": 6, "quota": 4}


class Chaos:
    """A trainer and its samplers, started again when they die, and what is done to them: ``events``, times by name."""

    def __init__(self, directory, config_path, steps, events, num_samplers):
        self.directory, self.config_path, self.steps, self.rng = directory, config_path, steps, random.Random(0)
        self.events, self.num_samplers = events, num_samplers
        self.logs = directory.parent / "logs"
        self.logs.mkdir()
        self.trainer, self.num_trainers = self.start_trainer(), 1
        self.samplers = [self.start_sampler() for _ in range(num_samplers)]
        self.later: list[tuple[float, object]] = []
        self.done: list[str] = []

    def start(self, command, *options):
        """Output goes to a file: a pipe that nobody reads fills up and stops its process."""
        with (self.logs / f"{len(list(self.logs.iterdir())):03d}-{command}").open("w") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "oapl_jax", command, *options],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def start_trainer(self):
        return self.start("train", "--config", str(self.config_path))

    def start_sampler(self):
        return self.start("sample", "--run", str(self.directory), "--mesh", "data=1")

    def output(self):
        return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in sorted(self.logs.iterdir()))

    def run(self):
        names = [name for name, times in self.events.items() for _ in range(times)]
        self.rng.shuffle(names)
        places = sorted(self.rng.randrange(1, self.steps - 5) for _ in names)
        end = time.monotonic() + DEADLINE
        while True:
            assert time.monotonic() < end, (self.done, self.output())
            now = time.monotonic()
            for item in [item for item in self.later if item[0] <= now]:
                self.later.remove(item)
                item[1]()
            if places and len(read_lines(self.directory / "batches.jsonl")) >= places[0]:
                places.pop(0)
                self.cause(names.pop())
            if self.trainer.poll() is not None:
                if self.trainer.returncode == 0:
                    return
                assert self.trainer.returncode in (1, -signal.SIGKILL), self.output()
                self.trainer, self.num_trainers = self.start_trainer(), self.num_trainers + 1
            self.samplers = [sampler for sampler in self.samplers if sampler.poll() is None]
            while len(self.samplers) < self.num_samplers:
                self.samplers.append(self.start_sampler())
            time.sleep(0.02)

    def cause(self, name):
        sampler = self.rng.choice(self.samplers)
        if name == "kill trainer":
            self.trainer.kill()
        elif name == "kill sampler":
            sampler.kill()
        elif name == "stop sampler":
            sampler.send_signal(signal.SIGSTOP)
            seconds = self.rng.choice([0.5, 1.5 * LEASE_SECONDS])
            self.later.append((time.monotonic() + seconds, lambda: sampler.send_signal(signal.SIGCONT)))
        elif name == "join" and len(self.samplers) < self.num_samplers + 2:
            self.samplers.append(self.start_sampler())
        elif name == "torn file":
            self.tear()
        elif name == "quota":
            hurt = self.rng.choice([sampler, sampler, self.trainer])
            resource.prlimit(hurt.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            self.later.append((time.monotonic() + QUOTA_SECONDS, lambda: self.lift(hurt)))
        self.done.append(name)

    def lift(self, process):
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def tear(self):
        """Half a file where the next shard of the newest window belongs, as a dying disk leaves it."""
        folder = max((self.directory / "rollouts").iterdir())
        parts = sorted(folder.glob("part-*.parquet"))
        if parts:
            torn = folder / f"part-{int(parts[-1].stem[5:]) + 1:06d}.parquet"
            if not torn.exists():
                torn.write_bytes(parts[-1].read_bytes()[:300])

    def end(self):
        for process in [*self.samplers, self.trainer]:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


def options(steps):
    return {
        "run": {"steps": steps},
        "window": {"sync_every": 20, "shard_groups": 4, "lease_seconds": LEASE_SECONDS, "deadline": 300.0},
        "checkpoint": {"every": 10, "keep": 50},
        "evaluation": {"every": 0},
    }


@pytest.mark.timeout(1800)  # on a busy machine
@pytest.mark.parametrize(
    ("steps", "events", "num_samplers"),
    [
        pytest.param(40, dict.fromkeys(EVENTS, 1), 2, id="one-of-each"),
        pytest.param(120, EVENTS, 3, id="thirty", marks=pytest.mark.long),
    ],
)
def test_faults_change_nothing(tmp_path, monkeypatch, steps, events, num_samplers):
    # A copy of the compiled programs: a quota would leave torn files among those of the other tests.
    programs = shutil.copytree(os.environ["JAX_COMPILATION_CACHE_DIR"], tmp_path / "programs")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
    directory = tmp_path / "run"
    config = make_config(directory, mode="detached", **options(steps))
    chaos = Chaos(directory, write_config(tmp_path / "config.yaml", config), steps, events, num_samplers)
    try:
        chaos.run()
    finally:
        chaos.end()
    assert sorted(chaos.done) == sorted(name for name, times in events.items() for _ in range(times))
    assert chaos.num_trainers > events["kill trainer"], "killed, and perhaps stopped by a full disk"
    # A file that was torn when its window had ended may lie there still, read by nobody.
    expected = f"{steps} steps, {steps // 20} windows, {4 * steps} groups, {32 * steps} rollouts: all as recorded"
    assert audit(directory).startswith(expected)

    replay = tmp_path / "replay"
    shutil.copytree(directory, replay)
    for name in ("config.yaml", "metrics.jsonl"):
        (replay / name).unlink()
    for path in (replay / "checkpoints").iterdir():
        if path.name != "0":
            shutil.rmtree(path)
    train.run(make_config(replay, mode="detached", **options(steps)))
    calm = tmp_path / "calm"
    online = options(steps)
    del online["window"]["shard_groups"]
    train.run(make_config(calm, **online))
    for other in (replay, calm):
        for name, tensor in weights(other).items():
            np.testing.assert_array_equal(tensor, weights(directory)[name], err_msg=f"{other.name}: {name}")

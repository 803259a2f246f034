"""Detached samplers on a real Ray cluster of this machine: one actor is killed, one is added while the run goes on."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from oapl_jax.rollouts.audit import audit
from train.runs import ROOT, finish, make_config, read_lines, start, write_config

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]

MODEL = {"path": None, "config": str(ROOT / "configs/toy_qwen3.json"), "tokenizer": "characters"}
LAUNCHER = str(ROOT / "launch/ray_samplers.py")


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster with one node of four pretended CPUs."""
    pytest.importorskip("ray")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["RAY_worker_niceness"] = "0"  # else the actors starve beside other work
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    options = [
        "--head",
        f"--port={port}",
        "--num-cpus=4",
        "--include-dashboard=false",
        "--disable-usage-stats",
        "--block",
    ]
    options += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    node = subprocess.Popen([*ray, "start", *options], env=environment, start_new_session=True)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(node.pid, signal.SIGKILL)  # with all processes of the cluster
        node.wait()


def wait_for(is_so, process, seconds=600):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.2)


def workers_of(run_dir):
    """Ids of the sampling processes of a run, each with that of the actor that started it."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.MULTILINE)
        except OSError:  # it has ended
            continue
        if b"sample" in words and str(run_dir).encode() in words and LAUNCHER.encode() not in words and parent:
            found[int(folder.name)] = int(parent[1])
    return found


def test_actors_sample_a_run_to_its_end_although_one_is_killed_and_one_is_added(cluster, tmp_path):
    directory = tmp_path / "run"
    config = make_config(
        directory, mode="detached", model=MODEL, window={"shard_groups": 2, "lease_seconds": 600.0, "deadline": 1800.0}
    )
    trainer = start(write_config(tmp_path / "config.yaml", config))
    words = [sys.executable, LAUNCHER, "start", "--name", "samplers", "--address", cluster, "--num", "2"]
    actors = subprocess.Popen([*words, "--", "sample", "--run", str(directory), "--mesh", "data=1"], cwd=ROOT)
    try:
        wait_for(lambda: len(workers_of(directory)) == 2, actors)
        wait_for(lambda: read_lines(directory / "metrics.jsonl"), actors)
        trainer.send_signal(
            signal.SIGSTOP
        )  # so that the run is not over before all of this has happened; shorter than a lease
        process, actor = next(iter(workers_of(directory).items()))
        os.kill(actor, signal.SIGKILL)
        wait_for(lambda: process not in workers_of(directory), actors)  # it ends with its actor
        wait_for(lambda: len(workers_of(directory)) == 2, actors)
        scale = [sys.executable, LAUNCHER, "scale", "--name", "samplers", "--address", cluster, "3"]
        subprocess.run(scale, check=True, cwd=ROOT)
        wait_for(lambda: len(workers_of(directory)) == 3, actors)
        trainer.send_signal(signal.SIGCONT)
        code, output = finish(trainer, timeout=1200)
        assert code == 0, output
        assert actors.wait(300) == 0
        assert not workers_of(directory)
    finally:
        trainer.kill()
        actors.terminate()
        actors.wait(60)
    assert audit(directory) == "10 steps, 3 windows, 40 groups, 320 rollouts: all as recorded"


def test_a_process_that_cannot_work_ends_the_others_with_its_reason(cluster, tmp_path):
    words = [sys.executable, LAUNCHER, "start", "--name", "broken", "--address", cluster, "--num", "2"]
    done = subprocess.run(
        [*words, "--", "sample", "--run", str(tmp_path / "absent"), "--wait", "1"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "ended with 1: oapl-jax sample --run" in done.stderr

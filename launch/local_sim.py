"""Runs the pods of a rendered JobSet as processes of this machine, and restarts them by the JobSet's own rules.

What Kubernetes does besides is left out: images, networks, the grader's isolation. Start it by ``launch/local_sim.sh``.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import bundle
import manifests
import render
from oapl_jax.config.config_file import SHIPPED

ROOT = pathlib.Path(__file__).parents[1]
NAME = "simulation"
OPTIONS = [
    *("--config", "quickstart", "--name", NAME, "--image", "local:simulation", "--pvc", "simulated"),
    *("--topology", "cpu-2", "--samplers", "2", "--sampler-topology", "cpu-1"),
    *(
        "mode=detached",
        "model.warm_start=null",
        f"model.config={SHIPPED / 'toy_qwen3.json'}",
        "model.tokenizer=characters",
    ),
    *("mesh.trainer=fsdp=2", f"run.dir=runs/{NAME}", "run.steps=12", "window.sync_every=4", "checkpoint.every=4"),
    *("learner.batch_rollouts=32", "window.lease_seconds=5", "evaluation.prompts=0", "run.tracker=null"),
]
DEADLINE = 1800.0
"""Seconds for each of the things that are waited for."""


@dataclasses.dataclass
class Pod:
    """A process in the place of a pod."""

    role: str
    index: int
    process: subprocess.Popen[bytes]

    @property
    def exit_code(self) -> int | None:
        """As Kubernetes counts it: above 128 for a signal; None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code


class Cluster:
    """The pods of one JobSet; ``folder`` has the ConfigMap, the storage and the logs."""

    def __init__(self, job: manifests.Job, folder: pathlib.Path):
        self.folder = folder
        self.jobs = {
            one["name"]: one["template"]["spec"] for one in manifests.render(job)[-1]["spec"]["replicatedJobs"]
        }
        self.pods: list[Pod] = []
        self.num_restarts = 0
        self.run = folder / "data/runs" / NAME
        here = bundle.Bundle(job.config, job.bundle.at, {
            path: content.replace(b"/config/", f"{folder}/config/".encode()) for path, content in job.bundle.files.items()
        })  # fmt: skip
        bundle.write(here, folder / "config")
        (folder / "data").mkdir()

    def start(self) -> None:
        """Starts all pods."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.pods = [self._start(role, i) for role, job in self.jobs.items() for i in range(job["parallelism"])]

    def _start(self, role: str, index: int) -> Pod:
        (container,) = self.jobs[role]["template"]["spec"]["containers"]
        replaced = {
            "python": sys.executable,
            f"{manifests.CONFIG_FOLDER}/{bundle.CONFIG_FILE}": str(self.folder / "config" / bundle.CONFIG_FILE),
            f"{NAME}-trainer-0-0.{NAME}:{manifests.COORDINATOR_PORT}": f"127.0.0.1:{self.port}",
            "$(JOB_COMPLETION_INDEX)": str(index),
        }
        given = {one["name"]: one["value"] for one in container["env"]}
        environment = os.environ | given | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
        with (self.folder / f"{role}-{index}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(replaced.get(word, word)) for word in container["command"]],
                cwd=self.folder / "data", env=environment, stdout=log, stderr=log,
            )  # fmt: skip
        return Pod(role, index, process)

    def action(self, role: str, exit_code: int) -> str:
        """What the Job's rules say of a pod that has ended; ``Count`` where none matches."""
        for rule in self.jobs[role]["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes")
            if codes and (exit_code in codes["values"]) == (codes["operator"] == "In"):
                return rule["action"]
        return "Count"

    def control(self) -> None:
        """Looks at the pods once: replaces samplers, and restarts all where a trainer asks for it.

        Raises:
            RuntimeError: a pod has ended as one with a bug does.
        """
        for pod in list(self.pods):
            if not (code := pod.exit_code):
                continue
            if (action := self.action(pod.role, code)) == "FailJob":
                log = (self.folder / f"{pod.role}-{pod.index}.log").read_text()
                raise RuntimeError(f"{pod.role} {pod.index} ended with {code}:\n{log[-4000:]}")
            print(f"{pod.role} {pod.index} ended with {code}: {action}", flush=True)
            if pod.role == "trainer":
                self.stop()
                self.num_restarts += 1
                self.start()
                return
            self.pods[self.pods.index(pod)] = self._start(pod.role, pod.index)

    def wait(self, what: str, is_so: Callable[[], bool]) -> None:
        """Controls the pods until something is so."""
        end = time.monotonic() + DEADLINE
        while not is_so():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {DEADLINE:g} s: {what}")
            self.control()
            time.sleep(0.2)

    def step(self) -> int:
        """The newest step of the run; 0 before the first."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def signal(self, role: str, index: int, number: signal.Signals) -> None:
        """Sends a signal to a pod."""
        (pod,) = [pod for pod in self.pods if (pod.role, pod.index) == (role, index)]
        print(f"step {self.step()}: {role} {index} gets {number.name}", flush=True)
        pod.process.send_signal(number)

    def stop(self) -> None:
        """SIGTERM to all, and SIGKILL after the time that a pod has."""
        for pod in self.pods:
            pod.process.terminate()
        for pod in self.pods:
            try:
                pod.process.wait(self.jobs[pod.role]["template"]["spec"]["terminationGracePeriodSeconds"])
            except subprocess.TimeoutExpired:
                pod.process.kill()
                pod.process.wait()


def simulate(job: manifests.Job, folder: pathlib.Path) -> None:
    """The whole story; raises where it does not end as it should."""
    cluster = Cluster(job, folder)
    try:
        cluster.start()
        cluster.wait("the third step", lambda: cluster.step() >= 3)
        cluster.signal("sampler", 0, signal.SIGKILL)
        cluster.wait("two more steps", lambda: cluster.step() >= 5)
        cluster.signal("trainer", 1, signal.SIGTERM)
        cluster.wait("the restart", lambda: cluster.num_restarts == 1)
        cluster.wait("the end of all pods", lambda: all(pod.exit_code == 0 for pod in cluster.pods))
    finally:
        cluster.stop()
    words = [sys.executable, "-m", "oapl_jax", "audit", str(cluster.run)]
    subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="launch/local_sim.sh", description="The pods of a JobSet as local processes.")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/local_sim"), help="new folder; default %(default)s"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the toy run's config")
    arguments = parser.parse_intermixed_args(argv)
    folder = arguments.out.absolute()
    folder.mkdir(parents=True)
    job, _ = render.make_job([*OPTIONS, *arguments.overrides])
    simulate(job, folder)


if __name__ == "__main__":
    main(sys.argv[1:])

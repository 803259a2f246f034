"""Renders the Kubernetes JobSet that runs a config on a GKE TPU slice, and applies it.

    python launch/render.py --config configs/x.yaml --topology v5p-64 --image IMG --name N [--dry-run] ...

Needs PyYAML and, to submit, kubectl with a context of a cluster that has JobSet (v0.11 or newer).
Every pod runs the same command; JAX finds the other hosts through what GKE injects. How a run ends:

    exit code 0    the job is done
    exit code 42   saved on request (SIGTERM): the JobSet starts all pods again, and they resume
    above 128      killed by a signal: the same
    preemption     the same, without counting against --max-restarts
    anything else  a bug or a bad config: the JobSet fails at once, for a restart would not help
"""

import argparse
import dataclasses
import math
import re
import shlex
import signal
import subprocess
import sys
from typing import Any

import yaml

EXIT_SAVED = 42
"""Exit code of a command that SIGTERM stopped, with everything saved."""
EXIT_BAD_ARGUMENTS = 2
# Exit codes above 128 say "killed by signal CODE - 128": stopped, out of memory, a peer that died (abort).
_SIGNALS = (signal.SIGINT, signal.SIGABRT, signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
RESTARTED_EXITS = (EXIT_SAVED, *sorted(128 + number for number in _SIGNALS))
# A pod's host name is NAME-slice-SLICE-HOST, at most 63 characters; 14 are left for the suffix.
LONGEST_NAME = 49


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of TPUs as GKE sells it."""

    accelerator: str
    """Value of the node label cloud.google.com/gke-tpu-accelerator."""
    units_per_chip: int
    """What N counts in "v5p-N": TensorCores (2 a chip) or chips."""
    dimensions: int


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", units_per_chip=2, dimensions=3),
    "v5e": Generation("tpu-v5-lite-podslice", units_per_chip=1, dimensions=2),
    "v5p": Generation("tpu-v5p-slice", units_per_chip=2, dimensions=3),
    "v6e": Generation("tpu-v6e-slice", units_per_chip=1, dimensions=2),
    "tpu7x": Generation("tpu7x", units_per_chip=2, dimensions=3),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v7x": "tpu7x", "7x": "tpu7x"}
CHIPS_PER_HOST = 4
# The TPU runtime's: between hosts, between slices, usage metrics.
_TPU_PORTS = (8471, 8080, 8431)
# The shape that a plain chip count stands for; other shapes are written out, e.g. v5p-4x4x12.
SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: (
        "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice: chips wired to one another."""

    generation: str
    topology: str
    """As GKE writes it, e.g. ``2x4x4``."""

    @property
    def chips(self) -> int:
        """Chips of the whole slice."""
        return _chips(self.topology)

    @property
    def chips_per_host(self) -> int:
        """Chips of each virtual machine."""
        return min(self.chips, CHIPS_PER_HOST)

    @property
    def hosts(self) -> int:
        """Virtual machines of the slice: one pod each."""
        return self.chips // self.chips_per_host


@dataclasses.dataclass(frozen=True)
class Job:
    """What is run where."""

    name: str
    image: str
    config: str
    slice: Slice
    overrides: tuple[str, ...] = ()
    command: str = "train"
    """Of ``python -m oapl_jax``."""
    num_slices: int = 1
    spot: bool = False
    reservation: str | None = None
    queue: str | None = None
    priority: str | None = None
    namespace: str = "default"
    service_account: str | None = None
    max_restarts: int = 50
    grace_seconds: int = 60

    @property
    def argv(self) -> list[str]:
        """The program is the pod's first process, so SIGTERM reaches it without a shell in between."""
        return ["python", "-m", "oapl_jax", self.command, "--config", self.config, *self.overrides]


def parse_topology(text: str) -> Slice:
    """``v5p-64``, ``v5litepod-16``, ``v6e-4x4`` or ``tpu7x-4x4x4`` as a slice.

    Raises:
        ValueError: an unknown generation, or no standard shape with that many chips.
    """
    match = re.fullmatch(r"([a-z0-9]+)[-:]([0-9]+(?:x[0-9]+)*)", text)
    name = ALIASES.get(match[1], match[1]) if match else ""
    if not match or name not in GENERATIONS:
        raise ValueError(
            f"topology {text!r}: write GENERATION-SIZE, e.g. v5p-64 or v5p-2x4x4; generations: {', '.join(GENERATIONS)}"
        )
    generation, size = GENERATIONS[name], match[2]
    topology = size if "x" in size else _standard_shape(text, name, generation, int(size))
    if topology.count("x") + 1 != generation.dimensions:
        example = SHAPES[generation.dimensions][3]
        raise ValueError(
            f"topology {text!r}: {name} slices have {generation.dimensions} dimensions, e.g. {name}-{example}"
        )
    chips = _chips(topology)
    if chips == 0 or (chips % CHIPS_PER_HOST and chips != 1):
        raise ValueError(f"topology {text!r}: {chips} chips are not whole hosts of {CHIPS_PER_HOST}")
    return Slice(name, topology)


def render(job: Job) -> dict[str, Any]:
    """The JobSet: one replicated Job per slice, one pod per host, restarted by exit code."""
    metadata: dict[str, Any] = {
        "name": job.name,
        "namespace": job.namespace,
        "labels": {"app.kubernetes.io/name": "oapl-jax"},
        # One slice, one node pool: GKE puts all pods of a Job on the same slice.
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    if job.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = job.queue
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": 86_400,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": _failure_policy(job),
            "replicatedJobs": [{"name": "slice", "replicas": job.num_slices, "template": {"spec": _job_spec(job)}}],
        },
    }


def _failure_policy(job: Job) -> dict[str, Any]:
    """Bugs end the JobSet, preemption is free, everything else is a restart that counts."""
    return {
        "maxRestarts": job.max_restarts,
        "rules": [
            {
                "name": "preempted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": [".*DisruptionTarget.*"],
            },
            {"name": "bug", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
        ],
    }


def _job_spec(job: Job) -> dict[str, Any]:
    bug = {"containerName": "main", "operator": "NotIn", "values": list(RESTARTED_EXITS)}
    return {
        "parallelism": job.slice.hosts,
        "completions": job.slice.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # The first rule that matches decides, so a preempted pod's signal is not mistaken for anything else.
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": bug},
            ]
        },
        "template": {"metadata": {"labels": {"app.kubernetes.io/name": "oapl-jax"}}, "spec": _pod_spec(job)},
    }


def _pod_spec(job: Job) -> dict[str, Any]:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": GENERATIONS[job.slice.generation].accelerator,
        "cloud.google.com/gke-tpu-topology": job.slice.topology,
    }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if job.reservation:
        selector["cloud.google.com/reservation-name"] = job.reservation
    spec = {
        "restartPolicy": "Never",  # podFailurePolicy needs it; the JobSet restarts all pods together
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": selector,
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "containers": [_container(job)],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if job.spot:
        spec["tolerations"].append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    if job.priority:
        spec["priorityClassName"] = job.priority
    if job.service_account:
        spec["serviceAccountName"] = job.service_account
    return spec


def _container(job: Job) -> dict[str, Any]:
    chips = {"google.com/tpu": job.slice.chips_per_host}
    return {
        "name": "main",
        "image": job.image,
        "command": job.argv,
        "env": [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}, {"name": "PYTHONUNBUFFERED", "value": "1"}],
        "ports": [{"containerPort": port} for port in _TPU_PORTS],
        "securityContext": {"privileged": True},  # the TPU driver's device files
        "resources": {"requests": chips, "limits": chips},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }


def _standard_shape(text: str, name: str, generation: Generation, units: int) -> str:
    chips, odd = divmod(units, generation.units_per_chip)
    by_chips = {_chips(shape): shape for shape in SHAPES[generation.dimensions]}
    if odd or chips not in by_chips:
        sizes = ", ".join(str(size * generation.units_per_chip) for size in by_chips)
        shape = "x".join("ABC"[: generation.dimensions])
        raise ValueError(f"topology {text!r}: no standard {name} slice of that size; sizes: {sizes}; or {name}-{shape}")
    return by_chips[chips]


def _chips(topology: str) -> int:
    return math.prod(int(part) for part in topology.split("x"))


def _check(job: Job) -> None:
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", job.name) or len(job.name) > LONGEST_NAME:
        raise ValueError(
            f"name {job.name!r}: use lower-case letters, digits and '-', a letter first, at most {LONGEST_NAME} characters"
        )
    if ":" not in job.image.rpartition("/")[2] or job.image.endswith(":latest"):
        raise ValueError(
            f"image {job.image!r}: give a tag other than 'latest' (or a digest), so that restarts run the same code"
        )
    if job.num_slices < 1:
        raise ValueError(f"num-slices {job.num_slices}: must be at least 1")
    malformed = [word for word in job.overrides if "=" not in word]
    if malformed:
        raise ValueError(f"override {malformed[0]!r}: write it as section.key=value")
    if job.spot and job.reservation:
        raise ValueError("--spot and --reservation exclude one another")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/gke_tpu.sh", description="Run a config on a GKE TPU slice.")
    parser.add_argument("--config", required=True, help="YAML file, as the image has it, e.g. configs/x.yaml")
    parser.add_argument("--topology", required=True, help="v5p-64, v5e-16, v6e-4x4, tpu7x-4x4x4, ...")
    parser.add_argument("--image", required=True, help="container image with a tag, made from launch/Dockerfile")
    parser.add_argument("--name", required=True, help="name of the JobSet")
    parser.add_argument("--command", default="train", help="command of oapl-jax (default: %(default)s)")
    parser.add_argument("--num-slices", type=int, default=1, help="slices of that topology (default: %(default)s)")
    parser.add_argument("--spot", action="store_true", help="run on Spot capacity")
    parser.add_argument("--reservation", help="name of a reservation")
    parser.add_argument("--queue", help="Kueue local queue")
    parser.add_argument("--priority", help="priority class")
    parser.add_argument("--namespace", default="default", help="Kubernetes namespace (default: %(default)s)")
    parser.add_argument("--service-account", help="Kubernetes service account, for access to gs:// buckets")
    parser.add_argument(
        "--max-restarts", type=int, default=50, help="restarts besides preemptions (default: %(default)s)"
    )
    parser.add_argument("--grace", type=int, default=60, help="seconds from SIGTERM to SIGKILL (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the config")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> None:
    """The command line."""
    arguments = _parse_arguments(argv)
    try:
        job = Job(
            name=arguments.name,
            image=arguments.image,
            config=arguments.config,
            slice=parse_topology(arguments.topology),
            overrides=tuple(arguments.overrides),
            command=arguments.command,
            num_slices=arguments.num_slices,
            spot=arguments.spot,
            reservation=arguments.reservation,
            queue=arguments.queue,
            priority=arguments.priority,
            namespace=arguments.namespace,
            service_account=arguments.service_account,
            max_restarts=arguments.max_restarts,
            grace_seconds=arguments.grace,
        )
        _check(job)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(EXIT_BAD_ARGUMENTS) from None
    manifest = yaml.safe_dump(render(job), sort_keys=False, width=120)
    print(_describe(job), file=sys.stderr)
    if arguments.dry_run:
        print(manifest, end="")
        return
    submitted = subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, text=True, check=False)
    if submitted.returncode:
        raise SystemExit(submitted.returncode)
    print(_what_next(job))


def _describe(job: Job) -> str:
    tpu = job.slice
    total = tpu.chips * job.num_slices
    return (
        f"{job.name}: {job.num_slices} x {tpu.generation} {tpu.topology}"
        f" ({tpu.hosts} hosts x {tpu.chips_per_host} chips; {total} chips in all), {shlex.join(job.argv)}"
    )


def _what_next(job: Job) -> str:
    of_job = f"-n {job.namespace} -l jobset.sigs.k8s.io/jobset-name={job.name}"
    first_host = f"{of_job},batch.kubernetes.io/job-completion-index=0"
    return (
        f"watch:   kubectl get pods {of_job} -w\n"
        f"log:     kubectl logs -f {first_host}\n"
        f"stop:    kubectl delete jobset -n {job.namespace} {job.name}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])

"""Renders the Kubernetes manifests of a run (``manifests.py``), and applies them.

    launch/gke_tpu.sh --config configs/x.yaml --topology v5p-64 --image IMG:TAG --name N --bucket B [--dry-run] ...

Needs this package and, to submit, kubectl with a context of a cluster that has JobSet (v0.11 or newer). The config is
read and checked here, and travels in a ConfigMap with the files that it names.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

# Before anything imports JAX: an accelerator of this machine is not used.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import bundle as bundles
import fit
import machines as machine_kinds
from manifests import BUCKET_FOLDER, CLAIM_FOLDER, CONFIG_FOLDER, Job, to_yaml

EXIT_BAD_ARGUMENTS = 2
# A pod's host name is NAME-trainer-SLICE-HOST, at most 63 characters; 16 are left for the suffix.
LONGEST_NAME = 47
MOST_CONFIG_BYTES = 1_000_000
"""Of a ConfigMap, by Kubernetes' limit."""


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
    if job.num_slices > 1 and job.machines.kind != "tpu":
        raise ValueError(f"num-slices {job.num_slices}: only TPUs come in slices; name more {job.machines.kind}s")
    if job.spot and job.reservation:
        raise ValueError("--spot and --reservation exclude one another")
    if job.bucket and job.claim:
        raise ValueError("--bucket and --pvc exclude one another")
    _check_samplers(job)
    _check_storage(job)
    if (num_bytes := sum(map(len, job.bundle.files.values()))) > MOST_CONFIG_BYTES:
        largest = max(job.bundle.files, key=lambda path: len(job.bundle.files[path]))
        raise ValueError(
            f"the config and its files have {num_bytes:,} bytes, a ConfigMap at most {MOST_CONFIG_BYTES:,}: copy"
            f" {largest} to the bucket or the claim, and name it by its path there"
        )


def _check_samplers(job: Job) -> None:
    mode = getattr(job.config, "mode", None)
    if job.num_samplers and mode != "detached":
        raise ValueError(f"--samplers {job.num_samplers}: needs mode=detached; the config has mode={mode}")
    if job.num_samplers and (job.sampler_machines is None or job.sampler_machines.hosts != 1):
        raise ValueError("--sampler-topology: a sampler is one process on one host, as v5e-4, h100-8 or cpu-1")


def _check_storage(job: Job) -> None:
    """Refuses run directories that would end with their pods."""
    for key, path in (("run.dir", job.config.run.dir), ("run.shared_dir", job.shared_dir)):
        is_kept = "://" in path or (job.mount and (not path.startswith("/") or path.startswith(f"{job.mount}/")))
        if not is_kept:
            where = f"the pods mount {job.mount}" if job.mount else "give --bucket or --pvc"
            raise ValueError(f"{key}={path}: it would be inside the pods and be gone with them; {where}")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/gke_tpu.sh (or gke_gpu.sh)", description="Run a config on GKE, on TPUs, GPUs or CPUs."
    )
    parser.add_argument("--config", required=True, help="YAML file, or a shipped one by name: quickstart")
    parser.add_argument("--topology", required=True, help="v5p-64, v5e-16, v6e-4x4, tpu7x-4x4x4, h100-16, cpu-2, ...")
    parser.add_argument("--image", required=True, help="container image with a tag, made from launch/Dockerfile")
    parser.add_argument("--name", required=True, help="name of the JobSet")
    parser.add_argument("--command", default="train", choices=bundles.SCHEMAS, help="default: %(default)s")
    parser.add_argument("--num-slices", type=int, default=1, help="slices of that topology (default: %(default)s)")
    parser.add_argument("--samplers", type=int, default=0, metavar="N", help="detached samplers, on Spot capacity")
    parser.add_argument("--sampler-topology", metavar="T", help="one host (default: v5e-4)")
    storage = "their paths are relative to it"
    parser.add_argument("--bucket", help=f"Cloud Storage bucket, mounted at {BUCKET_FOLDER} in the pods; {storage}")
    parser.add_argument("--pvc", metavar="CLAIM", help=f"PersistentVolumeClaim, mounted at {CLAIM_FOLDER}; {storage}")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable")
    parser.add_argument(
        "--secret", action="append", default=[], metavar="NAME=SECRET:KEY", help="environment variable from a Secret"
    )
    parser.add_argument("--spot", action="store_true", help="run on Spot capacity")
    parser.add_argument("--reservation", help="name of a reservation")
    parser.add_argument("--queue", help="Kueue local queue")
    parser.add_argument("--priority", help="priority class")
    parser.add_argument("--namespace", default="default", help="Kubernetes namespace (default: %(default)s)")
    parser.add_argument("--service-account", help="Kubernetes service account, for access to buckets")
    parser.add_argument(
        "--image-pull-policy", default="IfNotPresent", choices=("IfNotPresent", "Always", "Never"), help="%(default)s"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=50, help="restarts besides preemptions (default: %(default)s)"
    )
    parser.add_argument("--grace", type=int, default=60, help="seconds from SIGTERM to SIGKILL (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the manifests and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the config")
    return parser.parse_intermixed_args(argv)


def _pairs(option: str, words: list[str], pattern: str) -> dict[str, re.Match[str]]:
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        match = re.fullmatch(pattern, value, re.DOTALL)
        if "=" not in word or not re.fullmatch(r"[A-Za-z_]\w*", name) or match is None:
            raise ValueError(
                f"{option} {word!r}: write it as {'NAME=VALUE' if option == '--env' else 'NAME=SECRET:KEY'}"
            )
        found[name] = match
    return found


def make_job(argv: list[str]) -> tuple[Job, bool]:
    """The job of a command line, checked, and whether its manifests are only printed.

    Raises:
        ValueError: what is wrong with the arguments or the config.
    """
    arguments = _parse_arguments(argv)
    secrets = _pairs("--secret", arguments.secret, "([^:]+):([^:]+)").items()
    job = Job(
        name=arguments.name,
        image=arguments.image,
        machines=machine_kinds.parse(arguments.topology),
        bundle=bundles.make(arguments.command, arguments.config, arguments.overrides, CONFIG_FOLDER),
        command=arguments.command,
        num_slices=arguments.num_slices,
        num_samplers=arguments.samplers,
        sampler_machines=machine_kinds.parse(arguments.sampler_topology or "v5e-4") if arguments.samplers else None,
        bucket=arguments.bucket,
        claim=arguments.pvc,
        environment={name: match[0] for name, match in _pairs("--env", arguments.env, ".*").items()},
        secrets={name: (match[1], match[2]) for name, match in secrets},
        spot=arguments.spot,
        reservation=arguments.reservation,
        queue=arguments.queue,
        priority=arguments.priority,
        namespace=arguments.namespace,
        service_account=arguments.service_account,
        image_pull_policy=arguments.image_pull_policy,
        max_restarts=arguments.max_restarts,
        grace_seconds=arguments.grace,
    )
    _check(job)
    return job, arguments.dry_run


def main(argv: list[str]) -> None:
    """The command line."""
    try:
        job, is_dry_run = make_job(argv)
        lines = [_describe(job), *_notes(job)]
        if job.command == "train":
            lines.append(fit.check(job.config, job.machines, job.num_slices))
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(EXIT_BAD_ARGUMENTS) from None
    print("\n".join(lines), file=sys.stderr)
    manifests = to_yaml(job)
    if is_dry_run:
        print(manifests, end="")
        return
    submitted = subprocess.run(["kubectl", "apply", "-f", "-"], input=manifests, text=True, check=False)
    if submitted.returncode:
        raise SystemExit(submitted.returncode)
    print(_what_next(job))


def _notes(job: Job) -> Iterator[str]:
    """What the pods rely on and this machine cannot check."""
    for line in job.bundle.left:
        yield f"{line}: a folder of this machine, which the pods have to find in their storage"
    is_warm = job.command == "train" and job.config.model.warm_start is not None
    if is_warm and job.machines.hosts * job.num_slices > 1:
        yield "model.warm_start: several hosts do not make it; run it first on one (--command sft --topology v5e-1)"


def _describe(job: Job) -> str:
    machines = job.machines
    samplers = f", {job.num_samplers} samplers" if job.sampler_machines else ""
    return (
        f"{job.name}: {job.num_slices} x {machines.name} ({machines.hosts} hosts x {machines.chips_per_host} chips;"
        f" {machines.chips * job.num_slices} chips in all){samplers}, {shlex.join(job.argv)}"
    )


def _what_next(job: Job) -> str:
    options = f"{job.name} --namespace {job.namespace}"
    return (
        f"watch:   launch/status.sh {options}\nlog:     launch/logs.sh {options}\nstop:    launch/delete.sh {options}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])

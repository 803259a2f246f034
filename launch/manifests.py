"""The Kubernetes manifests of a run: a JobSet of trainers and samplers, the config, the network's rules.

How a pod of the trainer ends:

    exit code 0    the job is done
    exit code 42   saved on request (SIGTERM): the JobSet starts all pods again, and they resume
    above 128      killed by a signal: the same
    preemption     the same, without counting against --max-restarts
    anything else  a bug or a bad config: the JobSet fails at once, for a restart would not help

A sampler that ends like this is replaced alone, but for bugs; samplers end with the trainer.
"""

import base64
import dataclasses
import signal
from typing import Any

import yaml

from bundle import CONFIG_FILE, Bundle
from machines import Machines

EXIT_SAVED = 42
"""Exit code of a command that SIGTERM stopped, with everything saved."""
# Exit codes above 128 say "killed by signal CODE - 128": stopped, out of memory, a peer that died (abort).
_SIGNALS = (signal.SIGINT, signal.SIGABRT, signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
RESTARTED_EXITS = (EXIT_SAVED, *sorted(128 + number for number in _SIGNALS))
USER = 1000
"""Of ``launch/Dockerfile``."""
CONFIG_FOLDER, BUCKET_FOLDER, CLAIM_FOLDER = "/config", "/gcs", "/data"
COORDINATOR_PORT = 8476
# The TPU runtime's: between hosts, between slices, usage metrics.
_TPU_PORTS = (8471, 8080, 8431)
_SPOT = {"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is run where."""

    name: str
    image: str
    bundle: Bundle
    machines: Machines
    """Of each of the trainer's slices."""
    command: str = "train"
    """Of ``python -m oapl_jax``."""
    num_slices: int = 1
    num_samplers: int = 0
    sampler_machines: Machines | None = None
    """One host."""
    bucket: str | None = None
    claim: str | None = None
    """PersistentVolumeClaim."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    secrets: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Environment variables from Secrets: name of the secret, key in it."""
    spot: bool = False
    reservation: str | None = None
    queue: str | None = None
    priority: str | None = None
    namespace: str = "default"
    service_account: str | None = None
    image_pull_policy: str = "IfNotPresent"
    max_restarts: int = 50
    grace_seconds: int = 60

    @property
    def config(self) -> Any:
        """As it was read."""
        return self.bundle.config

    @property
    def mount(self) -> str | None:
        """Where the storage is that outlives the pods, and where relative paths begin."""
        return BUCKET_FOLDER if self.bucket else CLAIM_FOLDER if self.claim else None

    @property
    def shared_dir(self) -> str:
        """What trainer and samplers share."""
        return getattr(self.config.run, "shared_dir", None) or self.config.run.dir

    @property
    def isolation(self) -> str | None:
        """The sandbox's level, where programs of the model are graded."""
        values = self.config.model_dump()
        return self.config.reward.isolation if _grades_code(values) else None

    @property
    def argv(self) -> list[str]:
        """The program is the pod's first process, so SIGTERM reaches it without a shell in between."""
        words = ["python", "-m", "oapl_jax", self.command, "--config", f"{CONFIG_FOLDER}/{CONFIG_FILE}"]
        if self.command == "train" and self.machines.kind != "tpu" and self.machines.hosts > 1:
            # On TPUs GKE says it in the environment. $(...) is replaced by Kubernetes.
            first = f"{self.name}-trainer-0-0.{self.name}:{COORDINATOR_PORT}"
            words += ["--coordinator", first, "--num-processes", str(self.machines.hosts)]
            words += ["--process-id", "$(JOB_COMPLETION_INDEX)"]
        return words

    @property
    def sampler_argv(self) -> list[str]:
        """A detached sampler waits for the trainer's first policy."""
        return ["python", "-m", "oapl_jax", "sample", "--run", self.shared_dir, "--wait", "3600"]


def render(job: Job) -> list[dict[str, Any]]:
    """The manifests: the config, the network's rules where programs are run, the JobSet."""
    found = [_config_map(job)]
    if job.isolation:
        found.append(_network_policy(job))
    return [*found, _job_set(job)]


def _metadata(job: Job) -> dict[str, Any]:
    return {"name": job.name, "namespace": job.namespace, "labels": {"app.kubernetes.io/name": "oapl-jax"}}


def _key(path: str) -> str:
    """A file's key in the ConfigMap, where names have no slashes."""
    return path.replace("/", "..")


def _config_map(job: Job) -> dict[str, Any]:
    texts, binaries = {}, {}
    for path, content in job.bundle.files.items():
        try:
            texts[_key(path)] = content.decode()
        except UnicodeDecodeError:
            binaries[_key(path)] = base64.b64encode(content).decode()
    found = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(job), "data": texts}
    return found | ({"binaryData": binaries} if binaries else {})


def _network_policy(job: Job) -> dict[str, Any]:
    """The pods talk to one another, to name servers, to public HTTPS, and to the metadata server."""
    own = {"jobset.sigs.k8s.io/jobset-name": job.name}
    private = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16"]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job),
        "spec": {
            "podSelector": {"matchLabels": own},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": own}}]}],
            "egress": [
                {"to": [{"podSelector": {"matchLabels": own}}]},
                {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]},
                {
                    "to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": private}}],
                    "ports": [{"protocol": "TCP", "port": 443}],
                },
                {
                    "to": [{"ipBlock": {"cidr": f"169.254.169.{host}/32"}} for host in (252, 254)],
                    "ports": [{"protocol": "TCP", "port": port} for port in (80, 988)],
                },
            ],
        },
    }


def _job_set(job: Job) -> dict[str, Any]:
    metadata = _metadata(job)
    if job.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = job.queue
    # One slice, one node pool: GKE puts all pods of a trainer's Job on the same slice.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    trainer: dict[str, Any] = {"spec": _trainer_job(job)}
    if job.machines.kind == "tpu":
        trainer["metadata"] = {"annotations": exclusive}
    jobs = [{"name": "trainer", "replicas": job.num_slices, "template": trainer}]
    if job.num_samplers:
        jobs.append({"name": "sampler", "replicas": 1, "template": {"spec": _sampler_job(job)}})
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": 86_400,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All", "targetReplicatedJobs": ["trainer"]},
            "failurePolicy": _failure_policy(job),
            "replicatedJobs": jobs,
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


def _exit_rule(action: str, operator: str, codes: tuple[int, ...]) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"containerName": "main", "operator": operator, "values": list(codes)}}


def _disruption_rule(action: str) -> dict[str, Any]:
    return {"action": action, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def _trainer_job(job: Job) -> dict[str, Any]:
    """One pod on each host; if one fails, the Job fails, and the JobSet decides."""
    # The first rule that matches decides, so a preempted pod's signal is not mistaken for anything else.
    rules = [_disruption_rule("FailJob"), _exit_rule("FailJob", "NotIn", RESTARTED_EXITS)]
    pod = _pod_spec(job, job.machines, job.argv, spot=job.spot)
    return _job_spec(job, job.machines.hosts, 0, rules, pod)


def _sampler_job(job: Job) -> dict[str, Any]:
    """Pods that are replaced one by one; a bug in one ends the JobSet."""
    assert job.sampler_machines is not None
    rules = [
        _disruption_rule("Ignore"),
        _exit_rule("Ignore", "In", (EXIT_SAVED,)),
        _exit_rule("FailJob", "NotIn", RESTARTED_EXITS),
    ]
    pod = _pod_spec(job, job.sampler_machines, job.sampler_argv, spot=True)
    return _job_spec(job, job.num_samplers, job.max_restarts, rules, pod)


def _job_spec(
    job: Job, num_pods: int, backoff_limit: int, rules: list[dict[str, Any]], pod: dict[str, Any]
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"labels": {"app.kubernetes.io/name": "oapl-jax"}}
    if job.bucket:
        metadata["annotations"] = {"gke-gcsfuse/volumes": "true"}
    return {
        "parallelism": num_pods,
        "completions": num_pods,
        "completionMode": "Indexed",
        "backoffLimit": backoff_limit,
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": metadata, "spec": pod},
    }


def _pod_spec(job: Job, machines: Machines, argv: list[str], *, spot: bool) -> dict[str, Any]:
    selector, tolerations = dict(machines.selector), []
    if machines.resource:
        (resource,) = machines.resource
        tolerations.append({"key": resource, "operator": "Exists", "effect": "NoSchedule"})
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append(_SPOT)
    if job.reservation and not spot:
        selector["cloud.google.com/reservation-name"] = job.reservation
    spec: dict[str, Any] = {
        "restartPolicy": "Never",  # podFailurePolicy needs it; the JobSet restarts all pods together
        "terminationGracePeriodSeconds": job.grace_seconds,
        "automountServiceAccountToken": job.service_account is not None,
        "securityContext": _security(job),
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [_container(job, machines, argv)],
        "volumes": _volumes(job),
    }
    if job.num_slices > 1:  # the traffic between slices
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if job.priority:
        spec["priorityClassName"] = job.priority
    if job.service_account:
        spec["serviceAccountName"] = job.service_account
    return spec


def _security(job: Job) -> dict[str, Any]:
    """The user, and the profiles that the grader's sandbox needs (docs/rewards.md)."""
    if job.isolation == "uid":  # programs get uids of their own, which root alone can give
        return {"runAsUser": 0, "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}}
    found: dict[str, Any] = {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER}
    if job.isolation == "namespaces":  # the default profiles refuse user namespaces and mounts
        return found | {"seccompProfile": {"type": "Unconfined"}, "appArmorProfile": {"type": "Unconfined"}}
    return found | {"seccompProfile": {"type": "RuntimeDefault"}}


def _container(job: Job, machines: Machines, argv: list[str]) -> dict[str, Any]:
    platforms = {"tpu": "tpu,cpu", "gpu": "cuda,cpu", "cpu": "cpu"}[machines.kind]
    values = {"JAX_PLATFORMS": platforms, "PYTHONUNBUFFERED": "1"} | job.environment
    environment: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in values.items()]
    environment += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
        for name, (secret, key) in job.secrets.items()
    ]
    security: dict[str, Any] = {"allowPrivilegeEscalation": False}
    if job.isolation != "uid":
        security["capabilities"] = {"drop": ["ALL"]}
    mounts = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
    ]
    found: dict[str, Any] = {
        "name": "main",
        "image": job.image,
        "imagePullPolicy": job.image_pull_policy,
        "command": argv,
        "env": environment,
        "securityContext": security,
        "volumeMounts": mounts,
    }
    if machines.resource:
        found["resources"] = {"requests": dict(machines.resource), "limits": dict(machines.resource)}
    if machines.kind == "tpu":
        found["ports"] = [{"containerPort": port} for port in _TPU_PORTS]
    if job.mount:
        mounts.append({"name": "storage", "mountPath": job.mount})
        found["workingDir"] = job.mount
    return found


def _volumes(job: Job) -> list[dict[str, Any]]:
    items = [{"key": _key(path), "path": path} for path in job.bundle.files]
    found: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        {"name": "config", "configMap": {"name": job.name, "items": items}},
    ]
    if job.bucket:
        options = f"implicit-dirs,uid={USER},gid={USER}"
        driver = {"driver": "gcsfuse.csi.storage.gke.io"}
        attributes = {"volumeAttributes": {"bucketName": job.bucket, "mountOptions": options}}
        found.append({"name": "storage", "csi": driver | attributes})
    if job.claim:
        found.append({"name": "storage", "persistentVolumeClaim": {"claimName": job.claim}})
    return found


def _grades_code(value: Any) -> bool:
    if isinstance(value, dict):
        return "code" in (value.get("functions") or ()) or any(map(_grades_code, value.values()))
    return isinstance(value, list | tuple) and any(map(_grades_code, value))


def comments(job: Job) -> list[str]:
    """What a reader of the manifests should know of the security of their pods."""
    lines = [
        "The pods are not privileged. GKE nodes from version 1.28 on give TPUs to such pods.",
        f"They run as user {USER} of launch/Dockerfile, without a service account's token"
        if job.service_account is None
        else f"They run as user {USER} of launch/Dockerfile, with the token of {job.service_account}",
    ]
    if job.isolation == "namespaces":
        lines.append(
            "Graded programs are isolated by user namespaces: seccomp and AppArmor of the pods are Unconfined."
        )
    elif job.isolation == "uid":
        lines.append(
            "Graded programs get user ids of their own, so the pods run as root, with the runtime's capabilities."
        )
    elif job.isolation == "landlock":
        lines.append("Graded programs are isolated by Landlock, which the default profiles allow; gVisor has none.")
    if job.isolation:
        lines.append("The NetworkPolicy is for the pods that run them; it has no effect on pods with hostNetwork.")
    return lines


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such, and nothing as a reference to what was written before."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def to_yaml(job: Job) -> str:
    """All manifests as one text."""
    documents = [yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120) for document in render(job)]
    return "".join(f"# {line}\n" for line in comments(job)) + "---\n".join(documents)

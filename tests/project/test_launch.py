import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

from oapl_jax.build.checks import CHECKS
from oapl_jax.cli.commands import COMMANDS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.io.console import ExitCode

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch/gke_tpu.sh"
REQUIRED = ["--config", "configs/quickstart.yaml", "--image", "registry.example/oapl-jax:v1", "--name", "demo"]

# topology as written -> (shape, hosts, chips per host, accelerator label)
TOPOLOGIES = {
    "v4-32": ("2x2x4", 4, 4, "tpu-v4-podslice"),
    "v4-8": ("2x2x1", 1, 4, "tpu-v4-podslice"),
    "v5e-1": ("1x1", 1, 1, "tpu-v5-lite-podslice"),
    "v5e-16": ("4x4", 4, 4, "tpu-v5-lite-podslice"),
    "v5litepod-256": ("16x16", 64, 4, "tpu-v5-lite-podslice"),
    "v5p-64": ("2x4x4", 8, 4, "tpu-v5p-slice"),
    "v5p-4x4x12": ("4x4x12", 48, 4, "tpu-v5p-slice"),
    "v5p-8192": ("16x16x16", 1024, 4, "tpu-v5p-slice"),
    "v6e-8": ("2x4", 2, 4, "tpu-v6e-slice"),
    "v6e-256": ("16x16", 64, 4, "tpu-v6e-slice"),
    "tpu7x-128": ("4x4x4", 16, 4, "tpu7x"),
    "tpu7x-4x4x4": ("4x4x4", 16, 4, "tpu7x"),
}


def launch(*words, check=True):
    return subprocess.run(
        ["bash", str(SCRIPT), *words], capture_output=True, text=True, check=check, cwd=ROOT,
        env={**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip


def manifest(topology, *words):
    return yaml.safe_load(launch(*REQUIRED, "--topology", topology, "--dry-run", *words).stdout)


def job_spec(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_spec(jobset):
    return job_spec(jobset)["template"]["spec"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_hosts_times_chips_is_the_topology(topology):
    shape, hosts, chips_per_host, label = TOPOLOGIES[topology]
    jobset = manifest(topology)
    job, pod = job_spec(jobset), pod_spec(jobset)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == shape
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label
    assert job["parallelism"] == job["completions"] == hosts
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips_per_host}
    assert hosts * chips_per_host == math.prod(map(int, shape.split("x")))


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
@pytest.mark.parametrize("topology", ["v4-32", "v5e-1", "v5p-64", "v6e-256", "tpu7x-128"])
def test_the_job_is_valid_by_the_schemas_of_kubernetes(topology, version):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    jobset = manifest(topology, "--spot", "--queue", "tpu", "--priority", "high", "--service-account", "trainer")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "demo-slice-0"}, "spec": job_spec(jobset)}
    kubernetes_validate.validate(job, version, strict=True)
    job["spec"]["paralelism"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)


def test_the_jobset_has_what_its_schema_requires_and_nothing_unknown():
    """The part of the JobSet v1alpha2 schema that we use; Kubernetes' own schemas do not cover it."""
    jobset = manifest("v5p-64", "--num-slices", "2")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) == {"ttlSecondsAfterFinished", "network", "failurePolicy", "replicatedJobs"}
    assert [(job["name"], job["replicas"]) for job in jobset["spec"]["replicatedJobs"]] == [("slice", 2)]
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert {"name", "action"} <= set(rule) <= {
            "name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns", "targetReplicatedJobs",
        }  # fmt: skip
        assert rule["action"] in {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}


@pytest.mark.parametrize(
    ("exit_code", "is_preempted", "outcome"),
    [
        (42, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
        (143, False, "RestartJobSet"),
        (143, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, False, "FailJobSet"),
        (2, False, "FailJobSet"),
    ],
)
def test_what_happens_after_each_exit_code(exit_code, is_preempted, outcome):
    """Follows the rules as the Job and JobSet controllers do: the first that matches decides."""
    jobset = manifest("v5e-16")
    assert job_spec(jobset)["backoffLimit"] == 0
    assert pod_spec(jobset)["restartPolicy"] == "Never"
    reason, message = "BackoffLimitExceeded", ""
    for rule in job_spec(jobset)["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if "onPodConditions" in rule and is_preempted:
            reason, message = "PodFailurePolicy", "pod has condition DisruptionTarget"
            break
        if codes and codes["operator"] == "NotIn" and exit_code not in codes["values"]:
            reason, message = "PodFailurePolicy", f"exit code {exit_code}"
            break
    actions = [
        rule["action"]
        for rule in jobset["spec"]["failurePolicy"]["rules"]
        if reason in rule["onJobFailureReasons"]
        and all(p.strip(".*") in message for p in rule.get("onJobFailureMessagePatterns", []))
    ]
    assert (actions or ["RestartJobSet"])[0] == outcome


def test_the_program_and_its_launcher_agree_on_the_exit_code_of_a_saved_run():
    (launcher,) = re.findall(r"^EXIT_SAVED = (\d+)$", (ROOT / "launch/render.py").read_text(), re.MULTILINE)
    assert int(launcher) == ExitCode.PREEMPTED


def test_the_command_of_the_pod_is_one_that_the_program_accepts():
    words = ["learner.learning_rate=1e-4", "run.dir=gs://bucket/runs/demo"]
    (container,) = pod_spec(manifest("v5p-64", "--spot", *words))["containers"]
    python, dash_m, module, command, *argv = container["command"]
    assert (python, dash_m, module, command) == ("python", "-m", "oapl_jax", "train")
    parsed, _ = config_file.from_command_line(
        TrainConfig, command, [str(ROOT / a) if a.endswith("yaml") else a for a in argv], checks=CHECKS
    )
    assert parsed.learner.learning_rate == 1e-4
    assert parsed.run.dir == "gs://bucket/runs/demo"


def test_another_command_is_run_where_one_is_named():
    (container,) = pod_spec(manifest("v5e-1", "--command", "generate"))["containers"]
    assert container["command"][:4] == ["python", "-m", "oapl_jax", "generate"]
    assert "generate" in [command.name for group in COMMANDS.values() for command in group]


def test_options_reach_the_manifest():
    jobset = manifest(
        "v5p-64", "--spot", "--queue", "tpu", "--grace", "120", "--max-restarts", "3", "--namespace", "rl"
    )
    assert pod_spec(jobset)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tpu"
    assert jobset["metadata"]["namespace"] == "rl"
    assert pod_spec(jobset)["terminationGracePeriodSeconds"] == 120
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3


def test_pod_host_names_fit_even_in_the_largest_job():
    name = "a" * 49
    jobset = yaml.safe_load(
        launch(*REQUIRED[:-1], name, "--topology", "v5p-8192", "--num-slices", "64", "--dry-run").stdout
    )
    assert len(f"{jobset['metadata']['name']}-slice-63-1023") <= 63


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v9-8"], "generations: v4, v5e, v5p, v6e, tpu7x"),
        (["--topology", "v5p64"], "write GENERATION-SIZE"),
        (["--topology", "v5p-63"], "no standard v5p slice of that size; sizes: 8, 16"),
        (["--topology", "v5e-6"], "no standard v5e slice of that size"),
        (["--topology", "v5p-4x4"], "v5p slices have 3 dimensions, e.g. v5p-2x4x4"),
        (["--topology", "v6e-2x4x4"], "v6e slices have 2 dimensions, e.g. v6e-4x4"),
        (["--topology", "v5e-1x3"], "3 chips are not whole hosts of 4"),
        (["--topology", "v5e-4", "--name", "Bad_Name"], "lower-case letters"),
        (["--topology", "v5e-4", "--name", "a" * 50], "at most 49 characters"),
        (["--topology", "v5e-4", "--image", "registry.example:5000/oapl"], "give a tag"),
        (["--topology", "v5e-4", "--image", "oapl:latest"], "other than 'latest'"),
        (["--topology", "v5e-4", "--num-slices", "0"], "at least 1"),
        (["--topology", "v5e-4", "--spot", "--reservation", "r"], "exclude one another"),
        (["--topology", "v5e-4", "run.steps"], "'run.steps': write it as section.key=value"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(words, message):
    done = launch(*REQUIRED, "--dry-run", *words, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_submission_pipes_the_manifest_to_kubectl_and_says_what_next(tmp_path, monkeypatch):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/manifest\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = [*REQUIRED, "--topology", "v5e-16"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/render.py"), *words], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "words").read_text().split() == ["apply", "-f", "-"]
    assert yaml.safe_load((tmp_path / "manifest").read_text()) == manifest("v5e-16")
    assert "kubectl delete jobset -n default demo" in done.stdout


@pytest.mark.parametrize("script", sorted(ROOT.glob("launch/*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse_and_can_be_run(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


def test_the_image_holds_what_the_command_needs():
    dockerfile = (ROOT / "launch/Dockerfile").read_text()
    for needed in ("requirements.txt", "pyproject.toml", "README.md", "LICENSE", "oapl_jax ", "configs"):
        assert any(line.startswith("COPY") and needed in line for line in dockerfile.splitlines())
    (extras,) = re.findall(r"^ARG EXTRAS=([\w,]+)$", dockerfile, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])

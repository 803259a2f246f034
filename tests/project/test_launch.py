"""What launch/ renders, and refuses to render: by the schemas of Kubernetes and JobSet, without a cluster."""

import contextlib
import io
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import types

import pytest
import yaml

import manifests
import render
from golden import make_manifests
from oapl_jax.build.checks import CHECKS
from oapl_jax.cli.commands import COMMANDS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.io.console import ExitCode

ROOT = pathlib.Path(__file__).parents[2]
REQUIRED = [
    *("--config", "configs/quickstart.yaml", "--image", "registry.example/oapl-jax:v1"),
    *("--bucket", "rl-runs", "--name", "demo"),
]
JOBSET = json.loads((ROOT / "tests/golden/jobset_crd.json").read_text())

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


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def launch(*words, check=True):
    """The renderer in this process: imports take seconds."""
    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            render.main(list(words))
        except SystemExit as exit_:
            code = exit_.code
    assert not (check and code), error.getvalue()
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=error.getvalue())


def all_manifests(topology, *words):
    """Of the toy model, which is too small to be split over many devices."""
    required = [*REQUIRED, "--topology", topology, "--dry-run", "mesh.trainer=fsdp=1"]
    found = yaml.safe_load_all(launch(*required, *words).stdout)
    return {document["kind"]: document for document in found}


def manifest(topology, *words):
    return all_manifests(topology, *words)["JobSet"]


def job_spec(jobset, role="trainer"):
    (found,) = [job for job in jobset["spec"]["replicatedJobs"] if job["name"] == role]
    return found["template"]["spec"]


def pod_spec(jobset, role="trainer"):
    return job_spec(jobset, role)["template"]["spec"]


def container(jobset, role="trainer"):
    (found,) = pod_spec(jobset, role)["containers"]
    return found


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


@pytest.mark.parametrize(
    ("topology", "gpu_hosts", "per_host"), [("h100-16", 2, 8), ("l4-2", 1, 2), ("a100-8", 1, 8), ("cpu-3", 3, None)]
)
def test_hosts_with_gpus_or_without_find_each_other_by_their_first_pod(topology, gpu_hosts, per_host):
    jobset = manifest(topology)
    assert job_spec(jobset)["parallelism"] == gpu_hosts
    assert container(jobset).get("resources", {}).get("limits", {}).get("nvidia.com/gpu") == per_host
    words = container(jobset)["command"]
    assert ("--coordinator" in words) == (gpu_hosts > 1)
    if gpu_hosts > 1:
        assert words[-6:] == [
            *("--coordinator", "demo-trainer-0-0.demo:8476", "--num-processes", str(gpu_hosts)),
            *("--process-id", "$(JOB_COMPLETION_INDEX)"),
        ]


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
@pytest.mark.parametrize("case", make_manifests.CASES)
def test_the_manifests_are_valid_by_the_schemas_of_kubernetes(case, version):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    documents = list(yaml.safe_load_all((make_manifests.FOLDER / f"{case}.yaml").read_text()))
    for document in documents[:-1]:
        kubernetes_validate.validate(document, version, strict=True)
    for replicated in documents[-1]["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "demo"}, **replicated["template"]}
        kubernetes_validate.validate(job, version, strict=True)
        job["spec"]["paralelism"] = 2
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(job, version, strict=True)


def strict(schema):
    """A schema that refuses unknown keys, as the API server does with ``--validate=strict``."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(inner) for key, inner in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    return found | {"additionalProperties": False} if is_object else found


@pytest.mark.parametrize("case", make_manifests.CASES)
def test_the_jobset_is_valid_by_its_own_schema(case):
    jsonschema = pytest.importorskip("jsonschema")
    *_, jobset = yaml.safe_load_all((make_manifests.FOLDER / f"{case}.yaml").read_text())
    schema = strict(JOBSET["schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    jsonschema.validate(jobset, schema)
    jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    with pytest.raises(jsonschema.ValidationError, match="is not one of"):
        jsonschema.validate(jobset, schema)


@pytest.mark.parametrize("case", make_manifests.CASES)
def test_manifests_are_those_that_were_read_by_people(case):
    """After a change that is meant: tests/golden/make_manifests.py."""
    assert make_manifests.make(case) == (make_manifests.FOLDER / f"{case}.yaml").read_text()


def test_slices_are_jobs_with_node_pools_of_their_own():
    jobset = manifest("v5p-64", "--num-slices", "2")
    (trainer,) = jobset["spec"]["replicatedJobs"]
    assert (trainer["name"], trainer["replicas"]) == ("trainer", 2)
    (key, value) = next(iter(trainer["template"]["metadata"]["annotations"].items()))
    assert (key, value) == ("alpha.jobset.sigs.k8s.io/exclusive-topology", "cloud.google.com/gke-nodepool")
    assert pod_spec(jobset)["hostNetwork"] is True
    assert "hostNetwork" not in pod_spec(manifest("v5p-64"))


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


@pytest.mark.parametrize(
    ("exit_code", "is_preempted", "outcome"),
    [(42, False, "Ignore"), (143, True, "Ignore"), (0, False, None), (137, False, None), (2, False, "FailJob")],
)
def test_a_sampler_is_replaced_alone_unless_it_has_a_bug(exit_code, is_preempted, outcome):
    """Without an outcome the Job counts the failure, up to ``backoffLimit``, and replaces the pod too."""
    job = job_spec(manifest("v5e-4", "mode=detached", "--samplers", "3", "--max-restarts", "7"), "sampler")
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (3, 3, 7)
    actions = []
    for rule in job["podFailurePolicy"]["rules"] if exit_code else []:
        codes = rule.get("onExitCodes", {"operator": "", "values": []})
        is_listed = exit_code in codes["values"]
        if ("onPodConditions" in rule and is_preempted) or (codes["operator"], is_listed) in {
            ("In", True),
            ("NotIn", False),
        }:
            actions.append(rule["action"])
    assert (actions or [None])[0] == outcome


def test_the_run_is_over_when_its_trainer_is():
    jobset = manifest("v5e-4", "mode=detached", "--samplers", "3")
    assert jobset["spec"]["successPolicy"] == {"operator": "All", "targetReplicatedJobs": ["trainer"]}


def test_samplers_are_on_spot_capacity_and_sample_for_the_trainers_run():
    jobset = manifest("v5e-16", "mode=detached", "--samplers", "3", "--sampler-topology", "v6e-1")
    sampler = pod_spec(jobset, "sampler")
    assert sampler["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert sampler["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "1x1"
    assert "cloud.google.com/gke-spot" not in pod_spec(jobset)["nodeSelector"]
    assert container(jobset, "sampler")["command"][3:6] == ["sample", "--run", "runs/quickstart"]
    assert container(jobset, "sampler")["workingDir"] == container(jobset)["workingDir"] == "/gcs"


def test_the_program_and_its_launcher_agree_on_the_exit_code_of_a_saved_run():
    assert manifests.EXIT_SAVED == ExitCode.PREEMPTED


def unpack(config_map, folder):
    """The files of a ConfigMap in a folder, which takes the place of the pods'."""
    folder.mkdir(exist_ok=True)
    for name, text in config_map["data"].items():
        (folder / name).write_text(text.replace("/config/", f"{folder}/"))
    return folder


def test_the_command_of_the_pod_is_one_that_the_program_accepts(tmp_path):
    words = ["learner.learning_rate=1e-4", "run.dir=gs://bucket/runs/demo"]
    found = all_manifests("v5p-64", "--spot", *words)
    python, dash_m, module, command, option, path = container(found["JobSet"])["command"]
    assert (python, dash_m, module, command, option) == ("python", "-m", "oapl_jax", "train", "--config")
    folder = unpack(found["ConfigMap"], tmp_path)
    parsed, _ = config_file.from_command_line(
        TrainConfig, command, [option, path.replace("/config/", f"{folder}/")], checks=CHECKS
    )
    assert parsed.learner.learning_rate == 1e-4
    assert parsed.run.dir == "gs://bucket/runs/demo"


def test_another_command_is_run_where_one_is_named():
    words = container(manifest("v5e-1", "--command", "generate", "--config", "configs/countdown_generate.yaml"))[
        "command"
    ]
    assert words[:4] == ["python", "-m", "oapl_jax", "generate"]
    assert "generate" in [command.name for group in COMMANDS.values() for command in group]


def test_a_config_travels_with_every_file_that_it_reaches(tmp_path, monkeypatch):
    project, pod = tmp_path / "project", tmp_path / "pod"
    (project / "verdicts").mkdir(parents=True)
    shutil.copy(ROOT / "configs/toy_qwen3.json", project)
    shutil.copy(ROOT / "configs/chain_sft.yaml", project)
    (project / "verdicts/__init__.py").write_text("from shared_rules import rule\n")
    (project / "shared_rules.py").write_text("import json\n\ndef rule(prompt, response):\n    return 1.0\n")
    (project / "not_reached.py").touch()
    (project / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (project / "run.yaml").write_text(
        "run: {dir: runs/own, steps: 1}\nmodel: {warm_start: chain_sft.yaml}\ndata: {path: rows.jsonl, max_prompt_tokens: 16}\n"
        'reward: {functions: {"verdicts:rule": 1.0}}\nsampler: {max_response_tokens: 8}\nevaluation: {prompts: 0}\n'
    )
    monkeypatch.setenv("SECRET_SYSTEM", "not to be seen")
    words = ["--config", str(project / "run.yaml"), "data.system=${oc.env:SECRET_SYSTEM}"]
    found = all_manifests("v5e-1", *words)["ConfigMap"]
    names = {
        "config.yaml",
        "chain_sft.yaml",
        "toy_qwen3.json",
        "rows.jsonl",
        "shared_rules.py",
        "verdicts..__init__.py",
    }
    assert set(found["data"]) == names
    assert "not to be seen" not in yaml.safe_dump(found)
    assert str(tmp_path) not in yaml.safe_dump(found), "paths of this machine"
    folder = unpack(found, pod)
    config = config_file.load(TrainConfig, folder / "config.yaml", checks=CHECKS)
    for path in (config.data.path, config.model.warm_start):
        assert pathlib.Path(str(path)).parent == folder
        assert pathlib.Path(str(path)).is_file()
    (volume,) = [one for one in pod_spec(manifest("v5e-1", *words))["volumes"] if one["name"] == "config"]
    paths = {item["key"]: item["path"] for item in volume["configMap"]["items"]}
    assert set(paths) == names
    assert paths["verdicts..__init__.py"] == "verdicts/__init__.py"


def test_two_files_of_one_name_both_travel(tmp_path):
    for name, row in (("train", '{"prompt": "1", "answer": "1"}'), ("test", '{"prompt": "2", "answer": "2"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(row)
    words = ["--config", "configs/gsm8k_qwen2.5.yaml", "data.format=jsonl", "data.name=null"]
    words += [f"data.path={tmp_path}/train/rows.jsonl", f"evaluation.path={tmp_path}/test/rows.jsonl"]
    words += ["data.split=train", "evaluation.split=test"]
    found = all_manifests("h100-8", *words)["ConfigMap"]["data"]
    config = yaml.safe_load(found["config.yaml"])
    texts = [found[config[section]["path"].removeprefix("/config/")] for section in ("data", "evaluation")]
    assert [json.loads(text)["answer"] for text in texts] == ["1", "2"]


@pytest.mark.parametrize(("option", "folder"), [("--bucket", "/gcs"), ("--pvc", "/data")])
def test_the_run_directory_is_on_storage_that_the_pods_mount(option, folder):
    words = [word for word in REQUIRED if word not in ("--bucket", "rl-runs")]
    documents = launch(*words, option, "rl-runs", "--topology", "v5e-1", "--dry-run").stdout
    jobset = list(yaml.safe_load_all(documents))[-1]
    (mount,) = [one for one in container(jobset)["volumeMounts"] if one["name"] == "storage"]
    (volume,) = [one for one in pod_spec(jobset)["volumes"] if one["name"] == "storage"]
    assert mount["mountPath"] == container(jobset)["workingDir"] == folder
    assert "rl-runs" in json.dumps(volume)
    annotations = job_spec(jobset)["template"]["metadata"].get("annotations", {})
    assert ("gke-gcsfuse/volumes" in annotations) == (option == "--bucket")


@pytest.mark.parametrize("isolation", ["namespaces", "landlock", "uid"])
def test_pods_have_no_more_rights_than_the_graders_sandbox_needs(isolation):
    words = ["--config", "configs/code_qwen2.5.yaml", f"reward.isolation={isolation}"]
    found = all_manifests("h100-8", *words)
    pod, security = pod_spec(found["JobSet"]), container(found["JobSet"])["securityContext"]
    assert pod["automountServiceAccountToken"] is False
    assert security["allowPrivilegeEscalation"] is False
    assert "privileged" not in security
    profile = pod["securityContext"]["seccompProfile"]["type"]
    assert profile == ("Unconfined" if isolation == "namespaces" else "RuntimeDefault")
    assert pod["securityContext"]["runAsUser"] == (0 if isolation == "uid" else 1000)
    policy = found["NetworkPolicy"]["spec"]
    labels = {"jobset.sigs.k8s.io/jobset-name": "demo"}
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": labels}}]}]


def test_a_run_that_grades_no_programs_needs_no_rules_of_the_network():
    assert set(all_manifests("v5e-1")) == {"ConfigMap", "JobSet"}


def test_an_account_is_mounted_only_where_one_is_given():
    pod = pod_spec(manifest("v5e-1", "--service-account", "trainer"))
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("trainer", True)


def test_environment_variables_come_from_the_command_line_and_from_secrets():
    words = ["--env", "HF_HOME=/gcs/a=b", "--env", "EMPTY=", "--secret", "HF_TOKEN=hub:token"]
    found = {one["name"]: one for one in container(manifest("v5e-1", *words, "--image-pull-policy", "Always"))["env"]}
    assert found["HF_HOME"]["value"] == "/gcs/a=b"
    assert found["EMPTY"]["value"] == ""
    assert found["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}


def test_the_memory_of_a_device_is_said_and_nothing_is_compiled():
    error = launch(*REQUIRED, "--config", "math_qwen3_4b", "--topology", "v5p-32", "--dry-run").stderr
    assert re.search(r"memory of a device: \d+\.\d\d GiB for certain of 95.74 GiB", error)


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
    jobset = manifest("v5p-8192", "--num-slices", "64", "--name", "a" * 47)
    assert len(f"{jobset['metadata']['name']}-trainer-63-1023") <= 63


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
        (["--topology", "v5e-4", "--name", "a" * 50], "at most 47 characters"),
        (["--topology", "v5e-4", "--image", "registry.example:5000/oapl"], "give a tag"),
        (["--topology", "v5e-4", "--image", "oapl:latest"], "other than 'latest'"),
        (["--topology", "v5e-4", "--num-slices", "0"], "at least 1"),
        (["--topology", "v5e-4", "--spot", "--reservation", "r"], "exclude one another"),
        (["--topology", "h100-3"], "3 GPUs are not 1, 2, 4, or whole hosts of 8"),
        (["--topology", "h100-16", "--num-slices", "2"], "only TPUs come in slices"),
        (
            ["--topology", "v5e-4", "--config", "configs/missing.yaml"],
            "config file 'configs/missing.yaml' does not exist",
        ),
        (["--topology", "v5e-4", "learner.rate=1"], "learner.rate: unknown key"),
        (["--topology", "v5e-4", "run.dir=/home/me/runs"], "run.dir=/home/me/runs: it would be inside the pods"),
        (["--topology", "v5e-4", "--pvc", "claim"], "--bucket and --pvc exclude one another"),
        (["--topology", "v5e-4", "--samplers", "2"], "needs mode=detached; the config has mode=online"),
        (
            ["--topology", "v5e-4", "--samplers", "2", "mode=detached", "--sampler-topology", "v5e-16"],
            "a sampler is one process on one host",
        ),
        (["--topology", "v5e-4", "--env", "HF_HOME"], "--env 'HF_HOME': write it as NAME=VALUE"),
        (["--topology", "v5e-4", "--secret", "TOKEN=hub"], "--secret 'TOKEN=hub': write it as NAME=SECRET:KEY"),
        (["--topology", "v5e-4", "mesh.trainer=fsdp=3,tensor=2"], "mesh.trainer"),
        (["--topology", "v5e-1", "--config", "math_qwen3_4b"], "does not fit 1 x v5e-1: a device lacks"),
        (["--topology", "v5e-4", "run.steps"], "'run.steps': write it as section.key=value"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(words, message):
    done = launch(*REQUIRED, "--dry-run", *words, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_config_that_is_too_large_for_a_configmap_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 40_000)
    words = ["--config", "gsm8k_qwen2.5", "data.format=jsonl", "data.name=null", f"data.path={tmp_path}/rows.jsonl"]
    done = launch(*REQUIRED, *words, "--topology", "h100-8", "--dry-run", check=False)
    assert done.returncode == 2
    assert "copy rows.jsonl to the bucket or the claim" in done.stderr


def test_without_storage_there_is_no_manifest():
    words = [word for word in REQUIRED if word not in ("--bucket", "rl-runs")]
    done = launch(*words, "--topology", "v5e-4", "--dry-run", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "give --bucket or --pvc" in done.stderr


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A program of that name which notes its words and its input."""
    program = tmp_path / "kubectl"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/words\n[ "$1" != apply ] || cat > {tmp_path}/manifest\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    return tmp_path


def test_a_submission_pipes_the_manifests_to_kubectl_and_says_what_next(kubectl):
    words = [*REQUIRED, "--topology", "v5e-16"]
    command = ["bash", "launch/gke_tpu.sh", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (kubectl / "words").read_text().split() == ["apply", "-f", "-"]
    assert (kubectl / "manifest").read_text() == launch(*words, "--dry-run").stdout
    assert "launch/delete.sh demo --namespace default" in done.stdout


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        (
            "logs.sh",
            ["demo", "sampler", "--namespace", "rl"],
            ["logs --follow", "replicatedjob-name=sampler", "--namespace rl"],
        ),
        ("logs.sh", ["demo"], ["replicatedjob-name=trainer", "jobset-name=demo"]),
        (
            "status.sh",
            ["demo", "--namespace", "rl"],
            ["get jobset demo --namespace rl", "get pods", "jobset-name=demo"],
        ),
        ("delete.sh", ["demo"], ["delete", "jobset/demo configmap/demo networkpolicy/demo"]),
    ],
)
def test_scripts_about_a_job_that_runs_call_kubectl(script, words, expected, kubectl):
    subprocess.run(["bash", f"launch/{script}", *words], check=True)
    called = (kubectl / "words").read_text()
    assert all(text in called for text in expected), called
    wrong = subprocess.run(["bash", f"launch/{script}"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr.split(" NAME")[0]) == (2, f"usage: launch/{script}")


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch"]), ids=lambda path: path.name
)
def test_shell_scripts_parse_and_can_be_run(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.suffix == ".sbatch" or os.access(script, os.X_OK)
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck:
        subprocess.run([shellcheck, str(script)], check=True)


def test_the_image_holds_what_the_command_needs():
    dockerfile = (ROOT / "launch/Dockerfile").read_text()
    for needed in ("requirements.txt", "pyproject.toml", "README.md", "LICENSE", "oapl_jax ", "configs"):
        assert any(line.startswith("COPY") and needed in line for line in dockerfile.splitlines())
    (extras,) = re.findall(r"^ARG EXTRAS=([\w,]+)$", dockerfile, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes a program that notes its words and ends with a code."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def make(name, code=0):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $@" >> {tmp_path}/called\nexit {code}\n')
        (folder / name).chmod(0o755)
        return tmp_path / "called"

    return make


def tpu_vm(*words):
    done = subprocess.run(
        ["bash", "launch/tpu_vm.sh", *words, "--zone", "z"], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_a_slice_of_tpu_vms_is_a_queued_resource(programs):
    programs("gcloud")
    code, printed = tpu_vm("create", "slice", "--type", "v5p-64", "--version", "v2-alpha-tpuv5", "--spot", "--dry-run")
    assert code == 0
    assert "queued-resources create slice --node-id slice --zone z --accelerator-type v5p-64" in printed
    assert printed.splitlines()[0].endswith("--spot ")
    assert tpu_vm("create", "slice", "--type", "v5p-64")[0] == 2, "the runtime version is missing"


def test_a_config_is_brought_to_all_tpu_vms_and_run_there(programs):
    called = programs("gcloud")
    code, _ = tpu_vm("run", "slice", "--config", "quickstart", "run.steps=3")
    assert code == 0
    removed, copied, run = called.read_text().splitlines()
    assert removed.endswith("rm -rf oapl_config")
    assert re.search(r"scp --recurse --zone z --worker all \S+ slice:oapl_config$", copied)
    assert run.endswith("oapl/bin/oapl-jax train --config oapl_config/config.yaml --coordinator auto")
    assert tpu_vm("run", "slice", "--config", "missing")[0] == 2
    assert len(called.read_text().splitlines()) == 3, "nothing is started for a config that does not exist"


@pytest.mark.parametrize(("code", "is_requeued"), [(0, False), (42, True), (2, False)])
def test_a_slurm_job_is_queued_again_when_it_was_saved(code, is_requeued, programs, monkeypatch):
    called = programs("srun", code)
    programs("scontrol")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    done = subprocess.run(["bash", "launch/slurm.sbatch", "--config", "configs/quickstart.yaml"], check=False)
    assert done.returncode == code
    first, *rest = called.read_text().splitlines()
    assert first.endswith("oapl-jax train --config configs/quickstart.yaml")
    assert rest == (["scontrol requeue 7"] if is_requeued else [])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_skypilot_task_is_one_that_skypilot_reads(tmp_path):
    """In an environment of its own: SkyPilot brings half a gigabyte of packages."""
    python = tmp_path / "environment/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "skypilot"], check=True)
    alone = {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}

    program = """
import json, sky
task = sky.Task.from_yaml("launch/sky.yaml")
print(json.dumps([sorted(str(r.accelerators) for r in task.resources), task.envs["CONFIG"], [*task.storage_mounts]]))
"""
    done = subprocess.run([python, "-c", program], cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    assert read == [["{'A100-80GB': 8}", "{'H100': 8}"], "configs/gsm8k_qwen2.5.yaml", ["/runs"]]


def test_the_skypilot_task_runs_what_is_here(programs, tmp_path, monkeypatch):
    """Its shell, with the paths of this machine."""
    task = yaml.safe_load((ROOT / "launch/sky.yaml").read_text())
    called = programs("oapl-jax")
    for name, value in {**task["envs"], "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SKYPILOT_NODE_RANK", "1")
    monkeypatch.setenv("OVERRIDES", "run.steps=3 run.seed=1")
    assert "${PWD}/.venv/bin:" in task["run"]  # where setup installs; here the program is that of the test
    shell = task["run"].replace("cd /runs", f"cd {tmp_path}").replace("${PWD}/.venv/bin:", "")
    subprocess.run(["bash", "-c", shell], check=True)
    assert called.read_text().split() == [
        *("oapl-jax", "train", "--config", str(ROOT / "configs/gsm8k_qwen2.5.yaml")),
        *("--coordinator", "10.0.0.1:8476", "--num-processes", "2", "--process-id", "1", "run.steps=3", "run.seed=1"),
    ]

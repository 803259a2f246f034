"""Manifests of six topologies as ``launch/render.py`` made them: rerun this file after a change that is meant, and read the difference.

    PYTHONPATH=. python tests/golden/make_manifests.py

The ConfigMap is left out: it has the resolved config, and every new field of any section.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "tests/golden/launch"
sys.path.insert(0, str(ROOT / "launch"))

import manifests  # noqa: E402
import render  # noqa: E402

CASES = {
    "v5e-1": "quickstart --topology v5e-1 --bucket rl-runs --service-account trainer",
    "v5e-16": "math_qwen2.5_0.5b --topology v5e-16 --bucket rl-runs --service-account trainer --spot --queue tpu"
    " mode=detached --samplers 4",
    "v5p-64_2": "math_r1_distill_14b --topology v5p-64 --num-slices 2 --reservation ours --pvc runs"
    " --secret HF_TOKEN=hub:token --env HF_HOME=/data/hub",
    "v6e-256": "math_r1_distill_14b --topology v6e-256 --priority high --bucket rl-runs --grace 120",
    "tpu7x-128": "math_r1_distill_14b --topology tpu7x-128 --bucket rl-runs --namespace rl",
    "h100-16": "code_qwen2.5 --topology h100-16 --pvc runs mode=detached --samplers 2 --sampler-topology h100-1",
}


def make(case: str) -> str:
    """The text of all manifests but the ConfigMap."""
    job, _ = render.make_job(
        ["--config", *CASES[case].split(), "--image", "registry.example/oapl-jax:v1", "--name", "demo"]
    )
    text = manifests.to_yaml(job)
    comments, documents = text.split("apiVersion", 1)[0], text.split("---\n")[1:]
    return comments + "---\n".join(documents)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        (FOLDER / f"{name}.yaml").write_text(make(name))

# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # OAPL on real models
#
# First SmolLM2-135M on sums of two-digit numbers, on any runtime. Then Qwen2.5-0.5B on GSM8K on a T4, on one v5e chip (Colab) or on eight (Kaggle). Models and data come from the Hugging Face hub, or from folders of yours.

# %%
# @title Install
import os
import pathlib
import shutil
import subprocess
import sys

REPOSITORY = ""  # @param {type:"string"}
# An address to clone, or nothing with a wheel (oapl_jax*.whl) or an archive of the repository (oapl_jax*.zip, .tar.gz)
# in this folder.


def checkout() -> pathlib.Path | None:
    """The folder of the configs: this one, the one above, or what this cell made before."""
    here = pathlib.Path.cwd()
    places = (here, here.parent, here / "oapl_jax_source", *here.glob("oapl_jax_source/*"))
    return next((place for place in places if (place / "configs/quickstart.yaml").is_file()), None)


def install() -> None:
    """Installs the upload or the clone, with the JAX that it was tested with in place of the runtime's own."""
    here, target = pathlib.Path.cwd(), pathlib.Path("oapl_jax_source")
    wheels = sorted(here.glob("oapl_jax*.whl"))
    archives = sorted([*here.glob("oapl_jax*.zip"), *here.glob("oapl_jax*.tar.gz")])
    extra = "[tpu]" if "TPU_ACCELERATOR_TYPE" in os.environ else "[cuda]" if shutil.which("nvidia-smi") else ""
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    if wheels:
        subprocess.run([*pip, f"{wheels[-1]}{extra}"], check=True)
        found = subprocess.run([*pip[:3], "show", "-f", "oapl-jax"], check=True, capture_output=True, text=True).stdout
        places = dict(line.strip().split(": ", 1) for line in found.splitlines() if ": " in line)
        inside = next((line.strip() for line in found.splitlines() if line.endswith("/quickstart.yaml")), None)
        if inside is None:
            raise RuntimeError(f"{wheels[-1].name} has no configs: upload an archive of the repository instead")
        shutil.copytree((pathlib.Path(places["Location"]) / inside).parent, target / "configs")
        return
    if archives:
        shutil.unpack_archive(archives[-1], target)
    elif REPOSITORY:
        subprocess.run(["git", "clone", "--depth=1", REPOSITORY, str(target)], check=True)
    else:
        raise RuntimeError(
            "nothing to install: give REPOSITORY an address, or upload a wheel or an archive to this folder"
        )
    source = checkout()
    if source is None:
        raise RuntimeError(f"{target} has no configs/quickstart.yaml: is it the repository of oapl_jax?")
    subprocess.run([*pip, "-c", "requirements.txt", "-e", f".{extra}"], check=True, cwd=source)


if checkout() is None:
    had_jax = "jax" in sys.modules
    install()
    if had_jax:
        raise RuntimeError("JAX was imported before it was replaced: restart the session, and run this cell again")
os.chdir(checkout())
sys.path.insert(0, str(pathlib.Path.cwd()))

import jax

print(f"jax {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## SmolLM2-135M learns sums
#
# The prompt has three worked examples as raw text, the answer ends at the newline and is graded exactly. 100 steps took held-out pass@1 from 0.17 to 0.60 on two CPU cores (docs/results.md). The form field takes a name on the hub or a folder.

# %%
from oapl_jax import train
from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # @param {type:"string"}
STEPS = 100  # @param {type:"integer"}

overrides = [f"model.path={SMOLLM2}", f"run.steps={STEPS}", "run.dir=runs/notebook_sums"]
smoke = os.environ.get("OAPL_SMOKE")  # a test names a folder with a tiny model and a few questions
if smoke:
    overrides += [f"model.path={smoke}/model", "data.max_prompt_tokens=64", "run.steps=2", "window.sync_every=1"]
    overrides += ["learner.batch_rollouts=8", "sampler.groups_in_flight=1"]
    overrides += ["evaluation.every=2", "evaluation.prompts=4", "evaluation.samples=1", "evaluation.final_samples=1"]

sums = config_file.load(TrainConfig, "configs/sums_smollm2.yaml", overrides, CHECKS)

# %% [markdown]
# The plan says what memory the run will take, before it takes any.

# %%
for lines in train.describe(sums):
    print(lines)

# %%
summary = train.run(sums)
for when in ("before", "after"):
    print(when, {name: round(value, 3) for name, value in summary[when].items()})

# %% [markdown]
# A reward proves nothing before responses were read. These are of the last policy version:

# %%
from oapl_jax.rollouts.log import RolloutLog

log = RolloutLog(pathlib.Path(sums.run.dir) / "rollouts")
for group in log.read(log.versions()[-1])[:4]:
    print(repr(group.prompt.text.splitlines()[-1]))
    print("   ", [(item.text, str(item.grade.verdict)) for item in group.rollouts])

# %% [markdown]
# ## Qwen2.5-0.5B on GSM8K
#
# `configs/math_qwen2.5_0.5b.yaml` is for a v5e-8: weights, moments and rows are split over the eight chips (`mesh.trainer=fsdp=-1`), and each chip is a replica of the sampler. One chip has the same on itself, with smaller micro-batches. A T4 has no bfloat16 products, so it trains adapters in float32.
#
# The memory of each program on one chip, in GiB, as the compiler for TPUs gives it (`oapl-jax preflight`, made 2026-11-30 with jax 0.10.2; a v5e has 15.75 GiB; docs/preflight.md explains the columns):
#
# v5e-8:
#
# | program | arguments | temporaries | beside | total | of usable |
# |---|---|---|---|---|---|
# | `train_step` | 0.70 | 3.92 | 1.11 | 5.77 | 37% |
# | `score` | 0.23 | 1.18 | 1.57 | 3.00 | 19% |
# | `prefill` | 0.92 | 0.00 | 0.88 | 1.81 | 11% |
# | `decode` | 1.11 | 0.08 | 0.69 | 1.88 | 12% |
# | `sync` | 0.23 | 0.75 | 1.57 | 3.47 | 22% |
#
# v5e-1, with `learner.micro_batch_rows=1`:
#
# | program | arguments | temporaries | beside | total | of usable |
# |---|---|---|---|---|---|
# | `train_step` | 5.53 | 7.39 | 2.42 | 15.36 | 98% |
# | `score` | 1.85 | 1.21 | 6.10 | 9.17 | 58% |
# | `prefill` | 0.92 | 0.00 | 7.02 | 7.95 | 50% |
# | `decode` | 2.42 | 0.08 | 5.52 | 8.02 | 51% |
# | `sync` | 1.84 | 0.00 | 6.10 | 8.86 | 56% |
#
# We had none of these runtimes: the TPU programs were compiled for these chips and not run, the T4's settings were only checked.

# %%
QWEN = "Qwen/Qwen2.5-0.5B-Instruct"  # @param {type:"string"}
RUNTIME = "auto"  # @param ["auto", "T4", "v5e-1", "v5e-8", "other"]
GSM8K_STEPS = 50  # @param {type:"integer"}

SETTINGS = {
    "v5e-8": [],
    "v5e-1": ["learner.micro_batch_rows=1"],
    "T4": [
        "model.compute_dtype=float32",
        "model.remat=layer",
        "model.remat_names=[]",
        "sampler.dtype=float32",
        "lora.rank=16",
        "learner.learning_rate=2e-4",
        "learner.clip_norm=1.0",
        "learner.batch_rollouts=32",
        "learner.micro_batch_rows=2",
    ],
    "other": [],
}


def runtime() -> str:
    """The name of this machine's devices in ``SETTINGS``."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    if "T4" in kind:
        return "T4"
    return f"v5e-{count}" if "v5 lite" in kind and count in (1, 8) else "other"


chosen = runtime() if RUNTIME == "auto" else RUNTIME
overrides = [f"model.path={QWEN}", f"run.steps={GSM8K_STEPS}", "run.dir=runs/notebook_gsm8k", *SETTINGS[chosen]]
if smoke:
    overrides += [f"model.path={smoke}/model", f"data.path={smoke}/gsm8k.jsonl", "data.format=jsonl", "data.name=null"]
    overrides += [f"evaluation.path={smoke}/gsm8k.jsonl", "data.max_prompt_tokens=128"]
    overrides += ["sampler.max_response_tokens=16", "sampler.groups_in_flight=1", "learner.batch_rollouts=8"]
    overrides += ["learner.row_tokens=256", "learner.micro_batch_rows=1", "window.sync_every=1", "run.steps=1"]
    overrides += ["evaluation.prompts=2", "evaluation.samples=1", "evaluation.final_samples=1", "reward.workers=1"]

gsm8k = config_file.load(TrainConfig, "configs/math_qwen2.5_0.5b.yaml", overrides, CHECKS)
print("runtime:", chosen)

# %% [markdown]
# The plan on these devices, with the meshes and the account of memory, and how the learner's parameters are split: each dimension by the mesh axis that is named.

# %%
from oapl_jax.run.start import load

assembly, inputs = load(gsm8k)
inputs.grader.close()
for name, text in assembly.describe().items():
    print(f"{name:>14}  {text}")
for path, shape in jax.tree_util.tree_leaves_with_path(assembly.learner.shapes.params)[:8]:
    print(f"{jax.tree_util.keystr(path):50} {shape.shape!s:22} {getattr(shape.sharding, 'spec', '')}")

# %%
summary = train.run(gsm8k)
for when in ("before", "after"):
    print(when, {name: round(value, 3) for name, value in summary[when].items()})

# %% [markdown]
# ## Next
#
# - `report.html` in each run directory has the curves and the responses.
# - The trained model is in `export/`, as a Hugging Face folder.
# - Your own data and reward: docs/bring_your_own.md.

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
# # OAPL in ten minutes: a model that learns while you watch
#
# A small Qwen3 model learns left-to-right arithmetic modulo 10 by online, asynchronous OAPL ([arXiv 2602.19362](https://arxiv.org/abs/2602.19362)): a sampler thread draws and grades groups of rollouts with frozen weights while the learner trains, and every 50 learner steps the sampler gets the new weights. It takes a few minutes on any runtime, also without an accelerator. The outputs that are kept here are those of a run on two busy CPU cores (2026-11-30).

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
# ## The run
#
# A run is a YAML file; anything in it can be overridden by `section.key=value`. In a shell the next two cells are `oapl-jax train --config configs/quickstart.yaml`.

# %%
from oapl_jax import train
from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig

overrides = ["run.dir=runs/notebook"]
if "OAPL_SMOKE" in os.environ:  # a test runs this notebook to the end, in less time
    overrides += ["run.steps=20", "window.sync_every=10", "evaluation.every=10"]
    overrides += ["evaluation.prompts=32", "evaluation.final_samples=16"]

settings = config_file.load(TrainConfig, "configs/quickstart.yaml", overrides, CHECKS)
print(config_file.to_yaml(settings))

# %% [markdown]
# ## Train
#
# First the warm start (supervised, on noisy demonstrations), then OAPL. If the runtime stops, run the cell again: it resumes from the last checkpoint.

# %%
summary = train.run(settings)

# %% [markdown]
# ## What it learned
#
# pass@k on held-out prompts: the chance that at least one of k samples is correct.

# %%
print(f"{'':8}" + "".join(f"{name:>9}" for name in summary["after"]))
for when in ("before", "after"):
    print(f"{when:8}" + "".join(f"{value:9.3f}" for value in summary[when].values()))

# %%
from IPython.display import Image, display

run_dir = pathlib.Path(settings.run.dir)
display(Image(run_dir / "curves.png"))

# %% [markdown]
# ## Look at the rollouts
#
# Every group of rollouts is in the run directory, with token ids, log-probabilities, verdict and advantage. `report.html` beside it shows the curves, the configuration and some rollouts in one file.

# %%
from oapl_jax.rollouts.log import RolloutLog

log = RolloutLog(run_dir / "rollouts")
for version in (log.versions()[0], log.versions()[-1]):
    group = log.read(version)[0]
    print(f"policy version {version}: {group.prompt.text}   V* = {group.value:.3f}")
    for item in group.rollouts:
        print(f"    {item.text:12} {item.grade.verdict:8} advantage {item.advantage:+.3f}")

# %% [markdown]
# ## Next
#
# - Another lag: `window.sync_every=100` in `overrides`, with another `run.dir`.
# - The baseline: `objective.name=grpo` (and remove `objective.beta2` from the YAML file, which it has no use for).
# - A pretrained model: the notebook `real_model`. Finished data: the notebook `offline`.

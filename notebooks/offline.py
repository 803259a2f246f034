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
# # Offline: from a log of rollouts to a better model
#
# A policy's responses are sampled once, or come from elsewhere, and a model is trained on them later. This notebook makes a data set with the toy model of the quickstart, writes part of it as another program would, imports that, trains on both, and measures pass@k. It runs on a CPU in a few minutes.

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
# ## A data set of responses
#
# Eight responses of the start model, which is trained first (`configs/chain_sft.yaml`), to each of 1,024 prompts, graded. In a shell this is `oapl-jax generate`; started in several processes it shares the work.

# %%
from oapl_jax.cli import commands

PROMPTS, EPOCHS = 1024, 2
final_samples = 16
if "OAPL_SMOKE" in os.environ:  # a test runs this notebook to the end, in less time
    PROMPTS, EPOCHS, final_samples = 64, 1, 4

COMMON = """
data: {task: chain, max_prompt_tokens: 12}
sampler: {group_size: 8, max_response_tokens: 6, groups_in_flight: 16, decode_steps: 5}
"""


def oapl_jax(*words: str) -> None:
    """Runs a command as a shell would, and stops the notebook where it fails."""
    if code := commands.main(list(words)):
        raise RuntimeError(f"oapl-jax {words[0]} ended with code {code}: see above")


pathlib.Path("notebook_generate.yaml").write_text(
    f"""
run: {{dir: runs/notebook_data}}
model: {{warm_start: configs/chain_sft.yaml, scan_layers: false}}
{COMMON}
generation: {{prompts: {PROMPTS}}}
filter: {{min_correct: 1}}
"""
)
oapl_jax("generate", "--config", "notebook_generate.yaml")

# %% [markdown]
# ## Rollouts that others collected
#
# A record is a line of JSON with the token ids that were drawn and their log-probabilities. Here we write the first groups of our log as records, as if another program had made them. With a `reward` they keep it; without one they are graded here.

# %%
import json

from oapl_jax.rollouts.log import RolloutLog

groups = RolloutLog(pathlib.Path("runs/notebook_data/rollouts")).read(0)
with pathlib.Path("notebook_records.jsonl").open("w") as file:
    for group in groups[:32]:
        for item in group.rollouts:
            record = {
                "prompt_token_ids": group.prompt.token_ids.tolist(),
                "token_ids": item.rollout.token_ids.tolist(),
                "logprobs": item.rollout.logprobs.tolist(),
                "finish_reason": str(item.rollout.finish_reason),
                "prompt": group.prompt.text,
            }
            file.write(json.dumps(record) + "\n")
print(json.dumps(record))

# %% [markdown]
# ## Train on the log, in two rounds
#
# The first round has the records, the second one the log, without groups that nobody got right. A round starts from the policy of the round before.

# %%
pathlib.Path("notebook_offline.yaml").write_text(
    f"""
mode: offline
run: {{dir: runs/notebook_offline, steps: 1000}}
model: {{path: runs/chain_sft/export, tokenizer: characters, scan_layers: false}}
{COMMON}
objective: {{beta1: 1.0, beta2: 0.1}}
learner: {{batch_rollouts: 64, learning_rate: 1e-4, clip_norm: 1.0}}
offline:
  rounds:
    - {{log: runs/notebook_imported, epochs: 1}}
    - {{log: runs/notebook_data/rollouts/000000, epochs: {EPOCHS}, filter: {{min_correct: 1}}}}
evaluation: {{every: 0, prompts: 64, samples: 4, final_samples: {final_samples}}}
"""
)
shutil.rmtree("runs/notebook_imported", ignore_errors=True)
oapl_jax("import-rollouts", "notebook_records.jsonl", "runs/notebook_imported", "--config", "notebook_offline.yaml")
oapl_jax("train", "--config", "notebook_offline.yaml")

# %% [markdown]
# ## pass@k
#
# `summary.json` has pass@k on held-out prompts before and after. The command `evaluate --log` makes tables with intervals of any logs; here the start model's own log, on the training prompts.

# %%
summary = json.loads(pathlib.Path("runs/notebook_offline/summary.json").read_text())
for when in ("before", "after"):
    print(f"{when:8}", {name: round(value, 3) for name, value in summary[when].items()})

# %%
oapl_jax("evaluate", "--log", "start=runs/notebook_data", "--out", "runs/notebook_tables")

# %% [markdown]
# ## What was trained on
#
# `audit` proves it from the files.

# %%
oapl_jax("audit", "runs/notebook_offline")

"""How far the compiled TPU programs of the large configs are from the least work that they could do.

    PYTHONPATH=. .venv/bin/python benchmarks/roofline.py [--reports DIR] [--only NAME ...] [--json]

Reads the reports of ``preflight_tables.py`` in DIR, and makes those that are missing, which needs libtpu (``make tpu``).
Prints a table, or with ``--json`` a line of JSON for each case and one object with all of them last:

* ``decode_hbm``: bytes that decode steps move in HBM over those of the weights and of the live cache, each once a step.
  Rows are half-way through their responses, as far as there are pages for them. An embedding that is not the output
  matrix as well is only looked up, and is left out.
* ``train_flops``: FLOPs of the train step on all devices over model FLOPs. Of splash attention each counts the same
  formula; recomputation inside its backward kernels is not seen.
* ``train_hbm_over_compute``: the step's time by HBM bandwidth over that by peak FLOPs; above 1 it is bound by HBM.
* ``train_mfu``: the upper bound of preflight.
* ``train_ici``, ``train_dcn``: bytes that a device receives over the least: each weight once in the compute dtype and
  each gradient once in float32 within a slice, with four sums of the activations a layer over ``tensor``; the gradient
  once between slices. None where nothing has to be sent.

Bytes and FLOPs are those of the compiled programs (``oapl_jax/preflight/hlo.py``), the bytes of kernels those of their
lowered modules (``kernels.py``, which says what is assumed of scalars that only a run knows).
"""

import argparse
import json
import pathlib
import shlex
from typing import Any

import preflight_tables

from oapl_jax.build import policy
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.model.qwen import QwenConfig
from oapl_jax.preflight import topology
from oapl_jax.preflight.programs import architecture_file

COMPUTE_BYTES, GRADIENT_BYTES = 2, 4
"""Of a number in the forward and backward pass, and in the sum of gradients."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=pathlib.Path, default=pathlib.Path("runs/preflight"))
    parser.add_argument("--only", nargs="*", default=None, help="names of cases")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {}
    for cases in preflight_tables.CASES.values():
        for name, words in cases.items():
            if arguments.only is None or name in arguments.only:
                report = preflight_tables.read_report(arguments.reports, name, words)
                found[name] = ratios(report, words)
                if arguments.json:
                    print(json.dumps({name: found[name]}), flush=True)
    print(json.dumps(found) if arguments.json else table(found))


def ratios(report: dict[str, Any], words: str) -> dict[str, float | None]:
    """What a case takes over the least that it could take."""
    overrides = [word for word in shlex.split(words)[1:] if "=" in word]
    config = config_file.load(TrainConfig, shlex.split(words)[0], overrides)
    model = policy.read_config(pathlib.Path(architecture_file(config)))
    chip = topology.GENERATIONS[report["topology"]["generation"]]
    programs = {program["name"]: program for program in report["programs"]}
    train, decode = programs["train_step"], programs["decode"]
    received = {
        network: sum(each["num_bytes"] for each in train["collectives"] if each["network"] == network)
        for network in ("ICI", "DCN")
    }
    least = least_received(report, config, model)
    seconds = train["seconds"]
    return {
        "decode_hbm": decode["seconds"]["hbm"] * chip.hbm_bandwidth / least_decode_bytes(report, config, model),
        "train_flops": train["flops"] * report["topology"]["devices"] / train["model_flops"],
        "train_hbm_over_compute": seconds["hbm"] / seconds["compute"],
        "train_mfu": train["mfu"],
        "train_ici": received["ICI"] / least["ICI"] if least["ICI"] else None,
        "train_dcn": received["DCN"] / least["DCN"] if least["DCN"] else None,
    }


def least_decode_bytes(report: dict[str, Any], config: TrainConfig, model: QwenConfig) -> float:
    """Of ``sampler.decode_steps`` steps on one device."""
    memory, cache, tensor = report["memory"], report["kv_cache"], mesh_sizes(report, config)["tensor"]
    weights = memory["sampler_weights"]
    if not model.tie_word_embeddings:
        weights -= model.vocab_size * model.hidden_size / tensor * COMPUTE_BYTES
    live = min(config.data.max_prompt_tokens + config.sampler.max_response_tokens / 2, cache["tokens"] / cache["rows"])
    return config.sampler.decode_steps * (weights + memory["kv_cache"] * live * cache["rows"] / cache["tokens"])


def least_received(report: dict[str, Any], config: TrainConfig, model: QwenConfig) -> dict[str, float]:
    """Bytes that a device has to receive in a train step."""
    mesh, num_slices = mesh_sizes(report, config), report["topology"]["num_slices"]
    shards, tensor = mesh["fsdp"] * mesh["tensor"], mesh["tensor"]
    weights = model.num_params / shards
    rollouts = config.learner.batch_rollouts // config.learner.updates_per_batch
    tokens = rollouts * (config.sampler.max_response_tokens + config.data.max_prompt_tokens / config.sampler.group_size)
    of_device = tokens / (report["topology"]["devices"] / tensor)
    activations = 4 * model.num_hidden_layers * of_device * model.hidden_size * COMPUTE_BYTES
    per_slice = report["topology"]["devices"] / num_slices
    return {
        "ICI": (mesh["fsdp"] - 1) * weights * (COMPUTE_BYTES + GRADIENT_BYTES)
        + 2 * (tensor - 1) / tensor * activations,
        "DCN": 2 * (num_slices - 1) / num_slices * model.num_params * GRADIENT_BYTES / per_slice,
    }


def mesh_sizes(report: dict[str, Any], config: TrainConfig) -> dict[str, int]:
    """Of the axes of the mesh, which all cases have in common for trainer and sampler."""
    axes = dict.fromkeys(("data", "fsdp", "context", "tensor"), 1)
    axes |= {axis: int(size) for axis, size in (word.split("=") for word in config.mesh.trainer.split(","))}
    rest = report["topology"]["devices"]
    for size in axes.values():
        rest //= max(size, 1)
    return {axis: rest if size == -1 else size for axis, size in axes.items()}


def table(found: dict[str, dict[str, float | None]]) -> str:
    """Markdown."""
    names = list(next(iter(found.values())))
    lines = ["| case | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for case, values in found.items():
        lines.append(f"| {case} | " + " | ".join("" if x is None else f"{x:.2f}" for x in values.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""The README.md of an exported model: what it was made from and with, and what the run measured."""

import pathlib

from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.io import storage
from oapl_jax.io.metrics import METRICS_FILE, read_metrics
from oapl_jax.io.run_dir import SUMMARY_FILE
from oapl_jax.io.storage import SharedPath

CARD_FILE = "README.md"
PAPER = "https://arxiv.org/abs/2602.19362"
_TAGS = ("reinforcement-learning", "oapl", "jax")


def write_card(folder: pathlib.Path, config: TrainConfig, run_dir: SharedPath, step: int, dtype: str) -> None:
    """Writes the card of a checkpoint into its model folder, with what the run has measured so far."""
    name, model, data = config.objective.name, config.model, config.data
    start = model.path or model.warm_start or f"{model.config} (random weights)"
    objective = f"OAPL ([arXiv 2602.19362]({PAPER}))" if name == "oapl" else f"the objective `{name}`"
    trained_on = ", ".join(f"`{part.task or part.dataset or part.path}`" for part in data.sets.values() or [data])
    parts = [
        _front_matter(config),
        f"# {run_dir.resolve().name}, step {step}",
        f"Trained with oapl_jax by {objective}: {step:,} of {config.run.steps:,} learner steps of"
        f" {config.learner.batch_rollouts} rollouts, from `{start}`, on {trained_on}. Weights: {dtype}.",
        "## Results",
        _results(config, run_dir, step),
        "## Use",
        "A Hugging Face model folder: `transformers`, vLLM and `python -m oapl_jax evaluate` load it as it is.",
        "## Config of the run",
        f"```yaml\n{config_file.to_yaml(config).strip()}\n```",
    ]
    (folder / CARD_FILE).write_text(config_file.hide("\n\n".join(parts)) + "\n", encoding="utf-8")


def _front_matter(config: TrainConfig) -> str:
    """What the hub reads. Only names that may be on the hub are given: it refuses paths."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in _TAGS]
    if config.model.path is not None and _is_hub_name(config.model.path):
        lines.append(f"base_model: {config.model.path}")
    parts = config.data.sets.values() or [config.data]
    paths = [part.path for part in parts if part.format == "datasets" and part.path and _is_hub_name(part.path)]
    if paths:
        lines += ["datasets:", *(f"- {path}" for path in paths)]
    return "\n".join([*lines, "---"])


def _is_hub_name(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not pathlib.Path(path).exists()


def _results(config: TrainConfig, run_dir: SharedPath, step: int) -> str:
    """pass@k before the run and at this step, where the run measured it."""
    before, at_step = _measured(run_dir, 0), _measured(run_dir, step)
    summary_file = run_dir / SUMMARY_FILE
    if storage.exists(summary_file):
        summary = storage.read_object(summary_file)
        before = summary.get("before") or before
        at_step = summary["after"] if summary.get("steps") == step else at_step
    if not at_step:
        return f"The run did not evaluate step {step}; `python -m oapl_jax evaluate` does."
    names = [name for name in at_step if name in before] or list(at_step)
    distribution = config.evaluation
    rows = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, values in (("before", before), (f"step {step}", at_step)):
        if values:
            rows.append(f"| {title} | " + " | ".join(f"{values[name]:.3f}" for name in names) + " |")
    caption = (
        f"Unbiased pass@k on {distribution.prompts} held-out prompts at most, at temperature {distribution.temperature:g} and top-p"
        f" {distribution.top_p:g}, responses of at most {config.sampler.max_response_tokens:,} tokens."
    )
    return "\n".join(rows) + f"\n\n{caption}"


def _measured(run_dir: SharedPath, step: int) -> dict[str, float]:
    lines = [line for line in read_metrics(run_dir / METRICS_FILE) if line["step"] == step]
    found = lines[-1] if lines else {}
    return {name.removeprefix("evaluation/"): value for name, value in found.items() if "pass@" in name}

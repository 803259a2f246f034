"""The guard that stops a run at a metric that is NaN or infinite."""

import math
from collections.abc import Iterable

from oapl_jax.types import Metrics, RunError


def check_finite(step: int, metrics: Metrics, names: Iterable[str]) -> None:
    """Raises RunError for the first of ``names`` whose value is NaN or infinite."""
    for name in names:
        value = float(metrics[name])
        if not math.isfinite(value):
            raise RunError(
                f"{name} is {value} at step {step}; the run stops here and its last checkpoint is kept.\n"
                "  What to do: start again from that checkpoint with a lower learner.learning_rate or"
                " learner.clip_norm, or a higher objective.beta2;\n"
                "  learner/grad_norm and learner/log_ratio_min in metrics.jsonl show whether it came gradually;"
                " model.compute_dtype=float32 rules out overflow."
            )

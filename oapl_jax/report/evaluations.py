"""pass@k of a run on its held-out prompts: at its start, on its way and at its end."""

from typing import Any, NamedTuple

import numpy as np

from oapl_jax.evaluation import passk
from oapl_jax.io import json_lines
from oapl_jax.io.storage import SharedPath
from oapl_jax.report.curves import Curve

MOST_PROMPTS, MOST_COLUMNS, MOST_CURVES = 200, 40, 4
_SEED = 20_260


class Evaluation(NamedTuple):
    """Counts of each prompt after a step."""

    step: int
    prompts: list[str]
    graded: np.ndarray
    correct: np.ndarray

    @property
    def rates(self) -> dict[str, float]:
        """Share of correct samples, by prompt."""
        return dict(zip(self.prompts, (self.correct / self.graded).tolist(), strict=True))


class Scores(NamedTuple):
    """pass@k over k."""

    label: str
    k: list[int]
    value: list[float]
    low: list[float]
    """Of the 95 % bootstrap interval over prompts; empty where the counts of the prompts are not known."""
    high: list[float]


class Gain(NamedTuple):
    """What training changed in pass@1, from the first to the last evaluation."""

    before: float
    after: float
    interval: tuple[float, float] | None
    """95 % of the difference, paired over prompts; None where the counts of the prompts are not known."""
    num_prompts: int


class Solved(NamedTuple):
    """The share of correct samples by prompt and evaluation; prompts that were solved first come first."""

    prompts: list[str]
    steps: list[int]
    shares: list[list[float | None]]
    num_prompts: int
    """Also those that are left out."""


def read_evaluations(path: SharedPath) -> list[Evaluation]:
    """The evaluations of a run by step, the last one of each; empty where there is no such file.

    Raises:
        ValueError: a line is damaged.
    """
    found = {}
    for line in json_lines.stream(path):
        step, prompts = line["step"], line.get("prompts")
        counts = [line.get("graded"), line.get("correct")]
        if not isinstance(prompts, list) or not all(_are_counts(item, len(prompts)) for item in counts):
            raise ValueError(f"{path}: step {step}: needs prompts, and graded and correct samples of each")
        graded, correct = (np.array(item, np.int64) for item in counts)
        if (correct > graded).any() or not graded.all():
            raise ValueError(f"{path}: step {step}: a prompt has more correct samples than graded ones, or none")
        found[step] = Evaluation(step, [str(name) for name in prompts], graded, correct)
    return [found[step] for step in sorted(found)]


def score(evaluations: list[Evaluation], summary: dict[str, Any], curves: dict[str, Curve]) -> list[Scores]:
    """pass@k of the base first, of some steps or offline epochs, and of the newest policy last.

    Without counts of prompts the values are those of summary.json, and in an unfinished run those of metrics.jsonl.
    """
    if evaluations:
        chosen = [evaluations[i] for i in _spread(len(evaluations), MOST_CURVES)]
        return [_score(item) for item in chosen]
    rows = {"before": summary.get("before", {})}
    rows |= {f"round {item['round']}, epoch {item['epoch']}": item for item in summary.get("epochs", ())}
    rows["after"] = summary.get("after", {})
    if not summary:
        ends = {name.partition("/")[2]: curve.points()["y"] for name, curve in curves.items() if "/pass@" in name}
        rows = {"before": {name: values[0] for name, values in ends.items()}}
        rows["newest"] = {name: values[-1] for name, values in ends.items() if len(values) > 1}
    found = {label: dict(sorted(by_k(values).items())) for label, values in rows.items()}
    return [Scores(label, list(rates), list(rates.values()), [], []) for label, rates in found.items() if rates]


def gain(evaluations: list[Evaluation], scores: list[Scores]) -> Gain | None:
    """The change of pass@1 in a run; None where it was not evaluated twice."""
    if len(evaluations) < 2:
        ends = [item.value[item.k.index(1)] for item in scores if 1 in item.k]
        return Gain(ends[0], ends[-1], None, 0) if len(ends) > 1 else None
    first, last = evaluations[0].rates, evaluations[-1].rates
    shared = [name for name in first if name in last]
    before, after = (np.array([rates[name] for name in shared])[:, None] for rates in (first, last))
    low, high = passk.interval(passk.resampled_means(after - before, np.random.default_rng(_SEED)))
    return Gain(float(before.mean()), float(after.mean()), (float(low[0]), float(high[0])), len(shared))


def solved(evaluations: list[Evaluation]) -> Solved:
    """The matrix, with rows and columns left out evenly where there are too many."""
    columns = [evaluations[i] for i in _spread(len(evaluations), MOST_COLUMNS)]
    shares = [item.rates for item in columns]
    rows = {name: [of.get(name) for of in shares] for name in dict.fromkeys(n for of in shares for n in of)}

    def solved_at(name: str) -> tuple[int, float]:
        half = [i for i, share in enumerate(rows[name]) if share is not None and share >= 0.5]
        return half[0] if half else len(columns), -(rows[name][-1] or 0.0)

    names = sorted(rows, key=solved_at)
    chosen = [names[i] for i in _spread(len(names), MOST_PROMPTS)]
    return Solved(chosen, [item.step for item in columns], [rows[name] for name in chosen], len(names))


def _score(item: Evaluation) -> Scores:
    ks = [2**i for i in range(int(item.graded.min()).bit_length())]
    values = passk.pass_at_ks(item.graded, item.correct, ks[-1])[:, np.array(ks) - 1]
    low, high = passk.interval(passk.resampled_means(values, np.random.default_rng(_SEED)))
    label = "before" if item.step == 0 else f"step {item.step}"
    return Scores(label, ks, values.mean(axis=0).tolist(), low.tolist(), high.tolist())


def by_k(values: dict[str, float]) -> dict[int, float]:
    """Values by k, without those of single data sets; raises a ValueError where a name or value is none."""
    if not isinstance(values, dict):
        raise ValueError(f"pass@k is {values!r:.40}, not an object")
    found = {name: value for name, value in values.items() if name.startswith("pass@")}
    try:
        return {int(name.removeprefix("pass@")): float(value) for name, value in found.items()}
    except (TypeError, OverflowError):
        raise ValueError(f"pass@k is {found!r:.80}, not numbers") from None


def _spread(length: int, most: int) -> list[int]:
    """Indices from the first to the last, evenly; ``most`` of them, where there are more."""
    return sorted({round(i * (length - 1) / max(1, min(most, length) - 1)) for i in range(min(most, length))})


def _are_counts(found: Any, length: int) -> bool:
    return isinstance(found, list) and len(found) == length and all(type(n) is int and 0 <= n < 2**31 for n in found)

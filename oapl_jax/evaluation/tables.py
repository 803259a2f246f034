"""Scores as files (results.json, results.csv) and as a printed table."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from oapl_jax.evaluation.scores import AVERAGE, Score, Value, shown_ks
from oapl_jax.evaluation.tally import Tally
from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.io.terminal import visible

JSON_FILE, CSV_FILE = "results.json", "results.csv"
MAX_NAMED = 5
FORMULA = re.compile(r"[\s=+@\-\uff1d\uff0b\uff20\uff0d]")
"""How a text begins that a spreadsheet takes for a formula, in full-width characters too."""
_CSV = ("label", "benchmark", "baseline", "metric", "k", "value", "low", "high", "problems", "short")


def write(directory: SharedPath, scores: Sequence[Score], comparisons: Sequence[Score]) -> None:
    """Writes both files, each of them atomically."""
    records = {
        "scores": [_record(item, {"counts": item.counts}) for item in scores],
        "comparisons": [_record(item, {"baseline": item.baseline, **item.counts}) for item in comparisons],
    }
    storage.replace(directory / JSON_FILE, json.dumps(records, indent=1, allow_nan=False).encode() + b"\n")
    rows = io.StringIO(newline="")
    writer = csv.writer(rows, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(_CSV)
    for item in [*scores, *comparisons]:
        names = [_quoted(name) for name in (item.label, item.benchmark, item.baseline)]
        writer.writerows([*names, *v] for v in item.values)
    storage.replace(directory / CSV_FILE, rows.getvalue().encode())


def render(scores: Sequence[Score], comparisons: Sequence[Score]) -> str:
    """The table that the command prints: pass@k in percent with its interval, avg@k, maj@k and counts."""
    lines = []
    for benchmark in dict.fromkeys(item.benchmark for item in scores):
        members = [item for item in scores if item.benchmark == benchmark]
        ks = _columns(max((v.k for item in members for v in item.of("pass")), default=0))
        width = max(len(item.label) for item in members)
        lines += ["", f"{benchmark}: {members[0].counts['problems']:,.0f} problems, pass@k in percent [95 %]"]
        lines.append(
            f"{'':{width}}  " + "".join(f"{f'k={k}':>22}" for k in ks) + "    avg    maj   tokens  truncated  invalid"
        )
        for item in members:
            found = {v.k: v for v in item.of("pass")}
            cells = "".join(f"{_cell(found.get(k)):>22}" for k in ks)
            counts = item.counts
            lines.append(
                f"{item.label:{width}}  {cells}{_last(item, 'avg'):>7}{_last(item, 'maj'):>7}{counts['response_tokens']:9,.0f}"
                f"{counts['truncated']:11.1%}{counts['verdict_invalid']:9,.0f}"
            )
    if comparisons:
        lines += ["", f"pass@k minus that of {comparisons[0].baseline}, in points, on the same problems [95 %, paired]"]
    for item in comparisons:
        ks = {1, *shown_ks(max(v.k for v in item.values))[-1:]}
        cells = "  ".join(f"k={v.k}: {_cell(v, '+')}" for v in item.values if v.k in ks)
        unpaired = f"  ({item.counts['unpaired']} unpaired problems)" if item.counts["unpaired"] else ""
        lines.append(f"{item.label}, {item.benchmark}: {cells}{unpaired}")
    return "\n".join(lines).strip("\n")


def shortages(label: str, tallies: Sequence[Tally]) -> Iterator[str]:
    """A line for each benchmark whose problems have different numbers of samples."""
    for tally in tallies:
        most = int(tally.num_samples.max())
        short = [f"{item.id} ({len(item.is_correct)})" for item in tally.problems if len(item.is_correct) < most]
        if short:
            more = f" and {len(short) - MAX_NAMED} more" if len(short) > MAX_NAMED else ""
            yield (
                f"{label}, {tally.benchmark}: {len(short)} of {len(tally.problems)} problems have fewer than {most} samples"
                f" with a verdict, so they are left out of pass@k for larger k: {', '.join(short[:MAX_NAMED])}{more}"
            )


def _quoted(text: str) -> str:
    """A text that a spreadsheet shows and does not calculate."""
    return f"'{visible(text)}" if FORMULA.match(text) else visible(text)


def _record(item: Score, rest: dict[str, Any]) -> dict[str, Any]:
    names = ("value", "low", "high", "problems", "short")
    values = {f"{v.metric}@{v.k}": dict(zip(names, v[2:], strict=True)) for v in item.values}
    return {"label": item.label, "benchmark": item.benchmark, **rest, "values": values}


def _columns(max_k: int) -> list[int]:
    """At most six values of k, so that a line fits on a screen."""
    ks = shown_ks(max_k)
    return ks if len(ks) <= 6 else [*(k for k in (1, 4, 16, 64) if k < max_k), max_k]


def _cell(value: Value | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{100 * value.value:{sign}.1f} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"


def _last(item: Score, metric: str) -> str:
    """The value at the largest k; the average over benchmarks has none."""
    values = item.of(metric)
    return f"{100 * values[-1].value:.1f}" if values and item.benchmark != AVERAGE else "-"

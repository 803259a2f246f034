"""Records of runs as the JSON that a page carries, and as that page."""

import base64
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

import jinja2

from oapl_jax.io.terminal import visible
from oapl_jax.report import curves, evaluations, findings, reservoir
from oapl_jax.report.record import RunRecord, differences
from oapl_jax.rollouts.diagnostics import TokenLogprobs
from oapl_jax.types import RolloutGroup

MOST_BYTES = 8_000_000
"""Of the JSON."""
LONGEST_TEXT = 3000
"""Characters of a text of a rollout; fewer, where the JSON would be too long."""

CHARACTERS_PER_TOKEN = 4
"""What a token of a heat map takes of the characters of its rollout."""


def render(records: Sequence[RunRecord], *, is_served: bool = False) -> str:
    """The page: HTML, with style, script and data inside. A served page asks its server for newer data."""
    folder = pathlib.Path(__file__).parent
    script, style = ((folder / f"report.{kind}").read_text("utf-8") for kind in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((folder / "report.html.jinja").read_text("utf-8"))
    data = to_json(records, is_served=is_served)
    name = visible(records[0].directory.resolve().name)
    return template.render(name=name, style=style, script=script, digest=digest, data=data)


def to_json(records: Sequence[RunRecord], *, is_served: bool = False) -> str:
    """What the script draws. It has no ``<``, so that no text in it can end the element that it stands in."""
    page = {
        "runs": [_run(record) for record in records],
        "panels": [panel._asdict() for panel in curves.PANELS],
        "rules": {"curves": curves.RULE, "rollouts": reservoir.RULE},
        "differences": differences(list(records)),
        "served": is_served,
    }
    longest = LONGEST_TEXT
    while True:
        groups = [[group(item, record, longest) for item in record.log.groups] for record in records]
        for run, of_run in zip(page["runs"], groups, strict=True):
            run["groups"] = of_run
        text = dump(page)
        if len(text.encode()) <= MOST_BYTES or longest < 10:
            return text
        longest //= 2


def dump(value: Any) -> str:
    """JSON without ``<``, NaN and control characters."""
    text = json.dumps(_printable(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def group(found: RolloutGroup, record: RunRecord, longest: int = LONGEST_TEXT) -> dict[str, Any]:
    """A group with its rollouts, the middle of long texts left out."""
    found_logprobs = record.token_logprobs.get(found.id)
    of_tokens = [] if found_logprobs is None else found_logprobs.rollouts
    rollouts = [
        {
            "text": _shorten(item.text, longest),
            "verdict": item.grade.verdict.value,
            "detail": _shorten(item.grade.detail, longest),
            "reward": item.grade.reward,
            "advantage": item.advantage,
            "logprob": float(item.rollout.logprobs.sum(dtype="float64")),
            "tokens": len(item.rollout.token_ids),
            "finish": item.rollout.finish_reason.value,
            "extra": "" if item.extra == "{}" else _shorten(item.extra, longest),
            "heat": _heat(logprobs, longest // CHARACTERS_PER_TOKEN),
        }
        for item, logprobs in itertools.zip_longest(found.rollouts, of_tokens[: len(found.rollouts)])
    ]
    return {
        "id": found.id,
        "version": found.policy_version,
        "name": found.prompt.id,
        "prompt": _shorten(found.prompt.text, longest),
        "answer": _shorten(found.prompt.answer, longest),
        "value": found.value,
        "steps": record.trained_at.get(found.id),
        "heat_step": None if found_logprobs is None else found_logprobs.step,
        "rollouts": rollouts,
    }


def _heat(found: TokenLogprobs | None, most_tokens: int) -> list[tuple[str, float, float]] | None:
    """Text and log-probabilities, of learner and sampler, of the first tokens of a response."""
    return None if found is None else list(zip(*(column[:most_tokens] for column in found), strict=True))


def _run(record: RunRecord) -> dict[str, Any]:
    metrics, summary = record.metrics, record.summary
    totals = {name: metrics.curves[name].total for name in metrics.curves if name.endswith("seconds")}
    return {
        "name": record.directory.resolve().name,
        "verdict": findings.verdict(record),
        "warnings": findings.warnings(record),
        "facts": {name: summary[name] for name in ("steps", "rollouts", "seconds") if name in summary},
        "curves": {name: curve.points() for name, curve in sorted(metrics.curves.items())},
        "syncs": metrics.syncs,
        "scores": [item._asdict() for item in record.scores],
        "solved": evaluations.solved(record.evaluations)._asdict(),
        "counts": [dataclasses.asdict(item) for item in record.log.counts],
        "reasons": record.log.reasons,
        "damaged": record.log.damaged,
        "seconds": totals,
        "starts": record.starts,
        "num_trained": record.num_trained,
        "config": record.config,
        "command": _command(record),
    }


def _command(record: RunRecord) -> str:
    """What makes the run go on, or begins it again elsewhere; '' for a directory of another command."""
    command = {"run.steps": "sft", "window.sync_every": "train"}
    names = [name for key, name in command.items() if key in record.settings]
    directory = record.directory.resolve()
    words = ["oapl-jax", *names[-1:], "--config", str(directory / "config.yaml"), f"run.dir={directory}"]
    return shlex.join(words) if names else ""


def _printable(value: Any) -> Any:
    """The value with control characters shown, and null for numbers that JSON does not have."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {visible(str(key)): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list | tuple) else value


def _shorten(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters omitted …\n{text[-half:]}"

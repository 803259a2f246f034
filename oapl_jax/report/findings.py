"""What a run has come to, in words: what was trained, how much better it is, and what should make one suspicious."""

import math
import pathlib
from collections.abc import Iterator

from oapl_jax.report.evaluations import gain
from oapl_jax.report.record import RunRecord
from oapl_jax.rollouts.surface import MOST_AT_START, SHARE
from oapl_jax.types import Verdict

MOST_TRUNCATED, MOST_INVALID = 0.2, 0.05
LEAST_ENTROPY, LEAST_ENTROPY_SHARE = 0.02, 0.1
"""Nats per token, and of the entropy at the start."""
STALE_SHARE = 0.95
LEAST_LOG_RATIO = -10.0
"""Nats per response; docs/metrics.md has the reasons for these bounds."""


def verdict(record: RunRecord) -> str:
    """One to three sentences."""
    settings, summary = record.settings, record.summary
    step = record.metrics.last_step
    if step is None:
        return "Nothing recorded yet: metrics.jsonl is missing or empty."
    data = settings.get("data.task", "None")
    data = f"the task {data}" if data != "None" else settings.get("data.path", "its prompts")
    name = settings.get("objective.name", "oapl")
    models = [settings.get(f"model.{key}", "None") for key in ("path", "warm_start", "config")]
    model = next((pathlib.PurePath(text).name for text in models if text != "None"), "A model")
    model = model.removesuffix(".yaml").removesuffix(".json")
    length = f"{step:,} steps" + (f", {summary['rollouts']:,} rollouts" if "rollouts" in summary else "")
    end = "" if summary else f"Not finished: the last recorded step is {step}, and summary.json is missing. "
    text = f"{end}{model} was trained on {data} by {name} for {length}."
    found = gain(record.evaluations, record.scores)
    if found is None:
        first, last = _ends(record, "rollouts/reward")
        if math.isnan(first):
            return text
        return f"{text} No two held-out evaluations; the training reward went from {first:.3f} to {last:.3f}."
    change = found.after - found.before
    text += f" Held-out pass@1 went from {found.before:.3f} to {found.after:.3f} ({100 * change:+.1f} points"
    if found.interval is None:
        return f"{text}; no interval: {record.directory.name} has no counts by prompt)."
    low, high = found.interval
    sure = "better" if low > 0 else "worse" if high < 0 else "neither better nor worse beyond chance"
    return f"{text}, 95 % between {100 * low:+.1f} and {100 * high:+.1f}, paired over {found.num_prompts:,} prompts): {sure}."


def warnings(record: RunRecord) -> list[str]:
    """What a person should look at, the gravest first."""
    texts = [text for check in (_gamed, _endless, _collapsed, _ungraded) for text in check(record)]
    if damaged := record.log.damaged:
        texts.append(f"Files of the rollout log or of the batch record that could not be read: {len(damaged)}.")
    return texts


def _ends(record: RunRecord, name: str) -> tuple[float, float]:
    """Means of a metric over the first and the last tenth of a run; NaN where it is not recorded."""
    curves = record.metrics.curves
    return curves[name].ends() if name in curves else (math.nan, math.nan)


def _gamed(record: RunRecord) -> Iterator[str]:
    _, copied = _ends(record, "rollouts/copied")
    before, form = _ends(record, "rollouts/same_form")
    if copied >= SHARE:
        yield f"Reward hacking? {copied:.0%} of the correct responses at the end consist of passages of their prompt."
    if form >= SHARE and before < MOST_AT_START:
        yield f"Reward hacking? {form:.0%} of the correct responses at the end have one form, {before:.0%} at the start."


def _endless(record: RunRecord) -> Iterator[str]:
    _, truncated = _ends(record, "rollouts/truncated")
    if truncated >= MOST_TRUNCATED:
        yield f"Non-termination: {truncated:.0%} of the responses at the end are cut at the limit."
    reward, finished = _ends(record, "rollouts/reward")[1], _ends(record, "rollouts/finished_reward")[1]
    if finished < reward - 0.02:
        yield f"Responses are rewarded that never end: reward {reward:.3f}, {finished:.3f} of those that end by themselves."


def _collapsed(record: RunRecord) -> Iterator[str]:
    before, after = _ends(record, "learner/entropy")
    if after < LEAST_ENTROPY or after < LEAST_ENTROPY_SHARE * before:
        yield f"Collapse of entropy: from {before:.3f} to {after:.3f} nats per token."
    _, log_ratio = _ends(record, "learner/log_ratio")
    if log_ratio < LEAST_LOG_RATIO:
        yield f"The KL term has no hold: the log-ratio at the end is {log_ratio:.1f} nats per response."


def _ungraded(record: RunRecord) -> Iterator[str]:
    _, invalid = _ends(record, "rollouts/invalid")
    if invalid >= MOST_INVALID:
        reason = next((reason for kind, reason, _ in record.log.reasons if kind == Verdict.INVALID), "")
        because = f"; {reason}" if reason else ""
        yield f"Failing grader: {invalid:.0%} of the rollouts at the end have no verdict{because}."
    _, equal = _ends(record, "rollouts/equal_reward_groups")
    if equal >= STALE_SHARE:
        yield f"Stale grader, or prompts that teach nothing: in {equal:.0%} of the groups at the end all rewards are equal."

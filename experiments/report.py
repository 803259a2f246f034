"""The results of a grid as Markdown and figures, from what its runs have left on disk."""

import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from experiments import claims, figures
from experiments.claims import Pair
from experiments.grid import Grid, Run, Settings, Side, arm_runs, search_runs
from experiments.records import Record, read
from experiments.runner import is_over

RESULTS_FILE = "results.md"
_SHOWN = ("pass@1", "pass@10", "pass@64", "entropy")


class Choice(NamedTuple):
    """What a search has found."""

    settings: Settings
    values: list[tuple[Settings, float]]
    """pass@1 at the end of each run, on the prompts of the search; of a run that diverged, in its last evaluation."""


def choose(grid: Grid, name: str, out: pathlib.Path) -> Choice | None:
    """The settings with the best pass@1 at the end; None while runs of the search are missing."""
    runs, prompts = search_runs(grid, name, out), slice(0, grid.search_prompts)
    if not all(is_over(run, out) for _, run in runs):
        return None
    values = [(settings, _read(run, out, prompts).value("pass@1", "final")) for settings, run in runs]
    return Choice(max(values, key=lambda item: item[1])[0], values)


def records(grid: Grid, name: str, out: pathlib.Path) -> dict[Pair, Record]:
    """The records of the runs of an arm that have ended, by their pairs."""
    search = grid.arms[name].search
    choice = choose(grid, search, out) if search else None
    if search and choice is None:
        return {}
    runs = arm_runs(grid, name, choice.settings if choice else {}, out)
    prompts = slice(grid.search_prompts, grid.search_prompts + grid.test_prompts)
    return {pair: _read(run, out, prompts) for pair, run in runs.items() if is_over(run, out)}


def write(grid: Grid, out: pathlib.Path) -> pathlib.Path:
    """Writes ``results.md`` and its figures; what has not been run is left out, and said."""
    found = {name: records(grid, name, out) for name in grid.arms}
    drawn = [name for name, figure in grid.figures.items() if figures.draw(out / f"{name}.png", figure, found)]
    parts = [f"# {grid.title}\n", _claims(grid, found), _arms(grid, found), _searches(grid, out)]
    parts += [f"![{grid.figures[name].title}]({name}.png)\n" for name in drawn]
    path = out / RESULTS_FILE
    path.write_text("\n".join(parts))
    return path


def _claims(grid: Grid, found: Mapping[str, Mapping[Pair, Record]]) -> str:
    lines = [
        "## Claims\n",
        "Left minus right, pair by pair. A claim is reproduced where the difference is above 0 in every pair and the 95 %"
        " interval (Student's t over the pairs) leaves 0 out, in each metric; not, where it is below 0 in that way in one.\n",
        "| claim | verdict | metric | left | right | difference [95 %] | pairs above 0 |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in grid.claims:
        differences = claims.examine(claim, found)
        what = f"{claim.text} ({claim.source}): {_side(claim.left)} above {_side(claim.right)}"
        if not differences:
            lines.append(f"| {what} | not run | | | | | |")
        for i, item in enumerate(differences):
            first = (what, f"**{claims.verdict(differences)}**") if i == 0 else ("", "")
            low, high = item.interval
            above = f"{sum(d > 0 for d in item.differences)} of {len(item.differences)}"
            interval = f"{item.mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if math.isfinite(low) else "")
            cells = (*first, item.metric, _value(*item.left), _value(*item.right), interval, above)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _arms(grid: Grid, found: Mapping[str, Mapping[Pair, Record]]) -> str:
    lines = [
        "## Arms\n",
        "Mean +- standard error over the pairs of a warm start and a seed, before -> after. Mismatch: the mean"
        " |log pi - log pi_sampler| of a response in nats while both have the same weights, its smallest and largest batch.\n",
        f"| arm | task | lag | pairs | rollouts | {' | '.join(_SHOWN)} | best pass@1 | mismatch |",
        f"|---|---|---|---|---|{'---|' * len(_SHOWN)}---|---|",
    ]
    for name, members in found.items():
        if not members:
            continue
        arm, first = grid.arms[name], next(iter(members.values()))
        cells = [name, arm.task, str(arm.lag or ""), str(len(members)), f"{first.rollouts[-1]:,}"]
        for metric in _SHOWN:
            start, end = ([r.value(metric, at) for r in members.values()] for at in ("start", "final"))
            is_known = np.isfinite(start).all() and np.isfinite(end).all()
            cells.append(f"{np.mean(start):.3f} -> {_summary(end)}" if is_known else "")
        cells.append(_summary([r.value("pass@1", "best") for r in members.values()]))
        mismatches = np.concatenate([r.mismatches for r in members.values()])
        cells.append(f"{mismatches.min():.1e} to {mismatches.max():.1e}" if mismatches.size else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _searches(grid: Grid, out: pathlib.Path) -> str:
    lines = [
        "## Searches\n",
        f"pass@1 at the end, on {grid.search_prompts} prompts that no claim is judged on; the best is in bold.\n",
    ]
    for name in grid.searches:
        if choice := choose(grid, name, out):
            tried = (
                f"{'**' if settings == choice.settings else ''}"
                f"{_short(settings)}: {result:.3f}"
                f"{'**' if settings == choice.settings else ''}"
                for settings, result in choice.values
            )
            lines.append(f"- `{name}`: {'; '.join(tried)}")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _read(run: Run, out: pathlib.Path, prompts: slice) -> Record:
    return read(out / run.name, run.config["learner"]["batch_rollouts"], prompts)


def _side(side: Side) -> str:
    return f"`{side.arm}` {side.at}"


def _short(settings: Settings) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in settings.items())


def _summary(values: list[float]) -> str:
    return _value(*claims.mean_and_error(values))


def _value(mean: float, error: float) -> str:
    return f"{mean:.3f}" + (f" +- {error:.3f}" if math.isfinite(error) else "")

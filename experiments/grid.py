"""A grid of training runs in YAML: tasks, methods, searches for hyperparameters, arms, claims; and the config of each run.

An arm is a method on a task at a lag, with the settings that its search chose. It is trained once for each pair of a
warm start and a seed, and arms are compared pair by pair.
"""

import copy
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from omegaconf import OmegaConf
from pydantic import Field

from oapl_jax.config.config_file import validate
from oapl_jax.config.section import Count, Section

Settings = dict[str, Any]
"""Values of a config by dotted keys; a key without a dot takes the place of a whole section."""

Moment = Literal["start", "middle", "third", "final", "best"]
"""Which evaluation of a run: before training; the last one within half or a third of its steps; the last; the best of
those after the start."""


class Task(Section):
    """A config of ``oapl-jax train``, and the config of ``oapl-jax sft`` that makes its warm start, if it has one."""

    config: str
    settings: Settings = Field(default={})
    warm_start: str | None = None
    warm_settings: Settings = Field(default={})


class Search(Section):
    """Runs of one method over all combinations of some values, on the first pair, judged on prompts of their own."""

    task: str
    method: str
    lag: Count | None = None
    values: dict[str, list[Any]]
    settings: Settings = Field(default={})


class Arm(Section):
    """A method on a task at a lag, trained for each pair."""

    task: str
    method: str
    lag: Count | None = None
    """Learner steps between two weight syncs; null: that of the task's config."""
    search: str | None = None
    """Whose best settings it takes."""
    settings: Settings = Field(default={})
    pairs: Count | None = None
    """How many of the grid's pairs are trained, the first ones; null: all."""
    sampler: tuple[str, ...] = ()
    """The words after ``oapl-jax sample --run RUN``, of a detached sampler beside each run; none: it samples itself."""


class Side(Section):
    """What a claim compares: an arm at a moment of its runs."""

    arm: str
    at: Moment = "final"


class Claim(Section):
    """That one side is above another, in each of some metrics."""

    text: str
    source: str
    """Where the paper says it."""
    left: Side
    right: Side
    metrics: tuple[str, ...]
    """``pass@k``, or ``entropy``: nats a response, averaged over a tenth of the steps."""


class Figure(Section):
    """A picture: a metric of some arms, over the rollouts of their runs, or pass@k over k."""

    title: str
    kind: Literal["curve", "pass_at_k"]
    arms: tuple[str, ...]
    metric: str = "pass@1"


class Grid(Section):
    """The whole of a grid file."""

    title: str
    tasks: dict[str, Task]
    methods: dict[str, Settings]
    searches: dict[str, Search] = Field(default={})
    arms: dict[str, Arm] = Field(default={})
    pairs: list[tuple[int, int]]
    """Seed of the warm start, seed of the run; in the order in which they are trained."""
    search_prompts: Count = 64
    """Held-out prompts on which searches are judged: the first ones."""
    test_prompts: Count = 128
    """Held-out prompts on which claims are judged: those after them."""
    claims: list[Claim] = Field(default=[])
    figures: dict[str, Figure] = Field(default={})

    def find_mistakes(self) -> Iterator[str]:
        """Names that nothing has; one warm start with different settings."""
        warm: dict[str | None, Settings] = {}
        for name, task in self.tasks.items():
            if warm.setdefault(task.warm_start, task.warm_settings) != task.warm_settings:
                yield f"tasks.{name}: warm_settings: another task has other ones with {task.warm_start}"
        named: list[tuple[str, str, Mapping[str, Any]]] = []
        for kind, members in (("searches", self.searches), ("arms", self.arms)):
            for name, member in members.items():
                named += [(f"{kind}.{name}", member.task, self.tasks), (f"{kind}.{name}", member.method, self.methods)]
        named += [(f"arms.{name}", arm.search, self.searches) for name, arm in self.arms.items() if arm.search]
        for i, claim in enumerate(self.claims):
            named += [(f"claims.{i}", side.arm, self.arms) for side in (claim.left, claim.right)]
        named += [(f"figures.{name}", arm, self.arms) for name, figure in self.figures.items() for arm in figure.arms]
        for place, name, members in named:
            if name not in members:
                yield f"{place}: there is no {name!r}; there are {', '.join(members)}"


class Run(NamedTuple):
    """One training run of a grid."""

    name: str
    """Its folder below the results."""
    config: dict[str, Any]
    """The whole config of ``oapl-jax train``, or of ``oapl-jax sft`` where it is a warm start."""
    command: Literal["train", "sft"] = "train"
    sampler: tuple[str, ...] = ()
    """Of its arm."""


def load(path: pathlib.Path, overrides: Sequence[str] = ()) -> Grid:
    """Reads a grid; paths in it lie beside the file. Overrides are settings of every task, as ``section.key=value``.

    Raises:
        ConfigError: with every mistake in it.
        ValueError: an override has another form.
    """
    if wrong := [word for word in overrides if "." not in word.partition("=")[0] or "=" not in word]:
        raise ValueError(f"override {wrong[0]!r}: write it as section.key=value")
    common = {word.partition("=")[0]: _value(word.partition("=")[2]) for word in overrides}
    grid = validate(Grid, OmegaConf.to_container(OmegaConf.load(path)), str(path))
    tasks = {}
    for name, task in grid.tasks.items():
        config = str((path.parent / task.config).resolve())
        warm_start = str((path.parent / task.warm_start).resolve()) if task.warm_start else None
        update = {"config": config, "warm_start": warm_start, "settings": task.settings | common}
        tasks[name] = task.model_copy(update=update)
    return grid.model_copy(update={"tasks": tasks})


def _value(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # pyright: ignore


def warm_starts(grid: Grid, out: pathlib.Path) -> list[Run]:
    """The supervised runs that the others start from: one for each of their configs and each seed of a warm start."""
    seeds = dict.fromkeys(warm for warm, _ in grid.pairs)
    tasks = [task for task in grid.tasks.values() if task.warm_start]
    runs = [_warm_start(task, seed, out) for task, seed in itertools.product(tasks, seeds)]
    return list({run.name: run for run in runs}.values())


def search_runs(grid: Grid, name: str, out: pathlib.Path) -> list[tuple[Settings, Run]]:
    """The runs of a search, with the settings that each of them tries."""
    search, runs = grid.searches[name], []
    for values in itertools.product(*search.values.values()):
        tried = dict(zip(search.values, values, strict=True))
        settings = search.settings | tried | {"evaluation.prompts": grid.search_prompts}
        label = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in tried.items())
        runs.append((tried, _run(grid, search, settings, grid.pairs[0], f"searches/{name}/{label}", out)))
    return runs


def arm_runs(grid: Grid, name: str, chosen: Settings, out: pathlib.Path) -> dict[tuple[int, int], Run]:
    """The runs of an arm by their pairs; ``chosen`` are the settings of its search."""
    arm = grid.arms[name]
    detached = {"mode": "detached"} if arm.sampler else {}
    settings = detached | arm.settings | chosen | {"evaluation.prompts": grid.search_prompts + grid.test_prompts}
    return {
        pair: _run(grid, arm, settings, pair, f"arms/{name}/warm{pair[0]}-seed{pair[1]}", out)._replace(
            sampler=arm.sampler
        )
        for pair in grid.pairs[: arm.pairs]
    }


def _run(
    grid: Grid, part: Search | Arm, settings: Settings, pair: tuple[int, int], name: str, out: pathlib.Path
) -> Run:
    task = grid.tasks[part.task]
    lag = {} if part.lag is None else {"window.sync_every": part.lag}
    own = {"run.dir": str(out / name), "run.seed": pair[1]}
    if task.warm_start:
        own["model.warm_start"] = str(config_path(_warm_start(task, pair[0], out), out))
    return Run(name, _config(task.config, task.settings, grid.methods[part.method], lag, settings, own))


def _warm_start(task: Task, seed: int, out: pathlib.Path) -> Run:
    folder = f"warm_starts/{pathlib.Path(str(task.warm_start)).stem}-{seed}"
    own = {"run.dir": str(out / folder), "run.seed": seed}
    return Run(folder, _config(str(task.warm_start), task.warm_settings, own), "sft")


def config_path(run: Run, out: pathlib.Path) -> pathlib.Path:
    """Where the config of a run is written."""
    return out / "configs" / f"{run.name.replace('/', '.')}.yaml"


def _config(path: str, *layers: Settings) -> dict[str, Any]:
    """A config file with settings over it, later ones over earlier ones; an architecture beside it gets its whole path."""
    file = pathlib.Path(path)
    config: Any = OmegaConf.to_container(OmegaConf.load(file))
    for key, value in (item for layer in layers for item in layer.items()):
        *sections, last = key.split(".")
        inner = config
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = copy.deepcopy(value)
    architecture = config["model"].get("config")
    if architecture is not None and (file.parent / architecture).is_file():
        config["model"]["config"] = str(file.parent / architecture)
    return config

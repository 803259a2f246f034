"""The checks of a config that know the dicts of other rooms: objectives, data sets, toy tasks.

``config_file.validate`` runs them with its own and reports all mistakes together.
"""

from typing import Any

from pydantic import ValidationError

from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.data import DataConfig, SetConfig, SftDataConfig
from oapl_jax.config.evaluation import HELD_OUT, BenchmarksConfig, EvaluationConfig
from oapl_jax.config.names import did_you_mean, entry
from oapl_jax.config.objective import ObjectiveConfig
from oapl_jax.config.section import Check, Checks
from oapl_jax.data.catalogue import DATASETS
from oapl_jax.data.tasks import TASKS
from oapl_jax.objectives.catalogue import OBJECTIVES
from oapl_jax.objectives.objective import Objective, ObjectiveOptions


def objective_of(section: ObjectiveConfig) -> tuple[Objective[Any], ObjectiveOptions]:
    """The objective that a config names, and its options.

    Raises:
        ValueError: it does not exist, or has no such options; a line for each mistake.
    """
    objective = entry(OBJECTIVES, section.name, "name")
    given, lines, own = dict(section.model_extra or {}), [], objective.options.model_fields
    for key in sorted(given.keys() - own.keys()):
        value = given.pop(key)
        if key not in _DEFAULTS:
            known = [*ObjectiveConfig.model_fields, *own]
            lines.append(f"{key}: unknown key (value {value!r}){did_you_mean(key, known, 'objective.')}")
        elif value not in _DEFAULTS[key]:
            lines.append(f"{key}: has no effect with name={section.name}; remove it")
    try:
        options = objective.options.model_validate(given)
    except ValidationError as error:
        raise ValueError("\n".join(lines + config_file.mistakes(objective.options, error))) from None
    if lines:
        raise ValueError("\n".join(lines))
    return objective, options


_DEFAULTS: dict[str, list[Any]] = {}
"""Options of all objectives, with the default of each objective that has it."""
for _objective in OBJECTIVES.values():
    for _key, _field in _objective.options.model_fields.items():
        _DEFAULTS.setdefault(_key, []).append(_field.default)


def _with_options(section: ObjectiveConfig) -> ObjectiveConfig:
    objective, options = objective_of(section)
    fields = {name: getattr(section, name) for name in ObjectiveConfig.model_fields}
    return ObjectiveConfig(**fields | {"name": objective.name}, **options.model_dump())


def _with_known_names(section: Any) -> Any:
    """A section as it is, where its task and its data sets exist."""
    if getattr(section, "task", None) is not None:
        entry(TASKS, section.task, "task")
    if getattr(section, "dataset", None) is not None:
        entry(DATASETS, section.dataset, "dataset")
    for name in getattr(section, "names", ()):
        entry(DATASETS, name, "names")
    return section


def _with_graders(config: TrainConfig) -> TrainConfig:
    """A config as it is, where the reward functions grade its data sets."""
    sets, lines = {HELD_OUT: (config.evaluation, config.reward), **config.graded_sets()}, []
    for key, (source, reward) in sets.items():
        kind = None if source.dataset is None else DATASETS[source.dataset].reward
        if kind is not None and kind not in reward.functions:
            _, is_held_out, name = key.rpartition(HELD_OUT)
            section = ("evaluation" if is_held_out else "data") + (f".sets.{name}" if name else "")
            own = "" if reward is config.reward else f"{section}."
            problem = f"is graded by {kind}; set {own}reward.functions={{{kind}: 1.0}}"
            lines.append(f"{section}.dataset={source.dataset} {problem}")
    if lines:
        raise ValueError("\n".join(lines))
    return config


CHECKS: Checks = {
    ObjectiveConfig: Check(_with_options, tuple(_DEFAULTS)),
    **{
        section: Check(_with_known_names)
        for section in (DataConfig, SetConfig, SftDataConfig, EvaluationConfig, BenchmarksConfig)
    },
    TrainConfig: Check(_with_graders),
}

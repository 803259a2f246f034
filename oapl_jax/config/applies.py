"""When a field of the configuration has an effect: data on the field, and the one check that reads it."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel


class AppliesWhen:
    """Metadata of a field: it has an effect only where other fields have certain values.

    Args:
        keys: fields of the same section, or dotted paths from the root of the file.
        condition: gets the values of these fields; by default the value has to be given and not zero.
    """

    def __init__(self, *keys: str, condition: Callable[..., Any] = bool):
        self.keys, self.condition = keys, condition

    def problem(self, owner: BaseModel) -> str | None:
        """Why the field has no effect in ``owner``, the model whose fields the keys are; None: it has one."""
        values = {key: _value(owner, key) for key in self.keys}
        if self.condition(*values.values()):
            return None
        return f"has no effect with {', '.join(_shown(*item) for item in values.items())}; remove it"


is_null = operator.not_
"""For ``AppliesWhen``: the other field is not given, or is zero."""


def one_of(*accepted: Any) -> Callable[[Any], bool]:
    """For ``AppliesWhen``: the other field has one of these values."""
    return lambda value: value in accepted


def changed(model: BaseModel) -> set[str]:
    """Fields that were given another value than their default: a saved config gives them all."""
    fields = type(model).model_fields
    return {name for name in model.model_fields_set & fields.keys() if getattr(model, name) != fields[name].default}


def inert_fields(model: BaseModel) -> list[str]:
    """A line for each field that was set and has no effect: its key, why, and what to do.

    A condition is checked by the model that has the fields that it names: the section itself, or the whole file.
    """
    return list(_inert(model, model, ""))


def _inert(owner: BaseModel, model: BaseModel, prefix: str) -> Iterator[str]:
    fields = type(model).model_fields
    for name in fields:  # in the order of the schema
        value = getattr(model, name, None)  # a config with mistakes may lack some
        problem = _first_problem(owner, model, name) if name in changed(model) else None
        if problem and isinstance(value, BaseModel):
            yield from (
                f"{prefix}{name}.{inner}: {problem}" for inner in type(value).model_fields if inner in changed(value)
            )
        elif problem:
            yield f"{prefix}{name}: {problem}"
        elif isinstance(value, BaseModel):
            yield from _inert(owner, value, f"{prefix}{name}.")


def _first_problem(owner: BaseModel, model: BaseModel, name: str) -> str | None:
    for condition in type(model).model_fields[name].metadata:
        is_checked = isinstance(condition, AppliesWhen) and _is_of(owner, model, condition.keys[0])
        if is_checked and (problem := condition.problem(owner)):
            return problem
    return None


def _is_of(owner: BaseModel, model: BaseModel, key: str) -> bool:
    """Whether ``key`` counts from ``owner``: a section's own fields come first."""
    first = key.partition(".")[0]
    return first in type(owner).model_fields and (owner is model or first not in type(model).model_fields)


def _value(owner: BaseModel, key: str) -> Any:
    value: Any = owner
    for part in key.split("."):
        value = None if value is None else getattr(value, part)
    return value


def _shown(key: str, value: Any) -> str:
    if isinstance(value, BaseModel) or (
        isinstance(value, dict) and any(isinstance(v, BaseModel) for v in value.values())
    ):
        return f"the section {key}"
    return f"{key}={'null' if value is None else value}"

"""When a field of the configuration has an effect: data on the field, and the one check that reads it."""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel

NO_EFFECT = "has no effect with"
"""In a message: the field is no mistake by itself."""


def are_set(*values: Any) -> bool:
    """For ``AppliesWhen``: the other fields are given, and not zero."""
    return all(values)


class AppliesWhen:
    """Metadata of a field: it has an effect only where other fields have certain values.

    Args:
        keys: fields of the same section, or dotted paths from the root of the file.
        condition: gets the values of these fields; by default all have to be given and not zero. The first sentence of
            its docstring stands in the configuration reference (``docs/site/reference.py``).
    """

    def __init__(self, *keys: str, condition: Callable[..., Any] = are_set):
        self.keys, self.condition = keys, condition

    def problem(self, owner: BaseModel) -> str | None:
        """Why the field has no effect in ``owner``, the model whose fields the keys are; None: it has one."""
        values = {key: _value(owner, key) for key in self.keys}
        if self.condition(*values.values()):
            return None
        return f"{NO_EFFECT} {', '.join(_shown(*item) for item in values.items())}; remove it"


is_null = operator.not_
"""For ``AppliesWhen``: the other field is not given, or is zero."""


def one_of(*accepted: Any) -> Callable[[Any], bool]:
    """For ``AppliesWhen``: the other field has one of these values."""
    return functools.partial(operator.contains, accepted)


def changed(model: BaseModel) -> set[str]:
    """Fields that were given another value than their default: a saved config gives them all."""
    fields = type(model).model_fields
    return {name for name in model.model_fields_set & fields.keys() if getattr(model, name) != fields[name].default}


def inert_fields(owner: BaseModel, model: BaseModel | None = None, prefix: str = "") -> Iterator[str]:
    """A line for each field that was set and has no effect: its key, why, and what to do.

    A condition is checked by the model that has the fields that it names: the section itself, or the whole file.

    Args:
        owner: the model by which conditions are checked.
        model: one within it, whose fields are looked at; None: itself.
        prefix: the path of that.
    """
    model = model or owner
    for name in type(model).model_fields:  # in the order of the schema
        value = getattr(model, name, None)  # a config with mistakes may lack some
        problem = _problem(owner, model, name) if name in changed(model) else None
        if problem is None and isinstance(value, BaseModel):
            yield from inert_fields(owner, value, f"{prefix}{name}.")
        elif problem is not None:
            is_section = isinstance(value, BaseModel)
            keys = (
                [f"{name}.{key}" for key in type(value).model_fields if key in changed(value)] if is_section else [name]
            )
            yield from (f"{prefix}{key}: {problem}" for key in keys)


def _problem(owner: BaseModel, model: BaseModel, name: str) -> str | None:
    ours, its = type(owner).model_fields, type(model).model_fields
    for condition in its[name].metadata:
        if isinstance(condition, AppliesWhen):
            first = condition.keys[0].partition(".")[0]  # a section's own fields come first
            if first in ours and (owner is model or first not in its) and (problem := condition.problem(owner)):
                return problem
    return None


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

"""The configuration reference: the tables of docs/configuration.md, made from the schema when the site is built."""

import inspect
import json
import operator
import re
import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from oapl_jax.config import commands
from oapl_jax.config.applies import AppliesWhen, are_set, is_null
from oapl_jax.config.objective import ObjectiveConfig
from oapl_jax.config.section import Section
from oapl_jax.objectives.catalogue import OBJECTIVES

CONFIGS: dict[str, type[Section]] = {
    "train": commands.TrainConfig,
    "sft": commands.SftConfig,
    "generate": commands.GenerateConfig,
    "evaluate": commands.EvaluateConfig,
}
"""The whole config of each command."""
TOP = "the whole file"
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything", type(None): "null"}
SIGNS = {"ge": "from {}", "gt": "above {}", "le": "up to {}", "lt": "below {}"}


class Row(NamedTuple):
    """A field of a section."""

    name: str
    type: str
    default: str
    text: str
    applies: str


def markdown() -> str:
    """All sections, each with a table of its fields; a section that two commands have stands there once."""
    return "\n\n".join(_table(path, rows) for path, rows in _sections().items()) + "\n"


def _sections() -> dict[str, dict[Row, list[str]]]:
    """By the path of a section its fields, each with the commands that have it."""
    sections: dict[str, dict[Row, list[str]]] = {}
    for command, config in CONFIGS.items():
        for path, row in _rows(config):
            sections.setdefault(path or TOP, {}).setdefault(row, []).append(command)
    return sections


def _rows(config: type[BaseModel]) -> Iterator[tuple[str, Row]]:
    """The fields of a config and of all its sections, each with the path of its section; a section is looked at once."""
    queue, seen = [(config, "")], {config}
    for section, path in queue:  # which grows
        for name, field in section.model_fields.items():
            yield path, _row(name, field)
            nested = _nested(field.annotation)
            if nested is not None and nested not in seen:
                seen.add(nested)
                place = f"{path}.{name}".lstrip(".")
                queue.append((nested, place if nested is _alone(field) else f"{place}.NAME"))
        if section is ObjectiveConfig:
            yield from ((path, row) for row in _objective_rows())


def _row(name: str, field: FieldInfo) -> Row:
    nested = _nested(field.annotation)
    kind = "section" if nested is not None and nested is _alone(field) else _type(field.annotation, field.metadata)
    return Row(name, kind, _default(field), _line(field.description or ""), "; ".join(_conditions(field)))


def _objective_rows() -> Iterator[Row]:
    """The options of each objective, which apply with its name."""
    for objective in OBJECTIVES.values():
        for name, field in objective.options.model_fields.items():
            yield _row(name, field)._replace(applies=f"`name` is `{objective.name}`")


def _conditions(field: FieldInfo) -> Iterator[str]:
    for item in field.metadata:
        if not isinstance(item, AppliesWhen):
            continue
        keys = " and ".join(f"`{key}`" for key in item.keys)
        if item.condition is are_set:
            yield f"{keys} {'is' if len(item.keys) == 1 else 'are'} set"
        elif item.condition is is_null:
            yield f"{keys} is null"
        elif getattr(item.condition, "func", None) is operator.contains:
            yield f"{keys} is {' or '.join(f'`{value}`' for value in item.condition.args[0])}"
        elif words := inspect.getdoc(item.condition):
            yield words.partition("\n")[0].removesuffix(".").replace("``", "`")
        else:
            raise ValueError(f"{item.condition} of {keys}: its docstring has to say when the field applies")


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is or has, alone or by names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _nested(part)) is not None), None)


def _is_optional(field: FieldInfo) -> bool:
    return get_origin(field.annotation) in (Union, types.UnionType)


def _alone(field: FieldInfo) -> Any:
    """A field's type without null."""
    parts = [part for part in get_args(field.annotation) if part is not type(None)]
    return parts[0] if _is_optional(field) and len(parts) == 1 else field.annotation


def _type(annotation: Any, metadata: list[Any]) -> str:
    """A type in words, with its bounds."""
    bounds = [
        sign.format(f"{getattr(item, name):g}")
        for item in metadata
        for name, sign in SIGNS.items()
        if getattr(item, name, None) is not None
    ]
    return " ".join([_words(annotation), *bounds])


def _words(annotation: Any) -> str:
    if annotation in WORDS:
        return WORDS[annotation]
    origin, parts = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        metadata = [part for item in annotation.__metadata__ for part in getattr(item, "metadata", [item])]
        return _type(annotation.__origin__, metadata)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin is dict:
        return (
            f"{_words(parts[1])} by name" if parts[0] is str else f"{_words(parts[1])} for each of {_words(parts[0])}"
        )
    if origin in (tuple, list):
        return f"list of {_words(parts[0])}"
    return "section" if isinstance(annotation, type) and issubclass(annotation, BaseModel) else str(annotation)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return "" if isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("``", "`").strip()


def _table(path: str, rows: dict[Row, list[str]]) -> str:
    owners = [command for command in CONFIGS if any(command in commands for commands in rows.values())]
    title = path if path == TOP else f"`{path}`"
    lines = [f"### {title}", "", f"Of {', '.join(f'`{command}`' for command in owners)}.", ""]
    lines += ["| field | type | default | what it does | applies when |", "|---|---|---|---|---|"]
    for row, of in rows.items():
        only = "" if len(of) == len(owners) else f"only {', '.join(f'`{command}`' for command in of)}"
        cells = [f"`{row.name}`", row.type, row.default, row.text, "; ".join(filter(None, [row.applies, only]))]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)

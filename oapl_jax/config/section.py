"""The base of every section of a config, and the types that sections share."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from oapl_jax.config import applies

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
FractionOrZero = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every config section: frozen, unknown keys refused, defaults validated.

    A section that is parsed with ``Checks`` is also checked by the one of its class.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    _texts: dict[tuple[Any, ...], str] = PrivateAttr(default_factory=dict)
    """Of a whole config that was read from a file: by the place of each value from the environment what the file says,
    such as ``${oc.env:NAME}``."""

    def find_mistakes(self) -> Iterable[str]:
        """What is wrong with fields that are right one by one, a line each; one that concerns a field begins ``key: ``."""
        return []

    @model_validator(mode="after")
    def _is_right(self, info: Any) -> "Section":
        problems = [*self.find_mistakes(), *applies.inert_fields(self)]
        if problems:
            raise ValueError("\n".join(problems))
        check = (info.context or {}).get(type(self))
        return check.resolve(self) if check else self


class Check(NamedTuple):
    """What only the rooms above know about a section, such as the entries of a dict that it names."""

    resolve: Callable[[Any], Section]
    """Returns the section with all that the named entry adds; raises a ``ValueError`` with a mistake in each line."""
    keys: tuple[str, ...] = ()
    """Keys of the section beside its fields."""


Checks = Mapping[type[Section], Check]

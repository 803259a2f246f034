"""Configs from YAML files and dotted overrides, and a report of every mistake in them at once.

A config is named by its file, or as one that comes with the package (``quickstart``). Files and folders that it names
are looked for beside it first; those of overrides, and those that are not there, from the working directory.

A file is read with OmegaConf (which knows that ``1e-6`` is a number and resolves ``${...}``) and validated by the
models beside this file. A file may stand on another one beside it: its key ``base``. What ``${oc.env:NAME}`` takes from
the environment is in memory only: ``written`` has the text of the file instead, for all that is saved, shown or compared.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import operator
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError

from oapl_jax.config.applies import NO_EFFECT, inert_fields
from oapl_jax.config.names import did_you_mean, nearest
from oapl_jax.config.reward import RewardConfig
from oapl_jax.config.section import Checks, Section
from oapl_jax.untrusted import reading


class ConfigError(ValueError):
    """Every mistake of a configuration, one a line; ``message`` where there is nothing to list, ``source``: what they are in.

    ``rest`` is the config with defaults in place of what is wrong, to look for further mistakes, or None; ``wrong`` its
    sections that have mistakes.
    """

    def __init__(
        self,
        message: str = "",
        lines: Sequence[str] = (),
        source: str = "",
        rest: Any = None,
        wrong: Iterable[str] = (),
    ):
        self.lines, self.source, self.rest, self.wrong = list(lines), source, rest, frozenset(wrong)
        head = f"{len(self.lines)} mistake{'s' if len(self.lines) > 1 else ''} in {source}"
        super().__init__(hide(message or "\n  ".join([head, *self.lines])))


AnyConfig = TypeVar("AnyConfig", bound=Section)
MOST_VALUES, MOST_INTERPOLATIONS = 10_000, 24
NO_CHECKS: Checks = {}
"""For a config that a run has saved: it was checked and completed before."""
_PACKAGE = pathlib.Path(__file__).parents[1]
SHIPPED = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE)
"""The configs that come with the package: inside an installed wheel, beside the package in a checkout."""
INPUTS = {"path", "config", "warm_start", "tokenizer", "folder", "log", "scorer", "imports"}
"""Keys, of any section, whose values may name a file or a folder that is read."""
MEANINGS = {
    "string_pattern_mismatch": "should be axes such as 'fsdp=4' or 'data=2,tensor=4' (data, fsdp, tensor; -1: all that are left)",
    "tuple_type": "should be a list such as [a, b]",
    "model_type": "should be a section with keys of its own",
}
"""Messages in place of pydantic's, by its kinds of mistakes."""
SHORTEST_SECRET = 6
"""Characters from which on a value of the environment is left out of messages; shorter ones are parts of words."""
_FROM_ENVIRONMENT: dict[str, str] = {}
"""Values that configs of this process took from the environment, with the texts of their files."""


def load(
    schema: type[AnyConfig],
    path: str | pathlib.Path,
    overrides: list[str] | None = None,
    checks: Checks = NO_CHECKS,
    *,
    is_saved: bool = False,
) -> AnyConfig:
    """Reads a YAML file, applies ``section.key=value`` overrides and validates; ``checks`` as in ``validate``.

    ``path`` is a file, or the name of a config that comes with the package. The paths in a config that a run has saved
    (``is_saved``) are taken as they stand.

    Raises:
        ConfigError: with every mistake: its dotted path, the value, what is allowed.
    """
    overrides, problems = overrides or [], []
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(f"override {word!r}: write it as section.key=value")
            continue
        try:
            OmegaConf.from_dotlist([word])
        except (YAMLError, OmegaConfBaseException) as error:
            problems.append(f"override {word!r}: its value cannot be read: {' '.join(str(error).split())}")
    if problems:
        raise ConfigError("\n".join(problems))
    path = _find(path)
    raw, texts = _read(path, overrides, None if is_saved else path.parent)
    _add_folder(raw, path)
    config = validate(schema, raw, str(path), checks)
    config._texts.update(texts)
    return config


def _add_folder(section: Any, path: pathlib.Path) -> None:
    """Reward functions of the user are looked for beside the file, in the rewards of data sets too."""
    if not isinstance(section, dict):
        return
    for inner in section.values():
        _add_folder(inner, path)
    functions = section.get("functions")
    if isinstance(functions, dict) and any(":" in str(name) for name in functions):
        section.setdefault("folder", str(path.resolve().parent))


def _find(path: str | pathlib.Path) -> pathlib.Path:
    shipped = SHIPPED / f"{path}.yaml"
    is_shipped = shipped.parent == SHIPPED and shipped.is_file() and not pathlib.Path(path).exists()
    return shipped if is_shipped else pathlib.Path(path)


def _beside(value: Any, folder: pathlib.Path) -> Any:
    """The values of a file in ``folder``, with the path from here for each input that lies beside the file."""
    if isinstance(value, list):
        return [_beside(inner, folder) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: from_here(folder / inner)
        if key in INPUTS and isinstance(inner, str) and _is_relative_path(inner) and (folder / inner).exists()
        else _beside(inner, folder)
        for key, inner in value.items()
    }


def _is_relative_path(text: str) -> bool:
    is_path = "://" not in text and text not in ("", "model", "characters")  # two of these name tokenizers
    return is_path and not pathlib.Path(text).is_absolute()


def from_here(path: pathlib.Path) -> str:
    """A path relative to the working directory where it lies in it, else an absolute one."""
    here, path = pathlib.Path.cwd(), path.absolute()  # links stay: Kubernetes leads those of a ConfigMap elsewhere
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _read(
    path: pathlib.Path, overrides: list[str], folder: pathlib.Path | None
) -> tuple[Any, dict[tuple[Any, ...], str]]:
    """The values of a file; where it uses the environment, its texts for values from there or from other keys too.

    Files that it names are looked for in ``folder`` first; None: their paths are taken as they stand.
    """
    if not path.is_file():
        others = [*(path.parent if path.parent.is_dir() else pathlib.Path("configs")).glob("*.yaml")]
        others += [shipped.stem for shipped in SHIPPED.glob("*.yaml")]
        raise ConfigError(f"config file {str(path)!r} does not exist{nearest(str(path), others, cutoff=0.4)}")
    try:
        read = _with_base(path)
        if folder is not None:
            read = OmegaConf.create(_beside(OmegaConf.to_container(read), folder))
        merged = OmegaConf.merge(read, OmegaConf.from_dotlist(overrides))
        values = OmegaConf.to_container(merged, resolve=True)
        uses_environment = "oc.env" in OmegaConf.to_yaml(merged)
        texts = dict(_texts(values, OmegaConf.to_container(merged))) if uses_environment else {}
    except RecursionError:
        raise ConfigError(f"config file {str(path)!r} cannot be read: it is nested too deeply") from None
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {str(path)!r} cannot be read: {reason}") from error
    return values, texts


def _with_base(path: pathlib.Path) -> Any:
    """The sections of a file, over those of the file beside it that its key ``base`` names.

    An ``objective`` with a name takes the place of the whole section: the options belong to the name.
    """
    read = _parse(path)
    base = read.pop("base", None)
    if base is None:
        return read
    below = _parse(path.with_name(str(base)))
    if "base" in below:
        raise ValueError(f"base={base}: that file has a base itself; name its base, or write the sections out")
    if "name" in (read.get("objective") or {}):
        below.pop("objective", None)
    return OmegaConf.merge(below, read)


def _parse(path: pathlib.Path) -> Any:
    text = reading.read_text(path)
    _check_size(text)
    read = OmegaConf.load(io.StringIO(text))
    if not OmegaConf.is_dict(read):
        raise ValueError("it is not a mapping of sections such as 'run:' and 'model:'")
    return read


def _texts(value: Any, raw: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Places of the values that a file takes from elsewhere, with its texts."""
    if isinstance(raw, dict | list):
        for key, inner in raw.items() if isinstance(raw, dict) else enumerate(raw):
            yield from _texts(value[key], inner, (*place, key))
    elif isinstance(raw, str) and "${" in raw:
        _FROM_ENVIRONMENT[str(value)] = raw
        yield place, raw


def written(config: Section) -> dict[str, Any]:
    """The values of a config as they may leave the process: the texts of the file for those from the environment."""
    values = config.model_dump(mode="json")
    for place, text in config._texts.items():
        functools.reduce(operator.getitem, place[:-1], values)[place[-1]] = text
    return values


def flat(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The values of a config by ``section.key``."""
    sections = {name: value if isinstance(value, dict) else {"": value} for name, value in values.items()}
    return {f"{name}.{key}".rstrip("."): value for name, section in sections.items() for key, value in section.items()}


def hide(message: str) -> str:
    """A message with the texts of the file for values from the environment, which may be secrets."""
    for value in sorted(_FROM_ENVIRONMENT, key=len, reverse=True):
        if len(value) >= SHORTEST_SECRET:
            message = message.replace(value, _FROM_ENVIRONMENT[value])
    return message


def _check_size(text: str) -> None:
    """Refuses what a few lines with aliases (``*a``) or interpolations (``${a}``) make huge.

    Raises:
        ValueError: it has too many values, or interpolations.
        YAMLError: it is no YAML.
    """

    @functools.cache
    def size(node: yaml.Node) -> float:
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        return 1 + sum(map(size, itertools.chain(*inner) if isinstance(node, yaml.MappingNode) else inner))

    num_values = max(len(text) / 20, text.count("[") + text.count("{"))  # else the parser itself takes long
    if num_values <= MOST_VALUES and (root := yaml.compose(text, Loader=yaml.SafeLoader)) is not None:
        num_values = size(root)
    if num_values > MOST_VALUES or text.count("${") > MOST_INTERPOLATIONS:
        raise ValueError(f"it has more than {MOST_VALUES:,} values, or than {MOST_INTERPOLATIONS} interpolations")


def load_reward(path: str | pathlib.Path) -> RewardConfig:
    """The section ``reward`` of any YAML file, such as the config of a run; what else is in the file is not read.

    Raises:
        ConfigError: as ``load``; or where the file has no such section.
    """
    path = _find(path)
    raw, _ = _read(path, [], path.parent)
    if not isinstance(raw, dict) or "reward" not in raw:
        raise ConfigError(f"{path}: has no section 'reward'")
    return validate(RewardConfig, raw["reward"], source=f"{path}, section reward")


def validate(schema: type[AnyConfig], raw: Any, source: str, checks: Checks = NO_CHECKS) -> AnyConfig:
    """Validates a plain nested dict, which ``source`` names in the error.

    ``checks`` are those of sections that name entries of dicts in other rooms: ``CHECKS`` of ``build/checks.py``.
    """
    try:
        return schema.model_validate(raw, context=checks)
    except ValidationError as error:
        raise _all_mistakes(schema, raw, error, source, checks) from None


def _all_mistakes(schema: type[Section], raw: Any, error: ValidationError, source: str, checks: Checks) -> ConfigError:
    """With those that pydantic does not look for, because a section is wrong; not what may follow from that."""
    lines, raw, wrong = mistakes(schema, error, checks), copy.deepcopy(raw), set()
    if not isinstance(raw, dict):
        return ConfigError(lines=lines, source=source)
    for line in lines:
        if place := re.match("([^:=]+)[:=]", line):  # of the mistake
            *parents, key = place[1].split(".")
            with contextlib.suppress(LookupError, TypeError, ValueError):  # it is not there, or is no table
                table = functools.reduce(
                    lambda inner, part: inner[int(part) if isinstance(inner, list) else part], parents, raw
                )
                if parents or not isinstance(table[key], dict):
                    del table[key]
            if NO_EFFECT not in line:
                wrong.add([*parents, key][0])
    rest: Any = _unchecked(schema, raw, checks)
    for find in (rest.find_mistakes, lambda: inert_fields(rest), lambda: _refused(rest, checks)):
        with contextlib.suppress(AttributeError, TypeError):  # what it reads is missing or wrong
            found = [
                line for line in find() if not any(re.search(rf"\b{re.escape(name)}[.:=]", line) for name in wrong)
            ]
            lines += [line for line in found if line not in lines]
    return ConfigError(lines=lines, source=source, rest=rest, wrong=wrong)


def _unchecked(schema: type[Section], raw: dict[str, Any], checks: Checks) -> Section:
    """A config of sections each of which is checked by itself, where it can be."""
    sections = {}
    for name in schema.model_fields.keys() & raw.keys():
        kind: Any = schema.model_fields[name].annotation
        try:
            sections[name] = TypeAdapter(kind).validate_python(raw[name], context=checks)
        except ValidationError:
            if isinstance(kind, type) and issubclass(kind, Section) and isinstance(raw[name], dict):
                sections[name] = kind.model_construct(**raw[name])
    return schema.model_construct(**sections)


def _refused(config: Section, checks: Checks) -> list[str]:
    try:
        if type(config) in checks:
            checks[type(config)].resolve(config)
    except ValueError as error:
        return str(error).split("\n")
    return []


def mistakes(schema: type[Section], error: ValidationError, checks: Checks = NO_CHECKS) -> list[str]:
    """A line for each mistake: dotted path, what is wrong, value, nearest valid name."""
    return [line for details in error.errors() for line in _describe(schema, details, checks)]


def to_yaml(config: Section) -> str:
    """The resolved config as YAML text; see ``written``."""
    return OmegaConf.to_yaml(OmegaConf.create(written(config)))


def from_command_line(
    schema: type[AnyConfig],
    command: str,
    argv: list[str],
    add_options: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
    *,
    checks: Checks,
) -> tuple[AnyConfig, argparse.Namespace]:
    """Parses ``--config FILE [--dry-run] [section.key=value ...]``; raises ``ConfigError`` on a mistake.

    ``add_options`` adds further options of the command; ``checks`` as in ``validate``.
    """
    summary = (schema.__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"oapl-jax {command}", description=summary)
    parser.add_argument("--config", required=True, help="YAML file, or a shipped one by name: quickstart")
    parser.add_argument("--dry-run", action="store_true", help="load everything, print config and plan, and exit")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the file")
    add_options(parser)
    arguments = parser.parse_intermixed_args(argv)
    return load(schema, arguments.config, arguments.overrides, checks), arguments


def _describe(schema: type[Section], error: ErrorDetails, checks: Checks) -> list[str]:
    location = tuple(str(part) for part in error["loc"])
    path = ".".join(location) or "config"
    if error["type"] == "extra_forbidden":
        return [f"{path}: unknown key (value {error['input']!r}){_nearest_key(schema, location, checks)}"]
    if error["type"] == "missing":
        return [f"{path}: is required and missing"]
    message = MEANINGS.get(error["type"], error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":  # a line of a section may begin with its key
        lines = message.split("\n")
        return (
            [f"{path}.{line}" if re.match(r"[\w.]+: ", line) else f"{path}: {line}" for line in lines]
            if location
            else lines
        )
    if error["type"] == "literal_error":
        allowed = error.get("ctx", {}).get("expected", "").split("'")
        message += nearest(str(error["input"]), filter(str.isidentifier, allowed))
    return [f"{path}: {message} (value {error['input']!r})"]


def _nearest_key(schema: type[Section], location: tuple[str, ...], checks: Checks) -> str:
    """The valid name nearest to an unknown one: in its section, else the same name in another section."""
    *section, key = location
    known = _keys_at(schema, section, checks)
    elsewhere = [f"{other}.{key}" for other in _keys_at(schema, [], checks) if key in _keys_at(schema, [other], checks)]
    if elsewhere and not nearest(key, known):
        return f"; did you mean {elsewhere[0]!r}?"
    return did_you_mean(key, known, ".".join([*section, ""]))


def _keys_at(schema: type[Section], location: list[str], checks: Checks) -> list[str]:
    parts = iter(location)
    for part in parts:
        annotation = schema.model_fields[part].annotation if part in schema.model_fields else None
        if get_origin(annotation) in (dict, tuple):
            next(parts, None)  # the name or the number of one of several
        found = [
            kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, Section)
        ]
        if not found:
            return []
        schema = found[0]
    return [*schema.model_fields, *(checks[schema].keys if schema in checks else ())]

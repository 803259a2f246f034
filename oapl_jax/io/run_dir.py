"""The run directory: opened once, tied to one config and one layout."""

import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

from oapl_jax import __version__
from oapl_jax.config import config_file
from oapl_jax.config.config_file import AnyConfig, ConfigError
from oapl_jax.config.section import Section
from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
"""Layout and release of the program that wrote the directory."""

EXPORT_FOLDER = "export"
"""The trained model as a Hugging Face folder."""
SUMMARY_FILE = "summary.json"
"""What a run leaves at its end; it says that the run has ended."""
BATCHES_FILE = "batches.jsonl"
"""A line for each learner step: the groups of its batch (``rollouts/log.py``)."""
EVALUATIONS_FILE = "evaluations.jsonl"
"""A line for each evaluation: its step, the ids of the held-out prompts, and of each the graded and correct samples."""
STARTS_FILE = "starts.jsonl"
"""A line for each start of the trainer: the step from which it went on."""

LAYOUT = 2
"""Number of what the files of a run directory are and mean; raised by a change that another release cannot read."""

UNMARKED = {"layout": 1, "version": "0.1.0 (commit 29ded25 or before)"}
"""What wrote a run directory that has no ``RUN_FILE``."""

NOT_IDENTITY = {"reward": ("folder",), "profile": ("steps",)}
"""Keys of further sections, as ``run.not_identity``."""


def check_release(run: SharedPath) -> None:
    """Refuses what is no run directory, and one of another layout; whoever reads a run directory calls this first.

    Raises:
        ValueError: names both releases and what to do.
    """
    if storage.exists(run / RUN_FILE):
        try:
            mark = storage.read_object(run / RUN_FILE)
            layout, version = mark["layout"], mark["version"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{run / RUN_FILE}: has no layout and version; restore the file") from None
    elif storage.exists(run / CONFIG_FILE):
        layout, version = UNMARKED.values()
    else:
        raise ValueError(f"{str(run)!r} is no run directory: it has no {RUN_FILE}")
    if layout != LAYOUT:
        raise ValueError(
            f"{str(run)!r} was written by oapl_jax {version}, layout {layout}, and this is oapl_jax {__version__},"
            f" layout {LAYOUT}: use the release that wrote it, or choose another run directory"
        )


def read_config(run: SharedPath, schema: type[AnyConfig]) -> AnyConfig:
    """The config of an existing run directory.

    Raises:
        ValueError: it is no run directory, or of another release, or its config cannot be read.
    """
    check_release(run)
    return _read_config(run, schema, is_saved=True)


def _read_config(run: SharedPath, schema: type[AnyConfig], *, is_saved: bool) -> AnyConfig:
    with tempfile.TemporaryDirectory() as copies:
        copy = storage.get_folder(run, [CONFIG_FILE], pathlib.Path(copies)) / CONFIG_FILE
        try:
            return config_file.load(schema, copy, is_saved=is_saved)
        except ConfigError as error:
            reason = (error.lines or [str(error)])[0].replace(str(copy), CONFIG_FILE)
            raise ValueError(
                f"{run / CONFIG_FILE}: oapl_jax {__version__} cannot read this config; it is damaged, or another release"
                f" wrote it ({reason}): restore the file, use that release, or choose another run directory"
            ) from error


def save_config(run: SharedPath, config: Section) -> None:
    """Marks a run directory with this release, and saves the resolved config in it.

    Raises:
        OSError: it cannot be written.
    """
    mark = {"layout": LAYOUT, "version": __version__}
    storage.replace(run / RUN_FILE, json.dumps(mark).encode() + b"\n")
    storage.replace(run / CONFIG_FILE, config_file.to_yaml(config).encode())


def check_run(config: Any) -> bool:
    """Whether a directory belongs to a run of this config; writes nothing.

    Raises:
        ValueError: it belongs to a run of another config or release; names the keys that differ, or the releases. Or it
            is new, and cannot be made or written.
    """
    run = storage.shared_path(config.run.dir)
    has_config = storage.exists(run / CONFIG_FILE)
    is_used = storage.exists(run / RUN_FILE) or (has_config and len(storage.names(run)) > 1)
    if is_used:  # a config.yaml alone is the user's own, of a run that has not begun
        check_release(run)
    if not has_config:
        if isinstance(run, pathlib.Path):
            folder = next(path for path in (run, *run.absolute().parents) if path.exists())
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise ValueError(
                    f"run.dir={config.run.dir!r}: cannot be written: {folder} is a file, or takes no files of this user"
                )
        return False
    changes = _differences(_identity(_read_config(run, type(config), is_saved=is_used)), _identity(config))
    if changes and not config.run.allow_config_change:
        raise ValueError(
            f"run.dir={config.run.dir!r} belongs to a run of another config; these differ:\n  "
            + "\n  ".join(changes)
            + "\nChoose another run.dir, or say run.allow_config_change=true to go on with the new config"
        )
    return not changes


def open_run(config: Any) -> SharedPath:
    """``check_run``, and saves the resolved config: when all is loaded, so that a start that fails claims no directory.

    Raises:
        ValueError: the directory belongs to a run of another config or release, or cannot be written, or is in a store
            that does not do what a run relies on.
    """
    check_run(config)
    run = storage.shared_path(config.run.dir)
    storage.check_creates_once(run)
    try:
        save_config(run, config)
    except OSError as error:
        raise ValueError(f"run.dir={config.run.dir!r}: cannot be written: {error}") from error
    return run


def identity(config: Any) -> str:
    """The config as text, without ``run.not_identity``: equal for two configs that mean the same run.

    Saved with each checkpoint: what a checkpoint was made with decides whether a resumed run has changed,
    not the run directory's config.yaml, which is written before the first checkpoint of the new config.
    """
    return json.dumps(_identity(config), sort_keys=True)


def digest(config: Any) -> str:
    """``identity`` in 16 digits."""
    return hashlib.sha256(identity(config).encode()).hexdigest()[:16]


def _identity(config: Any) -> dict[str, Any]:
    values = config_file.written(config)
    for section, keys in (NOT_IDENTITY | {"run": config.run.not_identity}).items():
        if isinstance(values.get(section), dict):
            values[section] = {key: value for key, value in values[section].items() if key not in keys}
    return values


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Lines ``section.key: old -> new``."""
    old, new = config_file.flat(before), config_file.flat(after)
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in {**new, **old} if old.get(key) != new.get(key)]

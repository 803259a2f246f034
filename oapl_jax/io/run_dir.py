"""The run directory: opened once, tied to one config."""

import hashlib
import json
import os
import pathlib
from typing import Any

import jax

from oapl_jax.config import config_file
from oapl_jax.config.section import Section

CONFIG_FILE = "config.yaml"


NOT_IDENTITY = ("dir", "shared_dir", "allow_config_change", "compile_cache")
"""Keys of ``run`` that do not make it another run: its place may be moved, and leave to change is no change."""


def check_run(config: Any, schema: type[Section]) -> None:
    """Refuses a directory that belongs to a run of another config; writes nothing.

    Raises:
        ValueError: names the keys that differ.
    """
    if "://" in config.run.dir:
        raise ValueError(
            f"run.dir={config.run.dir!r}: object storage cannot be written directly; mount it (Cloud Storage FUSE on"
            " GKE) and give the mounted path"
        )
    saved = pathlib.Path(config.run.dir) / CONFIG_FILE
    if saved.exists():
        changes = _differences(config_file.load(schema, saved).model_dump(), config.model_dump())
        if changes and not config.run.allow_config_change:
            raise ValueError(
                f"run.dir={config.run.dir!r} belongs to a run of another config; these differ:\n  "
                + "\n  ".join(changes)
                + "\nChoose another run.dir, or say run.allow_config_change=true to go on with the new config"
            )


def open_run(config: Any, schema: type[Section]) -> pathlib.Path:
    """Makes the run directory, or checks that it belongs to this config, and saves the resolved config in it.

    To be called when everything that the config names has been loaded: a start that fails claims no directory.

    Raises:
        ValueError: the directory belongs to a run of another config, or cannot be written.
    """
    check_run(config, schema)
    run_dir = pathlib.Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run.dir={config.run.dir!r}: cannot be made: {error}") from error
    try:
        config_file.save(config, run_dir / CONFIG_FILE)
    except OSError as error:
        raise ValueError(f"run.dir={config.run.dir!r}: cannot be written: {error}") from error
    return run_dir


def use_compile_cache(folder: str | None) -> None:
    """Keeps compiled programs in a folder, unless ``JAX_COMPILATION_CACHE_DIR`` names another.

    Not on CPU, where programs are compiled in seconds and are those of one kind of processor.
    """
    if folder is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def identity(config: Any) -> str:
    """The config as text, without ``NOT_IDENTITY``: equal for two configs that mean the same run.

    Saved with each checkpoint: what a checkpoint was made with decides whether a resumed run has changed,
    not the run directory's config.yaml, which is written before the first checkpoint of the new config.
    """
    values = config.model_dump()
    values["run"] = {key: value for key, value in values["run"].items() if key not in NOT_IDENTITY}
    return json.dumps(values, sort_keys=True)


def digest(config: Any) -> str:
    """``identity`` in 16 digits."""
    return hashlib.sha256(identity(config).encode()).hexdigest()[:16]


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Lines ``section.key: old -> new``."""
    lines = []
    for section, values in after.items():
        if not isinstance(values, dict):
            lines += [f"{section}: {before[section]!r} -> {values!r}"] if values != before[section] else []
            continue
        old = before[section] or {}
        lines += [
            f"{section}.{key}: {old.get(key)!r} -> {value!r}"
            for key, value in values.items()
            if value != old.get(key) and not (section == "run" and key in NOT_IDENTITY)
        ]
    return lines

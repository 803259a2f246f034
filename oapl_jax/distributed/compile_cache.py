"""Compiled programs kept on disk between processes."""

import os
import pathlib

import jax


def use_compile_cache(folder: str | None) -> None:
    """Keeps compiled programs in a folder, unless ``JAX_COMPILATION_CACHE_DIR`` names another.

    Not on CPU, where programs are compiled in seconds and are those of one kind of processor.
    """
    if folder is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

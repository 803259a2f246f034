"""Libraries of the extra ``data``, which are imported when a run first uses them."""

import importlib
from typing import Any


def load(module: str) -> Any:
    """Imports a module of an optional library.

    Raises:
        ValueError: it, or something that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed; run: pip install "oapl-jax[data]"') from error

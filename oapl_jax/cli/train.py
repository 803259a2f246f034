"""``oapl-jax train --config C.yaml``: the same as ``python -m oapl_jax.train``."""

from oapl_jax.train import main

__all__ = ["main"]

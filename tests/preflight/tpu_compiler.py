"""What skips where the compiler for TPUs is not installed."""

import pytest

from oapl_jax.preflight import topology

needs_libtpu = pytest.mark.skipif(
    topology.find_libtpu() is None, reason="libtpu is not installed: `make tpu` installs it"
)

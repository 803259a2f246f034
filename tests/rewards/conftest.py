import pytest

from oapl_jax.rewards.code.sandbox.sandbox import Settings
from oapl_jax.rewards.code.sandbox.self_test import try_level


@pytest.fixture(scope="session")
def sandboxed():
    """Skips where the machine has no sandbox of the default level."""
    worker, reason = try_level("namespaces", Settings())
    if worker is None:
        pytest.skip(f"no sandbox with namespaces here: {reason}")
    worker.close()

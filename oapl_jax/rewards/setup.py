"""What a grading worker is started with."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Setup:
    """Passed as JSON on the worker's command line."""

    kinds: tuple[str, ...] = ("math",)
    """What is to be warm: ``math``, ``code``."""
    isolation: str = "namespaces"
    packages: tuple[str, ...] = ()
    python: str | None = None
    exec_mode: str = "script"

"""``python -m oapl_jax COMMAND``, the same as ``oapl-jax COMMAND``."""

import signal
import sys

from oapl_jax.io import interrupt


def main() -> int:
    """Runs the command of the command line; Ctrl-C ends it from here on."""
    signal.signal(signal.SIGINT, interrupt.leave)
    from oapl_jax.cli import commands

    return commands.main()


if __name__ == "__main__":
    sys.exit(main())

"""``python -m oapl_jax COMMAND``, the same as ``oapl-jax COMMAND``."""

import sys

from oapl_jax.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())

"""The type checker that pytest switches on for the package (pyproject.toml): an int is a float, as for pyright."""

import beartype

checker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

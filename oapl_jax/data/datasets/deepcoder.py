"""DeepCoder, the paper's training data for code; ``data.name`` is primeintellect, taco, lcbv5 or codeforces."""

from typing import Any

from oapl_jax.data.dataset import PROGRAM, Dataset, Problem, Source, with_starter_code


def _read(row: dict[str, Any]) -> Problem | None:
    if row["tests"] in (None, "", "[]", "{}"):
        return None
    return Problem(with_starter_code(row["problem"], row["starter_code"]), row["tests"])


DATASET = Dataset(
    hub="agentica-org/DeepCoder-Preview-Dataset",
    splits={"train": Source("train", "primeintellect"), "test": Source("test", "lcbv5")},
    columns=("problem", "tests"),
    optional=("starter_code",),
    read=_read,
    reward="code",
    template=PROGRAM,
)

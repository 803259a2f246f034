"""GSM8K: 7,473 training and 1,319 test problems; the answer column is a solution that ends with ``#### answer``."""

from typing import Any

from oapl_jax.data.dataset import BOXED, Dataset, Problem, Source


def _read(row: dict[str, Any]) -> Problem | None:
    _, mark, gold = row["answer"].rpartition("####")
    return Problem(row["question"], gold.strip().replace(",", "")) if mark else None


DATASET = Dataset(
    hub="openai/gsm8k",
    splits={"train": Source("train", "main"), "test": Source("test", "main")},
    columns=("question", "answer"),
    read=_read,
    reward="math",
    template=BOXED,
)

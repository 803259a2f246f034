"""DeepScaleR: 40,315 problems, the paper's training data for mathematics."""

from oapl_jax.data.dataset import BOXED, Dataset, Problem, Source

DATASET = Dataset(
    hub="agentica-org/DeepScaleR-Preview-Dataset",
    splits={"train": Source("train")},
    columns=("problem", "answer"),
    read=lambda row: Problem(row["problem"], str(row["answer"])),
    reward="math",
    template=BOXED,
)

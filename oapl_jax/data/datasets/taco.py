"""TACO: 25,443 training and 1,000 test problems, in the layout of APPS."""

from oapl_jax.data.dataset import PROGRAM, Dataset, Source
from oapl_jax.data.datasets.apps import read_input_output

DATASET = Dataset(
    hub="BAAI/TACO",
    splits={"train": Source("train"), "test": Source("test")},
    columns=("question", "input_output"),
    optional=("starter_code",),
    read=read_input_output,
    reward="code",
    template=PROGRAM,
)

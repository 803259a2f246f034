"""The published data sets by their names in ``data.dataset`` (docs/evaluation.md has a table)."""

from oapl_jax.data.dataset import Dataset
from oapl_jax.data.datasets import (
    aime2025,
    apps,
    apps_plus,
    brumo2025,
    deepcoder,
    deepscaler,
    gsm8k,
    hmmt_feb_2025,
    hmmt_nov_2025,
    humaneval,
    livecodebench,
    math500,
    mbpp,
    taco,
)

DATASETS: dict[str, Dataset] = {
    "aime2025": aime2025.DATASET,
    "apps": apps.DATASET,
    "apps_plus": apps_plus.DATASET,
    "brumo2025": brumo2025.DATASET,
    "deepcoder": deepcoder.DATASET,
    "deepscaler": deepscaler.DATASET,
    "gsm8k": gsm8k.DATASET,
    "hmmt_feb_2025": hmmt_feb_2025.DATASET,
    "hmmt_nov_2025": hmmt_nov_2025.DATASET,
    "humaneval": humaneval.DATASET,
    "livecodebench": livecodebench.DATASET,
    "math500": math500.DATASET,
    "mbpp": mbpp.DATASET,
    "taco": taco.DATASET,
}

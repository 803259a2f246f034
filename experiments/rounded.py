"""PyTorch's ``generate`` with weights rounded to a few bits, as the engine of a detached sampler.

    python -m oapl_jax sample --run RUN --engine experiments.rounded:make bits=4

Each row of a matrix has a scale of its own; norms and biases stay as they are.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]  (a test extra)

from oapl_jax.config.commands import TrainConfig
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.sampler import pytorch


def make(config: TrainConfig, tokenizer: Tokenizer, bits: int) -> tuple[pytorch.TorchSampler, Callable[..., Any]]:
    """The sampler of a process, and what loads a published policy for it and rounds its matrices."""
    sampler, load = pytorch.make(config, tokenizer)

    def load_rounded(folder: pathlib.Path) -> Any:
        model = load(folder)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 2:
                    weight.copy_(rounded(weight, bits))
        return model

    return sampler, load_rounded


def rounded(matrix: Any, bits: int) -> Any:
    """The nearest multiples of a scale for each row: 7 of them on each side of 0 with 4 bits, 3 with 3."""
    largest = 2 ** (bits - 1) - 1
    scale = matrix.abs().amax(dim=1, keepdim=True) / largest
    scale = torch.where(scale == 0, 1.0, scale)
    return (matrix / scale).round() * scale

"""The policy that a run starts from: architecture, parameters on a mesh, tokenizer."""

import json
import pathlib
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from oapl_jax.config.model import LoraConfig, ModelConfig
from oapl_jax.data import tokenizer as tokenizers
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.distributed.sharding import TRAINER_RULES, shardings
from oapl_jax.model import hf, lora, qwen


def load_params(
    model: ModelConfig,
    path: str | None,
    config: qwen.QwenConfig,
    mesh: Mesh,
    seed: int,
    adapters: LoraConfig | None = None,
) -> Any:
    """The weights at ``path``, a Hugging Face folder or hub name, with the trainer's sharding; None: random ones.

    ``config`` is the architecture, of ``outline``. New ``adapters`` are put beside the weights, unless their rank is 0.

    Raises:
        ValueError: what cannot be read, and where.
    """
    if path is None:
        placed = shardings(qwen.abstract(config, param_dtype=model.param_dtype)[1], mesh, TRAINER_RULES)
        params = qwen.initialize(config, jax.random.key(seed), placed, param_dtype=model.param_dtype)
    else:
        try:
            _, params = hf.load_params(path, mesh, TRAINER_RULES, model.param_dtype)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"model.path: {error}") from error
    if adapters is not None and adapters.rank:
        placed = lora.trained(shardings(abstract(model, config, mesh, adapters)[1], mesh, TRAINER_RULES))

        def make() -> Any:
            return lora.trained(nnx.split(qwen.Qwen(config, rngs=nnx.Rngs(seed), lora=adapters))[1])

        params = lora.attached(params, jax.jit(make, out_shardings=placed)())
    return params


def outline(model: ModelConfig, path: str | None) -> tuple[qwen.QwenConfig, Tokenizer]:
    """Architecture and tokenizer, without the weights.

    Raises:
        ValueError: what cannot be read, and where; a tokenizer larger than the model's vocabulary.
    """
    if path is None:
        config = read_config(pathlib.Path(str(model.config)))
    else:
        try:
            path = hf.local_copy(path)
            config = hf.load_config(hf.resolve(path))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"model.path: {error}") from error
    tokenizer = tokenizers.load(model.tokenizer, path, model.chat_template_kwargs)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"model.tokenizer={model.tokenizer!r} has {tokenizer.vocab_size} ids, the model only {config.vocab_size}"
        )
    return config, tokenizer


def abstract(
    model: ModelConfig, config: qwen.QwenConfig, mesh: Mesh, adapters: LoraConfig | None = None
) -> tuple[Any, Any]:
    """Structure of the trainer's model, and the shapes of its parameters.

    Raises:
        ValueError: the model has no such matrix as an adapter is for.
    """
    return qwen.abstract(
        config,
        param_dtype=model.param_dtype,
        compute_dtype=model.compute_dtype,
        lora=adapters,
        remat=qwen.Remat(model.remat != "none", model.remat_names, offload=model.remat == "offload"),
        attention=model.attention,
        scan_layers=model.scan_layers,
        mesh=mesh,
    )


def read_config(path: pathlib.Path) -> qwen.QwenConfig:
    """Reads a Hugging Face ``config.json``.

    Raises:
        ValueError: there is none, or it is not one of a known model; names the file.
    """
    if not path.is_file():
        raise ValueError(f"model.config: file {str(path)!r} does not exist")
    try:
        return qwen.QwenConfig.from_hf(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"model.config: {path}: {error}") from error

"""The policy that a command starts from: a model folder, random weights, or a warm start that is made first."""

import pathlib

from oapl_jax.build import policy
from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import GenerateConfig, SftConfig, TrainConfig
from oapl_jax.config.model import ModelConfig
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.distributed.sharding import num_processes
from oapl_jax.io import run_dir
from oapl_jax.model import qwen
from oapl_jax.sft import sft


def make_warm_start(config: TrainConfig | GenerateConfig) -> None:
    """Makes the supervised warm start, where the config names one that does not exist.

    Raises:
        ValueError: a job of several processes needs one that does not exist.
    """
    warm_start, path = _warm_start(config.model), config.model.warm_start
    if warm_start is None:
        return
    if num_processes() > 1 and not sft.is_finished(warm_start):
        raise ValueError(
            f"model.warm_start={path}: it is made by one process; run it first: oapl-jax sft --config {path}"
        )
    sft.ensure(warm_start)


def model_path(model: ModelConfig) -> str | None:
    """The folder or hub name of the weights; None: random weights of ``model.config``."""
    warm_start = _warm_start(model)
    return model.path if warm_start is None else str(sft.export_folder(warm_start))


def outline(model: ModelConfig) -> tuple[qwen.QwenConfig, Tokenizer]:
    """Architecture and tokenizer, without weights; of a warm start that does not exist those that it will have.

    Raises:
        ValueError: what cannot be read, and where.
    """
    warm_start = _warm_start(model)
    if warm_start is None or sft.is_finished(warm_start):
        return policy.outline(model, model_path(model))
    tokenizer = model.tokenizer if model.tokenizer != "model" else warm_start.model.tokenizer
    options = warm_start.model.chat_template_kwargs | model.chat_template_kwargs
    update = {"tokenizer": tokenizer, "chat_template_kwargs": options}
    return policy.outline(warm_start.model.model_copy(update=update), warm_start.model.path)


def sampled_outline(model: ModelConfig) -> tuple[qwen.QwenConfig, Tokenizer]:
    """The same where ``model.path`` may also be a run: of what that started from."""
    if is_run(model.path):
        start = run_dir.read_config(pathlib.Path(str(model.path)), TrainConfig).model
        options = start.chat_template_kwargs | model.chat_template_kwargs
        model = start.model_copy(update={"chat_template_kwargs": options})
    return outline(model)


def _warm_start(model: ModelConfig) -> SftConfig | None:
    return None if model.warm_start is None else config_file.load(SftConfig, model.warm_start, checks=CHECKS)


def is_run(path: str | None) -> bool:
    """Whether a model path is the directory of a run."""
    return path is not None and (pathlib.Path(path) / run_dir.CONFIG_FILE).is_file()

"""What a run starts from: model, data, graders and devices, read and checked; a warm start, which is made first."""

from collections.abc import Callable, Iterable
from typing import Any

from oapl_jax.build import policy
from oapl_jax.build.assembly import Assembly, make_assembly
from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import GenerateConfig, SftConfig, TrainConfig
from oapl_jax.config.config_file import ConfigError
from oapl_jax.config.model import ModelConfig
from oapl_jax.data.prompts import held_out, load_prompts
from oapl_jax.data.tokenizer import CharacterTokenizer, Tokenizer
from oapl_jax.distributed.sharding import make_meshes, num_processes
from oapl_jax.io import run_dir, storage
from oapl_jax.model import qwen
from oapl_jax.rewards.grader import make_grader
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.stops import Stops
from oapl_jax.sft import sft
from oapl_jax.sources.setup import Inputs


class _AnyTokenizer(CharacterTokenizer):
    """In place of one that cannot be loaded: prompts are read all the same, for their own mistakes."""

    def encode_prompt(self, *_: Any, **__: Any) -> list[int]:
        """One token."""
        return [0]

    encode = encode_prompt


def load(config: TrainConfig, known: ConfigError | None = None) -> tuple[Assembly, Inputs]:
    """The assembly of a run on this machine's devices, and what the run reads; no weights.

    Where mistakes are ``known`` already, what reads their sections is left out, and they are raised with the others.

    Raises:
        ConfigError: every mistake in model, data, graders, devices and run directory.
    """
    lines, wrong = (list(known.lines), known.wrong) if known else ([], frozenset())

    def attempt(sections: Iterable[str], read: Callable[[], Any]) -> Any:
        """What it reads; None where that has a mistake, or one of these sections."""
        if wrong.isdisjoint(sections):
            try:
                return read()
            except (ValueError, OSError) as error:
                lines.extend({str(error).replace("\n", "\n  ")} - set(lines))
        return None

    everything = TrainConfig.model_fields
    attempt(everything, lambda: run_dir.check_run(config))
    grader = attempt(("data", "reward"), lambda: make_grader(config))  # its processes start beside what follows
    outlined = attempt(("model",), lambda: outline(config.model))
    meshes = attempt(("mesh",), lambda: make_meshes(config.mesh))
    tokenizer, assembly = outlined[1] if outlined else _AnyTokenizer(), None
    if outlined and meshes:
        stops = attempt(("sampler",), lambda: Stops(tokenizer, SamplingDistribution.of(config.sampler)).ids)
        sizes = outlined[0], tokenizer.vocab_size, stops or tokenizer.stop_ids
        assembly = attempt(everything, lambda: make_assembly(config, *sizes))
    prompts = attempt(("data", "run"), lambda: load_prompts(config.data, tokenizer, config.run.seed))
    held_out_prompts = attempt(("data", "evaluation"), lambda: held_out(config, tokenizer))
    if grader is not None:
        attempt((), lambda: grader.check_golds([*(prompts.items if prompts else ()), *(held_out_prompts or ())]))
    if assembly is None or grader is None or lines:
        if grader is not None:
            grader.close()
        source = known.source if known else f"the config of {config.run.dir!r}, and what it names"
        raise ConfigError(lines[0] if len(lines) == 1 and not known else "", lines, source)
    return assembly, Inputs(tokenizer, prompts, held_out_prompts, grader)


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
        start = run_dir.read_config(storage.shared_path(str(model.path)), TrainConfig).model
        options = start.chat_template_kwargs | model.chat_template_kwargs
        model = start.model_copy(update={"chat_template_kwargs": options})
    return outline(model)


def _warm_start(model: ModelConfig) -> SftConfig | None:
    return None if model.warm_start is None else config_file.load(SftConfig, model.warm_start, checks=CHECKS)


def is_run(path: str | None) -> bool:
    """Whether a model path is the directory of a run."""
    return path is not None and storage.exists(storage.shared_path(path) / run_dir.CONFIG_FILE)

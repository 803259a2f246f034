"""Supervised fine-tuning: the toy models' warm start, and the SFT baseline on pairs of prompt and response.

python -m oapl_jax sft --config configs/chain_sft.yaml
"""

import contextlib
import pathlib
import time
from typing import Any

import jax

from oapl_jax.build import policy
from oapl_jax.config import config_file
from oapl_jax.config.schema import SftConfig
from oapl_jax.data.pairs import load_pairs
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.io import run_dir
from oapl_jax.io.metrics import MetricsWriter
from oapl_jax.io.non_finite import check_finite
from oapl_jax.io.progress_bar import ProgressBar
from oapl_jax.learner.batch import RowLayout, from_pairs, place
from oapl_jax.learner.state import init_state, make_optimizer, make_schedule
from oapl_jax.learner.step import make_train_step, sft_loss_fn
from oapl_jax.model import hf, lora
from oapl_jax.weights.checkpoints import Checkpoints

EXPORT_FOLDER = "export"
SHOWN = ("learner/loss", "learner/grad_norm", "learner/entropy", "learner/learning_rate")


def load_config(path: str) -> SftConfig:
    """Reads the config of a warm start; a ``ConfigError`` names its file."""
    return config_file.load(SftConfig, path)


def is_finished(config: SftConfig) -> bool:
    """Whether the run's model has been written."""
    return (pathlib.Path(config.run.dir) / EXPORT_FOLDER).is_dir()


def ensure(config: SftConfig) -> pathlib.Path:
    """The Hugging Face folder of the trained model; trains it first where it does not exist."""
    if not is_finished(config):
        run(config)
    else:
        run_dir.check_run(config, SftConfig)  # refuses a model that another config made
    return pathlib.Path(config.run.dir) / EXPORT_FOLDER


def run(config: SftConfig) -> pathlib.Path:
    """Trains to the last step, resuming from the newest checkpoint, and returns the model's folder.

    The position in the data is a function of the step, so a resumed run sees the same batches.
    """
    run_dir.check_run(config, SftConfig)
    mesh, _ = make_meshes(config.mesh)
    loaded = policy.load(config.model, config.model.path, mesh, config.run.seed, config.lora)
    pairs = load_pairs(config.data, loaded.tokenizer, config.run.seed)
    schedule = make_schedule(config.learner, config.run.steps)
    optimizer = make_optimizer(config.learner, schedule)
    state, shardings = init_state(loaded.params, optimizer, mesh)
    num_pairs = config.learner.batch_rollouts
    layout = RowLayout(
        num_pairs,
        config.data.max_prompt_tokens + config.data.max_response_tokens,
        config.learner.row_tokens,
        config.learner.micro_batch_rows,
        mesh,
    )
    train_step = make_train_step(
        loaded.graphdef,
        optimizer,
        schedule,
        sft_loss_fn,
        beta2=0.0,
        temperature=1.0,
        vocab_size=loaded.tokenizer.vocab_size,
        mesh=mesh,
        shardings=shardings,
    )
    directory = run_dir.open_run(config, SftConfig)

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(ProgressBar(config.run.steps, enabled=config.logging.progress))
        checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint.keep, [config.checkpoint.keep_every])
        stack.callback(checkpoints.close)
        restored = checkpoints.restore(_abstract(state, shardings).stored, progress.note)
        first = 0
        if restored is not None:
            first, state = restored[0], state.restored(restored[1])
            progress.note(f"resumed supervised training at step {first}")
        writer = stack.enter_context(
            MetricsWriter(
                directory,
                resume_step=first if restored is not None else None,
                tensorboard=config.logging.tensorboard,
                wandb_project=config.logging.wandb_project,
                config=config.model_dump(),
            )
        )
        for step in range(first + 1, config.run.steps + 1):
            start = time.perf_counter()
            taken = [pairs[i] for i in range((step - 1) * num_pairs, step * num_pairs)]
            batch = from_pairs([(pair.prompt_ids, pair.response_ids) for pair in taken], layout)
            state, device_metrics = train_step(state, place(batch, layout))
            metrics = {name: float(device_metrics[name]) for name in SHOWN}
            check_finite(step, metrics, SHOWN)
            metrics["learner/seconds"] = time.perf_counter() - start
            if step % config.checkpoint.every == 0 or step == config.run.steps:
                checkpoints.save(step, state.stored, {})
            writer.write(step, metrics)
            progress.update(step, metrics)
    hf.save_folder(directory / EXPORT_FOLDER, loaded.config, lora.merged(state.params), loaded.tokenizer)
    return directory / EXPORT_FOLDER


def _abstract(state: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

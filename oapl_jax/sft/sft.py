"""Supervised fine-tuning: the toy models' warm start, and the SFT baseline on pairs of prompt and response."""

import contextlib
import time

from oapl_jax.build import policy
from oapl_jax.build.learner import make_learner
from oapl_jax.config import config_file
from oapl_jax.config.commands import SftConfig
from oapl_jax.data.pairs import load_pairs
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.io import run_dir, storage, trackers
from oapl_jax.io.metrics import MetricsWriter
from oapl_jax.io.non_finite import check_finite
from oapl_jax.io.progress_bar import ProgressBar
from oapl_jax.io.storage import SharedPath
from oapl_jax.learner.batch import from_pairs
from oapl_jax.model import hf, lora
from oapl_jax.objectives import supervised
from oapl_jax.weights.checkpoints import Checkpoints

SHOWN = ("learner/loss", "learner/grad_norm", "learner/entropy", "learner/learning_rate")


def export_folder(config: SftConfig) -> SharedPath:
    """Where the trained model is written."""
    return storage.shared_path(config.run.dir) / run_dir.EXPORT_FOLDER


def is_finished(config: SftConfig) -> bool:
    """Whether the trained model has been written."""
    return storage.exists(export_folder(config) / hf.CONFIG_FILE)


def ensure(config: SftConfig) -> None:
    """Trains the model where its folder does not exist yet."""
    if is_finished(config):
        run_dir.check_run(config)  # refuses a model that another config made
    else:
        run(config)


def run(config: SftConfig) -> SharedPath:
    """Trains to the last step, resuming from the newest checkpoint, and returns the model's folder.

    The position in the data is a function of the step, so a resumed run sees the same batches.
    """
    run_dir.check_run(config)
    mesh, _ = make_meshes(config.mesh)
    architecture, tokenizer = policy.outline(config.model, config.model.path)
    pairs = load_pairs(config.data, tokenizer, config.run.seed)
    learner = make_learner(
        config,
        architecture,
        mesh,
        max_response_tokens=config.data.max_response_tokens,
        group_size=1,
        objective=supervised.OBJECTIVE,
        options=supervised.OBJECTIVE.options(),
        temperature=1.0,
        vocab_size=tokenizer.vocab_size,
    )
    state = learner.init(
        policy.load_params(config.model, config.model.path, architecture, mesh, config.run.seed, config.lora)
    )
    num_pairs = config.learner.batch_rollouts
    directory = run_dir.open_run(config)

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(ProgressBar(config.run.steps, enabled=config.logging.progress))
        checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint.keep, [config.checkpoint.keep_every])
        stack.callback(checkpoints.close)
        first = 0
        if (restored := checkpoints.restore(learner.shapes.stored, progress.note)) is not None:
            first = restored[0]
            state = state.restored(restored[1])
            progress.note(f"resumed supervised training at step {first}")
        tracker = trackers.start(directory, config.run, first + 1, config_file.written(config))
        writer = stack.enter_context(MetricsWriter(directory, tracker, resume_step=first))
        for step in range(first + 1, config.run.steps + 1):
            start = time.perf_counter()
            taken = [pairs[i] for i in range((step - 1) * num_pairs, step * num_pairs)]
            batch = from_pairs([(pair.prompt_ids, pair.response_ids) for pair in taken], learner.rows)
            state, device_metrics, _ = learner.train_step(state, learner.place(batch))
            metrics = {name: float(device_metrics[name]) for name in SHOWN}
            check_finite(step, metrics, SHOWN)
            metrics["learner/seconds"] = time.perf_counter() - start
            writer.write(step, metrics)
            if step % config.checkpoint.every == 0 or step == config.run.steps:
                writer.flush()
                checkpoints.save(step, state.stored, {})
            progress.update(step, metrics)
    with storage.folder_for(export_folder(config), last=hf.CONFIG_FILE) as folder:
        hf.save_folder(folder, architecture, lora.merged(state.params), tokenizer)
    return export_folder(config)

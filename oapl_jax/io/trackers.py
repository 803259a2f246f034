"""Trackers that show metrics outside of the run directory's own file: TensorBoard and Weights & Biases."""

import importlib
import pathlib
import tempfile
import uuid
from typing import Any

from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath

TENSORBOARD_FOLDER = "tensorboard"


def start_tensorboard(run_dir: pathlib.Path, first_step: int) -> Any:
    """Opens event files; later steps of former ones are hidden."""
    # Imported here because it takes more than a second, which reading metrics need not pay.
    import tensorboardX

    # The suffix keeps the files of two starts within one second apart.
    folder, suffix = str(run_dir / TENSORBOARD_FOLDER), f".from-{first_step}"
    return tensorboardX.SummaryWriter(folder, purge_step=first_step, filename_suffix=suffix)


def start_wandb(project: str, run_dir: SharedPath, config: dict[str, Any] | None) -> Any:
    """Starts a W&B run, or goes on with the one of this run directory.

    Raises:
        ValueError: wandb is not installed.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"logging.wandb_project={project!r}: {error}; pip install 'oapl-jax[wandb]', or set it to null"
        ) from error
    # The id is kept with the run, so that a resumed run continues the same W&B run.
    id_file = run_dir / "wandb_id.txt"
    storage.create(id_file, uuid.uuid4().hex[:12].encode())
    run_id = storage.read(id_file).decode()
    folder = str(run_dir) if storage.is_local(run_dir) else tempfile.gettempdir()
    run = wandb.init(project=project, id=run_id, resume="allow", name=run_dir.name, dir=folder, config=config)
    # W&B's own step cannot go back, which a resumed run does.
    run.define_metric("*", step_metric="step")
    return run

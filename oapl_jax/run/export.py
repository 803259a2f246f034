"""A checkpoint of a run as a Hugging Face folder, which ``transformers`` and vLLM load.

The folder has the weights (safetensors, in shards where they are large), config, generation config, tokenizer and a
model card with the run's config and results. Of a run that trained adapters it has them merged; or the adapters alone,
for ``peft``. Everything passes through host memory, which has to hold the learner's weights: devices that a run is
using are left alone. Relative paths in the run's config are those of the folder in which it was started.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from oapl_jax.build import policy
from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.io import storage
from oapl_jax.io.run_dir import read_config
from oapl_jax.io.storage import SharedPath
from oapl_jax.learner.state import TrainState, abstract_state, make_optimizer, make_schedule
from oapl_jax.model import hf, lora, qwen
from oapl_jax.run.start import model_path, outline
from oapl_jax.weights import checkpoints
from oapl_jax.weights.checkpoint_store import CheckpointStore, checkpoint_folder
from oapl_jax.weights.model_card import write_card
from oapl_jax.weights.sync import WeightSync

CHECKPOINTS_FOLDER = "checkpoints"
LEARNER_WEIGHTS = "0/params/"
"""How the names of their arrays in a checkpoint begin."""


def export(
    run_dir: SharedPath,
    out: pathlib.Path | None = None,
    step: int | None = None,
    dtype: str | None = None,
    *,
    adapter: bool = False,
) -> pathlib.Path:
    """Writes the learner's weights of a checkpoint, with config, tokenizer and generation config; returns the folder.

    By default ``out`` is ``RUN_DIR/export-STEP``, of a run in an object store ``NAME-export-STEP`` here, ``step`` that of
    the newest checkpoint, and ``dtype`` as trained. A model in ``out`` is replaced. ``adapter`` writes the adapters alone.

    Raises:
        ValueError: there is no run or no such checkpoint, it is damaged or of another model, ``out`` is something else,
            or adapters are wanted and none were trained.
    """
    train = read_config(run_dir, TrainConfig)
    step = choose_step(run_dir, step)
    if out is None:
        is_here = storage.is_local(run_dir)
        out = pathlib.Path(str(run_dir / f"export-{step}") if is_here else f"{run_dir.name}-export-{step}")
    if adapter and not train.lora.rank:
        raise ValueError(f"{str(run_dir)!r} trained all weights (lora.rank=0), and has no adapters to export")
    if out.exists() and not any((out / name).is_file() for name in (hf.CONFIG_FILE, hf.ADAPTER_CONFIG_FILE)):
        raise ValueError(f"{str(out)!r} exists and is no model folder; it would be replaced: choose another")
    start = model_path(train.model)
    if start is not None and out.exists() and pathlib.Path(start).exists() and out.samefile(start):
        raise ValueError(f"{str(out)!r} is the model that the run started from; it would be replaced: choose another")
    config, tokenizer = outline(train.model)
    mesh, _ = make_meshes(MeshConfig(trainer="fsdp=1"), jax.devices("cpu"))
    with checkpoint_folder(run_dir / CHECKPOINTS_FOLDER, step) as checkpoint:
        params = _load(checkpoint, _abstract(config, train, mesh))
    if adapter:
        return hf.save_adapter(out, config, params, train.lora, str(start))
    if train.lora.rank:
        frozen = policy.load_params(train.model, start, config, mesh, train.run.seed, train.lora)
        params = lora.merged(lora.with_trained(frozen, params))
    folder = hf.save_folder(out, config, params, tokenizer, dtype)
    write_card(folder, train, run_dir, step, dtype or train.model.param_dtype)
    return folder


def push(folder: pathlib.Path, name: str, *, private: bool = False) -> str:
    """Puts a model folder on the Hugging Face hub, as one commit; returns its address.

    Raises:
        ValueError: the hub cannot be reached, or refuses; says why.
    """
    from huggingface_hub import HfApi  # half a second, which other exports need not pay

    api = HfApi()
    try:
        address = str(api.create_repo(name, private=private or None, exist_ok=True))
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=f"{folder.resolve().name} by oapl_jax.export"
        )
    except Exception as error:  # the hub's library raises whatever its transport does
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--push {name}: the hub refuses or cannot be reached ({reason}); the folder {folder} is complete: log in by"
            " `hf auth login` or HF_TOKEN, and push it again"
        ) from error
    return address


def _abstract(config: qwen.QwenConfig, train: TrainConfig, mesh: Mesh) -> tuple[TrainState, Any]:
    """Shapes of what a checkpoint holds, see ``Run.save``: the learner's state, the sampler's weights."""
    optimizer = make_optimizer(train.learner, make_schedule(train.learner, train.run.steps))
    params = policy.abstract(train.model, config, mesh, train.lora)[1]
    return abstract_state(params, optimizer).stored, WeightSync(params, mesh, train.sampler.dtype).abstract(params)


def _load(folder: pathlib.Path, abstract_tree: tuple[TrainState, Any]) -> Any:
    """What was trained. All arrays are read, one at a time, because their fingerprint is of them all."""
    host = SingleDeviceSharding(jax.devices("cpu")[0])
    kept = []

    def arrays() -> Iterator[jax.Array]:
        for name, leaf in checkpoints.flatten(abstract_tree).items():
            array = _load_array(folder, name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host))
            if name.startswith(LEARNER_WEIGHTS):
                kept.append(array)
            yield array

    fingerprint = checkpoints.fingerprint(arrays())
    saved = ocp.load_checkpointables(str(folder), {"meta": None})["meta"]["fingerprint"]
    if fingerprint != saved:
        raise ValueError(f"{folder} is damaged: fingerprint {fingerprint:#010x} is not the saved {saved:#010x}")
    return jax.tree.unflatten(jax.tree.structure(abstract_tree[0].params), kept)


def _load_array(folder: pathlib.Path, name: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            array = ocp.load_checkpointables(str(folder), {"arrays": {name: abstract}})["arrays"][name]
        if not isinstance(array, jax.Array):
            raise LookupError("it is absent")
    except Exception as error:  # Orbax raises whatever its storage does
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
        raise ValueError(
            f"{folder}: cannot load array {name} of shape {abstract.shape} that this run's config implies ({reason}); it"
            " is damaged or of another model"
        ) from error
    return array


def steps(run_dir: SharedPath) -> list[int]:
    """Steps of whole checkpoints: an unfinished or damaged one has more than digits in its name."""
    folder = run_dir / CHECKPOINTS_FOLDER
    if not storage.is_local(folder):
        return CheckpointStore(folder).steps()
    return sorted(int(name) for name in storage.names(folder) if name.isdigit())


def choose_step(run_dir: SharedPath, step: int | None) -> int:
    """The step of the newest checkpoint, or this one, which must be there."""
    there = steps(run_dir)
    if not there:
        raise ValueError(f"{str(run_dir)!r} has no checkpoint yet")
    if step not in (None, *there):
        raise ValueError(f"{str(run_dir)!r} has no checkpoint of step {step}; it has {', '.join(map(str, there))}")
    return there[-1] if step is None else step

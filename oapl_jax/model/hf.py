"""Hugging Face model folders, both ways: safetensors <-> sharded, stacked parameters.

Reading makes one stacked parameter at a time: each device's shard is cut out of the files by slices and cast, so the
host holds the shards of one parameter and never the model. (Orbax's safetensors loader took 2.5 times the model's
bytes.) Writing goes parameter by parameter from the devices to the file. ``LAYOUT`` alone knows Hugging Face's names
and shapes.
"""

import collections
import contextlib
import dataclasses
import fnmatch
import functools
import itertools
import json
import logging
import math
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from oapl_jax.config.model import LoraConfig
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.distributed.sharding import Rules, replicated, shardings
from oapl_jax.distributed.team import Team
from oapl_jax.io import storage
from oapl_jax.model import lora, qwen
from oapl_jax.untrusted import reading

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
SHARD_BYTES = 5 * 10**9
"""Hugging Face's own limit of a weights file."""

WRITE_DEADLINE = 1800.0
"""For how long the writers of a folder wait for each other."""

QUEUED_BLOCKS = 2
"""Tensors on the devices that a writer has not written yet."""

HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja"]
COMPARED_ROWS = 8192
"""Ids whose rows of embedding and output matrix are on the host at once to be compared."""
INERT = (".rotary_emb.inv_freq",)
"""Tensors in old checkpoints that follow from the config and are no weights."""

SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class TensorLayout(NamedTuple):
    """Where a parameter's tensors are in a Hugging Face checkpoint, and how their dimensions are arranged."""

    name: str
    """With ``{layer}`` and ``{expert}`` where there is one tensor for each."""
    groups: tuple[tuple[int, ...], ...]
    """Hugging Face's dimensions: each is the product of these dimensions of ours (without layer, expert)."""

    @property
    def num_stacked(self) -> int:
        """Leading dimensions of ours that are separate tensors in the file."""
        return self.name.count("{")

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one tensor in the file, of our shape without the stacked dimensions."""
        return tuple(math.prod(shape[dim] for dim in group) for group in self.groups)

    def hf_name(self, index: tuple[int, ...]) -> str:
        """Name of the tensor at an index of the stacked dimensions."""
        return self.name.format(**dict(zip(("layer", "expert"), index, strict=False)))

    @property
    def order(self) -> tuple[int, ...]:
        """Our dimensions in the order of the file."""
        return tuple(itertools.chain.from_iterable(self.groups))


_LAYER = "model.layers.{layer}."
_VECTOR = ((0,),)
_MATRIX = ((0,), (1,))
_TRANSPOSED = ((1,), (0,))  # torch's Linear is [out, in], ours [in, out]
_TO_HEADS = ((1, 2), (0,))  # [D, H, C] <- [H*C, D]
_FROM_HEADS = ((2,), (0, 1))  # [H, C, D] <- [D, H*C]
_HEAD_VECTOR = ((0, 1),)  # [H, C] <- [H*C]

LAYOUT: dict[str, TensorLayout] = {
    "embedding": TensorLayout("model.embed_tokens.weight", _MATRIX),
    "final_norm": TensorLayout("model.norm.weight", _VECTOR),
    "lm_head": TensorLayout("lm_head.weight", _TRANSPOSED),
    "layers/attention_norm": TensorLayout(_LAYER + "input_layernorm.weight", _VECTOR),
    "layers/attention/query": TensorLayout(_LAYER + "self_attn.q_proj.weight", _TO_HEADS),
    "layers/attention/key": TensorLayout(_LAYER + "self_attn.k_proj.weight", _TO_HEADS),
    "layers/attention/value": TensorLayout(_LAYER + "self_attn.v_proj.weight", _TO_HEADS),
    "layers/attention/query_bias": TensorLayout(_LAYER + "self_attn.q_proj.bias", _HEAD_VECTOR),
    "layers/attention/key_bias": TensorLayout(_LAYER + "self_attn.k_proj.bias", _HEAD_VECTOR),
    "layers/attention/value_bias": TensorLayout(_LAYER + "self_attn.v_proj.bias", _HEAD_VECTOR),
    "layers/attention/query_norm": TensorLayout(_LAYER + "self_attn.q_norm.weight", _VECTOR),
    "layers/attention/key_norm": TensorLayout(_LAYER + "self_attn.k_norm.weight", _VECTOR),
    "layers/attention/output": TensorLayout(_LAYER + "self_attn.o_proj.weight", _FROM_HEADS),
    "layers/mlp_norm": TensorLayout(_LAYER + "post_attention_layernorm.weight", _VECTOR),
    "layers/mlp/gate": TensorLayout(_LAYER + "mlp.gate_proj.weight", _TRANSPOSED),
    "layers/mlp/up": TensorLayout(_LAYER + "mlp.up_proj.weight", _TRANSPOSED),
    "layers/mlp/down": TensorLayout(_LAYER + "mlp.down_proj.weight", _TRANSPOSED),
}
"""Our parameter's path -> its tensors in the file."""

EXPERT_LAYOUT: dict[str, TensorLayout] = {
    **LAYOUT,
    "layers/mlp/router": TensorLayout(_LAYER + "mlp.gate.weight", _TRANSPOSED),
    "layers/mlp/gate": TensorLayout(_LAYER + "mlp.experts.{expert}.gate_proj.weight", _TRANSPOSED),
    "layers/mlp/up": TensorLayout(_LAYER + "mlp.experts.{expert}.up_proj.weight", _TRANSPOSED),
    "layers/mlp/down": TensorLayout(_LAYER + "mlp.experts.{expert}.down_proj.weight", _TRANSPOSED),
}
"""``LAYOUT`` of a mixture of experts."""


def load_config(folder: pathlib.Path) -> qwen.QwenConfig:
    """Reads ``config.json``; a policy is only tied where its weights agree.

    Where the config says that the embedding is tied, and the weights have an output matrix that differs from it, the
    policy is untied and a warning says so, as in transformers.

    Raises:
        FileNotFoundError: there is none, or a file of the weights is missing.
        ValueError: it is no JSON, or not of a known model; names the file, the key and the value.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a model folder has a {CONFIG_FILE}")
    try:
        config = qwen.QwenConfig.from_hf(reading.read_object(path))
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:  # the last three: a value of another type
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    if not config.tie_word_embeddings or (file := _file_of_other_head(folder)) is None:
        return config
    logging.getLogger(__name__).warning(
        "%s says tie_word_embeddings=true, but lm_head.weight in %s differs from the embedding: the model is loaded untied."
        " Set tie_word_embeddings to false to silence this, or remove lm_head.weight from the file to tie the model.",
        path,
        file,
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


def _file_of_other_head(folder: pathlib.Path) -> pathlib.Path | None:
    """The file with an output matrix that differs from the embedding; None where the weights have none."""
    has_weights = any((folder / name).is_file() for name in (INDEX_FILE, WEIGHTS_FILE))
    files, names = _find_tensors(folder) if has_weights else {}, (LAYOUT["lm_head"].name, LAYOUT["embedding"].name)
    if any(name not in files for name in names):
        return None
    with contextlib.ExitStack() as stack:
        head, embedding = (stack.enter_context(safe_open(folder / files[name], "np")).get_slice(name) for name in names)
        num_ids = head.get_shape()[0]
        rows = [slice(i, min(i + COMPARED_ROWS, num_ids)) for i in range(0, num_ids, COMPARED_ROWS)]
        is_same = head.get_shape() == embedding.get_shape()
        is_same = is_same and all(np.array_equal(head[part], embedding[part]) for part in rows)
    return None if is_same else folder / files[names[0]]


def load_params(
    source: str | pathlib.Path, mesh: Mesh, rules: Rules, param_dtype: DTypeLike
) -> tuple[qwen.QwenConfig, Any]:
    """Loads a model folder, or a model of the hub, straight into its shardings and dtype, shard by shard.

    Returns:
        The architecture, and parameters as ``nnx.split(Qwen(...))[1]`` has them.

    Raises:
        FileNotFoundError: the folder or a file of it does not exist.
        ValueError: an unknown model type, a missing or unused tensor, a wrong shape; names it and the file.
    """
    folder = resolve(source)
    config = load_config(folder)
    _, params = qwen.abstract(config, param_dtype=param_dtype)
    placed = shardings(params, mesh, rules)
    files = _find_tensors(folder)
    _check_tensors(folder, config, params, files)

    def load(path: tuple[Any, ...], leaf: nnx.Variable, target: nnx.Variable) -> nnx.Variable:
        layout = _layout(config, path)
        return leaf.replace(_load_stacked(folder, files, layout, leaf.shape, leaf.dtype, target.get_value()))

    return config, jax.tree_util.tree_map_with_path(load, params, placed, is_leaf=_is_variable)


def resolve(source: str | pathlib.Path) -> pathlib.Path:
    """The folder itself, or the local copy of a model on the hub (downloaded where needed).

    Raises:
        FileNotFoundError: neither a folder nor available from the hub.
    """
    source = local_copy(str(source))
    folder = pathlib.Path(source).expanduser()
    if folder.is_dir():
        return folder
    # A hub name is NAME or OWNER/NAME; all else can only have been meant as a path.
    if folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(f"model folder {source!r} does not exist")
    import huggingface_hub  # imports half a second of HTTP stack that local folders need not pay

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source!r} is no folder here and cannot be had from the Hugging Face hub: {error}"
        ) from error


def local_copy(source: str) -> str:
    """``source`` itself; of a model folder in an object store a copy, which this process makes once and has to its end.

    Raises:
        FileNotFoundError: the store has no such folder.
    """
    return source if storage.is_local(storage.shared_path(source)) else _copy(source).name


@functools.cache
def _copy(address: str) -> tempfile.TemporaryDirectory[str]:
    folder, copy = storage.shared_path(address), tempfile.TemporaryDirectory(prefix="oapl-model-")
    names = [name for name in storage.names(folder) if any(fnmatch.fnmatch(name, text) for text in HUB_PATTERNS)]
    if CONFIG_FILE not in names:
        raise FileNotFoundError(f"{address!r} is no model folder: it has no {CONFIG_FILE}")
    storage.get_folder(folder, names, pathlib.Path(copy.name))
    return copy


def _layout(config: qwen.QwenConfig, path: Sequence[Any]) -> TensorLayout:
    """Of the parameter at a path of JAX, or at one of flax."""
    name = "/".join(str(getattr(entry, "key", entry)) for entry in path)
    return (EXPERT_LAYOUT if config.num_experts else LAYOUT)[name]


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _find_tensors(folder: pathlib.Path) -> dict[str, str]:
    """Tensor name -> name of its file, from the index or from the only file."""
    index = folder / INDEX_FILE
    if index.is_file():
        files = reading.read_object(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError(f"{index}: weight_map does not give a file for each tensor; copy the model again")
        for name in sorted(set(files.values())):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} does not exist, but {index} names it; the copy is incomplete")
            absent = {tensor for tensor, file in files.items() if file == name} - set(_names(folder / name))
            if absent:
                raise ValueError(f"{folder / name} lacks tensor {min(absent)}, but {index} says that it is there")
        return files
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; only safetensors are read")
    return dict.fromkeys(_names(folder / WEIGHTS_FILE), WEIGHTS_FILE)


def _names(path: pathlib.Path) -> list[str]:
    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _check_tensors(folder: pathlib.Path, config: qwen.QwenConfig, params: Any, files: dict[str, str]) -> None:
    """Names and shapes of every tensor, before anything large is read."""
    expected = {name: layout.hf_shape(shape) for name, layout, shape, _ in _all_tensors(config, params)}
    where = folder / (INDEX_FILE if (folder / INDEX_FILE).is_file() else WEIGHTS_FILE)
    missing = sorted(expected.keys() - files.keys())
    if missing:
        raise ValueError(
            f"{where} lacks tensor {missing[0]} (missing in all: {len(missing)}) that {CONFIG_FILE} implies"
        )
    unused = files.keys() - expected.keys()
    if config.tie_word_embeddings:
        unused -= {"lm_head.weight"}
    unused = sorted(name for name in unused if not name.endswith(INERT))
    if unused:
        raise ValueError(
            f"{folder / files[unused[0]]} has tensor {unused[0]} (unused in all: {len(unused)}) that a"
            f" {config.model_type} with this {CONFIG_FILE} does not use"
        )
    for file_name in sorted(set(files.values())):
        with safe_open(folder / file_name, "np") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                if name in expected and (shape := list(file.get_slice(name).get_shape())) != list(expected[name]):
                    raise ValueError(
                        f"{folder / file_name}: tensor {name} has shape {shape}, {CONFIG_FILE} implies"
                        f" {list(expected[name])}"
                    )


def _all_tensors(
    config: qwen.QwenConfig, params: Any
) -> Iterator[tuple[str, TensorLayout, tuple[int, ...], tuple[nnx.Variable, tuple[int, ...]]]]:
    """Each tensor of the file: name, layout, our shape of it, and (parameter, index of the stacked dimensions)."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_variable)[0]:
        layout = _layout(config, path)
        for index in np.ndindex(*leaf.shape[: layout.num_stacked]):
            yield layout.hf_name(index), layout, leaf.shape[layout.num_stacked :], (leaf, index)


def _load_stacked(
    folder: pathlib.Path,
    files: dict[str, str],
    layout: TensorLayout,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """One parameter, made from slices of its tensors."""
    num_stacked = layout.num_stacked

    @functools.cache  # replicas of a shard are read once
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        """The part within ``bounds``, start and stop of each dimension."""
        inner = bounds[num_stacked:]
        shard = np.empty([stop - start for start, stop in bounds], dtype)
        slices = tuple(_merged_slice(group, shape[num_stacked:], inner) for group in layout.groups)
        sizes = [inner[dim][1] - inner[dim][0] for dim in layout.order]
        for place in np.ndindex(*shard.shape[:num_stacked]):
            name = layout.hf_name(tuple(start + i for (start, _), i in zip(bounds, place, strict=False)))
            # Opened again each time: pages that a map has touched count as ours until it is closed.
            with safe_open(folder / files[name], "np") as file:
                block = file.get_slice(name)[slices]
                shard[place] = block.reshape(sizes).transpose(np.argsort(layout.order))
        return shard

    def part(index: Any) -> np.ndarray:
        return read(tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, sharding, part)


def _merged_slice(group: tuple[int, ...], shape: tuple[int, ...], bounds: tuple[tuple[int, int], ...]) -> slice:
    """The slice of a dimension in the file that is the product of several of ours; only the first is split."""
    outer, *rest = group
    if any(bounds[dim] != (0, shape[dim]) for dim in rest):
        raise ValueError(f"dimension {rest[0]} of a parameter of shape {shape} cannot be split over a mesh")
    width = math.prod(shape[dim] for dim in rest)
    return slice(bounds[outer][0] * width, bounds[outer][1] * width)


def save_folder(
    folder: str | pathlib.Path,
    config: qwen.QwenConfig,
    params: Any,
    tokenizer: Tokenizer | None = None,
    dtype: DTypeLike | None = None,
    writers: Team | None = None,
    *,
    is_shared: bool = True,
) -> pathlib.Path:
    """Writes a model folder that ``transformers``, vLLM and ``load_params`` read, and returns it.

    It is written beside its place and renamed, so that a torn folder never looks whole. A folder that is there is
    replaced. Weights have ``dtype``, by default their own. ``writers`` are the processes that have the parameters, all
    of which call this; each writes files of its own. None: this process alone. Where the folder is not shared, each
    writes them in a folder of its own.
    """
    folder, writers = pathlib.Path(folder), writers or Team.alone()
    with _written_beside(folder, writers if is_shared else Team.alone()) as partial:
        dtype = jnp.dtype(params.embedding.dtype if dtype is None else dtype)
        _write_weights(partial, config, params, dtype, writers)
        if not writers.is_leader:
            return folder
        _write_json(partial / CONFIG_FILE, config.to_hf() | {"torch_dtype": dtype.name})
        values = {"bos_token_id": config.bos_token_id, "eos_token_id": config.to_hf()["eos_token_id"]}
        if tokenizer is not None:
            tokenizer.save(partial)
            values |= {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
        if not (partial / GENERATION_FILE).exists():
            _write_json(partial / GENERATION_FILE, {key: value for key, value in values.items() if value is not None})
    return folder


def save_adapter(
    folder: str | pathlib.Path, config: qwen.QwenConfig, params: Any, adapters: LoraConfig, base: str
) -> pathlib.Path:
    """Writes the adapters of a policy as a folder that ``peft`` loads, and returns it; see ``save_folder``.

    ``params`` may be the trained ones alone; ``base`` is the folder or hub name of the model that they belong to.
    """
    tensors = {}
    for path, leaf in nnx.to_flat_state(lora.trained(params)):
        name, layout = {"down": "lora_A", "up": "lora_B"}[str(path[-1])], _layout(config, path[:-1])
        rows = leaf.axes.index("rank") if name == "lora_A" else 2  # dimensions up to the matrix's columns
        for i, matrix in enumerate(np.asarray(leaf[...], np.float32)):
            matrix = matrix.reshape(math.prod(matrix.shape[: rows - 1]), -1).T  # torch's Linear is [out, in]
            hf_name = layout.hf_name((i,)).replace(".weight", f".{name}.weight")
            tensors[f"base_model.model.{hf_name}"] = np.ascontiguousarray(matrix)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "target_modules": list(adapters.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    folder = pathlib.Path(folder)
    with _written_beside(folder, Team.alone()) as partial:
        safetensors.numpy.save_file(tensors, partial / ADAPTER_FILE, {"format": "pt"})
        _write_json(partial / ADAPTER_CONFIG_FILE, values)
    return folder


@contextlib.contextmanager
def _written_beside(folder: pathlib.Path, writers: Team) -> Iterator[pathlib.Path]:
    """A folder that takes the place of ``folder`` when it is whole, and is gone after an error."""

    def make() -> str:
        partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
        partial.mkdir(parents=True)
        return str(partial)

    partial = pathlib.Path(writers.agree(make, WRITE_DEADLINE))
    if not writers.is_leader:
        yield partial
        writers.wait()  # all files are there
        writers.wait()  # and in their place
        return
    try:
        yield partial
        writers.wait()
        replaced = partial.with_suffix(".replaced")
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        writers.wait()
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _write_weights(folder: pathlib.Path, config: qwen.QwenConfig, params: Any, dtype: np.dtype, writers: Team) -> None:
    """One file, or several of at most ``SHARD_BYTES`` with an index: at least one for each writer, who writes its own.

    Tensors of all files come from the devices by turns; of several processes each gets all of them.
    """
    tensors = list(_all_tensors(config, params))
    sizes = [math.prod(shape) * dtype.itemsize for _, _, shape, _ in tensors]
    limit = min(SHARD_BYTES, -(-sum(sizes) // writers.size))
    shards: list[list[Any]] = [[]]
    num_bytes = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if num_bytes and num_bytes + size > limit:
            shards.append([])
            num_bytes = 0
        shards[-1].append(tensor)
        num_bytes += size
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS_FILE]
    elif writers.is_leader:
        weight_map = {tensor[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        handles: dict[str, IO[bytes]] = {}
        for name, shard in list(zip(names, shards, strict=True))[writers.rank :: writers.size]:
            handles[name] = stack.enter_context((folder / name).open("wb"))
            handles[name].write(_header(shard, dtype))
        pending: collections.deque[Future[None]] = collections.deque()
        for row in itertools.zip_longest(*shards):
            for name, tensor in zip(names, row, strict=True):
                if tensor is None:
                    continue
                _, layout, _, (leaf, index) = tensor
                mesh = leaf[...].sharding.mesh if writers.size > 1 else None
                block = _arranged(leaf[...], np.array(index, np.int32), layout.order, dtype.name, mesh)
                if name in handles:
                    pending.append(pool.submit(_write_block, handles[name], block))
                if len(pending) > QUEUED_BLOCKS:
                    pending.popleft().result()
        for written in pending:
            written.result()


@functools.partial(jax.jit, static_argnames=("order", "dtype", "mesh"))
def _arranged(array: jax.Array, index: jax.Array, order: tuple[int, ...], dtype: str, mesh: Mesh | None) -> jax.Array:
    """One tensor of a stacked parameter, with the dimensions of the file; with a mesh, on every device."""
    tensor = array[tuple(index)].astype(dtype).transpose(order)
    return tensor if mesh is None else jax.lax.with_sharding_constraint(tensor, replicated(mesh))


def _write_block(file: IO[bytes], block: jax.Array) -> None:
    host = np.asarray(block if block.is_fully_addressable else block.addressable_data(0))
    file.write(np.ascontiguousarray(host).view(np.uint8).data)


def _header(tensors: list[Any], dtype: np.dtype) -> bytes:
    """The format by hand, because the library's writer wants all tensors in memory at once.

    8 bytes: length of the header; the header: JSON of dtypes, shapes and offsets; then the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, layout, shape, _ in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        kind = SAFETENSORS_NAMES[dtype.name]
        header[name] = {"dtype": kind, "shape": layout.hf_shape(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data starts aligned
    return len(encoded).to_bytes(8, "little") + encoded

"""Work of a kernel: what it moves between HBM and fast memory, read from its lowered module (Mosaic, as Pallas makes).

A kernel runs through a grid. Before a step it gets a block of each operand, which an index map names, and after it
the blocks of its results go back; a block that is the same as that of the step before stays. A kernel may also copy by
itself (``tpu.enqueue_dma``). The last two dimensions of a block are padded to tiles of 8 x 128 numbers, as in HBM.

What the module does not say:

* Index maps may read scalars that are computed before the kernel runs. They are evaluated with ``Scalars.of_kernels``;
  for a kernel that is not there, each step is assumed to need another block.
* A kernel that copies by itself is assumed to do so for each step of the grid once a block of ``Scalars.live_tokens``,
  as paged attention does for a sequence of that length. The bytes of a block, and its tokens, are the module's.
* A grid of a length that only the run knows belongs to products of groups of rows (XLA's kernels for ``ragged_dot``,
  and megablox), with the groups' tables as scalars. All groups are assumed to be equal. Of these kernels alone the
  products are counted: attention skips steps.
"""

import base64
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax._src.interpreters import mlir  # a context with the dialects has no public name
from jaxlib.mlir import ir, passmanager
from jaxlib.mosaic.python import tpu

SUBLANES, LANES = 8, 128
"""Numbers of a tile."""

VERSION = "stable_mosaic.version"
"""An attribute of modules that are written in a form of their own, which this pass turns back:"""
DESERIALIZE = "builtin.module(mosaic-serde{serialize=false})"

OPERATIONS: dict[str, Callable[..., Any]] = {
    **{f"arith.{name}": lambda x: x for name in ("index_cast", "extsi", "extui", "trunci")},
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.divsi": lambda x, y: np.trunc(x / y).astype(np.int64),
    "arith.floordivsi": np.floor_divide,
    "arith.remsi": np.fmod,
    "arith.minsi": np.minimum,
    "arith.maxsi": np.maximum,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.select": np.where,
    "memref.load": lambda array, *index: array[index],
}
"""What index maps are made of, for all steps of a grid at once."""

COMPARISONS = (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal) * 2
"""By MLIR's number of a predicate: signed ones, then unsigned ones from ``less`` on (6 to 9)."""


@dataclasses.dataclass(frozen=True)
class Scalars:
    """What a run knows and a module does not."""

    of_kernels: Mapping[str, Sequence[np.ndarray]] = dataclasses.field(default_factory=dict)
    """Scalar arguments, by the beginning of a kernel's name."""
    live_tokens: float = 0
    """Of each sequence, in the cache."""


class Work(NamedTuple):
    """Of one call of a kernel."""

    flops: float
    hbm_bytes: float


def work(body: str, scalars: Scalars, is_in_hbm: Sequence[bool] | None = None) -> Work:
    """The work of a kernel whose custom call has this ``body`` in its configuration.

    ``is_in_hbm``: of each operand, scalars included, then of each result; None: all.

    Raises:
        ValueError: an index map has an operation that is unknown here.
    """
    module = _module(body)  # its functions live as long as it does
    functions = {ir.StringAttr(each.attributes["sym_name"]).value: each for each in module.body.operations}
    name, kernel = next(iter(functions.items()))
    if "window_params" not in kernel.attributes:
        return Work(0, 0)  # of scalars only
    grid = list(ir.DenseI64ArrayAttr(kernel.attributes["iteration_bounds"]))
    num_scalars = ir.IntegerAttr(kernel.attributes["scalar_prefetch"]).value
    arguments = list(kernel.regions[0].blocks[0].arguments)[len(grid) :]
    values = next((v for prefix, v in scalars.of_kernels.items() if name.startswith(prefix)), None)
    is_grouped = min(grid, default=0) < 0
    if is_grouped:
        values = _equal_groups(*(ir.MemRefType(argument.type).shape[0] for argument in arguments[:2]))
        grid = [len(values[1]) if size < 0 else size for size in grid]
    steps = [axis.ravel() for axis in np.indices(grid)]
    windows = [ir.DictAttr(window) for window in ir.ArrayAttr(kernel.attributes["window_params"])]
    total = math.prod(grid) * _copied(kernel, scalars.live_tokens)
    for i, window in enumerate(windows):
        if "transform_indices" not in window or not (is_in_hbm is None or is_in_hbm[i - len(windows)]):
            continue
        index_map = functions[ir.FlatSymbolRefAttr(window["transform_indices"]).value]
        num_blocks = len(steps[0])
        if values is not None or not _reads_scalars(index_map):
            blocks = np.stack([np.broadcast_to(x, num_blocks) for x in _evaluate(index_map, [*steps, *(values or ())])])
            num_blocks = 1 + int((blocks[:, 1:] != blocks[:, :-1]).any(axis=0).sum())
        shape = list(ir.DenseI64ArrayAttr(window["window_bounds"]))
        total += num_blocks * _padded_bytes(shape, ir.MemRefType(arguments[num_scalars + i].type).element_type)
    return Work(math.prod(grid) * _product_flops(kernel) if is_grouped else 0, total)


@functools.lru_cache(maxsize=64)
def _module(body: str) -> Any:
    """The module with the kernel and its index maps."""
    context = mlir.make_ir_context()
    tpu.register_dialect(context)
    context.allow_unregistered_dialects = True
    with context, ir.Location.unknown():
        module = ir.Module.parse(base64.b64decode(body))
        if VERSION in module.operation.attributes:
            passmanager.PassManager.parse(DESERIALIZE).run(module.operation)
    return module


def _reads_scalars(index_map: Any) -> bool:
    return any(operation.operation.name == "memref.load" for operation in index_map.regions[0].blocks[0].operations)


def _evaluate(index_map: Any, arguments: Sequence[Any]) -> list[Any]:
    """The indices of the blocks, along each dimension, in all steps of the grid."""
    (block,) = index_map.regions[0].blocks
    # A map that reads no scalars is evaluated without them.
    values: dict[Any, Any] = dict(zip(block.arguments, arguments, strict=False))
    for wrapped in block.operations:
        operation = wrapped.operation
        if operation.name == "arith.constant":
            values[operation.results[0]] = np.int64(ir.IntegerAttr(operation.attributes["value"]).value)
            continue
        operands = [values[operand] for operand in operation.operands]
        if operation.name == "func.return":
            return operands
        if operation.name == "arith.cmpi":
            function = COMPARISONS[ir.IntegerAttr(operation.attributes["predicate"]).value]
        elif operation.name in OPERATIONS:
            function = OPERATIONS[operation.name]
        else:
            raise ValueError(f"an index map of a kernel has an unknown operation: {operation.name}")
        values[operation.results[0]] = function(*operands)
    raise ValueError("an index map of a kernel has no end")


def _equal_groups(num_offsets: int, num_steps: int) -> list[np.ndarray]:
    """The tables of a ragged product: where groups begin (unused), and of each step its group and its tile of rows.

    ``num_steps`` are the most that there can be: each group but one may share its last tile with the next.
    """
    num_groups = num_offsets - 1
    num_tiles = num_steps - num_groups + 1
    starts = np.arange(num_offsets) * num_tiles
    tiles = [np.arange(starts[g] // num_groups, -(-starts[g + 1] // num_groups)) for g in range(num_groups)]
    return [starts, np.repeat(np.arange(num_groups), [len(x) for x in tiles]), np.concatenate(tiles), np.zeros(1, int)]


def _product_flops(kernel: Any) -> float:
    """Of the products in the code of a step, each done once."""
    flops = []

    def visit(operation: Any) -> Any:
        if operation.name == "tpu.matmul":
            arrays = [*list(operation.operands)[:2], operation.results[0]]
            # They have M K, K N and M N numbers.
            flops.append(2 * math.sqrt(math.prod(math.prod(ir.VectorType(array.type).shape) for array in arrays)))
        return ir.WalkResult.ADVANCE

    kernel.operation.walk(visit)
    return sum(flops)


def _copied(kernel: Any, live_tokens: float) -> float:
    """Bytes that a kernel itself copies from HBM in one step of the grid."""
    # Of each region of the code: the bytes that it copies, and the rows of the arrays that it copies from.
    regions: dict[Any, tuple[float, dict[Any, int]]] = {}

    def visit(operation: Any) -> Any:
        source = ir.MemRefType(operation.operands[0].type) if operation.name == "tpu.enqueue_dma" else None
        if source is not None and "vmem" not in str(source.memory_space):
            num_bytes, rows = regions.setdefault(operation.block, (0.0, {}))
            array = _array_of(operation.operands[0])
            rows[array] = rows.get(array, 0) + source.shape[-2]
            regions[operation.block] = num_bytes + _padded_bytes(source.shape, source.element_type), rows
        return ir.WalkResult.ADVANCE

    kernel.operation.walk(visit)
    if not regions:
        return 0
    # The first block is fetched by code of its own, equal to that for the others.
    num_bytes, rows = max(regions.values(), key=lambda region: region[0])
    return num_bytes * math.ceil(live_tokens / max(rows.values()))


def _array_of(value: Any) -> Any:
    """The kernel's argument that a part of memory belongs to."""
    while isinstance(value.owner, ir.Operation | ir.OpView):
        value = value.owner.operands[0]
    return value


def _padded_bytes(shape: Sequence[int], element: Any) -> float:
    """Bytes of a block in HBM. A single row is not padded to the rows of a tile."""
    *outer, rows, columns = (1, 1, *shape)
    rows = rows if rows == 1 else math.ceil(rows / SUBLANES) * SUBLANES
    columns = math.ceil(columns / LANES) * LANES
    return math.prod(outer) * rows * columns * element.width / 8

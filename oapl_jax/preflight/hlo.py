"""The work of a compiled program in one run, read from the text of its optimized HLO module.

XLA's ``cost_analysis`` counts the body of a loop once; here it is multiplied by the trip count. All numbers are per
device, because an SPMD module is the program of one device.

* **FLOPs** are those of matrix products (``dot``, and ``convolution``, which a TPU uses for them); additions and
  multiplications count. Of kernels (Pallas, ``tpu_custom_call``) see ``kernels.py``; their calls are counted, too.
* **HBM bytes** are the operands and results of each instruction that runs by itself. Values inside a fusion and values
  in fast memory cost nothing, and a slice counts with its own size. Those of a kernel are in its own module
  (``kernels.py``). The padding of tiles is counted in kernels only, so the number is a lower bound.
* **Collectives** are counted in bytes that a device has to receive by the best algorithm.
"""

import collections
import functools
import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from oapl_jax.preflight import kernels

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "f8e4m3fn": 8, "f8e5m2": 8}
"""Bits of element types whose names do not end in their width."""

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

SLICES = ("dynamic-slice", "slice", "gather")

UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Instructions that update a part of their first operand in place, with the index of the operand with the new part."""

FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"),
    *("custom-call", "partition-id", "replica-id", "async-start", "async-update", "async-done", "send", "recv"),
}
"""Instructions that move no bytes in HBM, or an unknown number; those that end in ``-done`` belong here too."""

Network = Literal["ICI", "DCN"]


class Collective(NamedTuple):
    """All collectives of one kind over one network."""

    kind: str
    network: Network
    count: float
    num_bytes: float
    """Bytes that a device receives in one run of the program."""


class Cost(NamedTuple):
    """The cost of one run of a program on one device."""

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    """In descending order of bytes."""
    num_kernels: float
    """Number of kernel calls."""

    def network_bytes(self, network: Network) -> float:
        """Bytes that a device receives over a network."""
        return sum(collective.num_bytes for collective in self.collectives if collective.network == network)


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    """Text between the parentheses."""
    attributes: str
    """Text after the parentheses."""
    is_root: bool


_Computation = dict[str, _Instruction]

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")


def analyze(
    text: str,
    *,
    expected_trips: Sequence[float] = (),
    slices: Sequence[int] = (),
    scalars: kernels.Scalars | None = None,
) -> Cost:
    """Adds up the cost of a module, given as ``compiled.as_text()``.

    ``expected_trips`` are the trip counts of loops whose count is known only at run time, by nesting depth among such
    loops; 1 for deeper loops. ``slices`` has the TPU slice of each device of the program, or nothing if all are in
    one. ``scalars`` are those that kernels read.
    """
    reader = _Reader(text, expected_trips, slices, scalars or kernels.Scalars())
    reader.run(reader.entry, 1)
    found = [Collective(*key, *value) for key, value in reader.collectives.items()]
    found.sort(key=lambda collective: -collective.num_bytes)
    return Cost(reader.flops, reader.hbm_bytes, tuple(found), reader.num_kernels)


class _Reader:
    """Walks over the computations of a module and adds up their cost."""

    def __init__(
        self, text: str, expected_trips: Sequence[float], slices: Sequence[int], scalars: kernels.Scalars
    ) -> None:
        self.computations, self.entry = _parse(text)
        self.expected_trips, self.slices, self.scalars = expected_trips, slices, scalars
        self.flops = self.hbm_bytes = self.num_kernels = 0.0
        self.collectives: dict[tuple[str, Network], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])

    def run(self, name: str, times: float, depth: int = 0, *, is_fused: bool = False) -> None:
        """Adds the cost of a computation that runs ``times`` times, inside ``depth`` loops whose trip count is unknown.

        Where it belongs to a fusion, it moves no bytes itself.
        """
        computation = self.computations[name]
        for instruction in computation.values():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode in ("dot", "convolution"):
                self.flops += times * _product_flops(instruction, computation)
            elif opcode in COLLECTIVES or opcode == "recv":
                self._add_collective(instruction, name, times)
            if "tpu_custom_call" in instruction.attributes:
                self.num_kernels += times
                self._add_kernel(instruction, computation, times)
            if not is_fused:
                self.hbm_bytes += times * self._traffic(instruction, computation)
            self._run_called(instruction, computation, times, depth, is_fused)

    def _run_called(
        self, instruction: _Instruction, computation: _Computation, times: float, depth: int, is_fused: bool
    ) -> None:
        if instruction.opcode == "while":
            start, end, step = self._range(instruction, computation)
            if end is None:
                end = self.expected_trips[depth] if depth < len(self.expected_trips) else start + step
                depth += 1
            trips = max(0, math.ceil((end - start) / step))
            self.run(_attribute(instruction, "body"), times * trips, depth, is_fused=is_fused)
        elif instruction.opcode == "conditional":
            # It is unknown which branch runs, so all of them are counted.
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = _names(branches[1]) if branches else _called(instruction, "true_computation", "false_computation")
            for branch in names:
                self.run(branch, times, depth, is_fused=is_fused)
        elif instruction.opcode.removesuffix("-start") not in COLLECTIVES:
            is_fusion = is_fused or instruction.opcode == "fusion"
            for called in _called(instruction, "calls", *(["to_apply"] if instruction.opcode == "call" else [])):
                self.run(called, times, depth, is_fused=is_fusion)

    def _range(self, loop: _Instruction, computation: _Computation) -> tuple[int, float | None, int]:
        """Start, end and step of a loop with the condition ``i < end``; an end known only at run time is None."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return 0, int(known[1]), 1
        condition = self.computations[_attribute(loop, "condition")]
        root = _root(condition)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return 0, None, 1
        counter, limit = (_behind_copies(condition, operand) for operand in root.operands)
        if counter.opcode != "get-tuple-element":
            return 0, None, 1
        index = int(_attribute(counter, "index"))
        # The compiler may have peeled iterations off the loop or unrolled its body.
        first = _constant(computation, _element(computation, computation[loop.operands[0]], index))
        body = self.computations[_attribute(loop, "body")]
        update = _element(body, _root(body), index)
        steps = [_constant(body, body[name]) for name in update.operands] if update.opcode == "add" else []
        return first or 0, _constant(condition, limit), next(filter(None, steps), 1)

    def _add_collective(self, instruction: _Instruction, name: str, times: float) -> None:
        kind, network, group = instruction.opcode.removesuffix("-start"), "ICI", 1
        if kind == "recv":
            # Between slices a TPU sends through its host: an attribute of `recv` names the collective.
            transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
            if transfer is None:
                return
            kind, network, group = transfer[1].lower().replace("_", "-"), "DCN", max(1, len(set(self.slices)))
        else:
            groups = _groups(instruction.attributes, len(self.slices))
            group = max(map(len, groups), default=1)
            if any(len({self.slices[i] for i in members if i < len(self.slices)}) > 1 for members in groups):
                network = "DCN"
        # The result of `recv` is a tuple that begins with the data, that of a `-start` begins with its operands.
        arrays = list(_arrays(instruction.type))
        if instruction.opcode == "recv":
            arrays = arrays[:1]
        elif instruction.opcode.endswith("-start") and kind != "all-reduce":
            arrays = arrays[len(instruction.operands) :][: len(instruction.operands)]
        scale = 1.0
        # A reduce-scatter can be an all-reduce that is fused with the slice that each device keeps.
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind, scale = "reduce-scatter", 1 / group
        count_and_bytes = self.collectives[kind, network]
        count_and_bytes[0] += times
        count_and_bytes[1] += times * scale * sum(array.num_bytes for array in arrays) * _received(kind, group)

    def _traffic(self, instruction: _Instruction, computation: _Computation) -> float:
        """Bytes that an instruction outside fusions reads from HBM and writes to it."""
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done"):
            return 0
        written = _hbm_bytes(instruction.type)
        if opcode in SLICES:
            return 2 * written
        if opcode in UPDATES:
            return 2 * _hbm_bytes(computation[instruction.operands[UPDATES[opcode]]].type)
        operands = [_hbm_bytes(computation[operand].type) for operand in instruction.operands]
        if opcode == "copy-start":
            # Its result has the target and the source.
            return written
        if opcode == "slice-start":
            # Its result has the source, of which it reads as much as the target holds, and the target.
            source, target, *_ = _arrays(instruction.type)
            return target.num_bytes * (source.is_in_hbm + target.is_in_hbm)
        if opcode == "fusion":
            written = min(written, self._written(instruction, computation))
            operands = [min(size, self._read_by_fusion(instruction, i)) for i, size in enumerate(operands)]
        return written + sum(operands)

    def _add_kernel(self, call: _Instruction, computation: _Computation, times: float) -> None:
        body = re.search(r'"body":"([^"]+)"', call.attributes)
        if body is None:
            return
        operands = (_arrays(computation[operand].type)[0] for operand in call.operands)
        in_hbm = [array.is_in_hbm for array in (*operands, *_arrays(call.type))]
        work = kernels.work(body[1], self.scalars, in_hbm)
        self.flops += times * work.flops
        self.hbm_bytes += times * work.hbm_bytes

    def _read_by_fusion(self, fusion: _Instruction, operand: int) -> float:
        """Bytes that a fusion reads of an operand."""
        inside = self.computations[_attribute(fusion, "calls")]
        parameters = {i.arguments: i.name for i in inside.values() if i.opcode == "parameter"}
        return self._read(inside, parameters[str(operand)])

    def _read(self, computation: _Computation, name: str) -> float:
        """Bytes of a value that a fusion reads: those of slices, or infinity for the whole value.

        A fusion may have another one inside that only passes the value on.
        """
        total = math.inf if computation[name].is_root else 0.0
        for user in computation.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                total += self._read(computation, user.name)
            elif user.opcode == "fusion":
                total += sum(
                    self._read_by_fusion(user, i) for i, operand in enumerate(user.operands) if operand == name
                )
            elif user.opcode in SLICES and user.operands[0] == name:
                total += _hbm_bytes(user.type)
            elif user.opcode not in UPDATES or user.operands[0] != name:
                return math.inf
        return total

    def _written(self, result: _Instruction, computation: _Computation) -> float:
        """Bytes of its result that a fusion writes: for an update in place only those of the update."""
        if result.opcode == "fusion":
            inside = self.computations[_attribute(result, "calls")]
            return self._written(_root(inside), inside)
        if result.opcode in ("tuple", "bitcast"):
            return sum(self._written(computation[operand], computation) for operand in result.operands)
        if result.opcode in UPDATES:
            return _hbm_bytes(computation[result.operands[UPDATES[result.opcode]]].type)
        return _hbm_bytes(result.type)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """All computations by name, and the name of the one that is run."""
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            root, name, result, opcode, rest = found.groups()
            arguments, _, attributes = rest.partition(")")
            current[name] = _Instruction(
                name, result, opcode, tuple(_names(arguments)), arguments, attributes, bool(root)
            )
    if not entry:
        raise ValueError("the text has no ENTRY computation, so it is not a compiled HLO module")
    return computations, entry


class _Array(NamedTuple):
    shape: tuple[int, ...]
    num_bytes: float
    is_in_hbm: bool


@functools.lru_cache(maxsize=4096)
def _arrays(type_text: str) -> tuple[_Array, ...]:
    """The arrays of a type, which may be a tuple. ``S(1)`` and up in a layout are memories other than HBM."""
    arrays = []
    for element, dimensions, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", type_text):
        shape = tuple(int(size) for size in dimensions.split(",") if size)
        width = re.search(r"\d+$", element)
        bits = BITS[element] if element in BITS else int(width[0]) if width else 0
        arrays.append(_Array(shape, math.prod(shape) * bits / 8, "S(" not in layout))
    return tuple(arrays)


def _hbm_bytes(type_text: str) -> float:
    return sum(array.num_bytes for array in _arrays(type_text) if array.is_in_hbm)


def _names(text: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", text)


def _attribute(instruction: _Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    if found is None:
        raise ValueError(f"instruction {instruction.name} ({instruction.opcode}) has no attribute {name}")
    return found[1]


def _called(instruction: _Instruction, *attributes: str) -> list[str]:
    """Names of the computations in these attributes of an instruction."""
    return re.findall(rf"\b(?:{'|'.join(attributes)})=%([\w.\-]+)", instruction.attributes)


def _root(computation: _Computation) -> _Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _element(computation: _Computation, state: _Instruction, index: int) -> _Instruction:
    """The element of a tuple that this computation makes; otherwise the instruction with the whole tuple."""
    return _behind_copies(computation, state.operands[index]) if state.opcode == "tuple" else state


def _constant(computation: _Computation, instruction: _Instruction) -> int | None:
    """The value of an integer constant, or None for any other instruction."""
    instruction = _behind_copies(computation, instruction.name)
    is_integer = instruction.opcode == "constant" and instruction.arguments.isdigit()
    return int(instruction.arguments) if is_integer else None


def _behind_copies(computation: _Computation, name: str) -> _Instruction:
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _product_flops(instruction: _Instruction, computation: _Computation) -> float:
    left, right = (_arrays(computation[operand].type)[0].shape for operand in instruction.operands[:2])
    out = _arrays(instruction.type)[0].shape
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = contracted[1].split(",") if contracted and contracted[1] else []
        return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"convolution {instruction.name} has no dim_labels")
    left_sizes, right_sizes, out_sizes = (
        dict(zip(names, shape, strict=True)) for names, shape in zip(labels.groups(), (left, right, out), strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    pairs = 2.0 * right_sizes["i"] * out_sizes["b"] * out_sizes["f"]
    # A TPU turns the batch dimensions of a product into spatial dimensions. Of the pairs of output and window positions
    # along one of them, few read data and not padding.
    for i, label in enumerate(map(str, range(len(out) - 2))):
        stride, padding, dilation, spread = (
            int(fields[name].split("x")[i].partition("_")[0]) if name in fields else default
            for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        position = np.arange(out_sizes[label])[:, None] * stride + np.arange(right_sizes[label]) * spread - padding
        is_inside = (position >= 0) & (position <= (left_sizes[label] - 1) * dilation)
        pairs *= int(np.sum(is_inside & (position % dilation == 0)))
    return pairs


def _groups(attributes: str, num_devices: int) -> list[list[int]]:
    """The groups of devices in a collective, which the text lists, or gives as a transposed range or as axes of a mesh."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes):
        return [[int(i) for i in re.findall(r"\d+", group)] for group in re.findall(r"\{([^}]*)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _counted(found[2], found[3]).reshape(_integers(found[1])).tolist()
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        chosen = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
        ids = _counted(found[2] or str(math.prod(sizes.values())), found[3]).reshape(list(sizes.values()))
        members = math.prod(ids.shape[axis] for axis in chosen)
        return np.moveaxis(ids, chosen, range(-len(chosen), 0)).reshape(-1, members).tolist()
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"the groups of a collective are written in an unknown way: {attributes[:200]}")
    return [list(range(num_devices))]


def _counted(shape: str, order: str | None) -> np.ndarray:
    """The numbers from 0 in a shape, transposed."""
    return (
        np.arange(math.prod(_integers(shape))).reshape(_integers(shape)).transpose(_integers(order) if order else None)
    )


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _received(kind: str, group: int) -> float:
    """Bytes that a device receives for each byte of its result."""
    others = (group - 1) / group
    shares = {"all-gather": others, "all-reduce": 2 * others, "reduce-scatter": group - 1.0, "all-to-all": others}
    return shares.get(kind, 1.0)

"""Whether a run fits a TPU slice, and what it would cost there, on a machine without one.

    python -m oapl_jax preflight --config configs/x.yaml --topology v5p-64 [--num-slices 2]
        [--json FILE] [--dry-run] [section.key=value ...]

Compiles the programs of the run for devices that are only described (``programs.py``, ``topology.py``), reads
what the compiler made of them (``hlo.py``), and prints for each its memory, work, traffic and a lower bound of
its time. docs/preflight.md explains the numbers. ``--dry-run`` stops before the first compilation.
"""

import dataclasses
import functools
import re
import time
from typing import Any

import jax

from oapl_jax.build.programs import Plan, Program, kv_bytes, make_plan, shortage
from oapl_jax.config.commands import TrainConfig
from oapl_jax.preflight import hlo, topology
from oapl_jax.preflight.topology import GIB, Chip, Topology

TOO_LARGE = "RESOURCE_EXHAUSTED"
"""What the compiler says of a program that needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Seconds:
    """The least time that a program's work takes, resource by resource; they can overlap."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def bound(self) -> tuple[str, float]:
        """The resource that takes longest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])


@dataclasses.dataclass(frozen=True)
class Result:
    """What the compiler made of a program; sizes in bytes of one device."""

    name: str
    compile_seconds: float
    arguments: float
    outputs: float
    """Those that do not take the place of an argument."""
    temporaries: float
    code: float
    beside: float
    """What else lies on the device while it runs."""
    total: float
    usable: float
    flops: float
    """Of matrix products and attention kernels, on one device, recomputation included."""
    model_flops: float
    """Of the model's mathematics, over all devices."""
    seconds: Seconds
    mfu: float
    """The most that ``model_flops`` can be of what all devices could do in that time."""
    collectives: tuple[hlo.Collective, ...]
    num_unknown_loops: int
    """Loops that were taken to run as often as the config says."""
    refusal: str = ""
    """The compiler's own words where it refused the program, as too large or else; then most other numbers are 0."""

    @property
    def missing(self) -> float:
        """Bytes short, as far as is known; negative: left over."""
        return self.total - self.usable

    @property
    def fits(self) -> bool:
        """The compiler took it, and it leaves room for what lies beside it."""
        return not self.refusal and self.missing <= 0


def compile_program(program: Program, slices: Topology) -> Result:
    """Compiles one program and weighs it."""
    start = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(program, str(error), time.perf_counter() - start, slices.chip)
    seconds = time.perf_counter() - start
    places = [topology.slice_of(device) for device in program.mesh.devices.flat]
    cost = hlo.analyze(compiled.as_text(), expected_trips=program.expected_trips, slices=places)
    has_kernels = cost.num_kernels > 0
    flops = cost.flops + has_kernels * program.kernel_flops / program.mesh.size
    hbm_bytes = cost.hbm_bytes + has_kernels * program.kernel_bytes
    least = roofline(flops, hbm_bytes, cost, slices.chip)
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "beside": program.beside,
    }
    return Result(
        name=program.name,
        compile_seconds=seconds,
        **sizes,
        total=sum(sizes.values()),
        usable=slices.chip.usable_bytes,
        flops=flops,
        model_flops=program.model_flops,
        seconds=least,
        mfu=program.model_flops / (slices.chip.flops * program.mesh.size * least.bound[1]),
        collectives=cost.collectives,
        num_unknown_loops=cost.num_unknown_loops,
    )


def roofline(flops: float, hbm_bytes: float, cost: hlo.Cost, chip: Chip) -> Seconds:
    """Work over what the chip could do: no program is faster."""
    return Seconds(
        compute=flops / chip.flops,
        hbm=hbm_bytes / chip.hbm_bandwidth,
        ici=cost.network_bytes("ICI") / chip.ici_bandwidth,
        dcn=cost.network_bytes("DCN") / chip.dcn_bandwidth,
    )


def parse_refusal(message: str) -> float:
    """Bytes that the compiler needed, from its RESOURCE_EXHAUSTED message; 0 where it does not say.

    It says either ``Used 43.02G of 15.75G hbm`` or ``memory required for HLO temporaries (33.36G) exceeds``.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm|required for [^(]*\(([\d.]+)([KMGT]?)\)", message)
    if found is None:
        return 0
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(number) * 1024 ** " KMGT".index(unit or " ")


def _refused(program: Program, message: str, seconds: float, chip: Chip) -> Result:
    needed = parse_refusal(message)
    return Result(
        name=program.name,
        compile_seconds=seconds,
        arguments=0,
        outputs=0,
        temporaries=needed,
        code=0,
        beside=program.beside,
        total=max(needed, chip.usable_bytes) + program.beside,
        usable=chip.usable_bytes,
        flops=0,
        model_flops=program.model_flops,
        seconds=Seconds(0, 0, 0, 0),
        mfu=0,
        collectives=(),
        num_unknown_loops=0,
        refusal=" ".join(message.split())[:400],
    )


def advice(result: Result, plan: Plan) -> list[str]:
    """Settings that would make a program smaller, the most fitting first."""
    config, memory = plan.config, plan.memory
    is_samplers = result.name in ("prefill", "decode")
    found = []
    if (is_samplers or memory.is_colocated) and 0 < result.missing < memory.kv_cache:
        fraction = config.sampler.kv_memory * (1 - result.missing / memory.kv_cache)
        found.append(f"sampler.kv_memory={fraction:.2f} (now {config.sampler.kv_memory:g}): a smaller KV cache")
    if result.name == "train_step" and config.model.remat == "none":
        found.append("model.remat=layer: activations are computed twice and not kept")
    if result.name in ("train_step", "score"):
        rows = plan.rows.micro_batch_rows or plan.rows.num_rows(plan.rows.num_rollouts)
        shards = plan.trainer_mesh.shape["data"] * plan.trainer_mesh.shape["fsdp"]
        if rows > shards:
            found.append(f"learner.micro_batch_rows={max(shards, rows // 2)} (now {rows}): fewer rows at once")
    if is_samplers and config.evaluation.every:
        found.append("evaluation.every=0: no second cache in the course of training")
    if is_samplers:
        found.append("sampler.dtype=int8, or fewer sampler.groups_in_flight")
    found.append("a larger tensor axis of the mesh, or more chips")
    if memory.is_colocated and memory.sampler > memory.state:
        found.append("mesh.sampler=...: devices of its own for the sampler")
    return found


def kv_capacity(plan: Plan) -> dict[str, float]:
    """What the sampler's cache holds: rollouts of full length at once, over all replicas, and of how many rows."""
    engine = plan.engine
    if engine is None:
        return {"rollouts": 0, "rows": 0, "tokens": 0}
    tokens = engine.num_pages * engine.page_size
    return {
        "rollouts": plan.num_replicas * (engine.num_pages // engine.max_pages),
        "rows": plan.num_replicas * engine.num_rows,
        "tokens": plan.num_replicas * tokens,
    }


def describe_plan(plan: Plan, slices: Topology) -> str:
    """What is asked for, and what lies on a device before anything is compiled."""
    config, memory, usable = plan.config, plan.memory, slices.chip.usable_bytes
    sampler = f"{_mesh(plan.sampler_mesh)}, " if not memory.is_colocated else "the trainer's mesh, "
    lines = [
        f"{slices.name}: {slices.num_slices} x {slices.shape}, {slices.num_devices} devices of {usable / GIB:.2f} GiB",
        f"model    {plan.model.model_type}, {plan.model.num_params:,} parameters, from {plan.source}",
        f"trainer  {_mesh(plan.trainer_mesh)}",
        f"sampler  {sampler}{plan.num_replicas} replicas of {plan.sampler_mesh.shape['tensor']} devices",
        f"batch    {config.learner.batch_rollouts} rollouts of at most {plan.max_tokens:,} tokens",
        f"resident GiB a device: weights {memory.weights / GIB:.2f} + optimizer {memory.optimizer / GIB:.2f}"
        f" + gradient {memory.gradient / GIB:.2f}; sampler's weights {memory.sampler_weights / GIB:.2f}"
        f" + KV cache {memory.kv_cache / GIB:.2f}" + ("" if memory.is_colocated else ", on devices of their own"),
    ]
    capacity = kv_capacity(plan)
    lines.append(
        f"KV cache {capacity['tokens']:,.0f} tokens: {capacity['rollouts']:,.0f} rollouts of full length at once"
        f" ({kv_bytes(plan) / GIB:.2f} GiB a device each), for {capacity['rows']:,.0f} rows"
    )
    return "\n".join(lines)


def describe(result: Result, plan: Plan) -> str:
    """A program's paragraph."""
    gib = {name: getattr(result, name) / GIB for name in ("arguments", "outputs", "temporaries", "code", "beside")}
    verdict = f"DOES NOT FIT: {result.missing / GIB:.2f} GiB short"
    if result.fits:
        verdict = "FITS"
    elif result.refusal and TOO_LARGE not in result.refusal:
        verdict = "DOES NOT COMPILE"
    lines = [
        f"{result.name}  compiled in {result.compile_seconds:.0f} s",
        "  HBM   "
        + "  ".join(f"{name} {size:.2f}" for name, size in gib.items())
        + f"  total {result.total / GIB:.2f} of {result.usable / GIB:.2f} GiB ({result.total / result.usable:.0%}) {verdict}",
    ]
    if result.refusal:
        lines.append(f"  the compiler: {result.refusal}")
    else:
        bound, seconds = result.seconds.bound
        parts = ", ".join(f"{name} {value:.3g}" for name, value in dataclasses.asdict(result.seconds).items())
        lines.append(f"  time  at least {seconds:.3g} s ({bound}; seconds: {parts})")
    if result.mfu:
        lines.append(
            f"  work  model {result.model_flops:.3g} FLOPs in all, compiled {result.flops:.3g} a device; MFU at most"
            f" {result.mfu:.0%}"
        )
    lines += [
        f"  {each.network}   {each.kind:<20} x {each.count:<7,.0f} {each.num_bytes / GIB:10.3f} GiB"
        for each in result.collectives
    ]
    if not result.fits:
        lines += [f"  try   {setting}" for setting in advice(result, plan)]
    return "\n".join(lines)


def check(config: TrainConfig, slices: Topology, *, dry_run: bool) -> dict[str, Any]:
    """Compiles, prints each program as soon as it is known, and returns everything for ``--json``.

    Raises:
        ValueError: what the config or the command line got wrong.
    """
    usable = slices.chip.usable_bytes
    plan = make_plan(config, topology.devices(slices), usable, functools.partial(topology.slice_alone, slices))
    print(describe_plan(plan, slices), flush=True)
    results = []
    missing = shortage(plan, usable)
    if missing > 0 or plan.engine is None:
        what = f"{missing / GIB:.2f} GiB short" if missing > 0 else "no room for the keys and values of one rollout"
        print(f"DOES NOT FIT before anything is compiled: {what}; more chips, or a larger fsdp or tensor axis")
    elif not dry_run:
        for program in plan.programs:
            results.append(compile_program(program, slices))
            print("\n" + describe(results[-1], plan), flush=True)
    fits = missing <= 0 and plan.engine is not None and all(result.fits for result in results)
    print("\n" + ("FITS" if fits else "DOES NOT FIT"))
    return {
        "fits": fits,
        "topology": slices._asdict() | {"devices": slices.num_devices, "usable_bytes": usable},
        "parameters": plan.model.num_params,
        "memory": dataclasses.asdict(plan.memory),
        "kv_cache": kv_capacity(plan),
        "programs": [_as_json(result) for result in results],
        "config": config.model_dump(),
    }


def _as_json(result: Result) -> dict[str, Any]:
    values = dataclasses.asdict(result)
    values["collectives"] = [collective._asdict() for collective in result.collectives]
    return values | {"fits": result.fits, "bound": result.seconds.bound[0]}


def _mesh(mesh: Any) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())

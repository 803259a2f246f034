"""Memory and cost of a run on a TPU slice, found on a machine without one (docs/preflight.md).

The programs of the run (``programs.py``) are compiled for described devices (``topology.py``). The report has the
memory, work and traffic of each compiled program (``hlo.py``), and a lower bound of its time.
"""

import dataclasses
import functools
import re
import time
from typing import Any

import jax

from oapl_jax.build.account import size
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.distributed.chips import GIB, Chip
from oapl_jax.distributed.sharding import row_shards
from oapl_jax.io.terminal import say
from oapl_jax.preflight import hlo, topology
from oapl_jax.preflight.programs import Plan, Program, make_plan, rollout_bytes
from oapl_jax.preflight.topology import Topology

TOO_LARGE = "RESOURCE_EXHAUSTED"
"""The compiler's message for a program that needs more memory than a device has contains this."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A compiled program. Sizes are in bytes of one device."""

    name: str
    compile_seconds: float
    arguments: float = 0
    outputs: float = 0
    """Outputs that do not reuse the memory of an argument."""
    temporaries: float = 0
    code: float = 0
    beside: float = 0
    """Other data on the device while the program runs."""
    total: float = 0
    usable: float = 0
    flops: float = 0
    """FLOPs of matrix products and attention kernels on one device, including recomputation."""
    model_flops: float = 0
    """FLOPs of the model's mathematics over all devices."""
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"compute": 0, "hbm": 0, "ici": 0, "dcn": 0})
    """Lower bounds of the time by resource; the resources can work at the same time."""
    mfu: float = 0
    """Upper bound of the model FLOPs utilization: ``model_flops`` over the peak FLOPs of all devices in that time."""
    collectives: tuple[hlo.Collective, ...] = ()
    refusal: str = ""
    """The compiler's message if it refused the program; most other numbers are then 0."""

    @property
    def bound(self) -> tuple[str, float]:
        """The resource that takes longest, and its time."""
        return max(self.seconds.items(), key=lambda item: item[1])

    @property
    def missing(self) -> float:
        """Bytes that are missing; negative if there is room left."""
        return self.total - self.usable

    @property
    def fits(self) -> bool:
        """Whether it compiles and there is room for the other data on the device."""
        return not self.refusal and self.missing <= 0


def compile_program(program: Program, slices: Topology) -> Result:
    """Compiles a program and computes its cost."""
    start, chip = time.perf_counter(), slices.chip
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = parse_refusal(str(error))
        return Result(
            program.name,
            time.perf_counter() - start,
            temporaries=needed,
            beside=program.beside,
            total=max(needed, chip.usable_bytes) + program.beside,
            usable=chip.usable_bytes,
            model_flops=program.model_flops,
            refusal=" ".join(str(error).split())[:400],
        )
    seconds = time.perf_counter() - start
    slice_ids = [topology.slice_of(device) for device in program.mesh.devices.flat]
    cost = hlo.analyze(
        compiled.as_text(), expected_trips=program.expected_trips, slices=slice_ids, scalars=program.scalars()
    )
    flops = cost.flops + (cost.num_kernels > 0) * program.kernel_flops / program.mesh.size
    least = roofline(flops, cost, chip)
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "beside": program.beside,
    }
    return Result(
        program.name,
        seconds,
        **sizes,
        total=sum(sizes.values()),
        usable=chip.usable_bytes,
        flops=flops,
        model_flops=program.model_flops,
        seconds=least,
        mfu=program.model_flops / (chip.flops * program.mesh.size * max(least.values())),
        collectives=cost.collectives,
    )


def roofline(flops: float, cost: hlo.Cost, chip: Chip) -> dict[str, float]:
    """Work divided by the chip's peak rates; no program is faster."""
    return {
        "compute": flops / chip.flops,
        "hbm": cost.hbm_bytes / chip.hbm_bandwidth,
        "ici": cost.network_bytes("ICI") / chip.ici_bandwidth,
        "dcn": cost.network_bytes("DCN") / chip.dcn_bandwidth,
    }


def parse_refusal(message: str) -> float:
    """Bytes that the program needs by the compiler's RESOURCE_EXHAUSTED message, or 0 if it does not say.

    The message has either ``Used 43.02G of 15.75G hbm`` or ``memory required for HLO temporaries (33.36G) exceeds``.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm|required for [^(]*\(([\d.]+)([KMGT]?)\)", message)
    if found is None:
        return 0
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(number) * 1024 ** " KMGT".index(unit or " ")


def advice(result: Result, plan: Plan) -> list[str]:
    """Settings that would make a program smaller, the most fitting first."""
    config, memory, rows = plan.assembly.config, plan.assembly.account, plan.assembly.learner.rows
    is_samplers = result.name in ("prefill", "decode")
    found = []
    if (is_samplers or memory.is_colocated) and 0 < result.missing < memory.kv_cache:
        fraction = config.sampler.kv_memory * (1 - result.missing / memory.kv_cache)
        found.append(f"sampler.kv_memory={fraction:.2f} (now {config.sampler.kv_memory:g}): a smaller KV cache")
    if result.name == "train_step" and config.model.remat == "none":
        found.append("model.remat=layer: activations are recomputed instead of stored")
    if result.name in ("train_step", "score"):
        shards = row_shards(plan.assembly.trainer_mesh)
        num_rows = rows.micro_batch_rows or rows.num_rows(rows.num_rollouts)
        if num_rows > shards:
            found.append(f"learner.micro_batch_rows={max(shards, num_rows // 2)} (now {num_rows}): fewer rows at once")
    if is_samplers and memory.evaluation_weights:
        found.append("evaluation.every a multiple of window.sync_every: no second policy beside the window's")
    if is_samplers:
        found.append("sampler.dtype=int8, or fewer sampler.groups_in_flight")
    found.append("a larger tensor axis of the mesh, or more chips")
    if memory.is_colocated and memory.sampler > memory.learner:
        found.append("mesh.sampler=...: devices of its own for the sampler")
    return found


def kv_capacity(plan: Plan) -> dict[str, float]:
    """What the sampler's cache holds: rollouts of full length at once, over all replicas, and of how many rows."""
    if not plan.assembly.engines:
        return {"rollouts": 0, "rows": 0, "tokens": 0}
    engine, num_replicas = plan.assembly.engines[0], plan.assembly.num_replicas
    return {
        "rollouts": num_replicas * (engine.num_pages // engine.max_pages),
        "rows": num_replicas * engine.num_rows,
        "tokens": num_replicas * engine.num_pages * engine.page_size,
    }


def describe_plan(plan: Plan, slices: Topology) -> str:
    """What is asked for, and what lies on a device before anything is compiled: the lines of ``train --dry-run``."""
    run, capacity, usable = plan.assembly, kv_capacity(plan), slices.chip.usable_bytes
    lines = {
        "slices": f"{slices.name}: {slices.num_slices} x {slices.shape}, {slices.num_devices} devices of {size(usable)}"
    }
    lines |= run.describe()
    del lines["disk"]  # of another machine
    lines["model"] += f", from {plan.source}"
    lines["rows"] = f"{run.num_replicas} replicas of {run.sampler_mesh.shape['tensor']} devices"
    if run.engines:
        lines["rows"] += (
            f", {capacity['rows']:,.0f} rows; the cache has {capacity['tokens']:,.0f} tokens:"
            f" {capacity['rollouts']:,.0f} rollouts of full length at once ({size(rollout_bytes(run))} a device each)"
        )
    return "\n".join(f"{name:>14}  {text}" for name, text in lines.items())


def describe(result: Result, plan: Plan) -> str:
    """Describes a compiled program."""
    names = "arguments", "outputs", "temporaries", "code", "beside"
    sizes = "  ".join(f"{name} {getattr(result, name) / GIB:.2f}" for name in names)
    verdict = "FITS" if result.fits else f"DOES NOT FIT: {result.missing / GIB:.2f} GiB short"
    if result.refusal and TOO_LARGE not in result.refusal:
        verdict = "DOES NOT COMPILE"
    lines = [
        f"{result.name}  compiled in {result.compile_seconds:.0f} s",
        f"  HBM   {sizes}  total {result.total / GIB:.2f} of {result.usable / GIB:.2f} GiB"
        f" ({result.total / result.usable:.0%}) {verdict}",
    ]
    if result.refusal:
        lines.append(f"  the compiler: {result.refusal}")
    else:
        bound, seconds = result.bound
        parts = ", ".join(f"{name} {value:.3g}" for name, value in result.seconds.items())
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
    """Compiles the programs, prints each as soon as it is compiled, and returns the report for ``--json``."""
    usable = slices.chip.usable_bytes
    plan = make_plan(config, topology.devices(slices), usable, functools.partial(topology.slice_alone, slices))
    say(describe_plan(plan, slices))
    results = []
    missing, has_room = plan.assembly.account.shortage(usable), bool(plan.assembly.engines)
    if missing > 0 or not has_room:
        what = f"{missing / GIB:.2f} GiB short" if missing > 0 else "no room for the keys and values of one rollout"
        say(f"DOES NOT FIT before anything is compiled: {what}; more chips, or a larger fsdp or tensor axis")
    elif not dry_run:
        for program in plan.programs:
            results.append(compile_program(program, slices))
            say("\n" + describe(results[-1], plan))
    fits = missing <= 0 and has_room and all(result.fits for result in results)
    say("\n" + ("FITS" if fits else "DOES NOT FIT"))
    return {
        "fits": fits,
        "topology": slices._asdict() | {"devices": slices.num_devices, "usable_bytes": usable},
        "parameters": plan.assembly.architecture.num_params,
        "memory": dataclasses.asdict(plan.assembly.account),
        "kv_cache": kv_capacity(plan),
        "programs": [
            dataclasses.asdict(result)
            | {"collectives": [collective._asdict() for collective in result.collectives]}
            | {"fits": result.fits, "bound": result.bound[0]}
            for result in results
        ],
        "config": config_file.written(config),
    }

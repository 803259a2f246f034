"""The train step's speed and memory beside google-tunix's in one run, and what packing saves.

    python benchmarks/train_step.py --json

Random float32 weights of one small Qwen3 (``sampler.MODEL``). The workloads of ours:

* ``step``: two groups of 8 rollouts of 64 prompt and 192 response tokens, one batch; AdamW, OAPL. Each group has its
  prompt once in a row. The peer's is GRPO without a reference model: one forward and one backward pass over the same
  rollouts, each with its prompt.
* ``unshared``: the same, a rollout a row.
* ``padded`` and ``packed``: 64 rollouts whose lengths are long-tailed (lognormal, median 64, at most 256, of which
  the prompt is a quarter), in rows of one rollout and in packed rows.

Every contender is a process of its own on the same cores; after one step that is not timed (compilation) they
take turns. What counts is CPU seconds, the median of the turns, and XLA's own account of the temporaries that the
compiled step needs. The floor is the matrix products of the step (``product_flops``) at the machine's measured rate.

    python3 -m venv ../tunix && ../tunix/bin/pip install google-tunix==0.1.7
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from sampler import INSTALL, MODEL, ROOT, Contender, Report, bind_to_cores, machine, num_weights, peak, serve, versions

MAX_TOKENS = 256
GROUP_SIZE = 8
"""Rollouts of a prompt in ``step``; ``unshared`` and the peer compute the prompt of each."""

ROW_TOKENS = {"step": 63 + 2 * (1 + 192), "packed": MAX_TOKENS}
"""Lengths of packed rows. Two rollouts of a group share a row: in longer ones attention costs more than the prompt saves."""


def make_lengths(workload: str) -> np.ndarray:
    """Prompt and response tokens of each rollout, ``[N, 2]``, the same in every process."""
    if workload in ("step", "unshared"):
        return np.array([[64, 192]] * (2 * GROUP_SIZE))
    lengths = np.random.default_rng(0).lognormal(math.log(64), 1.0, 64)
    lengths = np.clip(np.rint(lengths), 8, MAX_TOKENS).astype(int)
    return np.stack([lengths // 4, lengths - lengths // 4], axis=1)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contender")
    parser.add_argument("--contenders", nargs="+", default=["step", "unshared", "tunix", "padded", "packed"])
    parser.add_argument("--threads", type=int, default=2, help="cores that the contenders are bound to")
    parser.add_argument("--tunix-python", default=str(ROOT.parent / "tunix/bin/python"), metavar="PATH")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        make = peak if arguments.child == "peak" else ours
        serve(make, arguments.child, versions("jax", "jaxlib", "numpy"))
        return
    bind_to_cores(arguments.threads)
    reports = measure(arguments)
    result = {**headline(reports), **reports, "machine": machine(arguments.threads)}
    if arguments.json:
        print(json.dumps(result, indent=2))


def ours(workload: str) -> Callable[[int], Report]:
    """This repository's train step."""
    from oapl_jax.model.qwen import QwenConfig

    config = QwenConfig.from_hf({"model_type": "qwen3", **MODEL})
    group_size = GROUP_SIZE if workload == "step" else 1
    return our_step(
        config, make_lengths(workload), MAX_TOKENS, group_size=group_size, row_tokens=ROW_TOKENS.get(workload)
    )


def our_step(
    config: Any, lengths: np.ndarray, max_tokens: int, *, group_size: int = 1, **options: Any
) -> Callable[[int], Report]:
    """A train step of random weights and rollouts, compiled: a function that runs it once.

    Args:
        config: the architecture, a ``QwenConfig``.
        lengths: prompt and response tokens of each rollout, ``[N, 2]``.
        max_tokens: limit of a rollout.
        group_size: rollouts of a prompt, which a packed row has once.
        **options: ``row_tokens`` and ``micro_batch_rows`` of ``RowLayout``; ``compute_dtype`` and ``remat`` of ``Qwen``.
    """
    import jax

    from oapl_jax.config.learner import LearnerConfig
    from oapl_jax.config.mesh import MeshConfig
    from oapl_jax.distributed.sharding import TRAINER_RULES, make_meshes, shardings
    from oapl_jax.learner.batch import RowLayout, from_pairs, padding, place
    from oapl_jax.learner.state import init_state, make_optimizer, make_schedule
    from oapl_jax.learner.step import make_train_step
    from oapl_jax.model.qwen import Remat, abstract, initialize
    from oapl_jax.objectives import oapl

    mesh, _ = make_meshes(MeshConfig(trainer="fsdp=1"))
    compute_dtype = options.pop("compute_dtype", "float32")
    remat = options.pop("remat", Remat(True))
    graphdef, shapes = abstract(config, mesh=mesh, remat=remat, compute_dtype=compute_dtype)
    params = initialize(config, jax.random.key(0), shardings(shapes, mesh, TRAINER_RULES))
    learner = LearnerConfig(learning_rate=1e-6)
    schedule = make_schedule(learner, 1000)
    optimizer = make_optimizer(learner, schedule)
    state, placed = init_state(params, optimizer, mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        schedule,
        oapl.OBJECTIVE,
        oapl.OaplOptions(),
        temperature=1.0,
        vocab_size=config.vocab_size,
        mesh=mesh,
        shardings=placed,
    )
    rng = np.random.default_rng(1)
    layout = RowLayout(len(lengths), max_tokens, **options, mesh=mesh, shares_prompts=group_size > 1)
    pairs = [tuple(rng.integers(0, config.vocab_size, size).astype(np.int32) for size in pair) for pair in lengths]
    host = from_pairs(
        [(pairs[i - i % group_size][0], response) for i, (_, response) in enumerate(pairs)],
        layout,
        sampler_logprobs=[rng.normal(-10.0, 0.3, response).astype(np.float32) for _, response in lengths],
        advantages=rng.normal(size=len(lengths)).tolist(),
    )
    batch = place(host, layout)
    compiled = step.lower(state, batch).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20

    def run(_: int) -> Report:
        nonlocal state
        state, metrics, _ = compiled(state, batch)
        loss = float(metrics["learner/loss"])
        assert math.isfinite(loss)
        return {"temp_mib": temporaries, "loss": loss, "padding": padding(host, layout)}

    return run


def product_flops(workload: str) -> float:
    """Operations of the step's matrix products with weights, three passes.

    A prompt counts once for its group, and only responses need the vocabulary.
    """
    layer, head = num_weights()
    prompt, response = make_lengths(workload).sum(axis=0)
    if workload == "step":
        prompt //= GROUP_SIZE
    return 6.0 * (MODEL["num_hidden_layers"] * layer * (prompt + response) + head * response)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Lets the contenders take turns; the figures of each, null for those that are absent."""
    tunix = [arguments.tunix_python, str(pathlib.Path(__file__).with_name("peer_tunix_train.py"))]
    commands = {name: [sys.executable, __file__, "--child", name] for name in ("peak", *arguments.contenders)}
    commands["tunix"] = tunix
    contenders: list[Contender] = []
    turns: dict[str, list[Report]] = {}
    try:
        for name in ("peak", *arguments.contenders):
            if name == "tunix" and subprocess.run([tunix[0], "-c", "import tunix"], capture_output=True).returncode:
                print(f"tunix is left out; {INSTALL['tunix']}", flush=True)
                continue
            contenders.append(Contender(name, commands[name]))
            contenders[-1].report()
            print(f"{name} is warm", flush=True)
        for _ in range(arguments.repeats):
            for contender in contenders:
                turns.setdefault(contender.name, []).append(report := contender.turn())
                print(f"{contender.name} {report['cpu_seconds']:.2f} CPU s, {report['wall_seconds']:.2f} s", flush=True)
    finally:
        for contender in contenders:
            contender.close()
    flops = max(report["flops_per_cpu_second"] for report in turns.pop("peak"))
    reports: dict[str, Any] = {name: summary(turns[name]) if name in turns else None for name in arguments.contenders}
    return {**reports, "floor": {"cpu_seconds": product_flops("step") / flops, "flops_per_cpu_second": flops}}


def summary(reports: list[Report]) -> Report:
    """Medians over the turns of a contender, and what is the same in all."""
    medians = {key: statistics.median(report[key] for report in reports) for key in ("cpu_seconds", "wall_seconds")}
    return {**medians, **{key: reports[-1][key] for key in ("temp_mib", "loss", "versions", "load_average")}}


def headline(reports: dict[str, Any]) -> Report:
    """The figures to look at: ours over the peer's, ours over the floor, padded over packed; null where one is missing."""

    def ratio(key: str, above: str, below: str) -> float | None:
        pair = [reports.get(name) for name in (above, below)]
        return pair[0][key] / pair[1][key] if all(pair) else None

    return {
        "cpu_ratio": ratio("cpu_seconds", "step", "tunix"),
        "temp_ratio": ratio("temp_mib", "step", "tunix"),
        "train_floor_ratio": ratio("cpu_seconds", "step", "floor"),
        "packing_speedup": ratio("cpu_seconds", "padded", "packed"),
    }


if __name__ == "__main__":
    main(sys.argv[1:])

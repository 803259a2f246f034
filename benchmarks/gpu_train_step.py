"""The train step on a GPU: tokens per second and MFU beside PyTorch with transformers, on the same card in one run.

    python benchmarks/gpu_train_step.py --json

Models of Qwen2.5's shapes with random weights, bfloat16 products, float32 weights and AdamW moments, 4,096 to 16,384
tokens a sequence, of which three quarters are response; ``--micro-batch-tokens`` a forward and backward pass, gradients
summed over a batch. The peer is ``AutoModelForCausalLM`` under bfloat16 autocast with PyTorch's scaled-dot-product
attention and fused AdamW; its loss is the mean of the squared sums of response log-probabilities, as ours. Both once
with layers recomputed in the backward pass (``ours_layer``, ``transformers``) and once with what is faster where
there is room: ours with the results of its products saved (``ours``), the peer with everything kept
(``transformers_kept``).

Each measurement is a process that has the card for itself; contenders take turns. MFU is the model's arithmetic
(``model.flops.forward_flops``, times three: nothing computed twice counts) over the time and the card's dense bfloat16 rate.
``speedup`` is the best of the peer's times over the best of ours.
It was never run on a GPU: none was at hand. ``--models tiny --lengths 64 --peak-tflops 0.1`` runs it anywhere. What XLA
makes of the step on an H200 is counted by ``aot_gpu.py``.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any, get_args

import numpy as np

from sampler import ROOT, Report, versions

MODELS = {
    "qwen2.5_0.5b": "configs/models/qwen2.5_0.5b_instruct.json",
    "qwen2.5_1.5b": "configs/models/qwen2.5_1.5b_instruct.json",
    "tiny": "configs/toy_qwen3.json",
}

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L4": 121.0, "T4": 65.0}
"""Dense bfloat16 (T4: float16), from NVIDIA's data sheets, by a word in the device's name."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["qwen2.5_0.5b", "qwen2.5_1.5b"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384], help="tokens of a sequence")
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens of a step")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384, help="tokens of a forward and backward pass")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a measurement, after one that is not")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each contender")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 rate of the card; default: by its name")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--child", nargs=3, metavar=("NAME", "MODEL", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        name, model, length = arguments.child
        rows = max(1, arguments.micro_batch_tokens // int(length))
        print(
            json.dumps(measure(name, model, make_lengths(int(length), arguments.batch_tokens), rows, arguments.steps))
        )
        return
    result = [compare(model, length, arguments) for model in arguments.models for length in arguments.lengths]
    if arguments.json:
        print(json.dumps({"cases": result}, indent=2))


def make_lengths(length: int, batch_tokens: int) -> np.ndarray:
    """Prompt and response tokens of each rollout, ``[N, 2]``."""
    return np.array([[length // 4, length - length // 4]] * max(1, batch_tokens // length))


def compare(model: str, length: int, arguments: argparse.Namespace) -> Report:
    """Medians of the contenders' measurements, which take turns; null where one failed, with its last words printed."""
    turns: dict[str, list[Report]] = {name: [] for name in arguments.contenders}
    for _ in range(arguments.repeats):
        for name, reports in turns.items():
            command = [sys.executable, __file__, "--child", name, model, str(length)]
            command += ["--batch-tokens", str(arguments.batch_tokens), "--steps", str(arguments.steps)]
            command += ["--micro-batch-tokens", str(arguments.micro_batch_tokens)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
            if done.returncode:
                print(f"{model} {length} {name} failed: {done.stderr[-2000:]}", flush=True)
                continue
            reports.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{model} {length} {name}: {reports[-1]['seconds']:.3f} s a step", flush=True)
    flops, tokens = step_flops(model, make_lengths(length, arguments.batch_tokens))
    report: Report = {"model": model, "length": length, "tokens": tokens, "flops": flops}
    for name, reports in turns.items():
        report[name] = summary(reports, flops, tokens, arguments.peak_tflops) if reports else None
    best: dict[bool, float] = {}
    for name in filter(report.get, turns):
        is_ours, seconds = name.startswith("ours"), report[name]["seconds"]
        best[is_ours] = min(seconds, best.get(is_ours, seconds))
    report["speedup"] = best[False] / best[True] if len(best) == 2 else None
    return report


def summary(reports: list[Report], flops: float, tokens: int, peak_tflops: float | None) -> Report:
    """MFU is null for a card that is not in the table and whose rate was not given."""
    seconds = statistics.median(report["seconds"] for report in reports)
    device = reports[0]["device"]
    known = next((rate for word, rate in PEAK_TFLOPS.items() if word in device), None)
    peak = peak_tflops or known
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / (peak * 1e12) if peak else None,
        "device": device,
        "peak_gib": reports[-1]["peak_gib"],
        "versions": reports[0]["versions"],
    }


def step_flops(model: str, lengths: np.ndarray) -> tuple[float, int]:
    """Floating point operations of a step's mathematics, and its tokens."""
    from oapl_jax.build.policy import read_config
    from oapl_jax.model.flops import forward_flops

    config, total = read_config(ROOT / MODELS[model]), lengths.sum(axis=1)
    pairs = float((total * (total + 1) / 2).sum())
    return 3 * forward_flops(config, float(total.sum()), pairs, float(lengths[:, 1].sum()))[0], int(total.sum())


def measure(name: str, model: str, lengths: np.ndarray, rows: int, num_steps: int) -> Report:
    """The median of a contender's steps, in the process that is its own."""
    run, finish = CONTENDERS[name](ROOT / MODELS[model], lengths, rows)
    run()
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), **finish()}


def ours(are_products_saved: bool, config_file: pathlib.Path, lengths: np.ndarray, rows: int) -> tuple[Any, Any]:
    """This repository's train step."""
    import jax
    from train_step import our_step

    from oapl_jax.build.policy import read_config
    from oapl_jax.config.model import SavedName
    from oapl_jax.model.qwen import Remat

    remat = Remat(True, get_args(SavedName) if are_products_saved else ())
    options = {"micro_batch_rows": rows, "compute_dtype": "bfloat16", "remat": remat}
    step = our_step(read_config(config_file), lengths, int(lengths[0].sum()), **options)

    def finish() -> Report:
        device = jax.devices()[0]
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
        return {"device": device.device_kind, "peak_gib": peak, "versions": versions("jax", "jaxlib")}

    return lambda: step(0), finish


def transformers(is_all_kept: bool, config_file: pathlib.Path, lengths: np.ndarray, rows: int) -> tuple[Any, Any]:
    """PyTorch with transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    config = AutoConfig.for_model(**json.loads(config_file.read_text()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").to(device)
    if not is_all_kept:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")
    prompt, response = (int(x) for x in lengths[0])
    tokens = torch.randint(0, config.vocab_size, (len(lengths), prompt + response), device=device)

    def run() -> None:
        for part in tokens.split(rows):
            with torch.autocast(device, torch.bfloat16):
                # The state at t predicts token t + 1.
                logits = model(part, use_cache=False, logits_to_keep=response + 1).logits[:, :-1]
            targets = part[:, prompt:]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
            )
            residuals = 1e-3 * (losses.view_as(targets).sum(1) - 10.0 * response)
            (residuals.square().sum() / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    def finish() -> Report:
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0
        return {"device": name, "peak_gib": peak, "versions": versions("torch", "transformers")}

    return run, finish


CONTENDERS = {
    "ours": functools.partial(ours, True),
    "ours_layer": functools.partial(ours, False),
    "transformers": functools.partial(transformers, False),
    "transformers_kept": functools.partial(transformers, True),
}


if __name__ == "__main__":
    main(sys.argv[1:])

"""Decode throughput on a GPU, as a fraction of what its memory allows, beside transformers' generate on the same card.

    python benchmarks/gpu_sampler.py --json

Models of Qwen2.5's shapes with random bfloat16 weights and a bfloat16 cache; 64 to 512 sequences at once, eight of each
prompt of 512 tokens, at temperature 1 with the log-probability of each token. Ours is the scheduler over the engine,
once for each way to read the cache: ``gpu`` is the Triton kernel over pages, ``xla`` gathers the pages in each step,
``dense`` gathers them once a chunk; ``scan`` is ``gpu`` with the layers left in their stack. The peer is ``generate``
on bfloat16 weights with PyTorch's scaled-dot-product attention and its dynamic cache.

What counts is decoding: the seconds of a run to the full length less those of a run to ``--short`` tokens, over the
tokens between. The roofline reads every weight once a step, and of every sequence the keys and values that it has by
then, at the card's bandwidth (its data sheet's, by the device's name). ``compile_seconds`` is what the first runs took
longer than the second ones. Each measurement is a process that has the card for itself; contenders take turns.

No GPU was at hand: it was run on a CPU only (``--models tiny --rows 8 --new-tokens 24 --short 8 --prompt-tokens 16
--bandwidth-gbs 10``). What XLA makes of the programs is counted by ``aot_gpu.py``.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sampler import ROOT, Report, versions

MODELS: dict[str, Any] = {
    "qwen2.5_0.5b": "configs/models/qwen2.5_0.5b_instruct.json",
    "qwen2.5_1.5b": "configs/models/qwen2.5_1.5b_instruct.json",
    "qwen2.5_7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "tiny": "configs/toy_qwen3.json",
}
"""Files of the repository, or what a Hugging Face ``config.json`` would say."""

BANDWIDTH_GBS = {"H200": 4800.0, "H100": 3350.0, "A100": 2039.0, "L4": 300.0}
"""Of the device's memory, from NVIDIA's data sheets (SXM, 80 GB), by a word in the device's name."""

GROUP_SIZE = 8


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["qwen2.5_0.5b", "qwen2.5_1.5b", "qwen2.5_7b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 256, 512], help="sequences at once")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--short", type=int, default=64, help="tokens of the run that is taken off")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each contender")
    parser.add_argument("--bandwidth-gbs", type=float, help="of the card's memory; default: by its name")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--child", nargs=3, metavar=("NAME", "MODEL", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        name, model, rows = arguments.child
        print(json.dumps(measure(CONTENDERS[name], model, int(rows), arguments)))
        return
    result = [compare(model, rows, arguments) for model in arguments.models for rows in arguments.rows]
    if arguments.json:
        print(json.dumps({"cases": result}, indent=2))


def compare(model: str, rows: int, arguments: argparse.Namespace) -> Report:
    """Medians of the contenders' measurements, which take turns; null where one failed, with its last words printed."""
    turns: dict[str, list[Report]] = {name: [] for name in arguments.contenders}
    sizes = ["--prompt-tokens", "--new-tokens", "--short"]
    values = [arguments.prompt_tokens, arguments.new_tokens, arguments.short]
    for _ in range(arguments.repeats):
        for name, reports in turns.items():
            command = [sys.executable, __file__, "--child", name, model, str(rows)]
            command += [str(word) for pair in zip(sizes, values, strict=True) for word in pair]
            done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
            if done.returncode:
                print(f"{model} {rows} {name} failed: {done.stderr[-2000:]}", flush=True)
                continue
            reports.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{model} {rows} {name}: {reports[-1]['decode_seconds']:.3f} s", flush=True)
    tokens, num_bytes = decode_work(model, rows, arguments)
    report: Report = {"model": model, "rows": rows, "tokens": tokens, "bytes": num_bytes}
    for name, reports in turns.items():
        report[name] = summary(reports, tokens, num_bytes, arguments.bandwidth_gbs) if reports else None
    return report


def decode_work(model: str, rows: int, arguments: argparse.Namespace) -> tuple[int, float]:
    """Tokens between the short and the long run, and the bytes that the roofline reads for them."""
    from oapl_jax.sampler.kv_cache import page_bytes

    config, steps = read_model(model), np.arange(arguments.short, arguments.new_tokens)
    weights = 2 * (config.num_params - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size))
    visible = arguments.prompt_tokens + steps
    return rows * len(steps), float((weights + rows * visible * page_bytes(config, 1, "bfloat16")).sum())


def summary(reports: list[Report], tokens: int, num_bytes: float, bandwidth_gbs: float | None) -> Report:
    """The fraction of the roofline is null for a card that is not in the table and whose bandwidth was not given."""
    seconds = statistics.median(report["decode_seconds"] for report in reports)
    device = reports[0]["device"]
    known = next((rate for word, rate in BANDWIDTH_GBS.items() if word in device), None)
    bandwidth = bandwidth_gbs or known
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "roofline_fraction": num_bytes / (bandwidth * 1e9) / seconds if bandwidth else None,
        **{key: reports[0][key] for key in ("compile_seconds", "device", "versions")},
    }


def measure(contender: Callable[..., Any], model: str, rows: int, arguments: argparse.Namespace) -> Report:
    """One measurement, in the process that is the contender's own."""
    run, about = contender(model, rows, arguments.prompt_tokens, arguments.new_tokens)
    seconds = {}
    for length in (arguments.short, arguments.new_tokens, arguments.short, arguments.new_tokens):
        start = time.perf_counter()
        run(length)
        seconds.setdefault(length, []).append(time.perf_counter() - start)
    long, short = seconds[arguments.new_tokens], seconds[arguments.short]
    compiling = sum(first - second for first, second in (long, short))
    return {"decode_seconds": long[1] - short[1], "compile_seconds": compiling, **about}


def read_model(model: str) -> Any:
    """The architecture, a ``QwenConfig``."""
    from oapl_jax.model.qwen import QwenConfig

    return QwenConfig.from_hf(hf_config(model))


def hf_config(model: str) -> dict[str, Any]:
    source = MODELS[model]
    return json.loads((ROOT / source).read_text()) if isinstance(source, str) else source


def make_prompts(vocab_size: int, rows: int, length: int) -> np.ndarray:
    """``[rows / GROUP_SIZE, length]``."""
    return np.random.default_rng(0).integers(2, vocab_size, (rows // GROUP_SIZE, length)).astype(np.int32)


def ours(attention: str, join_layers: bool | None, model: str, rows: int, prompt_tokens: int, new_tokens: int) -> Any:
    """This repository's sampler."""
    import jax

    from oapl_jax.config.mesh import MeshConfig
    from oapl_jax.distributed.sharding import SAMPLER_RULES, make_meshes, shardings
    from oapl_jax.model.qwen import abstract, initialize
    from oapl_jax.rollouts import sampling
    from oapl_jax.rollouts.sampling import Request
    from oapl_jax.sampler.engine import Engine
    from oapl_jax.sampler.sampler import JaxSampler

    config = read_model(model)
    mesh, _ = make_meshes(MeshConfig(trainer="tensor=1"))
    graphdef, shapes = abstract(config, param_dtype="bfloat16", compute_dtype="bfloat16")
    params = initialize(config, jax.random.key(0), shardings(shapes, mesh, SAMPLER_RULES), param_dtype="bfloat16")
    engine = Engine(
        graphdef,
        config,
        vocab_size=config.vocab_size,
        stop_ids=[0],
        num_rows=rows,
        max_prompt_tokens=prompt_tokens,
        max_response_tokens=new_tokens,
        decode_steps=32,
        mesh=mesh,
        page_size=16,
        cache_dtype="bfloat16",
        attention=attention,  # pyright: ignore[reportArgumentType]
        join_layers=join_layers,
        can_truncate=False,
    )
    sampler = JaxSampler([engine], mesh)
    sampler.set_weights(params)
    prompts = make_prompts(config.vocab_size, rows, prompt_tokens)

    def run(length: int) -> None:
        requests = [Request(i, p, GROUP_SIZE, (0, 0, i), max_tokens=length) for i, p in enumerate(prompts)]
        rollouts = [rollout for _, group in sampling.run(sampler, requests) for rollout in group]
        assert len(rollouts) == rows
        # One token of the vocabulary ends a response, and random weights draw it about as often as any other token.
        assert sum(len(rollout.token_ids) for rollout in rollouts) > 0.98 * rows * length or model == "tiny"

    device = jax.devices()[0].device_kind
    return run, {"device": device, "versions": versions("jax", "jaxlib")}


def transformers(model: str, rows: int, prompt_tokens: int, new_tokens: int) -> Any:
    """PyTorch with transformers."""
    import torch
    from peer_transformers import DISTRIBUTION, TokenLogprobs
    from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**hf_config(model), "eos_token_id": None, "bos_token_id": None})
    policy: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    policy = policy.to(device).eval()
    prompts = torch.from_numpy(make_prompts(config.vocab_size, rows, prompt_tokens)).long().to(device)

    @torch.inference_mode()
    def run(length: int) -> None:
        logprobs = TokenLogprobs()
        sequences = policy.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            num_return_sequences=GROUP_SIZE,
            max_new_tokens=length,
            **DISTRIBUTION,
            logits_processor=LogitsProcessorList([logprobs]),
        )
        drawn = logprobs.all(sequences).cpu()
        assert drawn.shape == (rows, length)

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return run, {"device": name, "versions": versions("torch", "transformers")}


CONTENDERS: dict[str, Callable[..., Any]] = {
    "gpu": functools.partial(ours, "gpu", None),
    "scan": functools.partial(ours, "gpu", False),
    "xla": functools.partial(ours, "xla", None),
    "dense": functools.partial(ours, "dense", None),
    "transformers": transformers,
}


if __name__ == "__main__":
    main(sys.argv[1:])

"""Offline RL for code in small: a made-up CodeNet, a warm start, four objectives, a pass@1 and pass@10 table.

    PYTHONPATH=. python benchmarks/offline_code.py runs/codenet_toy_data [--only-data] [--objectives rloo rloo_exp ...]

Every step is a command that a user would give. What a step has made already is not made again, so a killed run goes on.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import yaml
from codenet_toy import NUMBERS, statement, write_corpus

from oapl_jax.data.catalogue import PROGRAM

OBJECTIVES = ("sft", "rloo", "rloo_grpo", "rloo_exp")
HELD_OUT, SAMPLES, VOCABULARY = 18, 20, 420
STOP, PAD = "<|end|>", "<|pad|>"
TOY = pathlib.Path("configs/codenet_toy.yaml")
MODEL = {
    **{"model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 256},
    **{"num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32},
    **{"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 128},
    **{"initializer_range": 0.05, "eos_token_id": 0},
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path, help="folder of everything that is made")
    parser.add_argument("--only-data", action="store_true", help="stop before training")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--warm-steps", type=int, default=100, help="supervised steps of the warm start")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of configs/codenet_toy.yaml")
    arguments = parser.parse_intermixed_args(argv)
    work, started = arguments.work, time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    make_data(work, arguments.warm_steps)
    if arguments.only_data:
        return
    models = {"base": work / "warm_start" / "export"}
    for name in arguments.objectives:
        directory = work / f"run_{name}"
        models[name] = directory / "export"
        if not (directory / "summary.json").exists():
            words = [
                f"run.dir={directory}",
                f"objective.name={name}",
                f"model.path={models['base']}",
                f"data.path={work / 'held_out.jsonl'}",
                f"evaluation.path={work / 'held_out.jsonl'}",
                f"offline.rounds=[{{log: {work / 'log'}, epochs: 2}}]",
            ]
            command("oapl_jax.train", "--config", TOY, *words, *arguments.overrides)
    for name, model in models.items():
        config = {
            "run": {"dir": str(work / f"evaluation_{name}")},
            "model": {"path": str(model), "scan_layers": False},
            "data": yaml.safe_load(TOY.read_text())["data"] | {"path": str(work / "held_out.jsonl")},
            "reward": yaml.safe_load(TOY.read_text())["reward"],
            "sampler": {"samples": SAMPLES, "max_response_tokens": 40, "rows": 60, "temperature": 0.6},
            "mesh": {"trainer": "fsdp=1"},
        }
        path = work / f"evaluation_{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        command("oapl_jax", "evaluate", "--config", path)
    logs = [word for name in models for word in ("--log", f"{name}={work / f'evaluation_{name}'}")]
    command("oapl_jax", "evaluate", *logs, "--out", work / "comparison")
    print(table(work / "comparison" / "results.json"), f"\n{time.perf_counter() - started:.0f} s in all")


def make_data(work: pathlib.Path, warm_steps: int) -> None:
    """Corpus, tokenizer, rollout log, pairs and held-out problems, and the warm start."""
    order = np.random.default_rng(0).permutation(len(NUMBERS))
    train = [NUMBERS[i] for i in order[HELD_OUT:]]
    root = work / "Project_CodeNet"
    if not root.exists():
        write_corpus(root, train, most=300)
    programs = [path.read_text().strip() for path in sorted(root.glob("data/*/Python/*.py"))]
    if not (work / "tokenizer").exists():
        make_tokenizer(work / "tokenizer", programs)
    if not (work / "log").exists():
        command("oapl_jax", "codenet", root, work / "log", "--tokenizer", work / "tokenizer")
    lines = []
    for i in order[:HELD_OUT]:
        times, plus = NUMBERS[i]
        tests = [{"stdin": f"{n}\n", "stdout": f"{n * times + plus}\n"} for n in (0, 3, 11)]
        prompt = PROGRAM.replace("{prompt}", f"Times\n\n{statement(times, plus)}")
        lines.append(json.dumps({"prompt": prompt, "answer": json.dumps(tests)}))
    (work / "held_out.jsonl").write_text("\n".join(lines) + "\n")
    pairs = []
    for path in sorted(root.glob("data/*/Python/*.py")):
        times, plus = train[int(path.parent.parent.name[1:]) - 1]
        prompt = PROGRAM.replace("{prompt}", f"Times\n\n{statement(times, plus)}")
        pairs.append(json.dumps({"prompt": prompt, "response": f"```python\n{path.read_text().strip()}\n```"}))
    (work / "pairs.jsonl").write_text("\n".join(pairs) + "\n")
    (work / "model.json").write_text(json.dumps(MODEL))
    config = {
        "run": {"dir": str(work / "warm_start"), "steps": warm_steps},
        "model": {"config": str(work / "model.json"), "tokenizer": str(work / "tokenizer"), "scan_layers": False},
        "data": {"path": str(work / "pairs.jsonl"), "max_prompt_tokens": 48, "max_response_tokens": 40},
        "learner": {"batch_rollouts": 32, "learning_rate": 2e-3, "warmup_steps": 30, "clip_norm": 1.0},
        "mesh": {"trainer": "fsdp=1"},
        "checkpoint": {"every": 1000},
    }
    (work / "warm_start.yaml").write_text(yaml.safe_dump(config))
    command("oapl_jax", "sft", "--config", work / "warm_start.yaml")


def make_tokenizer(folder: pathlib.Path, programs: list[str]) -> None:
    """A small byte-level BPE of the corpus, digits apart, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[STOP, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [PROGRAM.replace("{prompt}", f"Times\n\n{statement(*numbers)}") for numbers in NUMBERS]
    tokenizer.train_from_iterator([*texts, *(f"```python\n{program}\n```" for program in programs)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=STOP, pad_token=PAD).save_pretrained(folder)


def command(module: str, *words: object) -> None:
    """``python -m MODULE WORDS``, told and run; ends this program where it fails."""
    line = [sys.executable, "-m", module, *map(str, words)]
    print("$ python -m", module, *words, flush=True)
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": str(pathlib.Path.cwd())}, check=False)
    if done.returncode:
        raise SystemExit(f"{module}: exit code {done.returncode}")


def table(path: pathlib.Path) -> str:
    """The paper's table, for the toy: a row a model."""
    rows = ["| model | pass@1 | pass@10 |", "|---|---|---|"]
    for score in json.loads(path.read_text())["scores"]:
        values = [score["values"][f"pass@{k}"] for k in (1, 10)]
        cells = [f"{100 * v['value']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]" for v in values]
        rows.append(f"| {score['label']} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main(sys.argv[1:])

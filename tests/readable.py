"""What the program reads from others: a valid folder for each reader, and the reader.

JAX is imported by those readers only that need it: each reads in a process of its own.
"""

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.data import rows, tokenizer
from oapl_jax.io import run_dir
from oapl_jax.rewards.code import layouts, programs
from oapl_jax.rollouts.log import BatchRecord, RolloutLog
from oapl_jax.untrusted import reading

ROOT = pathlib.Path(__file__).parents[1]
QUESTIONS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(20)]
MODEL = "qwen3_tied"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TESTS = [
    {"input": "1 2\n", "output": "3\n"},
    {"input": [1, [2]], "output": [3], "fn_name": "add", "type": "function_call"},
]


@dataclasses.dataclass(frozen=True)
class Reader:
    """Writes a valid folder, and reads a folder."""

    write: Callable[[pathlib.Path], object]
    read: Callable[[pathlib.Path], object]
    undamaged: tuple[str, ...] = ()
    """Files that stay as they are."""


def write_lines(path: pathlib.Path, items: list[Any]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def read_config(folder: pathlib.Path) -> object:
    from oapl_jax.build.checks import CHECKS

    return config_file.load(TrainConfig, folder / "config.yaml", [], CHECKS)


def write_config(folder: pathlib.Path) -> None:
    shipped = ROOT / "configs/countdown.yaml"
    (folder / "config.yaml").write_bytes(shipped.read_bytes())


def write_model(folder: pathlib.Path) -> None:
    from safetensors.numpy import save_file

    from model import tiny

    (folder / "config.json").write_text(json.dumps(tiny.HF_CONFIGS[MODEL]))
    save_file(tiny.weights(MODEL), folder / "model.safetensors")


def write_indexed_model(folder: pathlib.Path) -> None:
    from model import tiny

    write_model(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(tiny.weights(MODEL), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def read_model(folder: pathlib.Path) -> object:
    import jax.numpy as jnp

    from oapl_jax.config.mesh import MeshConfig
    from oapl_jax.distributed import sharding
    from oapl_jax.model import hf

    mesh, _ = sharding.make_meshes(MeshConfig(trainer="fsdp=1"))
    return hf.load_params(folder, mesh, sharding.TRAINER_RULES, jnp.float32)


def write_tokenizer(folder: pathlib.Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from model import tiny

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    made.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 3]}))
    (folder / "config.json").write_text(json.dumps(tiny.HF_CONFIGS[MODEL]))


def read_tokenizer(folder: pathlib.Path) -> object:
    return tokenizer.load("model", folder).encode_prompt("What is 1 + 1?", "Be brief.")


def write_run(folder: pathlib.Path) -> None:
    from oapl_jax.build.checks import CHECKS
    from rollouts.groups import group

    run_dir.save_config(folder, config_file.load(TrainConfig, ROOT / "configs/countdown.yaml", [], CHECKS))
    write_lines(
        folder / "metrics.jsonl", [{"step": step, "rollouts/reward": 0.5, "learner/loss": 0.1} for step in range(9)]
    )
    write_lines(
        folder / "batches.jsonl",
        [
            {"step": s, "policy_version": 0, "groups": [f"000000-{s:08d}"], "digests": [f"{s:016x}"]}
            for s in range(1, 9)
        ],
    )
    counts = {"prompts": ["a", "b"], "graded": [4, 4]}
    write_lines(
        folder / "evaluations.jsonl",
        [{"step": 0, **counts, "correct": [0, 1]}, {"step": 8, **counts, "correct": [2, 4]}],
    )
    write_lines(folder / "starts.jsonl", [{"step": 0}, {"step": 4}])
    (folder / "summary.json").write_text(json.dumps({"before": {"pass@1": 0.1}, "after": {"pass@1": 0.2}}))
    RolloutLog(folder / "rollouts").append([group(0), group(1)])


def read_run(folder: pathlib.Path) -> object:
    from oapl_jax.report import page, record

    run_dir.read_config(folder, TrainConfig)
    BatchRecord(folder / "batches.jsonl")
    return page.render([record.read_run(folder)])


def read_model_config(folder: pathlib.Path) -> object:
    from oapl_jax.model import hf

    return hf.load_config(folder)


def write_log(folder: pathlib.Path) -> None:
    from rollouts.groups import group

    RolloutLog(folder).append([group(0), group(1)])


def read_log(folder: pathlib.Path) -> object:
    return RolloutLog(folder).read(0)


def read_questions(name: str, file_format: str) -> Callable[[pathlib.Path], object]:
    return lambda folder: rows.read(str(folder / name), file_format, ["prompt", "answer"])


def read_tests(folder: pathlib.Path) -> object:
    return programs.parse_tests(layouts.read_tests(reading.read_text(folder / "tests.json")))


READERS = {
    "config": Reader(write_config, read_config),
    "jsonl": Reader(lambda f: write_lines(f / "train.jsonl", QUESTIONS), read_questions("train.jsonl", "jsonl")),
    "json": Reader(lambda f: (f / "a.json").write_text(json.dumps(QUESTIONS)), read_questions("a.json", "jsonl")),
    "gzip": Reader(
        lambda f: (f / "a.jsonl.gz").write_bytes(
            gzip.compress("".join(json.dumps(q) + "\n" for q in QUESTIONS).encode())
        ),
        read_questions("a.jsonl.gz", "jsonl"),
    ),
    "parquet": Reader(
        lambda f: pq.write_table(pa.Table.from_pylist(QUESTIONS), f / "a.parquet"),
        read_questions("a.parquet", "parquet"),
    ),
    "config.json": Reader(write_model, read_model_config, undamaged=("model.safetensors",)),
    "safetensors": Reader(write_model, read_model, undamaged=("config.json",)),
    "index": Reader(write_indexed_model, read_model, undamaged=("config.json", "model-00001-of-00001.safetensors")),
    "tokenizer": Reader(write_tokenizer, read_tokenizer),
    "tests": Reader(lambda folder: (folder / "tests.json").write_text(json.dumps(TESTS)), read_tests),
    "run": Reader(write_run, read_run),
    "shard": Reader(write_log, read_log),
}

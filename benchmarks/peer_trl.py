"""TRL's GRPOTrainer on the job of ``benchmarks/main_job.py``, which starts this with TRL's own Python.

    python benchmarks/peer_trl.py JOB.json REPORT.json

TRL knows no stop strings: a response ends at the tokens in which the string is whole, which for a newline is the same.
Other prompts than those of built-in tasks are mathematical, and end as the model ends them.
"""

import json
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from main_job import cpu_seconds, figures
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from oapl_jax.rewards.math.answers import grade_answer
from oapl_jax.rewards.toy import TOY_GRADERS
from sampler import versions

SETTINGS: dict[str, Any] = {
    "attn_implementation": "sdpa",
    "beta": 0.0,  # no reference model
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
    "per_device_train_batch_size": 8,
}
"""One batch of 32 did not fit beside other programs (benchmarks/README.md)."""


def grader(job: dict[str, Any]) -> Callable[[str, str], bool]:
    """Whether a response to a prompt is right: the built-in task's rule, or that of mathematical answers."""
    if job["task"] is not None:
        return TOY_GRADERS[job["task"]]
    golds = {prompt["text"]: prompt["gold"] for prompt in job["prompts"]}
    return lambda prompt, response: grade_answer(golds[prompt], response).is_correct


class Steps(TrainerCallback):
    """Notes what is asked of each step."""

    def __init__(self, batch_rollouts: int):
        self.batch_rollouts = batch_rollouts
        self.rewards: list[float] = []
        """Of the rollouts that are not trained on yet."""
        self.steps: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each step of the optimizer."""
        rewards, self.rewards = self.rewards[: self.batch_rollouts], self.rewards[self.batch_rollouts :]
        self.steps.append((cpu_seconds(), sum(rewards) / len(rewards)))
        print(f"step {state.global_step}: {self.steps[-1]}", flush=True)


def main(source: str, target: str) -> None:
    job = json.loads(pathlib.Path(source).read_text())
    settings = {**SETTINGS, **job["settings"]}
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.chat_template = None
    stop = job["stop"]
    stops = [i for i in range(len(tokenizer)) if stop in tokenizer.decode([i])] if stop else []
    for prompt in job["prompts"]:
        # With the marks of the chat template, which the text for people lacks.
        prompt["text"] = tokenizer.decode(prompt["token_ids"], clean_up_tokenization_spaces=False)
        assert tokenizer(prompt["text"])["input_ids"] == prompt["token_ids"], prompt["text"]
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), attn_implementation=settings.pop("attn_implementation")
    )
    ends = [tokenizer.eos_token_id, *stops]
    model.generation_config.eos_token_id = ends
    batch_rollouts = job["groups"] * job["group_size"]
    steps, grade = Steps(batch_rollouts), grader(job)

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]
        rewards = [
            float(ids[-1] in ends and grade(prompt, text.partition(stop)[0] if stop else text))
            for prompt, text, ids in zip(prompts, texts, completion_ids, strict=True)
        ]
        steps.rewards += rewards
        return rewards

    with tempfile.TemporaryDirectory(prefix="oapl-trl-") as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=job["steps"],
            gradient_accumulation_steps=batch_rollouts // settings["per_device_train_batch_size"],
            num_generations=job["group_size"],
            max_completion_length=job["max_response_tokens"],
            temperature=job["temperature"],
            lr_scheduler_type="constant",
            bf16=job["dtype"] == "bfloat16",
            use_cpu=True,
            seed=job["seed"],
            shuffle_dataset=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **job["optimizer"],
            **settings,
        )
        trainer = GRPOTrainer(
            model,
            reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt["text"]} for prompt in job["prompts"]]),
            processing_class=tokenizer,
            callbacks=[steps],
        )
        trainer.train()
    report = figures(steps.steps, job["first_steps"], batch_rollouts)
    report |= {"settings": {**SETTINGS, **job["settings"]}, "versions": versions("torch", "transformers", "trl")}
    pathlib.Path(target).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Reward functions of users: a config names one as ``MODULE:FUNCTION``, and a grading worker calls it.

docs/rewards.md has the signature. ``make_task`` runs in the trainer, ``call`` in the worker.
"""

import importlib
import math
from typing import Any

import numpy as np

from oapl_jax.types import Grade, Prompt, Verdict


def make_task(path: str, timeout: float, prompt: Prompt | None = None, response: str | None = None) -> dict[str, Any]:
    """The task of calling a function; without a prompt and a response the worker only imports it."""
    task: dict[str, Any] = {"kind": "function", "path": path, "timeout": timeout}
    if prompt is not None:
        given = {"id": prompt.id, "token_ids": prompt.token_ids.tolist(), "text": prompt.text, "answer": prompt.answer}
        task |= {"prompt": given, "response": response}
    return task


def call(task: dict[str, Any]) -> Grade:
    """Calls the function of a task.

    Raises:
        TypeError: the function returned neither a finite number nor a ``Grade``.
    """
    module, _, name = task["path"].partition(":")
    function = getattr(importlib.import_module(module), name)
    if "response" not in task:
        return Grade(Verdict.CORRECT, 1.0, f"{task['path']} can be imported")
    given = task["prompt"]
    prompt = Prompt(given["id"], np.asarray(given["token_ids"], np.int32), given["text"], given["answer"])
    result = function(prompt, task["response"])
    if isinstance(result, Grade):
        return result
    if isinstance(result, (bool, int, float)) and math.isfinite(result):
        return Grade(Verdict.CORRECT if result >= 1 else Verdict.WRONG, float(result))
    raise TypeError(f"{task['path']} returned {result!r:.80}, which is neither a finite number nor a Grade")

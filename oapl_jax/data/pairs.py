"""The endless, shuffled stream of prompt and response pairs for supervised fine-tuning."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from oapl_jax.config.data import SftDataConfig
from oapl_jax.data import messages, rows, tasks
from oapl_jax.data.streams import Made, Shuffled
from oapl_jax.data.tokenizer import Tokenizer, warn_of_control_tokens


class Pair(NamedTuple):
    """One example. The response ends with the stop token."""

    prompt_ids: Int[np.ndarray, "P"]
    response_ids: Int[np.ndarray, "R"]


def load_pairs(data: SftDataConfig, tokenizer: Tokenizer, seed: int) -> Shuffled[Pair] | Made[Pair]:
    """The tokenised pairs as an endless random-access stream, shuffled by ``seed``.

    Raises:
        ValueError: a row cannot be read; a row exceeds a limit and ``data.overlong`` is ``error``; or all rows do.
    """
    if data.task is not None:
        task = tasks.make_task(data)

        def make(position: int) -> Pair:
            prompt, response = task.demonstration(position, seed, tokenizer)
            pair = _make_pair(prompt.token_ids, response, tokenizer)
            if overlong := _over_limit(pair, data):
                raise ValueError(f"{prompt.id}: {overlong}; raise the limit (demonstrations are never dropped)")
            return pair

        return Made(make)
    table = rows.read(str(data.path), "jsonl", (data.prompt_column, data.response_column))
    pairs, texts = [], {}
    for number, (prompt_cell, response_cell) in enumerate(table.rows):
        row_name = f"{table.name}/{number}"
        prompt = messages.question_cell(prompt_cell, data.prompt_column, row_name)
        response = rows.string_cell(response_cell, data.response_column, row_name)
        texts |= {f"{row_name} (prompt)": messages.text_of(prompt), f"{row_name} (response)": response}
        pair = _make_pair(np.asarray(tokenizer.encode_prompt(prompt, data.system), np.int32), response, tokenizer)
        if (overlong := _over_limit(pair, data)) is None:
            pairs.append(pair)
        elif data.overlong == "error":
            raise ValueError(f"row {row_name}: {overlong}; raise the limit or set data.overlong=drop")
    if not pairs:
        problem = "rows exceed data.max_prompt_tokens or data.max_response_tokens"
        raise ValueError(f"{data.path!r}: all {len(table.rows)} {problem}")
    warn_of_control_tokens(tokenizer, "prompts and responses", texts)
    return Shuffled(pairs, len(table.rows) - len(pairs), seed)


def _make_pair(prompt_ids: Int[np.ndarray, "P"], response: str, tokenizer: Tokenizer) -> Pair:
    return Pair(prompt_ids, np.asarray([*tokenizer.encode(response), tokenizer.eos_id], np.int32))


def _over_limit(pair: Pair, data: SftDataConfig) -> str | None:
    """The limit that a pair exceeds, as a message."""
    if len(pair.prompt_ids) > data.max_prompt_tokens:
        return f"its prompt has {len(pair.prompt_ids)} tokens, over data.max_prompt_tokens={data.max_prompt_tokens}"
    if len(pair.response_ids) > data.max_response_tokens:
        return (
            f"its response has {len(pair.response_ids)} tokens with the stop token,"
            f" over data.max_response_tokens={data.max_response_tokens}"
        )
    return None

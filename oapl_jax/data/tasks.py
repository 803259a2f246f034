"""The built-in tasks: their prompts, demonstrations, and the split into training and held-out prompts.

Each prompt is made from its index alone, so a stream can be resumed from a position. The rewards are in
``rewards/toy.py``.
"""

import abc
import zlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from oapl_jax.config.data import SftDataConfig, SourceConfig, SumsConfig
from oapl_jax.config.names import entry
from oapl_jax.data.messages import Question, text_of
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.types import Prompt

Split = Literal["train", "held_out"]

HELD_OUT_SEED = 99
"""Seed of the held-out prompts, which are the same for every seed of a run."""

# The split of chain hashes character ids in this alphabet, as in the reference runs.
_SPLIT_ALPHABET = "_$0123456789+-*="

_STREAMS = {"train": 0, "held_out": 1, "demonstration": 2}


class Draw(NamedTuple):
    """One sample from the distribution of a task."""

    question: Question
    response: str
    """A demonstration, without the stop token."""
    split_key: bytes
    """Decides the split: samples with equal keys are in the same split."""


class Task(abc.ABC):
    """A distribution of questions and demonstrations.

    A question is held out if the crc32 of its key is divisible by 10.
    """

    name: str

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> Draw:
        """One question with a demonstration, from either split."""

    def prompt(self, index: int, split: Split, seed: int, tokenizer: Tokenizer) -> Prompt:
        """Prompt number ``index`` of a split; held-out prompts do not depend on ``seed``."""
        stream_seed = HELD_OUT_SEED if split == "held_out" else seed
        question = self._draw_at(index, stream_seed, split).question
        return self._make_prompt(f"{self.name}/{split}/{index}", question, tokenizer)

    def demonstration(self, index: int, seed: int, tokenizer: Tokenizer) -> tuple[Prompt, str]:
        """Training prompt number ``index`` of a separate stream, with a response that lacks the stop token."""
        draw = self._draw_at(index, seed, "demonstration")
        return self._make_prompt(f"{self.name}/demonstration/{index}", draw.question, tokenizer), draw.response

    def _make_prompt(self, prompt_id: str, question: Question, tokenizer: Tokenizer) -> Prompt:
        token_ids = np.asarray(self._encode(question, tokenizer), np.int32)
        return Prompt(id=prompt_id, token_ids=token_ids, text=text_of(question), answer="")

    def _encode(self, question: Question, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode_prompt(question)

    def _draw_at(self, index: int, seed: int, stream: str) -> Draw:
        rng = np.random.default_rng((seed, _STREAMS[stream], index))
        while True:
            draw = self.draw(rng)
            if _is_held_out(draw.split_key) == (stream == "held_out"):
                return draw


class Chain(Task):
    """Arithmetic modulo 10 from left to right, with all running values written out: ``7+5*3-8*4+6=`` -> ``26828``.

    In a demonstration each step is replaced by a random digit with probability ``noise``, and the chain continues from
    that digit. Imitation alone therefore leaves room for the reward, which depends on the last value.
    """

    name = "chain"
    num_operands = 6

    def __init__(self, noise: float = 0.35) -> None:
        self.noise = noise

    def draw(self, rng: np.random.Generator) -> Draw:
        """One question with a noisy demonstration."""
        first, *operands = (int(digit) for digit in rng.integers(0, 10, self.num_operands))
        operators = ["+-*"[k] for k in rng.integers(0, 3, self.num_operands - 1)]
        question = f"{first}{''.join(f'{o}{b}' for o, b in zip(operators, operands, strict=True))}="
        value, response = first, ""
        for operator, operand in zip(operators, operands, strict=True):
            value = _apply(operator, value, operand) % 10
            if rng.random() < self.noise:
                value = int(rng.integers(10))
            response += str(value)
        return Draw(question, response, bytes(map(_SPLIT_ALPHABET.index, question)))


class Countdown(Task):
    """Four digits and a target, ``3741:24`` -> ``3*721+425-124``: a step is an operator, a digit, a two-digit value.

    A solution uses three or four of the digits, each once, from left to right, and every value is in 0..99. A question
    has many solutions.
    """

    name = "countdown"
    three_digit_share = 0.35
    """Share of questions whose demonstration uses three digits."""

    def draw(self, rng: np.random.Generator) -> Draw:
        """One solvable question with one of its solutions."""
        while True:
            digits = [int(digit) for digit in rng.integers(1, 10, 4)]
            num_used = 3 if rng.random() < self.three_digit_share else 4
            first, *rest = (digits[i] for i in rng.permutation(4)[:num_used])
            value, response = first, str(first)
            for digit in rest:
                operator = "+-*"[rng.integers(3)]
                value = _apply(operator, value, digit)
                if not 0 <= value <= 99:
                    break
                response += f"{operator}{digit}{value:02d}"
            if 10 <= value <= 99:
                question = f"{''.join(map(str, digits))}:{value:02d}"
                return Draw(question, response, f"{sorted(digits)}{value}".encode())


class Sums(Task):
    """Two numbers after worked examples, for pretrained models: ``18 + 46 = 64``, a line each, then ``38 + 40 =``.

    Sums and products with exchanged numbers are in the same split. No example is the question itself, and none is from
    the held-out split.
    """

    name = "sums"

    def __init__(self, options: SumsConfig) -> None:
        self.options = options

    def draw(self, rng: np.random.Generator) -> Draw:
        """One question with its answer."""
        question, value, key = self._draw_one(rng)
        examples: list[tuple[str, int]] = []
        while len(examples) < self.options.shots:
            example, result, example_key = self._draw_one(rng)
            if example_key != key and not _is_held_out(example_key):
                examples.append((example, result))
        if self.options.form == "text":
            lines = [f"{example} {result}\n" for example, result in examples]
            return Draw("".join(lines) + question, f" {value}", key)
        turns = [(example, str(result)) for example, result in examples] + [(question, "")]
        messages = [{"role": role, "content": text} for turn in turns for role, text in zip(_ROLES, turn, strict=True)]
        return Draw(messages[:-1], str(value), key)

    def _draw_one(self, rng: np.random.Generator) -> tuple[str, int, bytes]:
        """A question without examples, its value, and what decides its split."""
        digits, operations = self.options.digits, self.options.operations
        left, right = (int(number) for number in rng.integers(10 ** (digits - 1), 10**digits, 2))
        operator = operations[rng.integers(len(operations))]
        pair = (left, right) if operator == "-" else sorted((left, right))
        return f"{left} {operator} {right} =", _apply(operator, left, right), f"{pair[0]}{operator}{pair[1]}".encode()

    def _encode(self, question: Question, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode(question) if isinstance(question, str) else tokenizer.encode_prompt(question)


_ROLES = ("user", "assistant")


def make_task(source: SourceConfig | SftDataConfig) -> Task:
    """The task that ``task`` names, with its options."""
    return entry(TASKS, str(source.task), "data.task")(source.sums)


TASKS: dict[str, Callable[[SumsConfig], Task]] = {
    "chain": lambda _: Chain(),
    "countdown": lambda _: Countdown(),
    "sums": Sums,
}


def _is_held_out(key: bytes) -> bool:
    return zlib.crc32(key) % 10 == 0


def _apply(operator: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]

"""The toy tasks and their rewards against independent implementations of their definitions."""

import ast
import re
import zlib

import numpy as np
import pytest

from oapl_jax.config.data import DataConfig, SourceConfig, SumsConfig
from oapl_jax.data import tasks
from oapl_jax.data.prompts import load_prompts
from oapl_jax.data.tokenizer import CHARS, CharacterTokenizer
from oapl_jax.rewards import toy

CHARACTERS = CharacterTokenizer()


class Bytes(CharacterTokenizer):
    """A token for each byte; a chat is the list of its messages as Python writes it."""

    def encode(self, text):
        return list(text.encode())

    def encode_prompt(self, question, system=None):
        return self.encode(repr(question))


RAW = Bytes()


def make_task(name: str) -> tasks.Task:
    return tasks.make_task(SourceConfig(task=name))


GRADERS = {"chain": toy.grade_chain, "countdown": toy.grade_countdown}


def naive_chain(question: str) -> str:
    """The running values, by Python's arithmetic on parenthesised prefixes of increasing length."""
    first, *steps = re.findall(r"[-+*]?\d", question)
    values, expression = "", first
    for step in steps:
        expression = f"({expression}{step})"
        values += str(eval(expression) % 10)
    return values


@pytest.mark.parametrize("name", ["chain", "countdown"])
def test_prompts_repeat_and_their_splits_are_disjoint(name):
    task = make_task(name)
    train = [task.prompt(i, "train", 7, CHARACTERS) for i in range(300)]
    held_out = [task.prompt(i, "held_out", 7, CHARACTERS) for i in range(300)]
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert task.prompt(217, "train", 7, CHARACTERS).text == train[217].text
    assert [task.prompt(i, "held_out", 8, CHARACTERS).text for i in range(50)] == [p.text for p in held_out[:50]]
    assert [task.prompt(i, "train", 8, CHARACTERS).text for i in range(50)] != [p.text for p in train[:50]]
    assert train[17].id == f"{name}/train/17"
    assert train[17].token_ids.tolist() == [CHARS.index(c) for c in train[17].text]


def test_splits_are_those_of_the_reference_runs():
    chain, countdown = make_task("chain"), make_task("countdown")
    for split in ("train", "held_out"):
        for i in range(200):
            text = chain.prompt(i, split, 0, CHARACTERS).text
            assert (zlib.crc32(bytes(CHARS.index(c) for c in text)) % 10 == 0) == (split == "held_out")
            digits, target = countdown.prompt(i, split, 0, CHARACTERS).text.split(":")
            key = str(sorted(int(d) for d in digits)) + str(int(target))
            assert (zlib.crc32(key.encode()) % 10 == 0) == (split == "held_out")


@pytest.mark.parametrize(("name", "prompt_tokens", "response_tokens"), [("chain", 12, 6), ("countdown", 7, 14)])
def test_demonstrations_fit_and_are_training_prompts(name, prompt_tokens, response_tokens):
    task = make_task(name)
    longest = 0
    for i in range(500):
        prompt, response = task.demonstration(i, 3, CHARACTERS)
        assert len(prompt.token_ids) == prompt_tokens
        longest = max(longest, len(CHARACTERS.encode(response)) + 1)
        assert task.demonstration(i, 3, CHARACTERS)[1] == response
    assert longest == response_tokens


def test_demonstrations_without_noise_are_right():
    clean_chain = tasks.Chain(noise=0.0)
    for i in range(500):
        prompt, response = clean_chain.demonstration(i, 0, CHARACTERS)
        assert response == naive_chain(prompt.text)
        assert toy.grade_chain(prompt.text, response)
        prompt, response = tasks.Countdown().demonstration(i, 0, CHARACTERS)
        assert toy.grade_countdown(prompt.text, response)


def test_noisy_chain_is_right_as_often_as_its_noise_says():
    task = make_task("chain")
    graded = [toy.grade_chain(p.text, r) for p, r in (task.demonstration(i, 1, CHARACTERS) for i in range(4000))]
    # By simulation of the definition: a replaced digit can be right by luck, and `*0` forgives all that came before.
    assert abs(np.mean(graded) - np.mean(simulated_chains_are_right(40_000))) < 0.03


def simulated_chains_are_right(number: int) -> np.ndarray:
    """Whether noisy chains end as the true ones."""
    rng = np.random.default_rng(5)
    true = noisy = rng.integers(10, size=number)
    for _ in range(5):
        operator, operand = rng.integers(3, size=number), rng.integers(10, size=number)
        true, noisy = (
            np.choose(operator, (value + operand, value - operand, value * operand)) % 10 for value in (true, noisy)
        )
        noisy = np.where(rng.random(number) < 0.35, rng.integers(10, size=number), noisy)
    return true == noisy


def test_chain_reward_looks_at_the_last_value():
    question = "7+5*3-8*4+6="
    assert naive_chain(question) == "26828"
    for right in ("26828", "8", "999998", "$8"):
        assert toy.grade_chain(question, right)
    for wrong in ("", "26827", "26828_", "26828=", "2682"):
        assert not toy.grade_chain(question, wrong)


def test_countdown_reward_checks_every_step():
    for right in ("3*721+425-124", "3+710+414*114"):
        question = "3741:24" if right.endswith("24") else "3741:14"
        assert toy.grade_countdown(question, right)
    question = "3741:24"
    wrong = {
        "empty": "",
        "digit that is not there": "3*721+425-223",
        "digit used twice": "3*721+324",
        "false intermediate": "3*722+426-125",
        "false but meets the target": "3*721+424",
        "other target": "3*721+425",
        "one step": "7-304",
        "too long": "3*721+425-124+024",
        "trailing pad": "3*721+425-124_",
        "one-digit value": "3*721+425-1 4",
        "fullwidth digits": "\uff13*721+425-124",
        "starts elsewhere": "9*327-423-122",
        "unknown operator": "3:721+425-124",
    }
    assert [reason for reason, response in wrong.items() if toy.grade_countdown(question, response)] == []


def test_countdown_targets_have_two_digits_and_negative_values_never_occur():
    task = tasks.Countdown()
    for i in range(500):
        prompt, response = task.demonstration(i, 2, CHARACTERS)
        assert re.fullmatch(r"[1-9]{4}:[1-9][0-9]", prompt.text)
        assert all(0 <= int(value) <= 99 for value in re.findall(r"[-+*]\d(\d\d)", response))
        assert response[-2:] == prompt.text[-2:]


def make_sums(**options) -> tasks.Task:
    return tasks.make_task(SourceConfig(task="sums", sums=SumsConfig(**options)))


def test_sums_are_lines_of_worked_examples_and_a_question():
    task, train, held_out = make_sums(operations=("+", "-"), shots=2), set(), set()
    for questions, split in ((train, "train"), (held_out, "held_out")):
        for i in range(400):
            text = task.prompt(i, split, 0, RAW).text
            *examples, question = text.split("\n")
            assert len(examples) == 2
            for example in examples:
                left, _, value = example.rpartition(" = ")
                assert re.fullmatch(r"[1-9]\d [-+] [1-9]\d", left)
                assert eval(left) == int(value)
            assert re.fullmatch(r"[1-9]\d [-+] [1-9]\d =", question)
            questions.add(canonical(question))
            train |= {canonical(f"{example.rpartition(' = ')[0]} =") for example in examples}
            assert canonical(question) not in [canonical(f"{e.rpartition(' = ')[0]} =") for e in examples]
    assert not train & held_out


def canonical(question: str) -> str:
    left, operator, right, _ = question.split()
    return f"{left} - {right}" if operator == "-" else f"{sorted((left, right))} {operator}"


def test_sums_as_text_are_raw_and_as_chat_have_a_turn_for_each_example():
    prompt = make_sums(shots=1).prompt(0, "train", 0, RAW)
    assert bytes(prompt.token_ids.tolist()).decode() == prompt.text
    prompt = make_sums(shots=1, form="chat").prompt(0, "train", 0, RAW)
    example, value, question = ast.literal_eval(bytes(prompt.token_ids.tolist()).decode())
    assert (example["role"], value["role"], question["role"]) == ("user", "assistant", "user")
    assert value["content"] == str(eval(example["content"].removesuffix(" =")))
    assert prompt.text.endswith(question["content"])


def test_a_limit_that_some_prompts_exceed_is_found_at_the_start():
    data = DataConfig(task="sums", sums=SumsConfig(operations=("-",), shots=1))
    prompts = load_prompts(data, RAW, seed=0)
    lengths = [len(prompts[i].token_ids) for i in range(64)]
    limit = lengths[0]
    assert limit < max(lengths)
    with pytest.raises(ValueError, match=f"over data.max_prompt_tokens={limit}; raise the limit"):
        load_prompts(data.model_copy(update={"max_prompt_tokens": limit}), RAW, seed=0)


@pytest.mark.parametrize("operation", ["+", "-", "*"])
@pytest.mark.parametrize("digits", [1, 5])
@pytest.mark.parametrize("form", ["text", "chat"])
def test_demonstrations_of_sums_are_right_and_near_answers_are_not(operation, digits, form):
    task = make_sums(operations=(operation,), digits=digits, form=form, shots=2)
    for i in range(20):
        for prompt in (task.prompt(i, "held_out", 0, RAW), task.demonstration(i, 0, RAW)[0]):
            *_, question = prompt.text.split("user: ")[-1].split("\n")
            value = eval(question.removesuffix(" ="))
            for right in (f"{value}", f" {value}", f"{value} "):
                assert toy.grade_sums(prompt.text, right)
            near = (
                f"{value + 1}",
                f"{value}.",
                f"={value}",
                f"{value}0",
                f"0{value}",
                "",
                question[:-2],
                f"{value}\n1",
            )
            assert [answer for answer in near if toy.grade_sums(prompt.text, answer)] == []
        assert toy.grade_sums(*(lambda p, r: (p.text, r))(*task.demonstration(i, 0, RAW)))

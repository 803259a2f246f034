"""Published data sets: local samples in their real layouts become prompts, and the graders grade them."""

import base64
import gzip
import json
import pickle
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.data import DataConfig
from oapl_jax.config.reward import RewardConfig
from oapl_jax.data.catalogue import DATASETS
from oapl_jax.data.prompts import held_out, load_prompts
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.rewards.code import layouts, programs
from oapl_jax.rewards.grader import RewardGrader
from oapl_jax.rewards.math import answers
from oapl_jax.rewards.pool import GraderPool
from oapl_jax.rewards.tasks import make_setup
from oapl_jax.types import FinishReason, Verdict


class Words(CharacterTokenizer):
    """A tokenizer with one token per word."""

    def encode_prompt(self, question, system=None):
        return list(range(len(question.split())))


STDIN = {"inputs": ["3\n", "5\n"], "outputs": ["6\n", "10\n"]}
CALL = {"fn_name": "double", "inputs": [[3]], "outputs": [[6]]}
DOUBLE_STDIN = "```python\nprint(2 * int(input()))\n```"
DOUBLE = "```python\ndef double(n):\n    return 2 * n\n```"
PRIVATE = [{"input": "7\n", "output": "14\n", "testtype": "stdin"}]
LCB = {
    "question_title": "Double",
    "question_content": "Print twice the number.",
    "platform": "atcoder",
    "starter_code": "",
    "public_test_cases": json.dumps([{"input": "3\n", "output": "6\n", "testtype": "stdin"}]),
    "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps(PRIVATE)))).decode(),
    "metadata": "{}",
}
APPS = {"problem_id": 0, "question": "Print twice the number.", "solutions": "", "starter_code": "", "difficulty": "x"}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(n):\n    """Twice n."""\n',
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    "entry_point": "double",
}
MBPP = {"task_id": 1, "text": "Write a function.", "code": "", "test_list": ["assert double(3) == 6"]}
ARENA = {"problem_idx": 1, "problem": "What is $2+2$?", "answer": "4", "problem_type": ["Algebra"]}

# Name, rows in the layout of the hub, how many of them have something to be graded by, a right response to the first.
CASES = [
    ("aime2025", [{**ARENA, "answer": 4}], 1, r"\boxed{4}"),
    ("brumo2025", [ARENA], 1, r"\boxed{4}"),
    ("hmmt_feb_2025", [{**ARENA, "answer": r"\frac{1}{2}"}], 1, r"\boxed{0.5}"),
    ("hmmt_nov_2025", [ARENA], 1, r"\boxed{4}"),
    ("math500", [{**ARENA, "subject": "Algebra", "level": 1, "unique_id": "a", "solution": ""}], 1, r"\boxed{4}"),
    ("deepscaler", [{"problem": "What is $2+2$?", "answer": "4", "solution": ""}], 1, r"\boxed{4}"),
    (
        "gsm8k",
        [{"question": "q", "answer": "1,000+1=1,001\n#### 1,001"}, {"question": "q", "answer": "?"}],
        1,
        "#### 1001",
    ),
    ("apps", [{**APPS, "input_output": json.dumps(STDIN)}, {**APPS, "input_output": ""}], 1, DOUBLE_STDIN),
    ("taco", [{**APPS, "input_output": json.dumps(CALL), "starter_code": "def double(n):"}], 1, DOUBLE),
    ("apps_plus", [{"question": "q", "starter_code": "def double(n):", **CALL}], 1, DOUBLE),
    (
        "deepcoder",
        [{"problem": "q", "solutions": [], "tests": json.dumps(STDIN)}, {"problem": "q", "tests": "[]"}],
        1,
        DOUBLE_STDIN,
    ),
    ("livecodebench", [LCB], 1, DOUBLE_STDIN),
    ("humaneval", [HUMAN_EVAL], 1, DOUBLE),
    ("mbpp", [{**MBPP, "test_setup_code": "", "challenge_test_list": []}], 1, DOUBLE),
]


def local_copy(tmp_path, name, rows, suffix):
    path = tmp_path / f"{name}{suffix}"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{k: row.get(k) for k in rows[0]} for row in rows]), path)
    elif suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def load(name, path, **fields):
    return load_prompts(DataConfig(dataset=name, path=path, split="test", **fields), Words(), seed=0)


@pytest.mark.parametrize(("name", "rows", "num_graded", "right"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("suffix", [".jsonl", ".gz", ".parquet"])
def test_a_local_copy_becomes_prompts(tmp_path, name, rows, num_graded, right, suffix):
    source = load(name, local_copy(tmp_path, name, rows, suffix))
    assert len(source) == num_graded
    assert source.num_dropped == len(rows) - num_graded
    prompt = source.items[0]
    assert prompt.id == f"{name}/test/0"
    if DATASETS[name].reward == "math":
        assert r"\boxed{}" in prompt.text
        assert answers.grade_answer(prompt.answer, right).is_correct
    else:
        assert "```" in prompt.text or "code block" in prompt.text
        assert programs.parse_tests(layouts.read_tests(prompt.answer))


@pytest.mark.slow
def test_right_programs_are_correct_and_wrong_ones_wrong(tmp_path):
    reward = RewardConfig(functions={"code": 1.0}, isolation="landlock")
    grader = RewardGrader(GraderPool(1, 1, make_setup(reward, ("code",))), reward)
    try:
        for name, rows, _, right in CASES:
            if DATASETS[name].reward == "code":
                prompt = load(name, local_copy(tmp_path, name, rows, ".jsonl")).items[0]
                responses = [right, right.replace("2 *", "3 *")]
                grades = grader.grade([(prompt, response, FinishReason.STOP) for response in responses])
                assert [grade.verdict for grade in grades] == [Verdict.CORRECT, Verdict.WRONG], (name, grades)
    finally:
        grader.close()


def test_a_template_of_the_config_wins_and_another_layout_is_named(tmp_path):
    path = local_copy(tmp_path, "math500", [ARENA], ".jsonl")
    assert load("math500", path, template="Q: {prompt}").items[0].text == "Q: What is $2+2$?"
    with pytest.raises(ValueError, match="has no column 'question_content'; it has problem_idx"):
        load("livecodebench", path)
    broken = local_copy(tmp_path, "broken", [{"question": "q", "input_output": "{"}], ".jsonl")
    with pytest.raises(ValueError, match=r"row apps/test/0 .*does not have the layout of apps"):
        load("apps", broken)
    empty = local_copy(tmp_path, "empty", [{"question": "q", "input_output": ""}], ".jsonl")
    with pytest.raises(ValueError, match="none of its 1 rows"):
        load("apps", empty)


def test_splits_of_the_hub_are_checked_before_the_network():
    with pytest.raises(ValueError, match="'deepscaler' has no split 'test' on the hub; it has train"):
        load("deepscaler", None)
    with pytest.raises(ValueError, match=r"set data\.path to a local copy"):
        load("apps_plus", None)


def test_training_on_one_data_set_and_evaluating_on_another(tmp_path):
    config = {
        "run": {"dir": "x", "steps": 1},
        "model": {"config": "configs/toy_qwen3.json", "tokenizer": "characters"},
        "data": {"dataset": "deepscaler", "path": local_copy(tmp_path, "deepscaler", CASES[5][1], ".jsonl")},
        "sampler": {"max_response_tokens": 8},
        "evaluation": {"dataset": "math500", "path": local_copy(tmp_path, "math500", CASES[4][1], ".jsonl")},
    }
    assert held_out(TrainConfig.model_validate(config), Words())[0].id == "math500/test/0"
    with pytest.raises(ValueError, match=r"data\.dataset=mbpp is graded by code"):
        config_file.validate(TrainConfig, {**config, "data": {"dataset": "mbpp"}}, "test", CHECKS)
    with pytest.raises(ValueError, match="format: has no effect with dataset=mbpp"):
        DataConfig(dataset="mbpp", format="parquet")


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("gsm8k", "math/gsm8k/test.jsonl", 1319),
        ("math500", "math/math500.jsonl", 500),
        ("humaneval", "code/humaneval/HumanEval.jsonl.gz", 164),
        ("mbpp", "code/mbpp/mbpp.jsonl", 974),
        ("mbpp", "code/mbpp/sanitized-mbpp.json", 427),
    ],
)
def test_the_published_files(shared_data, name, file, count):
    source = load(name, str(shared_data / file), max_prompt_tokens=4096)
    assert (len(source), source.num_dropped) == (count, 0)
    assert all(prompt.answer for prompt in source.items)

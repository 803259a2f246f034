"""Several data sets in one run: their mixture, names, mistakes, and what is said of them."""

import collections
import json

import pytest

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import EvaluateConfig, GenerateConfig, TrainConfig
from oapl_jax.config.config_file import ConfigError, validate
from oapl_jax.config.data import DataConfig
from oapl_jax.data.prompts import describe, held_out, load_prompts
from oapl_jax.data.streams import Made, Mixed
from oapl_jax.data.tokenizer import CharacterTokenizer

CHARACTERS = CharacterTokenizer()
MATH = {"functions": {"math": 1.0}}


@pytest.fixture
def sums(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}=", "answer": 2 * i}) + "\n" for i in range(20)))
    return str(path)


def train(data, evaluation, **sections):
    raw = {
        "run": {"dir": "unused", "steps": 1},
        "model": {"config": "unused", "tokenizer": "characters"},
        "data": {"max_prompt_tokens": 12, **data},
        "sampler": {"max_response_tokens": 6},
        "evaluation": evaluation,
        **sections,
    }
    return validate(TrainConfig, raw, "tests", CHECKS)


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [0.1, 0.2, 0.7], [1e-3, 1, 5, 2.5], [1, 1, 1, 1, 1, 1, 1]])
def test_every_prefix_has_the_weights_and_no_item_is_passed_by(weights):
    streams = {f"s{i}": Made(lambda position, i=i: (i, position)) for i in range(len(weights))}
    mixed = Mixed(streams, {f"s{i}": float(weight) for i, weight in enumerate(weights)})
    seen = collections.Counter()
    for position in range(3000):
        which, index = mixed[position]
        assert index == seen[which], "the next of its own stream"
        seen[which] += 1
        for i, weight in enumerate(weights):
            assert abs(seen[i] - (position + 1) * weight / sum(weights)) <= len(weights)
    assert mixed[10**12] == mixed[10**12]


def test_the_mixture_is_a_function_of_config_and_position(sums):
    config = train(
        {"sets": {"chain": {"task": "chain", "weight": 3}, "sums": {"path": sums}, "more": {"path": sums}}}, {}
    )
    source = load_prompts(config.data, CHARACTERS, seed=5)
    ids = [source[i].id for i in range(200)]
    sampler = validate(TrainConfig, config.model_dump(), "as a detached sampler reads it")
    again = load_prompts(sampler.data, CHARACTERS, seed=5)
    assert [again[i].id for i in (150, 3, 77)] == [ids[i] for i in (150, 3, 77)]
    assert {name: sum(i.startswith(f"{name}/") for i in ids) for name in config.data.sets} == {
        "chain": 120,
        "sums": 40,
        "more": 40,
    }
    mine, others = ([i.partition("/")[2] for i in ids if i.startswith(f"{name}/")] for name in ("sums", "more"))
    assert sorted(mine[:20]) == sorted(others[:20]) == sorted(map(str, range(20)))
    assert mine != others, "an order of its own"
    assert describe(config.data, source) == {
        "chain": "chain task; weight 3, 60.0% of the groups",
        "sums": "20 (0 overlong or without an answer dropped); weight 1, 20.0% of the groups",
        "more": "20 (0 overlong or without an answer dropped); weight 1, 20.0% of the groups",
    }


def test_held_out_sets(sums):
    sets = {"chain": {"task": "chain"}, "easy": {"path": sums, "reward": MATH}}
    config = train({"task": "chain"}, {"prompts": 2, "sets": sets})
    ids = ["evaluation.chain/0", "evaluation.chain/1", "evaluation.easy/0", "evaluation.easy/1"]
    assert [prompt.id for prompt in held_out(config, CHARACTERS)] == ids
    with pytest.raises(ValueError, match=r"evaluation.sets: is missing; name the held-out prompts for data.sets"):
        held_out(train({"sets": {"chain": {"task": "chain"}, "sums": {"path": sums}}}, {}), CHARACTERS)


def test_an_error_names_the_data_set(sums):
    data = {"sets": {"a": {"path": sums}, "b": {"path": sums, "answer_column": "gold"}}, "max_prompt_tokens": 12}
    with pytest.raises(ValueError, match=r"data\.sets\.b: .*row 0: has no column 'gold'; it has prompt, answer"):
        load_prompts(DataConfig.model_validate(data), CHARACTERS, seed=0)


def test_rewards_of_data_sets():
    own, other = {**MATH, "timeout": 3.0}, {**MATH, "timeout": 4.0}
    config = train(
        {"sets": {"a": {"path": "a", "reward": own}, "b": {"path": "b"}, "c": {"task": "chain"}}},
        {"sets": {"a": {"path": "x"}, "b": {"path": "y", "reward": other}, "d": {"path": "z"}}},
        reward={**MATH, "timeout": 9.0},
    )
    found = {name: (source.task, reward.timeout) for name, (source, reward) in config.graded_sets().items()}
    held = {"evaluation.a": (None, 3.0), "evaluation.b": (None, 4.0), "evaluation.d": (None, 9.0)}
    assert found == {"a": (None, 3.0), "b": (None, 9.0), "c": ("chain", 9.0), **held}


GSM8K = {"dataset": "gsm8k", "path": "copy"}


@pytest.mark.parametrize(
    ("data", "evaluation", "told"),
    [
        ({"sets": {"a/b": {"path": "x"}}}, {}, "data.sets: 'a/b' is no name of a data set"),
        ({"sets": {"a": {"path": "x"}}, "template": "{prompt}!"}, {}, "data.template: has no effect with sets"),
        ({"sets": {"a": {}}}, {}, "data.sets.a: give exactly one of task, dataset and path"),
        ({"sets": {"a": {"path": "x", "weight": 0}}}, {}, "data.sets.a.weight: Input should be greater than 0"),
        (
            {"sets": {"a": {"path": "x", "wieght": 1}}},
            {},
            "data.sets.a.wieght: unknown key (value 1); did you mean 'data.sets.a.weight'?",
        ),
        ({"sets": {"a": {"task": "chian"}}}, {}, "data.sets.a.task: unknown name 'chian'; did you mean 'chain'?"),
        (
            {"sets": {"a": {"task": "chain", "reward": {"timeout": 3}}}},
            {},
            "data.sets.a.reward.timeout: has no effect with task=chain",
        ),
        ({"sets": {"a": {"path": "x"}}}, {"path": "y"}, "evaluation.path: has no effect with the section data.sets"),
        (
            {"path": "x"},
            {"path": "y", "sets": {"a": {"path": "z"}}},
            "evaluation.path: has no effect with the section sets",
        ),
        (
            {"path": "x"},
            {"sets": {"a": {"path": "z", "weight": 2}}},
            "evaluation.sets.a.weight: has no effect, every prompt is asked once",
        ),
        (
            {"sets": {"a": {**GSM8K, "reward": {"functions": {"code": 1.0}}}}},
            {},
            "data.sets.a.dataset=gsm8k is graded by math; set data.sets.a.reward.functions={math: 1.0}",
        ),
        (
            {"path": "x"},
            {"sets": {"a": {"dataset": "mbpp"}}},
            "evaluation.sets.a.dataset=mbpp is graded by code; set reward",
        ),
    ],
)
def test_mistakes(data, evaluation, told):
    with pytest.raises(ConfigError) as caught:
        train(data, evaluation)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.strip().startswith(told)


@pytest.mark.parametrize("schema", [GenerateConfig, EvaluateConfig])
def test_weights_have_no_effect_where_every_prompt_is_asked_once(schema):
    raw = {"run": {"dir": "x"}, "model": {"path": "x"}, "sampler": {"max_response_tokens": 6}}
    raw["data"] = {"sets": {"a": {"path": "x", "weight": 2}, "b": {"path": "y"}}}
    with pytest.raises(ConfigError, match=r"data.sets.a.weight: has no effect, every prompt is asked once"):
        validate(schema, raw, "tests", CHECKS)


def test_one_weight_on_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(config_file.to_yaml(train({"sets": {"a": {"task": "chain"}, "b": {"task": "chain"}}}, {})))
    assert config_file.load(TrainConfig, path, ["data.sets.b.weight=2.5"]).data.sets["b"].weight == 2.5

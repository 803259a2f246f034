"""Prompts and pairs from every format, their order, and the error messages for all mistakes."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oapl_jax.config.commands import TrainConfig
from oapl_jax.config.data import DataConfig, SftDataConfig
from oapl_jax.data.pairs import load_pairs
from oapl_jax.data.prompts import held_out, load_prompts
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.rewards.grader import ToyGrader
from oapl_jax.sources.setup import Inputs

CHARACTERS = CharacterTokenizer()
ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(20)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, **fields):
    return load_prompts(DataConfig(path=str(path), **fields), CHARACTERS, seed=0)


def texts_and_answers(source):
    return [(p.text, p.answer) for p in source.items]


EXPECTED = [(row["prompt"], row["answer"]) for row in ROWS]


def test_every_epoch_visits_every_row_in_another_order(tmp_path):
    source = load(write_jsonl(tmp_path / "sums.jsonl", ROWS))
    epochs = [[source[20 * epoch + i].id for i in range(20)] for epoch in range(3)]
    assert len(source) == 20
    assert all(sorted(epoch) == sorted(p.id for p in source.items) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_position_is_the_whole_state(tmp_path):
    path = write_jsonl(tmp_path / "sums.jsonl", ROWS)
    source = load(path)
    walked = [source[position].id for position in range(60)]
    assert [load(path)[position].id for position in (59, 3, 30)] == [walked[59], walked[3], walked[30]]
    other_seed = load_prompts(DataConfig(path=path), CHARACTERS, seed=1)
    assert [other_seed[position].id for position in range(60)] != walked


def test_json_lines_and_arrays(tmp_path):
    lines = tmp_path / "sums.jsonl"
    lines.write_text("\n" + "\n\n".join(json.dumps(row) for row in ROWS))
    source = load(lines)
    assert texts_and_answers(source) == EXPECTED
    assert source.items[17].id == "sums/17"
    assert source.items[17].token_ids.tolist() == CHARACTERS.encode("17+17=")
    array = tmp_path / "sums.json"
    array.write_text(json.dumps(ROWS))
    assert texts_and_answers(load(array)) == EXPECTED


def test_unescaped_unicode_line_ends_stay_in_their_row(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "a\u2028b"}\n', encoding="utf-8")
    assert load(path).items[0].answer == "a\u2028b"


def test_parquet_file_and_folder(tmp_path):
    folder = tmp_path / "sums"
    folder.mkdir()
    for part, rows in enumerate((ROWS[:7], ROWS[7:])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{part:05d}.parquet")
    source = load(folder, format="parquet")
    assert texts_and_answers(source) == EXPECTED
    assert source.items[17].id == "sums/17"
    assert texts_and_answers(load(folder / "train-00000.parquet", format="parquet")) == EXPECTED[:7]


def test_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(tmp_path / "split")
    assert texts_and_answers(load(tmp_path / "one", format="datasets")) == EXPECTED
    test = load(tmp_path / "split", format="datasets", split="test")
    assert texts_and_answers(test) == EXPECTED[:3]
    assert test.items[2].id == "split/test/2"
    with pytest.raises(ValueError, match=r"has no split 'tset'; it has train, test; did you mean 'test'\?"):
        load(tmp_path / "split", format="datasets", split="tset")
    with pytest.raises(ValueError, match="has no column 'question'; it has prompt, answer"):
        load(tmp_path / "one", format="datasets", prompt_column="question")


def test_datasets_folder_of_files(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    assert texts_and_answers(load(folder, format="datasets")) == EXPECTED


def test_tfds_folder_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Sums(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"prompt": text, "answer": text})
            )

        def _split_generators(self, _):
            return {"train": enumerate(ROWS)}

        def _generate_examples(self):
            yield from ()

    Sums(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    had_tensorflow = "tensorflow" in sys.modules
    source = load(tmp_path, format="tfds")
    assert sorted(texts_and_answers(source)) == sorted(EXPECTED)
    assert source.items[4].id == "sums/train/4"
    assert len(load(tmp_path, format="tfds", split="train[:5]")) == 5
    assert ("tensorflow" in sys.modules) == had_tensorflow
    with pytest.raises(ValueError, match="has no split 'trian'; it has train; did you mean 'train'"):
        load(tmp_path, format="tfds", split="trian")


def test_template_keeps_the_braces_of_latex(tmp_path):
    path = write_jsonl(tmp_path / "sums.jsonl", ROWS[:1])

    class Loud(CharacterTokenizer):
        def encode_prompt(self, question, system=None):
            return [len(question)]

    data = DataConfig(path=path, template=r"{prompt} in \boxed{}")
    assert load_prompts(data, Loud(), seed=0).items[0].text == r"0+0= in \boxed{}"
    with pytest.raises(ValueError, match=r"data.template='Solve\.': lacks \{prompt\}"):
        load(path, template="Solve.")


def test_overlong_prompts_are_dropped_and_counted_or_an_error(tmp_path):
    path = write_jsonl(tmp_path / "sums.jsonl", ROWS)
    source = load(path, max_prompt_tokens=4)
    assert (len(source), source.num_dropped) == (10, 10)
    with pytest.raises(
        ValueError, match=r"row sums/10: its prompt has 6 tokens, over data.max_prompt_tokens=4 \(10 such"
    ):
        load(path, max_prompt_tokens=4, overlong="error")
    with pytest.raises(ValueError, match=r"all 20 prompts exceed data.max_prompt_tokens=3; the shortest has 4"):
        load(path, max_prompt_tokens=3)
    with pytest.raises(ValueError, match=r"prompt chain/train/0 has 12 tokens, over data.max_prompt_tokens=11"):
        load_prompts(DataConfig(task="chain", max_prompt_tokens=11), CHARACTERS, seed=0)


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    path = write_jsonl(tmp_path / "sums.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"sms.jsonl' does not exist; did you mean 'sums.jsonl'\?"):
        load(tmp_path / "sms.jsonl")
    with pytest.raises(ValueError, match=r"its folder .* does not exist either"):
        load(tmp_path / "no" / "sums.jsonl")
    with pytest.raises(
        ValueError, match=r"row 0: has no column 'answr'; it has prompt, answer; did you mean 'answer'\?"
    ):
        load(path, answer_column="answr")
    with pytest.raises(ValueError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl': has no rows"):
        load(tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "1", "answer": "1"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"broken.jsonl line 2: is not JSON"):
        load(tmp_path / "broken.jsonl")
    (tmp_path / "words.jsonl").write_text('"one"\n')
    with pytest.raises(ValueError, match="row 0: is str, not an object"):
        load(tmp_path / "words.jsonl")
    with pytest.raises(ValueError, match="is not a readable Parquet file"):
        load(path, format="parquet")
    with pytest.raises(ValueError, match=r"the folder contains no \*.parquet file"):
        load(tmp_path, format="parquet")


def test_cells_must_be_text(tmp_path):
    rows = [*ROWS[:2], {"prompt": None, "answer": "1"}]
    with pytest.raises(ValueError, match=r"row cells/2: column 'prompt' is None \(NoneType\), not a string"):
        load(write_jsonl(tmp_path / "cells.jsonl", rows))
    rows = [{"prompt": "1", "answer": ["1"]}]
    with pytest.raises(ValueError, match=r"row cells/0: column 'answer' is \['1'\] \(list\), not a string"):
        load(write_jsonl(tmp_path / "cells.jsonl", rows))
    assert load(write_jsonl(tmp_path / "cells.jsonl", [{"prompt": "1", "answer": 17}])).items[0].answer == "17"


def test_a_prompt_without_tokens_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"row cells/1: its prompt has no tokens"):
        load(write_jsonl(tmp_path / "cells.jsonl", [ROWS[0], {"prompt": "", "answer": "1"}]))


def train_config(data, **evaluation):
    return TrainConfig.model_validate(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {"config": "unused", "tokenizer": "characters"},
            "data": data,
            "sampler": {"max_response_tokens": 6},
            "evaluation": evaluation,
        }
    )


def test_held_out_prompts_come_first_to_last(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    test = write_jsonl(tmp_path / "test.jsonl", ROWS[::-1])
    config = train_config({"path": train}, path=test, prompts=3)
    assert [p.text for p in held_out(config, CHARACTERS)] == ["19+19=", "18+18=", "17+17="]
    assert len(held_out(train_config({"path": train}, path=test), CHARACTERS)) == 20
    with pytest.raises(ValueError, match=r"evaluation.path: is missing; set it to the held-out prompts for"):
        held_out(train_config({"path": train}), CHARACTERS)


def test_held_out_rows_that_are_dropped_are_counted_and_said(tmp_path):
    rows = write_jsonl(tmp_path / "sums.jsonl", ROWS)
    config = train_config({"path": rows, "max_prompt_tokens": 4}, path=rows, prompts=3)
    found = held_out(config, CHARACTERS)
    assert (len(found), found.dropped) == (3, {"": 10})
    inputs = Inputs(CHARACTERS, load_prompts(config.data, CHARACTERS, seed=0), found, ToyGrader("chain"))
    assert inputs.describe(config)["held out"] == "3 (10 overlong or without an answer dropped)"
    sets = train_config({"task": "chain", "max_prompt_tokens": 4}, sets={"sums": {"path": rows}}, prompts=20)
    assert held_out(sets, CHARACTERS).dropped == {"sums": 10}


def test_tasks_have_endless_prompts_and_the_same_held_out_ones_for_every_seed():
    config = train_config({"task": "chain"}, prompts=5)
    source = load_prompts(config.data, CHARACTERS, seed=0)
    assert source[123_456].text == source[123_456].text != source[123_457].text
    reseeded = config.model_copy(update={"run": config.run.model_copy(update={"seed": 9})})
    assert [p.text for p in held_out(config, CHARACTERS)] == [p.text for p in held_out(reseeded, CHARACTERS)]


def test_pairs_end_with_the_stop_token(tmp_path):
    rows = [{"prompt": f"{i}=", "response": f"{i}:{i}"} for i in range(12)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    source = load_pairs(SftDataConfig(path=path), CHARACTERS, seed=0)
    seen = {CHARACTERS.decode(source[i].prompt_ids) for i in range(12)}
    assert seen == {row["prompt"] for row in rows}
    prompt_ids, response_ids = source[4]
    text = CHARACTERS.decode(prompt_ids)[:-1]
    assert response_ids.tolist() == [*CHARACTERS.encode(f"{text}:{text}"), CHARACTERS.eos_id]
    np.testing.assert_array_equal(
        load_pairs(SftDataConfig(path=path), CHARACTERS, seed=0)[40].response_ids, source[40].response_ids
    )
    task_pair = load_pairs(SftDataConfig(task="chain"), CHARACTERS, seed=0)[3]
    assert (len(task_pair.prompt_ids), len(task_pair.response_ids), task_pair.response_ids[-1]) == (12, 6, 1)


def test_overlong_pairs(tmp_path):
    rows = [{"prompt": "1=", "response": "1" * length} for length in (1, 5, 9)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    source = load_pairs(SftDataConfig(path=path, max_response_tokens=6), CHARACTERS, seed=0)
    assert (len(source), source.num_dropped) == (2, 1)
    with pytest.raises(ValueError, match="row pairs/2: its response has 10 tokens with the stop token, over"):
        load_pairs(SftDataConfig(path=path, max_response_tokens=6, overlong="error"), CHARACTERS, seed=0)
    with pytest.raises(ValueError, match="all 3 rows exceed"):
        load_pairs(SftDataConfig(path=path, max_response_tokens=1), CHARACTERS, seed=0)


def test_gsm8k(shared_data):
    class Words(CharacterTokenizer):
        def encode_prompt(self, question, system=None):
            return [0] * len(question.split())

    path = str(shared_data / "math" / "gsm8k" / "train.jsonl")
    source = load_prompts(DataConfig(path=path, prompt_column="question"), Words(), seed=0)
    assert (len(source), source.num_dropped) == (7473, 0)
    assert source.items[17].id == "gsm8k/train/17"
    assert source.items[0].text.startswith("Natalia sold clips to 48")
    assert source.items[0].answer.endswith("#### 72")

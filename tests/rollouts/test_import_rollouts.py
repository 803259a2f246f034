"""Rollouts from outside: the two layouts there and back, and rows that cannot be used."""

import base64
import dataclasses
import json
import math
import pathlib
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import groups
from oapl_jax.rewards.code import layouts
from oapl_jax.rollouts import import_rollouts, published, schema
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.types import FinishReason, Prompt, RolloutGroup, Verdict

EOS = 1
EXPECTATIONS = import_rollouts.Expectations(
    vocab_size=40,
    reward_range=(-1.0, 1.0),
    encode_prompt=lambda question, system: [2 + ord(letter) % 30 for letter in question],
    encode_response=lambda text: [2 + ord(letter) % 30 for letter in text],
    eos_id=EOS,
    source_limit=9,
    group_size=4,
)


def make_group(index: int, answer: str = "", size: int = 4) -> RolloutGroup:
    rng = np.random.default_rng(index)
    items = [groups.rollout(rng, 2 + i, Verdict.CORRECT if i % 2 else Verdict.WRONG, 0.5 - i % 2) for i in range(size)]
    items[0] = dataclasses.replace(items[0], extra=f'{{"number": {index}}}')
    question = groups.prompt(index)
    return RolloutGroup(
        index, 0, Prompt(question.id, question.token_ids, question.text, answer or str(index)), tuple(items), 0.5
    )


GROUPS = [make_group(i) for i in range(6)]


def facts(found: list[import_rollouts.Responses]) -> list[tuple]:
    """What training uses of each row."""
    return sorted(
        (
            responses.prompt.id,
            responses.prompt.token_ids.tobytes(),
            responses.prompt.text,
            responses.prompt.answer,
            item.text,
            item.rollout.token_ids.tobytes(),
            item.rollout.logprobs.tobytes(),
            item.rollout.finish_reason,
            item.grade.verdict,
            item.grade.reward,
            item.grade.detail,
            item.extra,
        )
        for responses in found
        for item in responses.members
    )


def facts_of(source: list[RolloutGroup]) -> list[tuple]:
    return facts([import_rollouts.Responses(group.prompt, list(group.rollouts)) for group in source])


def read(path, action="error", expectations=EXPECTATIONS):
    bad = import_rollouts.BadRows(action)
    return import_rollouts.read(path, expectations, bad), bad.counts


def test_a_rollout_log_comes_in_whole(tmp_path):
    log = RolloutLog(tmp_path)
    log.append(GROUPS[:4])
    log.append(GROUPS[4:])
    found, counts = read(tmp_path)
    assert facts(found) == facts_of(GROUPS)
    assert [responses.prompt.id for responses in found] == [group.prompt.id for group in GROUPS]
    assert not counts


def test_there_and_back_through_the_published_layout_keeps_everything(tmp_path):
    tests = json.dumps([{"input": "1\n", "output": "é", "testtype": "stdin_stdout"}])
    source = [*GROUPS, make_group(6, answer=tests), make_group(7, answer="eJ is a gold answer")]
    published.write(tmp_path / "data.parquet", source)
    assert pq.read_metadata(tmp_path / "data.parquet").num_rows == 32
    found, counts = read(tmp_path / "data.parquet")
    assert facts(found) == facts_of(source)
    assert not counts
    assert layouts.read_tests(found[6].prompt.answer) == [{"stdin": "1\n", "stdout": "é"}]


def test_the_published_layout_is_what_the_authors_programs_read(tmp_path):
    """Columns and rules of their generate_offline_dataset.py, rl_dataset.py and offline_dataset_passatk.py."""
    tests = json.dumps([{"input": "1", "output": "2", "testtype": "stdin_stdout"}])
    published.write(tmp_path / "data.parquet", [make_group(0, answer=tests), make_group(1)])
    rows = pq.read_table(tmp_path / "data.parquet").to_pylist()
    assert len(rows) == 8
    for row in rows:
        assert [message["role"] for message in row["prompt"]] == ["user"]
        siblings = [other for other in rows if other["prompt"] == row["prompt"]]
        assert row["response_rewards"] == [other["precomputed_reward"] for other in siblings]
        assert isinstance(row["response"], str)
        assert isinstance(row["extra_info"]["index"], int)
        assert row["reward_model"]["style"] == "rule"
        assert {"data_source", "ability", "response_token_ids"} <= set(row)
    packed = zlib.decompress(base64.b64decode(rows[0]["reward_model"]["ground_truth"]))
    assert packed[:1] == b"\x80", "a pickle"
    assert layouts.unpack(rows[0]["reward_model"]["ground_truth"]) == tests
    assert rows[4]["reward_model"]["ground_truth"] == "1", "an answer that is no JSON stays plain"


AUTHORS = pa.schema(
    [
        pa.field("data_source", pa.string()),
        pa.field("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        pa.field("ability", pa.string()),
        pa.field("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        pa.field("extra_info", pa.struct([("index", pa.int64()), ("split", pa.string())])),
        pa.field("response", pa.string()),
        pa.field("precomputed_reward", pa.float64()),
        pa.field("response_rewards", pa.list_(pa.float64())),
    ]
)


def authors_row(index=0, response="short", reward=1.0, rewards=(1.0, 0.0), truth=None):
    return {
        "data_source": "path/to/train.parquet",
        "prompt": [{"content": f"question {index}", "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": layouts.pack("[]") if truth is None else truth, "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
        "response": response,
        "precomputed_reward": reward,
        "response_rewards": list(rewards),
    }


def write_authors(path, rows):
    pq.write_table(pa.Table.from_pylist(rows, schema=AUTHORS), path)
    return path


def test_the_authors_own_files_have_text_only(tmp_path):
    rows = [authors_row(), authors_row(response="far too long", reward=0.0)]
    ((responses,), counts) = read(write_authors(tmp_path / "train.parquet", rows))
    assert not counts
    assert responses.prompt.text == "question 0"
    assert responses.prompt.answer == "[]"
    short, long = responses.members
    assert short.rollout.token_ids.tolist() == [*EXPECTATIONS.encode_response("short"), EOS]
    assert short.rollout.finish_reason is FinishReason.STOP
    assert np.isnan(short.rollout.logprobs).all()
    assert (short.grade.verdict, long.grade.verdict) == (Verdict.CORRECT, Verdict.WRONG)
    assert long.rollout.token_ids.tolist() == EXPECTATIONS.encode_response("far too long")
    assert long.rollout.finish_reason is FinishReason.LENGTH, "as long as source_limit: it was cut"


def test_a_hostile_ground_truth_is_an_error_that_names_the_row(tmp_path):
    hostile = base64.b64encode(zlib.compress(f"cos\nsystem\n(Vtouch {tmp_path / 'ran'}\ntR.".encode())).decode()
    rows = [authors_row(0), authors_row(0, "other", 0.0), authors_row(1, truth=hostile), authors_row(1, "b", 0.0)]
    path = write_authors(tmp_path / "train.parquet", rows)
    with pytest.raises(
        ValueError, match=r"train\.parquet row 2: reward_model\.ground_truth is refused: its pickle has GLOBAL"
    ):
        read(path)
    found, counts = read(path, "drop")
    assert sum(len(responses.members) for responses in found) == 3
    assert counts["unreadable ground truth"] == 1
    assert not (tmp_path / "ran").exists()


def log_table(source=GROUPS):
    return schema.to_table(source)


def with_cell(table, column, row, value):
    """One cell changed, in the column's own type."""
    cells = table.column(column).to_pylist()
    cells[row] = value
    field = table.schema.field(column).with_nullable(True)
    return table.set_column(table.schema.get_field_index(column), field, pa.array(cells, field.type))


BAD_CELLS = {
    "empty response": ("token_ids", []),
    "empty prompt": ("prompt_token_ids", []),
    "unknown token": ("token_ids", [3, 40, 2]),
    "negative token": ("token_ids", [3, -1, 2]),
    "null in the tokens": ("token_ids", [3, None]),
    "reward is NaN": ("reward", math.nan),
    "reward is infinite": ("reward", math.inf),
    "reward is null": ("reward", None),
    "reward is out of range": ("reward", 7.0),
    "null text": ("response", None),
    "null tokens": ("token_ids", None),
    "unknown verdict": ("verdict", "maybe"),
    "unknown end": ("finish_reason", "bored"),
    "too few log-probabilities": ("logprobs", [-1.0]),
    "a log-probability is NaN": ("logprobs", [math.nan, -1.0, -1.0]),
    "a log-probability is above 0": ("logprobs", [0.5, -1.0, -1.0]),
    "another prompt": ("prompt_token_ids", [9, 9]),
    "doubled index": ("rollout_index", 0),
    "extra is no object": ("extra", "[1]"),
    "extra is no JSON": ("extra", "{"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_a_bad_cell_is_an_error_that_names_the_row_or_costs_that_row_only(tmp_path, name):
    column, value = BAD_CELLS[name]
    path = tmp_path / "part-000000.parquet"
    pq.write_table(with_cell(log_table(), column, 5, value), path)
    with pytest.raises(ValueError, match=r"part-000000\.parquet row \d+: .*offline\.bad_rows=drop"):
        read(path)
    found, counts = read(path, "drop")
    good = [row for i, row in enumerate(facts_in_order()) if i != 5]
    assert facts(found) == sorted(good)
    assert sum(counts.values()) - counts["unequal groups"] == 1


def facts_in_order():
    """Of each row of the log, in its order."""
    alone = [RolloutGroup(group.index, 0, group.prompt, (item,), 0.5) for group in GROUPS for item in group.rollouts]
    return [facts_of([group])[0] for group in alone]


def test_missing_log_probabilities_are_no_fault(tmp_path):
    table = log_table()
    pq.write_table(table.drop_columns(["logprobs"]), tmp_path / "without.parquet")
    found, counts = read(tmp_path / "without.parquet")
    assert not counts
    assert all(np.isnan(item.rollout.logprobs).all() for responses in found for item in responses.members)


def test_missing_optional_columns_have_their_defaults_and_unknown_ones_are_ignored(tmp_path):
    optional = [name for name, column in schema.COLUMNS.items() if not column.is_required]
    table = log_table().drop_columns([*optional, "group_index", "policy_version"])
    pq.write_table(table.append_column("later", pa.array([{"a": 1}] * 24)), tmp_path / "part.parquet")
    found, counts = read(tmp_path / "part.parquet")
    assert not counts
    texts = {(responses.prompt.text, item.text, item.extra) for responses in found for item in responses.members}
    assert texts == {("", "", "{}")}


def test_a_log_of_schema_1_comes_in(tmp_path):
    found, counts = read(pathlib.Path(__file__).parent / "fixtures" / "schema_1", "drop")
    assert [len(responses.members) for responses in found] == [2, 2]
    assert counts == {"no verdict": 2}


def test_an_invalid_verdict_is_left_out_and_no_error(tmp_path):
    table = with_cell(with_cell(log_table(), "verdict", 2, "invalid"), "reward", 2, None)
    pq.write_table(table, tmp_path / "part.parquet")
    found, counts = read(tmp_path / "part.parquet", "drop")
    assert sum(len(responses.members) for responses in found) == 23
    assert counts["no verdict"] == 1


def test_groups_of_unequal_size_are_an_error_or_used_as_they_are(tmp_path):
    path = tmp_path / "part.parquet"
    pq.write_table(log_table().filter(np.arange(24) != 9), path)
    with pytest.raises(ValueError, match="its group has 3 rows, most have 4"):
        read(path)
    found, counts = read(path, "drop")
    assert sorted(len(responses.members) for responses in found) == [3, 4, 4, 4, 4, 4]
    assert counts == {"unequal groups": 1}
    rows = [authors_row(i, name, reward) for i in range(2) for name, reward in (("a", 1.0), ("b", 0.0))]
    with pytest.raises(ValueError, match="response_rewards"):
        read(write_authors(tmp_path / "train.parquet", rows[:-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["reward"]), "has no column 'reward'"),
        (lambda t: t.drop_columns(["group_id"]), "has no column 'response_rewards'|has no column 'precomputed_reward'"),
        (lambda t: with_type(t, "token_ids", pa.list_(pa.string())), "column 'token_ids' is list"),
        (lambda t: with_type(t, "reward", pa.string()), "column 'reward' is string, not a number"),
        (lambda t: with_type(t, "verdict", pa.int64()), "column 'verdict' is int64, not text"),
        (lambda t: t.replace_schema_metadata({"oapl_jax.schema_version": "7"}), "schema version 7, .* up to 2; update"),
    ],
)
def test_a_file_of_another_schema_is_named(tmp_path, change, message):
    pq.write_table(change(log_table()), tmp_path / "part.parquet")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "part.parquet")
    found, counts = read(tmp_path / "part.parquet", "drop")
    assert not found
    assert sum(counts.values()) == 24


def with_type(table, column, kind):
    index = table.schema.get_field_index(column)
    return table.set_column(index, pa.field(column, kind), pa.nulls(len(table), kind))


def test_a_truncated_file_is_named_and_the_others_are_read(tmp_path):
    log = RolloutLog(tmp_path)
    whole, torn = pathlib.Path(str(log.append(GROUPS[:3]))), pathlib.Path(str(log.append(GROUPS[3:])))
    torn.write_bytes(torn.read_bytes()[:-50])
    assert whole.exists()
    with pytest.raises(ValueError, match=r"part-000001\.parquet: is not a readable Parquet file"):
        read(tmp_path)
    found, counts = read(tmp_path, "drop")
    assert facts(found) == facts_of(GROUPS[:3])
    assert counts == {"unreadable file": 1}


@pytest.mark.parametrize(
    ("drawn", "wanted", "problem"),
    [
        ({"temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6}, None),
        ({"temperature": 0.6}, {}, r"drawn at temperature 0\.6, and sampler\.temperature is 1;"),
        ({"temperature": 1.0}, {"stop_strings": ("\n",)}, None),  # a log that does not say it
        ({"stop_strings": ["\n", "Q:"]}, {"stop_strings": ("\n", "Q:")}, None),
        ({"stop_strings": []}, {"stop_strings": ("\n",)}, r"stop_strings \[\], and sampler\.stop_strings is \['\\n'\]"),
        ({"stop_strings": ["\n"]}, {}, r"stop_strings \['\\n'\], and sampler\.stop_strings is \[\]"),
        ({"stop_token_ids": [7]}, {"stop_token_ids": (8,)}, r"stop_token_ids \[7\], and"),
        ({"stop_strings": [1, "a", None]}, {}, "stop_strings"),
        ({"stop_strings": "x"}, {}, "stop_strings"),
        ({"temperature": [1.0]}, {}, "temperature"),
    ],
)
def test_data_of_another_distribution_are_refused(tmp_path, drawn, wanted, problem):
    RolloutLog(tmp_path, drawn).append(GROUPS)
    assert facts(read(tmp_path)[0]) == facts_of(GROUPS)
    expectations = dataclasses.replace(EXPECTATIONS, distribution=SamplingDistribution(**wanted))
    if problem is None:
        assert facts(read(tmp_path, expectations=expectations)[0]) == facts_of(GROUPS)
        return
    with pytest.raises(ValueError, match=problem):
        read(tmp_path, "drop", expectations)


def test_too_large_groups_and_nothing_at_all_are_said(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "none")
    with pytest.raises(ValueError, match="has no Parquet or JSONL file"):
        read(tmp_path)
    pq.write_table(log_table([make_group(0, size=5)]), tmp_path / "part.parquet")
    with pytest.raises(ValueError, match=r"5 responses and sampler\.group_size=4; set sampler\.group_size=5"):
        read(tmp_path / "part.parquet")


def mutated(rng: np.random.Generator, path: pathlib.Path, layout: str) -> tuple[str, set[int]]:
    """Writes a damaged file of either layout; returns what was done, and the rows that are good all the same."""
    if layout == "log":
        table = log_table()
    else:
        published.write(path, GROUPS)
        table = pq.read_table(path)
    kind = str(rng.choice(["cell", "cell", "cell", "column", "type", "cut", "flip", "rows"]))
    good = set(range(24))
    if kind == "cell":
        for row in rng.choice(24, rng.integers(1, 4), replace=False).tolist():
            table = with_cell(table, str(rng.choice(table.schema.names)), row, None)
            good.discard(row)
    elif kind == "column":
        name = str(rng.choice(table.schema.names))
        kind, table = f"column {name}", table.drop_columns([name])
    elif kind == "type":
        table = with_type(table, str(rng.choice(table.schema.names)), rng.choice([pa.int8(), pa.string(), pa.bool_()]))
        good = set()  # all of them have a null there
    elif kind == "rows":
        good = set(np.flatnonzero(rng.random(24) < 0.8).tolist())
        table = table.take(sorted(good))
    pq.write_table(table, path, write_page_checksum=True, compression="zstd")
    content = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(content[: rng.integers(len(content))])
    elif kind == "flip":
        for place in rng.integers(0, len(content), rng.integers(1, 6)):
            content[place] ^= 1 << rng.integers(8)
        path.write_bytes(content)
    return kind, good


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["log", "published"])
def test_a_hundred_mutated_files_raise_nothing_and_lose_no_good_row(tmp_path, layout):
    """Each good row comes out as it was, or its whole file is counted as unreadable or of another schema."""
    everything, of_whole_files = (
        facts_in_order(),
        {"unreadable file", "missing column", "wrong type", "wrong schema version"},
    )
    num_bad = 0
    for seed in range(100):
        path = tmp_path / f"{seed}.parquet"
        kind, good = mutated(np.random.default_rng(seed), path, layout)
        found, counts = read(path, "drop")
        num_bad += bool(counts)
        if counts:
            with pytest.raises(ValueError, match=r"offline\.bad_rows=drop"):
                read(path, "error")
        if of_whole_files & set(counts):
            assert not found, f"seed {seed}"
            continue
        # Without its tokens a row of the published layout has those of its text, without its name a prompt has another.
        kept = (2, 4, 8, 9) if kind.startswith("column") else range(12)
        kept = [i for i in kept if i != {"column prompt": 2, "column response": 4}.get(kind)]  # these have defaults
        got = {tuple(row[i] for i in kept) for row in facts(found)}
        assert got >= {tuple(everything[row][i] for i in kept) for row in good}, f"seed {seed}, {kind}: {counts}"
        assert len(facts(found)) >= len(good)
    assert num_bad > 50

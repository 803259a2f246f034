"""Logs of other programs: an older schema, a newer one, missing columns and unknown ones."""

import dataclasses
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oapl_jax.evaluation import tally
from oapl_jax.rollouts import schema
from oapl_jax.rollouts.log import RolloutLog
from rollouts.groups import bits, group

# Written by commit 29ded25, in a checkout of it with tests/ on the path:
#     log = RolloutLog(pathlib.Path("schema_1"), {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
#     log.append([group(0, 3), group(1, 3, is_usable=False), group(2, 3)])
SCHEMA_1 = pathlib.Path(__file__).parent / "fixtures" / "schema_1"
GROUPS_1 = [group(0, 3), group(1, 3, is_usable=False), group(2, 3)]


def test_a_log_of_schema_1_is_read_bit_for_bit():
    log = RolloutLog(SCHEMA_1)
    table = pq.ParquetFile(log.path(3, 0)).read()
    assert table.schema.metadata[schema.VERSION_KEY] == b"1"
    assert "extra" not in table.column_names
    read = log.read(3)
    assert [bits(item) for item in read] == [bits(item) for item in GROUPS_1]
    assert {rollout.extra for item in read for rollout in item.rollouts} == {"{}"}
    assert schema.sampling_of(table.schema) == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def test_a_log_of_schema_1_is_counted_and_evaluated():
    assert RolloutLog(SCHEMA_1).count(3)["rollouts"] == 6
    (found,) = tally.read(SCHEMA_1, 3)
    assert (found.benchmark, found.verdicts) == ("test", {"correct": 2, "wrong": 2, "invalid": 2})


def test_a_file_of_a_newer_schema_is_refused_with_both_versions_and_the_way_out(tmp_path):
    path = RolloutLog(tmp_path).append([group(0)])
    newer = schema.SCHEMA_VERSION + 1
    table = pq.ParquetFile(path).read().replace_schema_metadata({schema.VERSION_KEY: str(newer)})
    pq.write_table(table, path)
    told = (
        rf"part-000000\.parquet: is a rollout log of schema version {newer}, and this program reads versions up to 2;"
    )
    for read in (lambda log: log.read(0), lambda log: log.read_columns(0, 0, ["prompt_id"])):
        with pytest.raises(ValueError, match=told + " update oapl_jax to the release that wrote it$"):
            read(RolloutLog(tmp_path))


@pytest.mark.parametrize("name", schema.COLUMNS)
def test_a_column_that_a_file_lacks_has_its_default_or_is_named(name):
    table, column = schema.to_table(GROUPS_1).drop_columns([name]), schema.COLUMNS[name]
    if column.is_required:
        with pytest.raises(ValueError, match=rf"^part: is no rollout log: it has no column {name} "):
            schema.from_table(table, "part")
    else:
        read = schema.to_table(schema.from_table(table, "part"))
        assert read[name].to_pylist() == [column.default] * 6
        assert read.drop_columns([name]).equals(table)


def test_columns_that_are_not_known_are_ignored_and_stay_in_the_file(tmp_path):
    log = RolloutLog(tmp_path)
    path = log.append(GROUPS_1)
    table = pq.ParquetFile(path).read()
    for name in ("later", "nested"):
        table = table.add_column(0, name, pa.array([{"a": [name]}] * 6))
    pq.write_table(table, path)
    before = pathlib.Path(path).read_bytes()
    assert [bits(item) for item in log.read(3)] == [bits(item) for item in GROUPS_1]
    assert tally.read(tmp_path, 3)
    log.append([group(5, 3)])
    assert pathlib.Path(path).read_bytes() == before


def test_extra_comes_back_as_it_was(tmp_path):
    extras = ['{"v_star": 0.30000000000000004}', "{}"]
    rollouts = tuple(dataclasses.replace(r, extra=e) for r, e in zip(group(0).rollouts, extras, strict=True))
    RolloutLog(tmp_path).append([dataclasses.replace(group(0), rollouts=rollouts)])
    (read,) = RolloutLog(tmp_path).read(0)
    assert [item.extra for item in read.rollouts] == extras


def test_a_column_is_filled_where_nothing_else_is_read():
    table = RolloutLog(SCHEMA_1).read_columns(3, 0, ["extra"])
    assert table.to_pydict() == {"extra": ["{}"] * 6}

"""What a sampler writes never ends the trainer: what is not a shard of the run is put aside, and the run goes on."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.data.prompts import load_prompts
from oapl_jax.io.lease import Leases
from oapl_jax.rollouts import schema
from oapl_jax.rollouts.buffer import GroupBuffer, Ticket, Window
from oapl_jax.rollouts.checks import GroupCheck, ShardCheck
from oapl_jax.rollouts.log import BatchRecord, RolloutLog, digest
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.rollouts.source import Weights
from oapl_jax.rollouts.stops import Stops
from oapl_jax.sources.follower import LogFollower
from oapl_jax.types import FinishReason, Grade, GradedRollout, Rollout, Verdict
from rollouts.groups import GRADING
from sources.loops import TOKENIZER

SIZE, VERSION, SAMPLING = 2, 3, {"temperature": 1.0, "top_k": 0}
WINDOW = Window(VERSION, 100, 6)
RAW = {
    "run": {"dir": "unused", "steps": 100},
    "model": {"config": "unused.json", "tokenizer": "characters"},
    "data": {"task": "chain", "max_prompt_tokens": 12},
    "sampler": {"group_size": 3, "max_response_tokens": 5, "stop_strings": [":,"]},
    "learner": {"batch_rollouts": 6},
    "mode": "detached",
    "window": {"shard_groups": SIZE, "deadline": 20.0},
}
CONFIG = config_file.validate(TrainConfig, RAW, "test", CHECKS)
PROMPTS = load_prompts(CONFIG.data, TOKENIZER, CONFIG.run.seed)
STOPS = Stops(TOKENIZER, SamplingDistribution.of(CONFIG.sampler))


def make_group(index, *, version=VERSION, seed=0):
    """A group as a sampler makes it: the run's prompt, three responses, of which one is correct."""
    rng = np.random.default_rng((index, seed))
    members = []
    for verdict in (Verdict.CORRECT, Verdict.WRONG, Verdict.WRONG):
        tokens, logprobs = rng.integers(2, 16, 4).astype(np.int32), np.log(rng.uniform(size=4)).astype(np.float32)
        tokens[-1] = TOKENIZER.eos_id
        grade = Grade(verdict, float(verdict is Verdict.CORRECT))
        members.append(GradedRollout(Rollout(tokens, logprobs, FinishReason.STOP), "text", grade))
    return GRADING.group(Ticket(version, index, index), PROMPTS[WINDOW.position(index)], members)


def shard(number, **options):
    return [make_group(index, **options) for index in range(number * SIZE, (number + 1) * SIZE)]


class Nobody:
    """Samplers that are no processes: a test writes the log."""

    def __init__(self, is_published=False):
        self._num_bytes = 10 * is_published

    def open_window(self, window, weights):
        return {"sync/publish_bytes": self._num_bytes}

    def tidy(self):
        pass

    def finish(self):
        pass


@contextlib.contextmanager
def follower(directory, notes, *, record=None, samplers=None):
    log = RolloutLog(directory / "rollouts", SAMPLING)
    check = ShardCheck(GroupCheck(CONFIG, STOPS, GRADING.advantages, record), PROMPTS)
    buffer = GroupBuffer(lambda group: len(group.usable) >= 2)
    source = LogFollower(directory, log, buffer, samplers or Nobody(), check, notes.append)
    with contextlib.closing(source):
        yield source, log


def edit(**cells):
    """Rows of the shard with other cells in the first of them; a function takes the cell that was there."""

    def change(path):
        rows = schema.to_table(shard(1), SAMPLING).to_pylist()
        for name, value in cells.items():
            rows[0][name] = value(rows[0][name]) if callable(value) else value
        write_rows(path, rows)

    return change


def write_rows(path, rows, sampling=SAMPLING, **options):
    columns = {}
    for name, column in schema.COLUMNS.items():
        cells = [row[name] for row in rows]
        try:
            columns[name] = pa.array(cells, column.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            columns[name] = pa.array([cells[0]] * len(cells))  # of another type
    metadata = {**schema.SCHEMA.metadata, schema.SAMPLING_KEY: json.dumps(sampling)}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)


def edit_all(change, sampling=SAMPLING, **options):
    """Rows of the shard, each changed."""

    def write(path):
        rows = schema.to_table(shard(1), SAMPLING).to_pylist()
        write_rows(path, [{**row, **change(row)} for row in rows], sampling, **options)

    return write


def put(groups):
    return lambda path: pq.write_table(schema.to_table(groups, SAMPLING), path)


def first(group, **changes):
    """The group with another first rollout, and the advantages that go with it."""
    members = [dataclasses.replace(group.rollouts[0], **changes), *group.rollouts[1:]]
    return GRADING.group(Ticket(VERSION, group.index, group.index), group.prompt, members)


def with_reward(reward, verdict=Verdict.CORRECT):
    one, other = shard(1)
    return put([first(one, grade=Grade(verdict, reward)), other])


def flip_a_bit(path):
    RolloutLog(path.parents[1], SAMPLING).create(1, shard(1))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def link(path):
    put(shard(1))(path.parent / "elsewhere.parquet")
    path.symlink_to(path.parent / "elsewhere.parquet")


LONG, MANY = "x" * (20 * 2**20), 100_000
DAMAGES = {
    # Lengths and sizes.
    "a log-probability too few": (edit(logprobs=lambda x: x[1:]), "3 log-probabilities for 4 tokens"),
    "one log-probability": (edit(logprobs=[-1.0]), "1 log-probabilities for 4 tokens"),
    "no tokens": (edit(token_ids=[], logprobs=[]), "token_ids is empty"),
    "a response too long": (
        edit(token_ids=[1] * 6, logprobs=[-1.0] * 6),
        "6 response tokens; the run has at most 12 and 5",
    ),
    "a group too small": (
        put([make_group(2), dataclasses.replace(make_group(3), rollouts=make_group(3).rollouts[:2])]),
        "2 rollouts of 3",
    ),
    "a response of 20 MiB": (edit_all(lambda row: {"response": LONG}, compression="zstd"), "bytes"),
    "100,000 rollouts": (
        lambda path: write_rows(path, schema.to_table(shard(1)).to_pylist() * (MANY // 6), compression="zstd"),
        "rows",
    ),
    "4 M tokens": (lambda path: edit(token_ids=np.zeros(4_000_000, np.int32))(path), "bytes"),
    # Log-probabilities and tokens.
    "NaN as log-probability": (edit(logprobs=[math.nan, -1.0, -1.0, -1.0]), "log-probability is not finite"),
    "infinity as log-probability": (edit(logprobs=[-math.inf, -1.0, -1.0, -1.0]), "log-probability is not finite"),
    "null as log-probability": (edit(logprobs=[None, -1.0, -1.0, -1.0]), "log-probability is not finite"),
    "log-probability 50": (edit(logprobs=[50.0, -1.0, -1.0, -1.0]), "log-probability is 50, above 0"),
    "log-probability -1e30": (edit(logprobs=[-1e30, -1.0, -1.0, -1.0]), "log-probability is -1e.30, below"),
    "token -7": (edit(token_ids=[-7, 1, 1, 1]), "token_ids has -7; the vocabulary has ids 0 to 17"),
    "token beyond the vocabulary": (edit(token_ids=[18, 1, 1, 1]), "token_ids has 18"),
    "a token after the stop": (
        edit(token_ids=[5, 1, 5, 1]),
        "rollout 0: it has 4 tokens and goes on after its stop, token 2",
    ),
    "a stop string in the middle": (
        edit(token_ids=[16, 17, 5, 1]),
        "it has 4 tokens and goes on after its stop, token 2",
    ),
    "no stop at the end": (edit(token_ids=[5, 6, 5, 6]), "its finish_reason is stop, and it ends at no stop"),
    "cut before the limit": (
        edit(token_ids=[5, 6, 5, 6], finish_reason="length"),
        "was cut at 4 tokens; the run cuts at 5",
    ),
    "token null": (edit(token_ids=[None, 1, 1, 1]), "token_ids has nulls"),
    # Rewards, verdicts, advantages.
    "advantage 1e30": (edit(advantage=1e30), r"its advantages \[1e\+30"),
    "advantages of other rewards": (edit(advantage=lambda x: x + 0.01), "the rewards give"),
    "an advantage of NaN": (edit(advantage=math.nan), "the rewards give"),
    "another value": (edit_all(lambda row: {"value": 0.9}), "its value"),
    "invalid with an advantage": (edit(verdict="invalid", reward=None), "the rewards give"),
    "invalid with a reward": (edit(verdict="invalid", reward=1.0), "its verdict is invalid, and its reward 1"),
    "no reward": (with_reward(math.nan), "its reward is nan"),
    "an infinite reward": (edit(reward=math.inf), "its reward is inf"),
    "a reward of 1e30": (with_reward(1e30), r"its reward is 1e\+30"),
    "a reward that the verdict does not have": (with_reward(5.0), "its verdict is correct, its reward 5"),
    "an unknown verdict": (edit(verdict="splendid"), "'splendid' is not a valid Verdict"),
    "an unknown end": (edit(finish_reason="\x1b[2J"), "is not a valid FinishReason"),
    "extra that is no object": (edit(extra="[]"), "extra is '\\[\\]', no JSON object"),
    # Names and places.
    "an unknown prompt": (edit_all(lambda row: {"prompt_id": "=1+1"}), "its prompt '=1.1' is not the run's"),
    "another prompt's tokens": (edit_all(lambda row: {"prompt_token_ids": [2, 3]}), "is not the run's"),
    "another answer": (edit_all(lambda row: {"answer": "42"}), "is not the run's"),
    "prompts that differ": (edit(prompt_token_ids=[2, 3]), "has rollouts with different prompt_token_ids"),
    "two ids on one index": (edit_all(lambda row: {"group_index": 2}), "has policy_version 3 and group_index 2"),
    "another temperature": (
        edit_all(lambda row: {}, {"temperature": 2.0}),
        "was drawn at temperature 2.0, and sampler.temperature is 1",
    ),
    "a foreign version": (put(shard(1, version=7)), "of another policy version than its folder"),
    "no rows": (lambda path: write_rows(path, [], SAMPLING), r"has the groups \[\]; the shard is 2 to 3"),
    "another shard": (put(shard(2)), r"has the groups \[4, 5\]; the shard is 2 to 3"),
    "half a shard": (put(shard(1)[:1]), r"has the groups \[2\]; the shard is 2 to 3"),
    "a group twice": (put([*shard(1), make_group(2)]), "rows|has rollouts"),
    "index null": (edit_all(lambda row: {"group_index": None}), "column group_index has nulls"),
    "index text": (edit_all(lambda row: {"group_index": "two"}), "column group_index is string, not int64"),
    "index 2^62": (
        edit_all(
            lambda row: {
                k: v + 2**62 if k == "group_index" else f"000003-{2**62 + row['group_index']}"
                for k, v in row.items()
                if k in ("group_index", "group_id")
            }
        ),
        "has a group '000003-46116860184273879.*VERSION-INDEX",
    ),
    "id null": (edit(group_id=None), "column group_id has nulls"),
    "another id": (
        edit_all(lambda row: {"group_id": "x" + row["group_id"]}),
        "has a group 'x000003-0000000.*VERSION-INDEX",
    ),
    # Files.
    "torn": (lambda path: path.write_bytes(b"PAR1 torn"), "not a readable Parquet file"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable Parquet file"),
    "a flipped bit": (flip_a_bit, "not a readable Parquet file"),
    "a pipe": (os.mkfifo, "is not a regular file"),
    "a folder": (os.mkdir, "is not a regular file"),
    "a link": (link, "is not a regular file"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is not a regular file"),
    "a newer schema": (
        lambda path: pq.write_table(
            schema.to_table(shard(1)).replace_schema_metadata({schema.VERSION_KEY: b"99"}), path
        ),
        "schema version 99",
    ),
    "other columns": (lambda path: pq.write_table(pa.table({"a": [1]}), path), "is no rollout log"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_no_shard_of_the_run_is_put_aside_and_the_run_goes_on(name, tmp_path):
    write, told = DAMAGES[name]
    notes = []
    with follower(tmp_path, notes) as (source, log), Leases(tmp_path / "leases" / "shards") as leases:
        log.create(0, shard(0))
        write(log.path(VERSION, 1))
        source.open_window(WINDOW, Weights(None, None), [])
        assert [group.index for group in source.take(2, lambda: False).groups] == [0, 1]
        (note,) = notes
        assert note.startswith(str(log.path(VERSION, 1)))
        assert "\n" not in note
        assert "\x1b" not in note
        assert re.search(told, note), note
        assert note.endswith("; moved to part-000001.parquet.damaged, its groups are sampled again")
        assert source.report()["window/damaged_files"] == 1
        queue = ShardQueue(log, leases, lambda _: True, SIZE)
        queue.open_window(WINDOW)
        assert queue.admit(VERSION).index == 2, "its claim is free"
        log.create(1, shard(1))
        log.create(2, shard(2))
        for _ in range(2):
            assert len(source.take(2, lambda: False).groups) == 2


@pytest.mark.parametrize("name", ["a log-probability too few", "torn", "a pipe", "half a shard"])
def test_a_shard_that_comes_while_the_learner_waits_is_checked_too(name, tmp_path):
    write, told = DAMAGES[name]
    notes = []
    with follower(tmp_path, notes) as (source, log):
        source.open_window(WINDOW, Weights(None, None), [])
        log.create(0, shard(0))
        log.create(2, shard(2))
        write(log.path(VERSION, 1))
        assert [group.index for group in source.take(2, lambda: False).groups] == [0, 1]
        while not notes:
            time.sleep(0.02)
        log.create(1, shard(1))
        assert [group.index for group in source.take(4, lambda: False).groups] == [2, 3, 4, 5]
        assert re.search(told, notes[0])
        assert len(notes) == 1


def test_a_shard_that_was_replaced_before_a_restart_is_put_aside(tmp_path):
    """The sampler draws the same again, and the recorded batch is formed again."""
    batches, notes = tmp_path / "batches.jsonl", []
    groups = shard(1)
    BatchRecord(batches).record(1, VERSION, {group.id: digest(group) for group in groups})
    with follower(tmp_path, notes, record=BatchRecord(batches)) as (source, log):
        log.create(1, shard(1, seed=1))
        source.open_window(WINDOW, Weights(None, None), [])
        log.create(1, groups)
        taken = source.take(2, lambda: False, [2, 3]).groups
        BatchRecord(batches).record(1, VERSION, {group.id: digest(group) for group in taken})
    (note,) = notes
    assert "group 000003-00000002: is not the one that batches.jsonl has in a batch" in note


def test_files_from_before_a_version_was_published_are_put_aside(tmp_path):
    notes = []
    with follower(tmp_path, notes, samplers=Nobody(is_published=True)) as (source, log):
        log.create(0, shard(0))
        source.open_window(WINDOW, Weights(None, None), [])
        assert "part-000000.parquet: was written before this version was published; moved" in notes[0]
        log.create(0, shard(0))
        assert len(source.take(2, lambda: False).groups) == 2


def test_names_that_are_no_shards_are_passed_by(tmp_path):
    notes = []
    with follower(tmp_path, notes) as (source, log):
        (log.directory / "\u00b2").mkdir(parents=True)
        (log.directory / ("9" * 200)).mkdir()
        log.folder(VERSION).write_text("no folder")
        source.open_window(WINDOW, Weights(None, None), [])
        log.folder(VERSION).mkdir()
        for name in ("part-0.parquet", "part-\u0661\u0661\u0661\u0661\u0661\u0661.parquet", "part-0000001.parquet"):
            put(shard(0))(log.folder(VERSION) / name)
        put(shard(1))(log.folder(VERSION) / "part-999999999.parquet")
        log.create(0, shard(0))
        assert len(source.take(2, lambda: False).groups) == 2
        while len(notes) < 2:
            time.sleep(0.02)
        assert log.versions() == [VERSION]
        assert log.parts(VERSION) == [0]
    assert "000003: is no folder; moved to 000003.damaged" in notes[0]
    assert "part-999999999.parquet: is no shard that a sampler can have claimed" in notes[1]


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "null", "[" * 100_000, '{"beat": [], "tokens": 1, "idle_seconds": 1}'),
        *('{"beat": NaN, "tokens": 1, "idle_seconds": 1}', '{"beat": 1, "tokens": -1e999, "idle_seconds": 1}'),
        *('{"beat": %s, "tokens": 1, "idle_seconds": 1}' % ("9" * 400), '{"beat": 1}'),
        *("folder", "pipe"),
    ],
)
def test_a_report_that_is_none_is_passed_by(content, tmp_path):
    path, good = tmp_path / "samplers" / "a.json", tmp_path / "samplers" / "b.json"
    path.parent.mkdir()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}.get(content, lambda: path.write_text(content))()
    good.write_text('{"beat": 1, "tokens": 10, "idle_seconds": 0.5}')
    with follower(tmp_path, []) as (source, log):
        source.open_window(WINDOW, Weights(None, None), [])
        while (found := source.report())["sampler/processes"] == 0:
            time.sleep(0.02)
        assert found["sampler/processes"] == 1
        assert math.isfinite(found["sampler/tokens_per_second"])
        log.create(0, shard(0))
        assert len(source.take(2, lambda: False).groups) == 2


@pytest.mark.parametrize("name", ["rollouts", "samplers", "leases", "policy"])
def test_a_file_in_the_place_of_a_shared_folder_is_put_aside(name, tmp_path):
    notes = []
    with follower(tmp_path, notes) as (source, log), Leases(tmp_path / "leases", expires=3.0) as leases:
        trainer = leases.claim_from_the_dead("trainer")
        source.open_window(WINDOW, Weights(None, None), [])
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name).write_text("no folder")
        while not notes:
            time.sleep(0.02)
        assert notes == [f"{tmp_path / name}: is no folder; moved to {name}.damaged"]
        log.create(0, shard(0))
        assert len(source.take(2, lambda: False).groups) == 2
        assert trainer.renew()


def test_flipped_bits_are_refused_or_change_nothing(tmp_path):
    log, rng = RolloutLog(tmp_path, SAMPLING), np.random.default_rng(0)
    check, groups = ShardCheck(GroupCheck(CONFIG, STOPS, GRADING.advantages), PROMPTS), shard(1)
    log.create(1, groups)
    path, num_refused = log.path(VERSION, 1), 0
    whole = path.read_bytes()
    for _ in range(100):
        content = bytearray(whole)
        content[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        try:
            assert list(map(digest, check.read(log, WINDOW, 1))) == list(map(digest, groups))
        except ValueError:
            num_refused += 1
    assert num_refused > 50


def test_a_reward_is_that_of_the_prompts_data_set(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    sets = {
        "sums": {"path": str(tmp_path / "rows.jsonl"), "reward": {"functions": {"math": 2.0}}},
        "toy": {"task": "chain"},
    }
    raw = RAW | {"data": {"sets": sets, "max_prompt_tokens": 12}, "evaluation": {"prompts": 0}}
    check = GroupCheck(config_file.validate(TrainConfig, raw, "test", CHECKS), STOPS, GRADING.advantages)

    def group(name, reward):
        made = make_group(0)
        members = [dataclasses.replace(made.rollouts[0], grade=Grade(Verdict.CORRECT, reward)), *made.rollouts[1:]]
        return GRADING.group(Ticket(VERSION, 0, 0), dataclasses.replace(made.prompt, id=f"{name}/0"), members)

    check.check(group("sums", 2.0))
    check.check(group("toy", 1.0))
    for name, reward, told in (("sums", 1.0, "not 2.0"), ("toy", 2.0, "not 1.0"), ("other", 1.0, "of no data set")):
        with pytest.raises(ValueError, match=told):
            check.check(group(name, reward))

"""The worker with a small real model and real graders: windows are filled, failures are told, threads end."""

import contextlib
import functools
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from oapl_jax.config.data import DataConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.data.prompts import load_prompts
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.learner.batch import RowLayout, from_groups
from oapl_jax.model import qwen
from oapl_jax.objectives import oapl
from oapl_jax.rewards.grader import ToyGrader
from oapl_jax.rollouts.buffer import GroupBuffer, Ticket
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.sampler.engine import Engine
from oapl_jax.sources.local import GroupMaker, Worker
from oapl_jax.types import FinishReason, Grade, Rollout, Verdict
from rollouts.groups import bits

DEADLINE, GROUP_SIZE, SEED = 60.0, 3, 11
TOKENIZER = CharacterTokenizer()
CONFIG = qwen.QwenConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 18,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "rope_theta": 1e4,
    }
)
PROMPTS = load_prompts(DataConfig(task="chain", max_prompt_tokens=12), TOKENIZER, SEED)


@functools.cache
def weights(version):
    graphdef, params = nnx.split(qwen.Qwen(CONFIG, rngs=nnx.Rngs(0)))
    return graphdef, jax.tree.map(lambda x: x * (1 + 0.2 * version), params)


@functools.cache
def make_engine():
    return Engine(
        weights(0)[0],
        CONFIG,
        vocab_size=TOKENIZER.vocab_size,
        stop_ids=TOKENIZER.stop_ids,
        num_rows=4 * GROUP_SIZE,
        max_prompt_tokens=12,
        max_response_tokens=5,
        decode_steps=2,
        mesh=make_meshes(MeshConfig(trainer="fsdp=1"))[0],
        cache_dtype=jnp.float32,
    )


class SometimesInvalid(ToyGrader):
    """Fails on responses that begin with one of eight digits, as an infrastructure may."""

    def _grade(self, prompt, text, finish_reason):
        if text[:1] in tuple("01234567"):
            return Grade(Verdict.INVALID, math.nan, "the grading process died")
        return super()._grade(prompt, text, finish_reason)


class Broken(ToyGrader):
    """Raises at the third group."""

    num_graded = 0

    def grade(self, items):
        self.num_graded += len(items)
        if self.num_graded > 2 * GROUP_SIZE:
            raise OSError("the disk of the grader is full")
        return super().grade(items)


def make_groups(grader):
    return GroupMaker(
        TOKENIZER.decode,
        grader,
        lambda rewards, _: oapl.advantages(rewards, 1.0),
        functools.partial(oapl.optimal_value, beta1=1.0),
    )


@contextlib.contextmanager
def working(directory, grader=None, max_groups_ahead=None, finish_old=False):
    """A started worker on a window of six groups; yields what a test looks at."""
    buffer = GroupBuffer(lambda group: len(group.usable) >= 2, max_groups_ahead)
    log = RolloutLog(directory)
    worker = Worker(
        [make_engine()],
        PROMPTS,
        make_groups(grader or ToyGrader("chain")),
        buffer,
        log,
        sampling=SamplingDistribution(),
        group_size=GROUP_SIZE,
        seed=SEED,
        device_lock=contextlib.nullcontext(),
        finish_old=finish_old,
    )
    worker.set_weights(0, weights(0)[1])
    buffer.open_window(0, start_position=0, num_groups=6)
    worker.start()
    try:
        yield worker, buffer, log
    finally:
        worker.stop()


def take_two_windows(directory, **options):
    """The batches of two windows of three batches of two groups each, and the log."""
    with working(directory, **options) as (worker, buffer, log):
        taken = [buffer.take(2, DEADLINE) for _ in range(3)]
        worker.set_weights(1, weights(1)[1])
        buffer.open_window(1, start_position=buffer.cursor, num_groups=6)
        taken += [buffer.take(2, DEADLINE) for _ in range(3)]
        metrics = worker.report()
    return [group for batch in taken for group in batch], log, metrics


def test_two_windows_are_filled_in_order_and_every_group_taken_is_in_the_log(tmp_path):
    groups, log, metrics = take_two_windows(tmp_path)
    assert [(g.policy_version, g.index) for g in groups] == [(v, i) for v in (0, 1) for i in range(6)]
    assert [g.prompt.id for g in groups] == [PROMPTS[position].id for position in range(12)]
    logged = {g.id: bits(g) for version in log.versions() for g in log.read(version)}
    assert all(logged[g.id] == bits(g) for g in groups)
    for group in groups:
        assert len(group.rollouts) == GROUP_SIZE
        assert len({r.rollout.token_ids.tobytes() for r in group.rollouts}) > 1, "rollouts of a group differ"
        rewards = np.array([r.grade.reward for r in group.rollouts])
        assert group.value == oapl.optimal_value(rewards, 1.0)
        assert [r.advantage for r in group.rollouts] == (rewards - group.value).tolist()
        assert all(r.text == TOKENIZER.decode(r.rollout.token_ids) for r in group.rollouts)
    assert metrics["sampler/tokens_per_second"] > 0
    assert metrics["sampler/idle_seconds"] >= 0


def test_the_same_seed_gives_the_same_groups_whatever_the_timing(tmp_path):
    first, *_ = take_two_windows(tmp_path / "first")
    second, *_ = take_two_windows(tmp_path / "second", max_groups_ahead=2)
    assert [bits(g) for g in first] == [bits(g) for g in second]


def test_groups_in_progress_at_a_sync_are_finished_with_the_old_weights_and_logged_where_told(tmp_path):
    with working(tmp_path, finish_old=True) as (worker, buffer, log):
        end = time.monotonic() + DEADLINE
        while worker.report()["sampler/live_rollouts"] == 0 and time.monotonic() < end:
            time.sleep(0.001)
        worker.set_weights(1, weights(1)[1])
        started = buffer._next_index
        buffer.open_window(1, start_position=0, num_groups=6)
        assert started > 0
        assert buffer.num_dropped == started, "finished or not, none is taken"
        taken = [buffer.take(2, DEADLINE) for _ in range(3)]
    assert {group.policy_version for batch in taken for group in batch} == {1}
    assert [group.index for group in log.read(0)][:started] == list(range(started))
    whole, *_ = take_two_windows(tmp_path / "calm")
    old = {group.id: bits(group) for group in log.read(0)}
    assert all(old[group.id] == bits(group) for group in whole if group.id in old), (
        "drawn with the weights of version 0"
    )


def test_invalid_verdicts_are_in_the_log_and_nowhere_else(tmp_path):
    groups, log, _ = take_two_windows(tmp_path, grader=SometimesInvalid("chain"))
    logged = [g for version in log.versions() for g in log.read(version)]
    verdicts = [r.grade.verdict for g in logged for r in g.rollouts]
    assert verdicts.count(Verdict.INVALID) > 3, "the test must have seen some"
    for group in logged:
        usable = [r.grade.reward for r in group.rollouts if r.grade.verdict is not Verdict.INVALID]
        assert [r.grade.reward for r in group.usable] == usable
        assert all(math.isnan(r.advantage) == (r.grade.verdict is Verdict.INVALID) for r in group.rollouts)
        assert group.value == oapl.optimal_value(np.array(usable), 1.0) if usable else math.isnan(group.value)
    accepted = [g.id for g in logged if len(g.usable) >= 2]
    assert len(accepted) < len(logged), "the test must have seen a group that is passed over"
    for version in (0, 1):
        wanted = [name for name in accepted if int(name.split("-")[0]) == version][:6]
        assert [g.id for g in groups if g.policy_version == version] == wanted
    batch = from_groups(groups, RowLayout(len(groups) * GROUP_SIZE, 17))
    assert batch.segment_mask.sum() == sum(r.grade.verdict is not Verdict.INVALID for g in groups for r in g.rollouts)
    assert np.isfinite(batch.advantages).all()


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_logprob_that_is_not_finite_leaves_its_rollout_out_of_value_and_batch(bad):
    rng = np.random.default_rng(0)
    prompt = PROMPTS[0]
    tokens = np.array([*TOKENIZER.encode("12345"), TOKENIZER.eos_id], np.int32)
    rollouts = [Rollout(tokens, -rng.random(6).astype(np.float32), FinishReason.STOP) for _ in range(3)]
    rollouts[1].logprobs[2] = bad
    (group,) = make_groups(ToyGrader("chain"))([(Ticket(0, 0, 0), prompt, rollouts)])
    assert [r.is_usable for r in group.rollouts] == [True, False, True]
    rewards = np.array([group.rollouts[i].grade.reward for i in (0, 2)])
    assert group.value == oapl.optimal_value(rewards, 1.0)
    batch = from_groups([group], RowLayout(3, 20))
    assert batch.segment_mask[:, 0].tolist() == [True, True, False]
    assert np.isfinite(batch.sampler_logprobs).all()


def test_a_grader_that_raises_stops_the_learners_wait_with_its_message(tmp_path):
    start = time.monotonic()
    with working(tmp_path, grader=Broken("chain")) as (_, buffer, _):
        with pytest.raises(RuntimeError, match="the disk of the grader is full") as caught:
            buffer.take(6, DEADLINE)
        assert isinstance(caught.value.__cause__, OSError)
    assert time.monotonic() - start < DEADLINE


def test_weights_that_are_not_finite_give_no_usable_group_and_the_deadline_says_so(tmp_path):
    buffer = GroupBuffer(lambda group: len(group.usable) >= 2, 3)
    broken = jax.tree.map(lambda x: x * jnp.nan, weights(0)[1])
    log = RolloutLog(tmp_path)
    worker = Worker(
        *([make_engine()], PROMPTS, make_groups(ToyGrader("chain")), buffer, log),
        sampling=SamplingDistribution(),
        group_size=GROUP_SIZE,
        seed=SEED,
        device_lock=contextlib.nullcontext(),
    )
    buffer.open_window(0, start_position=0, num_groups=6)
    worker.set_weights(0, broken)
    worker.start()
    with pytest.raises(TimeoutError, match="waited 3 s for 2 groups of policy version 0: 0 are ready"):
        buffer.take(2, 3.0)
    worker.stop()
    assert log.read(0)
    assert not any(group.usable for group in log.read(0))


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_stop_ends_both_threads_at_any_time_and_may_be_called_twice(tmp_path, seconds):
    before = set(threading.enumerate())
    with working(tmp_path) as (worker, _, _):
        started = set(threading.enumerate()) - before
        assert {"sampler", "grader"} <= {thread.name for thread in started}
        time.sleep(seconds)
        worker.stop()
        assert not [t for t in started if t.name in ("sampler", "grader") and t.is_alive()]


class Held(ToyGrader):
    """Grades nothing until it is let go."""

    is_asked, go = threading.Event(), threading.Event()

    def grade(self, items):
        self.is_asked.set()
        assert self.go.wait(DEADLINE)
        return super().grade(items)


def test_what_is_finished_when_the_worker_stops_is_graded_and_logged(tmp_path):
    with working(tmp_path, grader=Held("chain")) as (worker, _, log):
        give_up = time.monotonic() + DEADLINE
        assert Held.is_asked.wait(DEADLINE)
        while worker._finished.qsize() < 3 and time.monotonic() < give_up:
            time.sleep(0.01)
        finished = worker._finished.qsize()
        assert finished >= 3
        threading.Timer(0.3, Held.go.set).start()
        worker.stop()
        assert len(log.read(0)) >= finished + 1, "and what was being graded"


def test_a_worker_that_was_not_started_stops(tmp_path):
    worker = Worker(
        *([make_engine()], PROMPTS, make_groups(ToyGrader("chain")), GroupBuffer(bool), RolloutLog(tmp_path)),
        sampling=SamplingDistribution(),
        group_size=GROUP_SIZE,
        seed=SEED,
        device_lock=contextlib.nullcontext(),
    )
    worker.stop()
    assert not [t for t in threading.enumerate() if t.name in ("sampler", "grader")]

"""The sampling loop with a small real model and real graders: windows are filled, failures are reported, threads end."""

import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.learner.batch import RowLayout, from_groups
from oapl_jax.objectives import oapl
from oapl_jax.rewards.grader import ToyGrader
from oapl_jax.rollouts.buffer import GroupBuffer, Ticket, Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Request, SamplingDistribution, run
from oapl_jax.types import FinishReason, Grade, Rollout, Verdict
from rollouts.groups import bits
from sources.loops import (
    DEADLINE,
    GROUP_SIZE,
    PROMPTS,
    SEED,
    TOKENIZER,
    make_grading,
    make_loop,
    make_turns,
    take_two_windows,
    weights,
    working,
)


class SometimesInvalid(ToyGrader):
    """Fails on responses that begin with one of eight digits, as an infrastructure may."""

    def _grade(self, prompt, text):
        if text[:1] in tuple("01234567"):
            return Grade(Verdict.INVALID, math.nan, "the grading process died")
        return super()._grade(prompt, text)


class Broken(ToyGrader):
    """Raises at the third group."""

    num_graded = 0

    def grade(self, items):
        self.num_graded += len(items)
        if self.num_graded > 2 * GROUP_SIZE:
            raise OSError("the disk of the grader is full")
        return super().grade(items)


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
    with working(tmp_path, finish_old=True) as (loop, buffer, log):
        end = time.monotonic() + DEADLINE
        while loop.report()["sampler/live_rollouts"] == 0 and time.monotonic() < end:
            time.sleep(0.001)
        loop.set_weights(1, weights(1)[1])
        buffer.open_window(Window(1, 0, 6))
        started = buffer.num_dropped
        assert started > 0
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
    (group,) = make_grading().groups([(Ticket(0, 0, 0), prompt, rollouts)])
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


@pytest.mark.slow
def test_weights_that_are_not_finite_give_no_usable_group_and_the_deadline_says_so(tmp_path):
    buffer = GroupBuffer(lambda group: len(group.usable) >= 2, 3)
    broken = jax.tree.map(lambda x: x * jnp.nan, weights(0)[1])
    log = RolloutLog(tmp_path)
    loop = make_loop(buffer, log)
    buffer.open_window(Window(0, 0, 6))
    loop.set_weights(0, broken)
    loop.start()
    with pytest.raises(TimeoutError, match="waited 3 s for 2 groups of policy version 0: 0 are ready"):
        buffer.take(2, 3.0)
    loop.stop()
    assert log.read(0)
    assert not any(group.usable for group in log.read(0))


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_stop_ends_both_threads_at_any_time_and_may_be_called_twice(tmp_path, seconds):
    before = set(threading.enumerate())
    with working(tmp_path) as (loop, _, _):
        started = set(threading.enumerate()) - before
        assert {"sampler", "grader"} <= {thread.name for thread in started}
        time.sleep(seconds)
        loop.stop()
        assert not [t for t in started if t.name in ("sampler", "grader") and t.is_alive()]


class Held(ToyGrader):
    """Grades nothing until it is let go."""

    is_asked, go = threading.Event(), threading.Event()

    def grade(self, items):
        self.is_asked.set()
        assert self.go.wait(DEADLINE)
        return super().grade(items)


def test_what_is_finished_when_the_loop_stops_is_graded_and_logged(tmp_path):
    with working(tmp_path, grader=Held("chain")) as (loop, _, log):
        give_up = time.monotonic() + DEADLINE
        assert Held.is_asked.wait(DEADLINE)
        while loop._finished.qsize() < 3 and time.monotonic() < give_up:
            time.sleep(0.01)
        finished = loop._finished.qsize()
        assert finished >= 3
        threading.Timer(0.3, Held.go.set).start()
        loop.stop()
        assert len(log.read(0)) >= finished + 1, "and what was being graded"


def test_a_loop_that_was_not_started_stops(tmp_path):
    loop = make_loop(GroupBuffer(bool), RolloutLog(tmp_path))
    loop.stop()
    assert not [t for t in threading.enumerate() if t.name in ("sampler", "grader")]


def test_the_groups_of_a_window_are_the_same_with_and_without_evaluations_in_it(tmp_path):
    """Somebody else uses the sampler, with other weights and prompts, while the windows are filled."""
    calm, *_ = take_two_windows(tmp_path / "calm")
    turns, evaluated = make_turns(), []

    def evaluate():
        with turns.take() as sampler:
            assert sampler.is_idle
            sampler.set_weights(weights(7)[1])
            requests = [
                Request(i, PROMPTS[1000 + i].token_ids, 4, (SEED, 99, i), SamplingDistribution()) for i in range(5)
            ]
            evaluated.append({i: [r.token_ids.tolist() for r in rollouts] for i, rollouts in run(sampler, requests)})

    disturbed, *_ = take_two_windows(tmp_path / "disturbed", between=evaluate, turns=turns)
    assert [bits(g) for g in disturbed] == [bits(g) for g in calm]
    assert len(evaluated) == 6
    assert all(each == evaluated[0] for each in evaluated), "and an evaluation does not depend on the window"


def test_what_is_in_flight_is_finished_before_somebody_else_has_the_sampler(tmp_path):
    turns = make_turns()
    with working(tmp_path, turns=turns) as (loop, buffer, log):
        end = time.monotonic() + DEADLINE
        while loop.report()["sampler/live_rollouts"] == 0 and time.monotonic() < end:
            time.sleep(0.001)
        with turns.take():
            started = buffer._next_index
            assert started > 0
            while len(log.read(0)) < started and time.monotonic() < end:  # graded meanwhile
                time.sleep(0.01)
            assert [group.index for group in log.read(0)] == list(range(started))
            time.sleep(0.3)
            assert buffer._next_index == started, "nothing new is admitted"

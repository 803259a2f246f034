"""All sources of groups keep one contract: local threads, a log that others write, rounds of finished data."""

import contextlib
import dataclasses

import pytest

from oapl_jax.build.checks import CHECKS
from oapl_jax.build.learner import make_learner
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.data.prompts import HeldOut
from oapl_jax.distributed.team import Team
from oapl_jax.io.lease import Leases
from oapl_jax.objectives import oapl
from oapl_jax.rollouts.buffer import GroupBuffer, Window
from oapl_jax.rollouts.checks import GroupCheck, ShardCheck
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.rollouts.source import GroupSource, Weights
from oapl_jax.rollouts.stops import Stops
from oapl_jax.sources.cluster import Cluster
from oapl_jax.sources.follower import LogFollower
from oapl_jax.sources.local import LocalSource
from oapl_jax.sources.offline import OfflineRounds
from oapl_jax.sources.setup import SamplingSetup
from sources.loops import (
    CONFIG,
    DEADLINE,
    GROUP_SIZE,
    PROMPTS,
    SEED,
    TOKENIZER,
    make_engine,
    make_grading,
    make_loop,
    make_turns,
    weights,
)

STEPS, GROUPS = 3, 2
"""Learner steps of a window, and groups of each."""
WINDOW = {"sync_every": STEPS, "deadline": DEADLINE}


def make_config(directory, **sections):
    raw = {
        "run": {"dir": str(directory), "steps": 100, "seed": SEED},
        "model": {"config": "unused.json", "tokenizer": "characters"},
        "data": {"task": "chain", "max_prompt_tokens": 12},
        "sampler": {"group_size": GROUP_SIZE, "max_response_tokens": 5},
        "learner": {"batch_rollouts": GROUPS * GROUP_SIZE},
        **sections,
    }
    return config_file.validate(TrainConfig, raw, "test", CHECKS)


def make_setup(config, turns):
    team = Team.alone()
    lock = contextlib.nullcontext()
    return SamplingSetup(config, TOKENIZER, PROMPTS, HeldOut(), make_grading(), turns, lock, team, team, None)


def is_usable(group):
    return len(group.usable) >= 2


@contextlib.contextmanager
def local(directory):
    buffer, log = GroupBuffer(is_usable), RolloutLog(directory / "rollouts")
    source = LocalSource(make_loop(buffer, log), buffer, log, make_config(directory, window=WINDOW).window)
    with contextlib.closing(source):
        yield source


class OtherProcess:
    """Samples each window as it opens, and appears in the log only: what ``Samplers`` asks for."""

    def __init__(self, log, leases):
        self._log, self._leases, self._loops = log, leases, []

    def open_window(self, window, weights):
        shards = ShardQueue(self._log, self._leases, is_usable, GROUPS)
        loop = make_loop(shards, shards)
        loop.set_weights(window.policy_version, weights.sampler)
        shards.open_window(window)
        loop.start()
        self._loops.append(loop)
        return {"sync/publish_seconds": 0.0}

    def tidy(self):
        for loop in self._loops[:-1]:
            loop.stop(0.0)

    def finish(self):
        for loop in self._loops:
            loop.stop()


@contextlib.contextmanager
def followed(directory):
    buffer, log = GroupBuffer(is_usable), RolloutLog(directory / "rollouts")
    config = make_config(directory, mode="detached", window={**WINDOW, "shard_groups": GROUPS})
    stops = Stops(TOKENIZER, SamplingDistribution.of(config.sampler))
    check = ShardCheck(GroupCheck(config, stops, make_grading().advantages), PROMPTS)
    with Leases(directory / "leases") as leases:
        samplers = OtherProcess(log, leases)
        source = LogFollower(directory, log, buffer, samplers, check, print)
        with contextlib.closing(source):
            yield source
        samplers.finish()


def make_scorer(config):
    """A learner, which generated data do not need: they have log-probabilities."""
    return make_learner(
        config,
        CONFIG,
        make_engine().mesh,
        max_response_tokens=5,
        group_size=4,
        objective=oapl.OBJECTIVE,
        options=oapl.OaplOptions(),
        temperature=1.0,
        vocab_size=TOKENIZER.vocab_size,
    )


@contextlib.contextmanager
def offline(directory):
    rounds = [{"prompts": STEPS * GROUPS, "epochs": 1}] * 2
    config = make_config(directory, mode="offline", offline={"rounds": rounds})
    setup = make_setup(config, make_turns())
    log = RolloutLog(directory / "rollouts", dataclasses.asdict(setup.distribution))
    source = OfflineRounds(setup, make_scorer(config), directory, log, lambda: False, print)
    with contextlib.closing(source):
        yield source


SOURCES = {"local": local, "followed": followed, "offline": offline}


def window(version, position=0):
    return Window(version, position, STEPS * GROUPS)


def both(version):
    return Weights(None, weights(version)[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_fills_windows_in_order_and_ends(kind, tmp_path):
    with SOURCES[kind](tmp_path) as source:
        assert isinstance(source, GroupSource)
        for version in (0, 1):
            plan = source.open_window(window(version, 6 * version), both(version), [])
            assert plan.num_steps == STEPS
            for step in range(STEPS):
                taken = source.take(GROUPS, lambda: False)
                assert taken is not None
                assert [group.index for group in taken.groups] == [GROUPS * step, GROUPS * step + 1]
                assert {group.policy_version for group in taken.groups} == {version}
                assert taken.cursor == GROUPS * (step + 1)
                assert taken.left_over == []
            assert {"window/ready_groups", "window/dropped_groups"} <= source.report().keys()
        source.finish()
        source.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_that_is_opened_again_gives_the_recorded_batch_and_goes_on(kind, tmp_path):
    with SOURCES[kind](tmp_path) as source:
        source.open_window(window(0), both(0), [])
        before = [source.take(GROUPS, lambda: False).groups for _ in range(STEPS)]
        source.finish()
    with SOURCES[kind](tmp_path) as source:
        # Step 1 was trained on and saved, step 2 was recorded and not saved.
        source.open_window(window(0), both(0), [[0, 1]])
        again = source.take(GROUPS, lambda: False, [2, 3])
        assert [group.id for group in again.groups] == [group.id for group in before[1]]
        assert [group.index for group in source.take(GROUPS, lambda: False).groups] == [4, 5]
        source.finish()


@pytest.mark.parametrize("kind", SOURCES)
def test_a_wait_that_is_cancelled_returns_nothing(kind, tmp_path):
    with SOURCES[kind](tmp_path) as source:
        source.open_window(window(0), both(0), [])
        assert source.take(1000, lambda: True) is None
        source.finish()


def test_all_processes_of_a_run_meet_in_its_shared_folder(tmp_path):
    """Trainers and processes that only sample: messages, leases and rollouts are in ``run.shared_dir`` for both."""
    shared = tmp_path / "shared"
    config = make_config(tmp_path / "run", mode="detached")
    config = config.model_copy(update={"run": config.run.model_copy(update={"shared_dir": str(shared)})})
    log = RolloutLog(shared / "rollouts")
    for turns in (make_turns(), None):
        cluster = Cluster(make_setup(config, turns), log, lambda: False)
        with contextlib.closing(cluster):
            assert str(cluster._root) == str(shared)
    assert str(make_setup(make_config(tmp_path / "run"), None).root) == str(tmp_path / "run")

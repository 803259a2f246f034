"""The worked example of docs/bring_your_own_sampler.md, with another engine behind it in the place of vLLM."""

import contextlib
import pathlib
import sys
import time
import weakref

import numpy as np
import pytest

from oapl_jax.io.lease import Leases
from oapl_jax.rollouts.buffer import Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Request, Sampler
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.sources.turns import SamplerTurns
from sources.loops import DEADLINE, GROUP_SIZE, PROMPTS, TOKENIZER, make_loop

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import vllm_sampler  # pyright: ignore[reportMissingImports]

    yield vllm_sampler
    del sys.modules["vllm_sampler"]


class Dice:
    """A policy that draws every digit alike, and stops with a chance of a quarter."""

    def __init__(self, response):
        self.response, self.rng = response, np.random.default_rng(0)

    def generate(self, prompts, group_size, distribution):
        return [[self.one() for _ in range(group_size)] for _ in prompts]

    def one(self):
        ids, logprobs = [], []
        while len(ids) < 5 and (not ids or ids[-1] != TOKENIZER.eos_id):
            is_end = self.rng.random() < 0.25
            ids.append(TOKENIZER.eos_id if is_end else TOKENIZER.encode(str(self.rng.integers(10)))[0])
            logprobs.append(np.log(0.25 if is_end else 0.075))
        return self.response(ids, logprobs, ids[-1] == TOKENIZER.eos_id)


def make_sampler(example, start):
    return example.EngineSampler(start, 6, 5)


def test_two_samplers_with_an_engine_of_ones_own_fill_a_window(example, tmp_path):
    log, window = RolloutLog(tmp_path / "rollouts"), Window(4, 7, 10)
    with contextlib.ExitStack() as stack:
        queues, loops = [], []
        for _ in range(2):
            leases = stack.enter_context(Leases(tmp_path / "leases", 30.0))
            sampler = make_sampler(example, lambda policy: Dice(example.Response))
            assert isinstance(sampler, Sampler)
            queue = ShardQueue(log, leases, lambda group: len(group.usable) >= 2, 2)
            loop = make_loop(queue, queue, turns=SamplerTurns(sampler))
            stack.callback(loop.stop, 1.0)
            loop.set_weights(4, "a folder")
            queue.open_window(window)
            loop.start()
            queues.append(queue)
            loops.append(loop)
        end = time.monotonic() + DEADLINE
        while len(log.parts(4)) < 5:
            assert time.monotonic() < end
            assert all(queue.failure is None for queue in queues), [queue.failure for queue in queues]
            time.sleep(0.02)
        time.sleep(0.5)
    assert log.parts(4) == [0, 1, 2, 3, 4], "as much as the window wants"
    groups = log.read(4)
    assert [group.prompt.id for group in groups] == [PROMPTS[7 + i].id for i in range(10)]
    assert {len(group.rollouts) for group in groups} == {GROUP_SIZE}
    assert sum(queue.num_written for queue in queues) == 10
    rollouts = [item.rollout for group in groups for item in group.rollouts]
    for rollout in rollouts:
        expected = np.full(len(rollout.token_ids), np.log(0.075), np.float32)
        if rollout.token_ids[-1] == TOKENIZER.eos_id:
            expected[-1] = np.log(0.25)
        np.testing.assert_array_equal(rollout.logprobs, expected)
    assert sum(loop.sums[0] for loop in loops) >= sum(len(rollout.token_ids) for rollout in rollouts)


def test_a_response_without_a_logprob_for_each_token_is_refused(example):
    class Short:
        def generate(self, prompts, group_size, distribution):
            return [[example.Response([5, 6, 1], [-1.0, -2.0], True)]]

    sampler = make_sampler(example, lambda policy: Short())
    sampler.set_weights("a folder")
    sampler.submit(Request("a", np.array([3], np.int32), 1, (0, 0, 0)))
    with pytest.raises(ValueError, match="3 tokens, 2 log-probabilities"):
        sampler.step()


def test_an_engine_ends_before_the_next_one_starts_and_weights_set_twice_start_one(example):
    """Two would not fit into the memory of a GPU."""
    engines = []

    def start(policy):
        assert all(engine() is None for engine in engines)
        engine = Dice(example.Response)
        engines.append(weakref.ref(engine))
        return engine

    sampler = make_sampler(example, start)
    for policy in ("first", "first", "second"):
        sampler.set_weights(policy)
    assert len(engines) == 2
    sampler.release()
    assert engines[-1]() is None
    sampler.set_weights("second")
    assert len(engines) == 3


def test_a_policy_outlives_its_folder_until_nobody_uses_it(example, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with example.load_policy(folder) as copy:
        (folder / "config.json").unlink()
        assert (pathlib.Path(copy) / "config.json").read_text() == "{}"

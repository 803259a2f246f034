"""The worked example of docs/bring_your_own_sampler.md, with another engine behind it in the place of vLLM."""

import contextlib
import functools
import pathlib
import sys
import time

import numpy as np
import pytest

from oapl_jax.config.data import DataConfig
from oapl_jax.data.prompts import load_prompts
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.io.lease import Leases
from oapl_jax.objectives import oapl
from oapl_jax.rewards.grader import ToyGrader
from oapl_jax.rollouts.buffer import Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Request, SamplingDistribution
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.sources.local import GroupMaker, RequestRunner, Worker

ROOT, DEADLINE, GROUP_SIZE = pathlib.Path(__file__).parents[2], 60.0, 3
TOKENIZER = CharacterTokenizer()
PROMPTS = load_prompts(DataConfig(task="chain", max_prompt_tokens=12), TOKENIZER, 0)


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
        return self.response(ids, logprobs)


def test_two_samplers_with_an_engine_of_ones_own_fill_a_window(example, tmp_path):
    log, window = RolloutLog(tmp_path / "rollouts"), Window(4, 7, 10)
    make_groups = GroupMaker(
        TOKENIZER.decode,
        ToyGrader("chain"),
        lambda rewards, _: oapl.advantages(rewards, 1.0),
        functools.partial(oapl.optimal_value, beta1=1.0),
    )
    with contextlib.ExitStack() as stack:
        queues = []
        for _ in range(2):
            leases = stack.enter_context(Leases(tmp_path / "leases", 30.0))
            runner = example.EngineRunner(6, TOKENIZER.stop_ids, 5)
            assert isinstance(runner, RequestRunner)
            queue = ShardQueue(log, leases, lambda group: len(group.usable) >= 2, 2)
            worker = Worker(
                runner,
                PROMPTS,
                make_groups,
                queue,
                queue,
                sampling=SamplingDistribution(),
                group_size=GROUP_SIZE,
                seed=0,
                device_lock=contextlib.nullcontext(),
            )
            stack.callback(worker.stop, 1.0)
            worker.set_weights(4, Dice(example.Response))
            queue.open_window(window)
            worker.start()
            queues.append(queue)
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
    for item in (item for group in groups for item in group.rollouts):
        is_stop = item.rollout.token_ids[-1] == TOKENIZER.eos_id
        expected = np.full(len(item.rollout.token_ids), np.log(0.075), np.float32)
        expected[-1] = np.log(0.25) if is_stop else expected[-1]
        np.testing.assert_array_equal(item.rollout.logprobs, expected)


def test_a_response_without_a_logprob_for_each_token_is_refused(example):
    runner = example.EngineRunner(6, TOKENIZER.stop_ids, 5)
    runner.submit(Request("a", np.array([3], np.int32), 1, (0, 0, 0), SamplingDistribution()))

    class Short:
        def generate(self, prompts, group_size, distribution):
            return [[example.Response([5, 6, 1], [-1.0, -2.0])]]

    with pytest.raises(ValueError, match="3 tokens, 2 log-probabilities"):
        runner.step(Short())

"""The stopwatch adds up over uses and threads."""

import threading
import time

import pytest

from oapl_jax.io.stopwatch import Stopwatch


def test_stopwatch_adds_up_over_uses_and_threads_and_starts_again_after_collect():
    stopwatch = Stopwatch()

    def work():
        with stopwatch("sampler/idle_seconds"):
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    with pytest.raises(KeyError), stopwatch("learner/wait_seconds"):
        raise KeyError
    seconds = stopwatch.collect()
    assert seconds["sampler/idle_seconds"] >= 4 * 0.05
    assert seconds["learner/wait_seconds"] < 0.05
    assert stopwatch.collect() == {}

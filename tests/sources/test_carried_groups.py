"""``window.max_version_lag: 1``: the sampler goes on for the next window, which begins with what the last one left."""

import contextlib
import time

import pytest

from oapl_jax.config.window import WindowConfig
from oapl_jax.rollouts.buffer import GroupBuffer, Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.source import Weights
from oapl_jax.sources.local import LocalSource
from rollouts.groups import bits
from sources.loops import DEADLINE, PROMPTS, make_loop, weights

pytestmark = pytest.mark.slow
WINDOW, BATCH = 4, 2
"""Groups that a window trains on, and those of a batch."""


@contextlib.contextmanager
def opened(directory):
    buffer, log = GroupBuffer(lambda group: len(group.usable) >= 2), RolloutLog(directory / "rollouts")
    limits = WindowConfig(sync_every=2, max_version_lag=1, deadline=DEADLINE)
    with contextlib.closing(LocalSource(make_loop(buffer, log), buffer, log, limits)) as source:
        yield source


def wait_for_ready(source, number):
    end = time.monotonic() + DEADLINE
    while (ready := source.report()["window/ready_groups"]) < number:
        assert time.monotonic() < end, f"{ready} of {number} groups are ready"
        time.sleep(0.01)


def take(source, recorded=None):
    taken = source.take(BATCH, lambda: False, recorded)
    return taken.groups, taken


def test_a_window_trains_on_what_the_last_one_left_and_a_restart_does_so_again(tmp_path):
    with opened(tmp_path) as source:
        first = source.open_window(Window(0, 0, 2 * WINDOW), Weights(None, weights(0)[1]), [])
        assert first.window == Window(0, 0, 2 * WINDOW)
        before = [take(source) for _ in range(2)]
        wait_for_ready(source, WINDOW)
        cursor = before[-1][1].cursor
        plan = source.open_window(Window(1, cursor, 2 * WINDOW), Weights(None, weights(1)[1]), [])
        after = [take(source) for _ in range(3)]
    groups = [group for batch, _ in (*before, *after) for group in batch]
    assert [group.policy_version for group in groups[: 2 * WINDOW]] == [0] * 2 * WINDOW
    assert [group.policy_version for group in groups[2 * WINDOW :]] == [1] * BATCH
    assert [group.prompt.id for group in groups] == [PROMPTS[place].id for place in range(10)], (
        "none twice, none left out"
    )

    # Batch 1 of the window was trained on and saved, batch 2 was recorded, batch 3 was not.
    with opened(tmp_path) as source:
        indices = [[group.index for group in batch] for batch, _ in after]
        again = source.open_window(Window(1, cursor, 2 * WINDOW), Weights(None, weights(1)[1]), indices[:1])
        assert again.window == plan.window
        resumed = [take(source, indices[1]), take(source)]
    for (batch, taken), (other, other_taken) in zip(after[1:], resumed, strict=True):
        assert list(map(bits, batch)) == list(map(bits, other))
        assert taken[1:] == other_taken[1:]

"""A data set of responses: a window whose weights never change, filled by one process or many.

Processes claim shards of the groups and write each as one file, as detached samplers do (``rollouts/shards.py``). So a
group is in the log once, even if processes are killed or do the same work.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from oapl_jax.config.sampling import SamplerConfig
from oapl_jax.io.lease import Leases
from oapl_jax.rollouts.buffer import Window
from oapl_jax.rollouts.grading import Grading
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.sources.sampling_loop import SamplingLoop
from oapl_jax.sources.turns import SamplerTurns
from oapl_jax.types import Prompt

POLL_SECONDS = 0.1
SECONDS_BETWEEN_REPORTS = 1.0


@dataclasses.dataclass(frozen=True)
class Generation:
    """What is to be generated, the same in all processes: group ``i`` answers prompt ``i``."""

    log: RolloutLog
    leases: Leases
    version: int
    prompts: Sequence[Prompt]
    groups_per_file: int
    deadline: float
    """Seconds to wait for files of other processes."""


def generate(
    work: Generation,
    turns: SamplerTurns,
    grading: Grading,
    weights: Any,
    sampler: SamplerConfig,
    seed: int,
    *,
    report: Callable[[int, float], None],
    is_stopped: Callable[[], bool],
) -> bool:
    """Generates until every group is in the log, or until it is stopped.

    ``report`` is called now and then with the number of groups in the log and this process's tokens a second. Returns
    whether every group is in the log.

    Raises:
        TimeoutError: other processes hold what is missing and finish nothing.
    """
    num_groups = len(work.prompts)
    shards = ShardQueue(work.log, work.leases, lambda group: True, work.groups_per_file, num_groups, work.deadline / 2)
    loop = SamplingLoop(
        turns,
        work.prompts,
        grading,
        shards,
        shards,
        distribution=SamplingDistribution.of(sampler),
        group_size=sampler.group_size,
        seed=seed,
    )
    start = last_change = time.monotonic()
    seen, next_report = (-1, -1), 0.0
    loop.set_weights(work.version, weights)
    shards.open_window(Window(work.version, 0, num_groups))
    loop.start()
    try:
        while (num_logged := shards.num_logged) < num_groups:
            if is_stopped():
                return False
            if shards.failure is not None:
                raise shards.failure
            now = time.monotonic()
            state = (num_logged, loop.sums[0])
            if state != seen:
                seen, last_change = state, now
            if now - last_change > work.deadline:
                raise TimeoutError(
                    f"{num_groups - num_logged} groups of policy version {work.version} are claimed by other processes,"
                    f" and none was finished for {work.deadline:g} s; do those processes still run?"
                )
            if now >= next_report:
                next_report = now + SECONDS_BETWEEN_REPORTS
                report(num_logged, loop.sums[0] / max(now - start, 1e-9))
            time.sleep(POLL_SECONDS)
        report(num_groups, loop.sums[0] / max(time.monotonic() - start, 1e-9))
        return True
    finally:
        shards.open_window(None)
        loop.stop(drain_seconds=0.0)

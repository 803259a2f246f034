"""Samples of benchmark problems, graded and written to a rollout log as they come: a killed evaluation goes on."""

from collections.abc import Sequence
from concurrent.futures import Future

from oapl_jax.config.commands import EvaluateConfig
from oapl_jax.evaluation.held_out import make_request
from oapl_jax.io.progress_bar import ProgressBar
from oapl_jax.rollouts.buffer import Ticket
from oapl_jax.rollouts.grading import Grading
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Sampler, SamplingDistribution, run
from oapl_jax.types import Prompt, Rollout, Verdict

MAX_UNWRITTEN = 64
"""Problems whose samples may wait for the grader before the sampler waits too."""


def sample(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    grading: Grading,
    log: RolloutLog,
    version: int,
    config: EvaluateConfig,
) -> None:
    """Samples the prompts that the log lacks under this version; a prompt's samples are logged when all are graded.

    The sampler is idle and has the weights of the policy. The seed is the same for every policy.
    """
    distribution, num_samples = SamplingDistribution.of(config.sampler), config.sampler.samples
    parts = [log.read_columns(version, part, ["prompt_id"]) for part in log.parts(version)]
    done = {name for part in parts for name in part["prompt_id"].to_pylist()}
    requests = [
        make_request(i, prompt, num_samples, config.run.seed, distribution)
        for i, prompt in enumerate(prompts)
        if prompt.id not in done
    ]
    verdicts: list[Verdict] = []
    num_before = len(prompts) - len(requests)

    def write(index: int, rollouts: list[Rollout]) -> list[Verdict]:
        (group,) = grading.groups([(Ticket(version, index, index), prompts[index], rollouts)])
        log.append([group])
        return [item.grade.verdict for item in group.rollouts]

    def settle(future: Future) -> None:
        verdicts.extend(future.result())
        num_done = num_before + len(verdicts) // num_samples
        progress.update(num_done, {"rollouts/pass_rate": verdicts.count(Verdict.CORRECT) / len(verdicts)})

    with ProgressBar(len(prompts), enabled=config.logging.progress) as progress:
        if num_before:
            progress.note(f"{num_before} of {len(prompts)} problems are in {log.directory} already")
        waiting: list[Future] = []
        for index, rollouts in run(sampler, requests):
            waiting.append(grading.submit(write, index, rollouts))
            while waiting and (waiting[0].done() or len(waiting) > MAX_UNWRITTEN):
                settle(waiting.pop(0))
        for future in waiting:
            settle(future)

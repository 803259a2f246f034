"""What a run is called, how long it lasts, and what it writes."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from oapl_jax.config.applies import AppliesWhen, one_of
from oapl_jax.config.section import Count, CountOrZero, Positive, Section


class RunDirConfig(Section):
    """What a run is called, and what it may overwrite."""

    not_identity: ClassVar[tuple[str, ...]] = ("dir", "allow_config_change", "compile_cache")
    """Fields that do not make it another run: it may be moved, and leave to change is no change."""

    dir: str
    """Run directory: holds the whole state of the run; the same command again resumes from it. A folder, or an address,
    ``gs://`` or ``s3://``."""
    seed: CountOrZero = 0
    """Root of every random stream: weights, prompt order, sampling. An evaluation with the same seed draws the same
    random numbers for every policy."""
    allow_config_change: bool = False
    """Go on in a run directory that was started with another config; what is there is kept."""
    compile_cache: str | None = "~/.cache/oapl_jax"
    """Folder of compiled programs, for all runs on GPUs, TPUs and AMD's CPUs: a second start compiles nothing again;
    null: none."""


class RunConfig(RunDirConfig):
    """The same, how long the run lasts, and what else shows it."""

    not_identity: ClassVar[tuple[str, ...]] = (*RunDirConfig.not_identity, "tracker", "project")

    steps: Count
    """Learner steps in all."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = "tensorboard"
    """What gets the metrics besides ``metrics.jsonl``, the config, and of some windows histograms and samples:
    TensorBoard's files in the run directory; Weights & Biases or trackio, which need the extra of that name. null: none."""
    project: Annotated[str, AppliesWhen("tracker", condition=one_of("wandb", "trackio"))] = "oapl-jax"
    """Where Weights & Biases or trackio show the run."""


class TrainRunConfig(RunConfig):
    """The same, and what other processes share."""

    not_identity: ClassVar[tuple[str, ...]] = (*RunConfig.not_identity, "shared_dir", "steps")
    """A finished run may go on with more steps."""

    shared_dir: Annotated[str | None, AppliesWhen("mode", condition=one_of("detached"))] = None
    """mode detached: where policies, rollouts and leases are, for samplers that must not or cannot write in ``dir``; a
    folder, ``gs://`` or ``s3://``; null: in ``dir``."""


class EvaluateRunConfig(RunDirConfig):
    """Where an evaluation is written, and what of a run it evaluates."""

    label: str | None = None
    """Name of the policy in tables and pictures; null: the last part of ``model.path``, for an export that of the run."""
    step: CountOrZero | None = None
    """Checkpoint, where ``model.path`` is a run directory; null: the newest."""
    watch_deadline: Positive = 3600.0
    """With ``--watch``: seconds to wait for the next version of a run that has not ended."""


class ProfileConfig(Section):
    """A trace of some learner steps, which XProf and Perfetto open."""

    steps: tuple[Count, Count] | None = None
    """The first and the last step of the trace, which is written to ``profile/`` in the run directory; null: none."""

    def find_mistakes(self) -> Iterator[str]:
        """An order."""
        if self.steps is not None and self.steps[0] > self.steps[1]:
            yield f"steps: {list(self.steps)} ends before it begins"


class CheckpointConfig(Section):
    """When the run is saved."""

    every: Count = 50
    """Learner steps between checkpoints."""
    keep: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: CountOrZero = 0
    """Checkpoints of steps that it divides are kept for good; 0: none."""


class TrainCheckpointConfig(CheckpointConfig):
    """The same, what else a run keeps, and what may end it."""

    keep_best: Annotated[str | None, AppliesWhen("evaluation.every", "evaluation.prompts")] = None
    """Metric of an evaluation, such as ``evaluation/pass@1``: the checkpoint in which it was highest is kept too. Each
    better one is saved; the learner then waits for its evaluations."""
    patience: Annotated[CountOrZero, AppliesWhen("keep_best")] = 0
    """The run ends after this number of evaluations without a higher ``keep_best``; 0: it does not."""
    keep_policies: Annotated[Count, AppliesWhen("mode", condition=one_of("detached"))] = 2
    """mode detached: newest published policies that are kept whether a sampler uses them or not."""
    keep_rollouts: Annotated[CountOrZero, AppliesWhen("mode", condition=one_of("online", "detached"))] = 0
    """Newest policy versions whose rollouts are kept, and those that a checkpoint may go on with; 0: all. ``audit``
    cannot check what is gone."""


class ProgressConfig(Section):
    """What is shown while the command works."""

    progress: bool = True
    """A live progress bar on a terminal; one line a step elsewhere."""

"""The whole config of each command."""

from collections.abc import Iterator
from typing import Annotated, Literal

from oapl_jax.config.applies import AppliesWhen, is_null
from oapl_jax.config.data import DataConfig, GradedSets, SftDataConfig, SourceConfig, inert_weights
from oapl_jax.config.evaluation import HELD_OUT, BenchmarksConfig, EvaluationConfig
from oapl_jax.config.learner import LearnerConfig, TrainLearnerConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.config.model import LoraConfig, ModelConfig
from oapl_jax.config.objective import ObjectiveConfig
from oapl_jax.config.offline import FilterConfig, OfflineConfig
from oapl_jax.config.reward import RewardConfig
from oapl_jax.config.run import (
    CheckpointConfig,
    EvaluateRunConfig,
    ProfileConfig,
    ProgressConfig,
    RunConfig,
    RunDirConfig,
    TrainCheckpointConfig,
    TrainRunConfig,
)
from oapl_jax.config.sampling import EngineConfig, EvaluateSamplerConfig, SamplerConfig
from oapl_jax.config.section import Count, CountOrZero, Positive, Section
from oapl_jax.config.window import WindowConfig

Reward = Annotated[RewardConfig, AppliesWhen("data.task", condition=is_null)]
"""Built-in tasks grade themselves."""


class TrainConfig(Section):
    """``oapl-jax train``: OAPL."""

    mode: Literal["online", "detached", "offline"] = "online"
    """Who samples. online: threads of this process; detached: other processes, ``oapl-jax sample``; offline: nobody
    while it trains: each round has data of its own, and ``run.steps`` is the most that the run may make."""
    run: TrainRunConfig
    model: ModelConfig
    data: DataConfig
    sampler: SamplerConfig
    reward: Reward = RewardConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    learner: TrainLearnerConfig = TrainLearnerConfig()
    lora: LoraConfig = LoraConfig()
    window: WindowConfig = WindowConfig()
    offline: OfflineConfig | None = None
    mesh: MeshConfig = MeshConfig()
    checkpoint: TrainCheckpointConfig = TrainCheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()
    logging: ProgressConfig = ProgressConfig()

    def graded_sets(self) -> GradedSets:
        """All data sets, with how they are graded."""
        sets: dict[str, tuple[SourceConfig, RewardConfig]] = {**self.data.graded(self.reward)}
        for name, part in self.evaluation.sets.items():
            sets[HELD_OUT + name] = part, part.reward or sets.get(name, (part, self.reward))[1]
        return sets

    def find_mistakes(self) -> Iterator[str]:
        """What does not fit together."""
        if self.mode == "offline" and self.offline is None:
            yield "mode=offline: the section offline is missing; name its rounds (docs/offline.md)"
        elif self.mode != "offline" and self.offline is not None:
            yield f"mode={self.mode}: the section offline is for mode=offline alone; remove it"
        elif self.offline is not None and self.data.is_endless:
            whose = "Several data sets have" if self.data.sets else "A built-in task has"
            for i, data in enumerate(self.offline.rounds):
                if data.log is None and data.prompts is None:
                    yield f"offline.rounds.{i}.prompts: how many? {whose} no end"
        if self.profile.steps and self.profile.steps[-1] > self.run.steps:
            yield f"profile.steps: step {self.profile.steps[-1]} is after the last one, run.steps={self.run.steps}"
        yield from _rounding_problems(self.model, self.lora)
        batch, group_size = self.learner.batch_rollouts, self.sampler.group_size
        if batch % group_size:
            yield (
                f"learner.batch_rollouts={batch} is not a multiple of sampler.group_size={group_size};"
                f" nearest: {max(1, (batch + (group_size - 1) // 2) // group_size) * group_size}"
            )
        elif batch // group_size % self.learner.updates_per_batch:
            yield (
                f"learner.updates_per_batch={self.learner.updates_per_batch} does not divide the {batch // group_size} groups"
                " of a batch (learner.batch_rollouts / sampler.group_size)"
            )
        if self.mode == "detached" and self.sampler.dtype == "int8":
            yield "sampler.dtype=int8: a published policy has float32 or bfloat16; choose one of them"
        best, most = self.checkpoint.keep_best, min(self.evaluation.samples, self.evaluation.final_samples)
        known = [f"pass@{2**i}" for i in range(most.bit_length())]
        if best is not None and not (best.startswith("evaluation/") and best.rpartition("/")[2] in known):
            yield f"checkpoint.keep_best={best}: an evaluation has evaluation/{', evaluation/'.join(known)}"
        yield from _line_problems(self.graded_sets(), self.sampler)
        window, ahead, groups_per_step = self.window, self.window.max_groups_ahead, -(-batch // group_size)
        if ahead is not None and ahead < groups_per_step:
            yield f"window.max_groups_ahead={ahead} is below the {groups_per_step} groups of one learner step"
        if window.sync_every % window.epochs:
            yield f"window.epochs={window.epochs} does not divide window.sync_every={window.sync_every}"
        if window.epochs > 1 and window.max_uses > 1:
            yield f"window.epochs={window.epochs} and max_uses={window.max_uses}: set one of them"
        others = {"epochs": window.epochs > 1, "max_uses": window.max_uses > 1, "imports": window.imports is not None}
        for name in (name for name, is_set in others.items() if is_set and window.max_version_lag):
            yield f"window.max_version_lag={window.max_version_lag} and {name}={getattr(window, name)}: set one of them"
        fresh = window.sync_every // window.epochs * groups_per_step
        if window.min_groups > min(fresh, fresh if ahead is None else ahead):
            yield (
                f"window.min_groups={window.min_groups} is more than the window's {fresh} new groups, or than"
                f" max_groups_ahead={ahead}: the first step would never begin"
            )


class GenerationConfig(Section):
    """How much is generated, and how processes share the work."""

    prompts: Count | None = None
    """Number of prompts of the data, drawn by ``run.seed``; null: all. Required for built-in tasks, which have no end."""
    policy_version: CountOrZero = 0
    """Version under which the groups are logged."""
    groups_per_file: Count = 8
    """Groups of a file: what one process claims, and what a kill can lose. 1 for very long responses."""
    lease_seconds: Positive = 30.0
    """Silence after which another process takes over what one has claimed; one that died on the same host loses it at
    once."""
    deadline: Positive = 7200.0
    """Seconds that a process without work waits for a file of the others before it stops with an explanation."""
    published: str | None = None
    """Parquet file in the layout of the paper's authors, written at the end from what ``filter`` leaves; null: none."""


class GenerateConfig(Section):
    """``oapl-jax generate``: responses of a policy to the prompts of a dataset."""

    run: RunDirConfig
    model: ModelConfig
    data: DataConfig
    sampler: SamplerConfig
    reward: Reward = RewardConfig()
    generation: GenerationConfig = GenerationConfig()
    filter: FilterConfig = FilterConfig()
    mesh: MeshConfig = MeshConfig()
    logging: ProgressConfig = ProgressConfig()

    def graded_sets(self) -> GradedSets:
        """All data sets, with how they are graded."""
        return self.data.graded(self.reward)

    def find_mistakes(self) -> Iterator[str]:
        """A number of prompts where the data have no end."""
        if self.data.task is not None and self.generation.prompts is None:
            yield f"generation.prompts: how many prompts? The built-in task {self.data.task!r} has no end"
        elif tasks := [part.task for part in self.data.sets.values() if part.task is not None]:
            yield f"data.sets: the built-in task {tasks[0]!r} has no end; generate its responses by themselves"
        else:
            yield from inert_weights(self.data.sets, "data.sets")
            yield from _line_problems(self.graded_sets(), self.sampler)


class SftConfig(Section):
    """``oapl-jax sft``: supervised fine-tuning, the toy models' warm start."""

    run: RunConfig
    model: ModelConfig
    data: SftDataConfig
    learner: LearnerConfig = LearnerConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: ProgressConfig = ProgressConfig()

    def find_mistakes(self) -> Iterator[str]:
        """Weights that cannot learn."""
        return _rounding_problems(self.model, self.lora)


def _rounding_problems(model: ModelConfig, lora: LoraConfig) -> Iterator[str]:
    if model.param_dtype != "float32" and not lora.rank:
        yield (
            f"model.param_dtype={model.param_dtype}: trained weights would lose small updates in rounding; use float32"
            " with model.compute_dtype=bfloat16, or train adapters (lora.rank)"
        )


def _line_problems(sets: GradedSets, sampler: EngineConfig) -> Iterator[str]:
    is_in_lines = any(source.task == "sums" and source.sums.form == "text" for source, _ in sets.values())
    if is_in_lines and "\n" not in sampler.stop_strings:
        yield 'sampler.stop_strings: lacks "\\n", which ends the answers of task=sums as text; set it to ["\\n"]'


class EvaluateConfig(Section):
    """``oapl-jax evaluate``: pass@k of a policy on benchmarks. ``model.path`` may be a run directory."""

    run: EvaluateRunConfig
    model: ModelConfig
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    data: DataConfig | None = None
    """Problems that are no published data set, as in a run: a task or a file."""
    sampler: EvaluateSamplerConfig = EvaluateSamplerConfig()
    reward: Reward = RewardConfig()
    """Options of the graders; for ``benchmarks.names`` the function is the data set's own, whatever ``functions`` says."""
    mesh: MeshConfig = MeshConfig()
    logging: ProgressConfig = ProgressConfig()

    def find_mistakes(self) -> Iterator[str]:
        """One source."""
        if bool(self.benchmarks.names) == (self.data is not None):
            yield "give exactly one of benchmarks.names and the section data"
        elif self.data is not None:
            yield from inert_weights(self.data.sets, "data.sets")
            yield from _line_problems(self.data.graded(self.reward), self.sampler)

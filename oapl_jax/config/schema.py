"""The typed configuration of every command: frozen pydantic models, which say what is wrong with a value.

``config_file.py`` reads them from YAML files and command lines.
"""

import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
_AXIS, _SAMPLER_AXIS = (f"(({names})=(-1|[1-9][0-9]*))" for names in ("data|fsdp|context|tensor", "data|fsdp|tensor"))
MeshAxes = Annotated[str, Field(pattern=rf"^{_AXIS}(,{_AXIS})*$")]
"""A mesh as words, e.g. ``fsdp=4`` or ``data=2,tensor=4``; -1 means "all devices that are left"."""
SamplerAxes = Annotated[str, Field(pattern=rf"^{_SAMPLER_AXIS}(,{_SAMPLER_AXIS})*$")]
"""The same without ``context``: a decode step has one token of a sequence, which nothing can split."""


CodeStatus = Literal[
    "accepted",
    "wrong_answer",
    "time_limit",
    "memory_limit",
    "output_limit",
    "runtime_error",
    "compile_error",
]
"""What may become of a program on a test."""
CODE_OPTIONS = {
    *("exec_mode", "code_reward", "status_rewards", "cpu_seconds", "wall_seconds", "memory_mb"),
    *("isolation", "packages", "python"),
}
"""Fields of the section ``reward`` that only programs need."""

WITHOUT_SAMPLER = ("sft", "rloo", "rloo_grpo", "rloo_exp")
"""Objectives that do not use the sampler's log-probabilities."""


MathDataset = Literal["aime2025", "brumo2025", "deepscaler", "gsm8k", "hmmt_feb_2025", "hmmt_nov_2025", "math500"]
CodeDataset = Literal["apps", "apps_plus", "deepcoder", "humaneval", "livecodebench", "mbpp", "taco"]
DatasetName = MathDataset | CodeDataset
"""Published data sets that are known by name (``data/catalogue.py``), by the reward function that grades them."""


IN_EVERY_MODE = {"deadline", "parity_tolerance", "lease_seconds", "sync_chunk_mib"}
"""Fields of the section ``window`` that offline training has a use for too."""


class Section(BaseModel):
    """Base of every config section: frozen, unknown keys refused, defaults validated."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, strict=False
    )

    def changed_from_default(self) -> set[str]:
        """Fields that were given another value than their default: a saved config gives them all."""
        fields = type(self).model_fields
        return {name for name in self.model_fields_set if getattr(self, name) != fields[name].default}


class RunDirConfig(Section):
    """What a run is called, and what it may overwrite."""

    dir: str
    """Run directory: holds the whole state of the run; the same command again resumes from it."""
    seed: CountOrZero = 0
    """Root of every random stream: weights, prompt order, sampling."""
    shared_dir: str | None = None
    """mode detached: where policies, rollouts and leases are, which samplers need; a folder, ``gs://`` or ``s3://``;
    null: in ``dir``."""
    allow_config_change: bool = False
    """Resume in a run directory that was started with another config."""
    compile_cache: str | None = "~/.cache/oapl_jax"
    """Folder of compiled programs, for all runs on GPUs and TPUs: a second start compiles nothing anew; null: none."""


class RunConfig(RunDirConfig):
    """And how long it lasts."""

    steps: Count
    """Learner steps in all."""


class ModelConfig(Section):
    """Which policy is trained. Exactly one of ``path``, ``config`` and ``warm_start``."""

    path: str | None = None
    """Hugging Face model folder, or the name of one on the hub."""
    config: str | None = None
    """Hugging Face ``config.json`` of a model that is built with random weights."""
    warm_start: str | None = None
    """Config of ``oapl_jax.sft``; its model is the start, made first where it does not exist yet."""
    tokenizer: str = "model"
    """``model``: the tokenizer in ``path``; ``characters``: the toy tasks' own; else a folder or hub name."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products; softmax, norms, losses and reductions are float32 always."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights; bfloat16 only where they are frozen (``lora.rank``) or evaluated. Trained ones and the
    optimizer state are float32, because steps of 1e-6 vanish in bfloat16's rounding."""
    remat: Literal["none", "layer", "names", "offload"] = "none"
    """What the backward pass computes anew. none: nothing, all activations are kept; layer: all of a layer but its input;
    names: all but ``remat_names``; offload: the same, and these are kept in the host's memory."""
    remat_names: tuple[str, ...] = ()
    """For ``names`` and ``offload``: of layer_input, query, key, value, attention, gate, up."""
    attention: Literal["xla", "splash", "cudnn", "triton"] | None = None
    """Attention of training rows: plain XLA, the TPU's Pallas kernel, cuDNN's or Triton's on GPUs; null: the device's
    own."""
    scan_layers: bool = True
    """False: a Python loop over layers, for debugging."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        given = [name for name in ("path", "config", "warm_start") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, config, warm_start; got {', '.join(given) or 'none'}")
        if self.tokenizer == "model" and self.config is not None:
            raise ValueError("tokenizer: a model built from a bare config has none; name one, or 'characters'")
        if (self.remat in ("names", "offload")) != bool(self.remat_names):
            raise ValueError(
                f"remat_names={list(self.remat_names)} with remat={self.remat}: give names exactly with names and offload"
            )
        return self


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""A matrix of each layer, by Hugging Face's name."""


class LoraConfig(Section):
    """Low-rank adapters, trained in the place of the weights. Precision: ``model.param_dtype`` is of the frozen weights."""

    rank: CountOrZero = 0
    """Rank of an adapter; 0: no adapters, all weights are trained."""
    alpha: Positive = 32.0
    """An adapter's product is multiplied by alpha / rank."""
    targets: Annotated[tuple[LoraTarget, ...], Field(min_length=1)] = get_args(LoraTarget)
    """Matrices that get an adapter."""

    @model_validator(mode="after")
    def _no_inert(self) -> "LoraConfig":
        inert = {"alpha", "targets"} & self.changed_from_default() if self.rank == 0 else set()
        if inert:
            raise ValueError(f"{', '.join(sorted(inert))}: has no effect with rank=0; give a rank or remove it")
        return self


class DataConfig(Section):
    """Where prompts come from. Exactly one of ``task``, ``dataset`` and ``path``; ``dataset`` may have a ``path``."""

    task: Literal["chain", "countdown"] | None = None
    """A built-in toy task; prompts, split and reward come with it."""
    dataset: DatasetName | None = None
    """A published data set by name; its columns and its template come with it. From the hub, or from a copy at ``path``."""
    path: str | None = None
    """File, folder, or name of a dataset on the hub or in TFDS."""
    format: Literal["jsonl", "parquet", "datasets", "tfds"] = "jsonl"
    """How ``path`` is read."""
    name: str | None = None
    """Configuration of a ``datasets`` dataset (GSM8K's is ``main``)."""
    split: str = "train"
    """Split, for ``datasets`` and ``tfds``."""
    prompt_column: str = "prompt"
    """Column of the question."""
    answer_column: str = "answer"
    """Column of the gold answer."""
    template: str = "{prompt}"
    """What the user message says; ``{prompt}`` is the question."""
    system: str | None = None
    """System message of the chat template; null: the template's own default."""
    max_prompt_tokens: Count = 1024
    """Limit of a tokenised prompt."""
    overlong: Literal["drop", "error"] = "drop"
    """What happens to a prompt over the limit: dropped and counted, or an error."""

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if self.dataset is not None:
            return self._of_dataset()
        if (self.task is None) == (self.path is None):
            raise ValueError("give exactly one of task, dataset and path")
        if self.task is not None:
            inert = sorted(self.changed_from_default() - {"task", "max_prompt_tokens", "overlong"})
            if inert:
                raise ValueError(f"{', '.join(inert)}: has no effect on the built-in task {self.task!r}; remove it")
        without = {"jsonl": {"name", "split"}, "parquet": {"name", "split"}, "tfds": {"name"}}.get(self.format, set())
        inert = sorted(self.changed_from_default() & without)
        if inert:
            raise ValueError(f"{', '.join(inert)}: has no effect with format={self.format}; remove it")
        return self

    def _of_dataset(self) -> "DataConfig":
        inert = sorted({"task", "format", "prompt_column", "answer_column"} & self.changed_from_default())
        if inert:
            raise ValueError(f"{', '.join(inert)}: has no effect with dataset={self.dataset}; remove it")
        return self


class RewardConfig(Section):
    """How responses are graded (built-in tasks grade themselves and need none of this; docs/rewards.md)."""

    functions: Annotated[dict[str, float], Field(min_length=1)] = {"math": 1.0}
    """Reward functions and their weights: ``math``, ``code``, or ``package.module:function``. The reward is the weighted
    sum; whether the response is correct is the verdict of the first."""
    workers: Count = 2
    """Grading processes."""
    timeout: Positive = 5.0
    """Seconds that one answer, or one call of a function of yours, may take before its worker is killed and the verdict
    is invalid. Programs have limits of their own."""
    retries: CountOrZero = 1
    """How often an invalid verdict is tried again, after half a second, one second, two, ..."""
    gold: Literal["whole", "last_hash"] = "whole"
    """math: where the gold answer stands in its column: all of it, or after the last ``####`` (GSM8K)."""
    answer: Literal["boxed", "hash", "any"] = "any"
    """math: where the answer stands: in the last box, after ``####`` in the last line, or in the box, the ``####`` or
    the last lines, whichever is there first."""
    exec_mode: Literal["script", "lcb"] = "script"
    """code: programs with text tests run as ``python file.py``, or in LiveCodeBench's harness, to compare with it."""
    code_reward: Literal["all", "fraction", "status"] = "all"
    """code: 1 where all tests pass, else 0; the fraction that passes; or by what became of the first that does not."""
    status_rewards: dict[CodeStatus, float] = {"accepted": 1.0}
    """code, with ``code_reward: status``: the reward of each outcome; 0 for those that are not named."""
    cpu_seconds: Positive = 6.0
    """code: CPU time of one test."""
    wall_seconds: Positive = 15.0
    """code: time of one test by the clock; well above the CPU time, or rewards depend on how busy the machine is."""
    memory_mb: Count = 1024
    """code: memory of one test."""
    isolation: Literal["namespaces", "uid", "landlock"] = "namespaces"
    """code: the weakest level of the sandbox that is accepted (``python -m oapl_jax check-sandbox``)."""
    packages: list[str] = []
    """code: packages that programs may import besides the standard library; loaded before the first test."""
    python: str | None = None
    """code: interpreter of the programs, of our own version; null: ours, or a system one where it cannot be reached."""
    format_pattern: str | None = None
    """Regular expression to be found in responses of the right form."""
    format_bonus: float = 0.0
    """Added to the reward of a finished response in which ``format_pattern`` is found."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken off the reward for every 1,000 characters of a response beyond ``length_free``."""
    length_free: CountOrZero = 0
    """Characters without a penalty."""

    @model_validator(mode="after")
    def _no_inert(self) -> "RewardConfig":
        problems = []
        for name in self.functions:
            if name not in ("math", "code") and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
                problems.append(f"functions: {name!r} is not math, code, or package.module:function")
        changed = self.changed_from_default()
        inert = {
            "functions without math": {"gold", "answer"} if "math" not in self.functions else set(),
            "functions without code": CODE_OPTIONS if "code" not in self.functions else set(),
            "code_reward other than status": {"status_rewards"} if self.code_reward != "status" else set(),
            "format_bonus=0": {"format_pattern"} if self.format_bonus == 0 else set(),
            "length_penalty=0": {"length_free"} if self.length_penalty == 0 else set(),
        }
        for reason, names in inert.items():
            for name in sorted(names & changed):
                problems.append(f"{name}: has no effect with {reason}; remove it")
        if self.format_bonus and self.format_pattern is None:
            problems.append("format_bonus: needs format_pattern")
        try:
            re.compile(self.format_pattern or "")
        except re.error as error:
            problems.append(f"format_pattern: {self.format_pattern!r} is not a regular expression: {error}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class SamplerConfig(Section):
    """How rollouts are drawn."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """G: rollouts per prompt; V* of a single rollout is its reward, so 1 teaches nothing."""
    max_response_tokens: Count
    """Limit of a response."""
    temperature: Positive = 1.0
    """Temperature of the sampled distribution; the learner's log-probabilities use the same."""
    top_k: CountOrZero = 0
    """Keep the k likeliest tokens; 0: all."""
    top_p: Fraction = 1.0
    """Keep the smallest set of likeliest tokens with at least this mass; 1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Keep tokens at least so likely as this fraction of the likeliest; 0: all."""
    groups_in_flight: Count = 16
    """Groups decoded at once: groups_in_flight x group_size rows, over all replicas."""
    decode_steps: Count = 32
    """Most tokens of a rollout decoded per call to the device."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Precision of the sampler's weights, products and cache. int8: of its matrices, with a scale for each output
    channel; products and cache then have ``model.compute_dtype``."""
    kv_dtype: Literal["int8"] | None = None
    """int8: keys and values of the cache, with a scale for each token and head; read by plain XLA, slower than the TPU's
    kernel. null: the cache has the precision of the products."""
    kv_memory: Fraction = 0.8
    """Most of a replica's free memory that its KV cache may take; never more than the rows need at full length."""


class ObjectiveConfig(Section):
    """The loss (paper section 3)."""

    name: Literal["oapl", "grpo", "gspo", "sft", "rloo", "rloo_grpo", "rloo_exp"] = "oapl"
    """oapl: the paper's squared regression; grpo: the paper's baseline, with importance sampling; gspo: a clipped ratio of
    whole sequences. Those that need no sampler log-probabilities: sft: imitate the correct responses; rloo: REINFORCE
    with the leave-one-out advantage; rloo_grpo: with GRPO's; rloo_exp: with the exponential of GRPO's."""
    beta1: Positive = 1.0
    """Temperature of V* (Eq. 2)."""
    beta2: Positive = 1e-3
    """Weight of the log-ratio (Eq. 3); shrinks with response length: about 0.1 for 6 tokens, 1e-3 for thousands."""
    clip_low: Positive = 3e-4
    """gspo: how far below 1 the ratio counts."""
    clip_high: Positive = 4e-4
    """gspo: how far above 1 the ratio counts."""
    drop_equal_reward_groups: bool = False
    """Leave out groups whose rewards are all equal. Not a no-op in OAPL: they pull to the sampler."""

    @model_validator(mode="after")
    def _no_inert(self) -> "ObjectiveConfig":
        options = {"oapl": {"beta1", "beta2"}, "gspo": {"clip_low", "clip_high"}}
        others = set().union(*(names for name, names in options.items() if name != self.name))
        inert = others & self.changed_from_default()
        if inert:
            raise ValueError(f"{', '.join(sorted(inert))}: has no effect with name={self.name}; remove it")
        return self


class LearnerConfig(Section):
    """The optimizer (AdamW) and the batch."""

    batch_rollouts: Count = 128
    """Rollouts per learner step; a multiple of the group size."""
    row_tokens: Count | None = None
    """Rollouts are packed into rows of so many tokens; null: a row holds one rollout and padding. The gradient is the
    same."""
    micro_batch_rows: Count | None = None
    """Rows per forward and backward pass; null: the whole batch. The gradient is the same."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Peak learning rate; 0: nothing is learned, to check a set-up by ``learner/log_ratio_abs``."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine down to a tenth at the last step."""
    adam_b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    adam_b2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of Adam's second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW's decoupled weight decay."""
    clip_norm: Positive = 1e-3
    """Limit of the gradient's global norm."""
    moment_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of Adam's first moment; null: that of the weights. The second has the weights' always."""


class WindowConfig(Section):
    """The time between two weight syncs."""

    sync_every: Count = 50
    """Learner steps in a window (the paper's L)."""
    order: Literal["index", "ready"] = "index"
    """index: the learner takes groups in the order of their prompts, so that a run depends on its seed only and slow
    groups are not left behind; ready: as they are finished, so that it never waits for a slow one."""
    epochs: Count = 1
    """Passes over a window's groups: the first ``sync_every / epochs`` steps take new groups, each later pass the same
    ones in another order."""
    max_uses: Count = 1
    """How often a group may be trained on where new ones are lacking: a step that would wait takes used ones again."""
    min_groups: CountOrZero = 0
    """Groups that must be ready before the first step of a window; 0: those of that step."""
    unfinished: Literal["abort", "finish"] = "abort"
    """Groups in progress at a sync. Both drop them; abort: at once; finish: they go on with the old weights, and are
    logged, before the first group of the new version is begun."""
    max_groups_ahead: Count | None = None
    """Groups that the sampler may be ahead of the learner; null: the rest of the window."""
    sync_chunk_mib: Count = 1024
    """MiB that a device needs at a sync beside the old and the new weights, about: they are copied in such chunks."""
    deadline: Positive = 1800.0
    """Seconds that the learner waits for groups before it stops with an explanation."""
    keep_checkpoints: bool = False
    """Save after each sync, and keep that checkpoint for good."""
    shard_groups: Count = 8
    """Samplers in other processes: groups that one leases at once and writes as one file."""
    lease_seconds: Positive = 30.0
    """Seconds without a beat after which a process counts as gone: others take over its shards, or its run."""
    parity_tolerance: Positive = 1e-3
    """Largest mean difference in nats a token between a freshly synced sampler and the learner, before step 1. The toy
    model measures 3e-7 with a float32 sampler, 2.5e-3 with bfloat16, 2.9e-3 with int8 and 3.3e-3 with an int8 cache
    too: give these 1e-2."""


class MeshConfig(Section):
    """Device meshes. ``sampler: null`` is colocated (one mesh); else the sampler has devices of its own."""

    trainer: MeshAxes = "fsdp=-1"
    """Axes of the trainer's mesh."""
    sampler: SamplerAxes | None = None
    """Axes of the sampler's own mesh, on the devices after the trainer's."""


class CheckpointConfig(Section):
    """When the run is saved."""

    every: Count = 50
    """Learner steps between checkpoints."""
    keep: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: CountOrZero = 0
    """Those of steps that it divides are kept for good; 0: none."""


class EvaluationConfig(Section):
    """pass@k on held-out prompts: before, during and after training."""

    path: str | None = None
    """Held-out prompts, in the format and columns of ``data``; the toy tasks bring their own."""
    dataset: DatasetName | None = None
    """Held-out prompts of another data set than ``data.dataset``, from the hub or from a copy at ``path``."""
    split: str = "test"
    """Split, for ``datasets`` and ``tfds``."""
    every: CountOrZero = 50
    """Learner steps between evaluations in the course of training; 0: none."""
    prompts: Count = 128
    """Held-out prompts."""
    samples: Count = 16
    """Samples per prompt in the course of training."""
    final_samples: Count = 64
    """Samples per prompt before and after."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Temperature of evaluation samples; 0: greedy."""
    top_k: CountOrZero = 0
    """Top-k of evaluation samples; 0: all."""
    top_p: Fraction = 1.0
    """Top-p of evaluation samples; 1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Min-p of evaluation samples; 0: all."""


class LoggingConfig(Section):
    """Where metrics go besides ``metrics.jsonl``."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str | None = None
    """Weights & Biases project; needs ``pip install wandb``."""
    progress: bool = True
    """A live progress bar on a terminal; one line a step elsewhere."""


class FilterConfig(Section):
    """Which groups of a rollout log are used. What is dropped is counted, by reason."""

    finished_only: bool = False
    """Leave out responses that were cut at the limit, and groups with fewer than two others."""
    min_correct: CountOrZero = 0
    """Fewest correct responses of a group."""
    max_correct: CountOrZero | None = None
    """Most correct responses of a group; null: any number."""
    prompts: Count | None = None
    """Of the groups that are left, those of so many prompts, drawn by ``run.seed``; null: all."""


class RoundConfig(Section):
    """A round of offline training: some data, some epochs over it."""

    log: str | None = None
    """Finished data: a folder of rollout log files, or a Parquet file (or a folder of them) in the layout of the paper's
    authors; null: generated with the policy that the round starts from."""
    prompts: Count | None = None
    """Prompts that are generated for; null, with a dataset: all."""
    epochs: Count = 1
    """Passes over the data, each in an order of its own."""
    scorer: str | None = None
    """Model that made the data, where these lack log-probabilities; null: the policy that the round starts from."""
    filter: FilterConfig = FilterConfig()
    """Which groups are used."""

    @model_validator(mode="after")
    def _no_inert(self) -> "RoundConfig":
        inert = {"prompts"} if self.log is not None else {"scorer"}
        if inert := sorted(inert & self.changed_from_default()):
            raise ValueError(f"{inert[0]}: has no effect {'with' if self.log else 'without'} log; remove it")
        return self


class OfflineConfig(Section):
    """Training on finished data, round by round (docs/offline.md)."""

    rounds: Annotated[tuple[RoundConfig, ...], Field(min_length=1)]
    """Each starts from what the one before has learned."""
    logprobs: Literal["logged", "scored"] = "logged"
    """logged: the sampler's, where the data have them, and scored ones elsewhere; scored: the learner's own of the model
    that made the data, whatever the log has."""
    overlong: Literal["drop", "cut", "error"] = "drop"
    """Responses over ``sampler.max_response_tokens``. cut: they lose the rest and with it their reward: they are wrong."""
    bad_rows: Literal["error", "drop"] = "error"
    """Rows that cannot be used (docs/offline.md lists why): an error, or dropped and counted by reason."""
    reward_range: tuple[float, float] | None = None
    """Least and largest reward that a row may have; null: any number."""
    source_limit: Count | None = None
    """Responses of so many tokens were cut when the data were made; null: none was. Where the data do not say it."""


class TrainConfig(Section):
    """``python -m oapl_jax.train``: OAPL."""

    mode: Literal["online", "detached", "offline"] = "online"
    """Who samples. online: threads of this process; detached: other processes, ``python -m oapl_jax sample``; offline:
    nobody while it trains: each round has data of its own, and ``run.steps`` is the most that the run may make."""
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    sampler: SamplerConfig
    reward: RewardConfig = RewardConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    learner: LearnerConfig = LearnerConfig()
    lora: LoraConfig = LoraConfig()
    window: WindowConfig = WindowConfig()
    offline: OfflineConfig | None = None
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        learner, group_size = self.learner, self.sampler.group_size
        problems = [*self._offline_problems(), *_rounding_problems(self.model, self.lora)]
        if learner.batch_rollouts % group_size:
            problems.append(
                f"learner.batch_rollouts={learner.batch_rollouts} is not a multiple of sampler.group_size={group_size};"
                f" nearest: {max(1, round(learner.batch_rollouts / group_size)) * group_size}"
            )
        needed = -(-learner.batch_rollouts // group_size)
        ahead = self.window.max_groups_ahead
        if ahead is not None and ahead < needed:
            problems.append(f"window.max_groups_ahead={ahead} is below the {needed} groups of one learner step")
        window = self.window
        fresh = window.sync_every // window.epochs * needed
        if window.sync_every % window.epochs:
            problems.append(f"window.epochs={window.epochs} does not divide window.sync_every={window.sync_every}")
        if window.epochs > 1 and window.max_uses > 1:
            problems.append(f"window.epochs={window.epochs} and max_uses={window.max_uses}: set one of them")
        if window.min_groups > min(fresh, fresh if ahead is None else ahead):
            problems.append(
                f"window.min_groups={window.min_groups} is more than the window's {fresh} new groups, or than"
                f" max_groups_ahead={ahead}: the first step would never begin"
            )
        if self.data.task is not None and self.evaluation.path is not None:
            problems.append(
                "evaluation.path has no effect on a built-in task, which brings held-out prompts; remove it"
            )
        if self.data.task is not None and self.evaluation.dataset is not None:
            problems.append("evaluation.dataset has no effect on a built-in task; remove it")
        for place, name in (("data", self.data.dataset), ("evaluation", self.evaluation.dataset)):
            kind = reward_of(name) if name else None
            if kind is not None and kind not in self.reward.functions:
                problems.append(f"{place}.dataset={name} is graded by {kind}; set reward.functions={{{kind}: 1.0}}")
        is_named = self.data.dataset is not None or self.evaluation.dataset is not None
        if (
            not is_named
            and self.data.format in ("jsonl", "parquet")
            and "split" in self.evaluation.changed_from_default()
        ):
            problems.append("evaluation.split has no effect on files and built-in tasks; remove it")
        problems += _reward_problems(self.data, self.reward)
        problems += self._inert_for_mode()
        _raise_all(problems)
        return self

    def _inert_for_mode(self) -> list[str]:
        """What this mode has no use for."""
        if self.mode == "detached":
            inert = {"window": {"max_groups_ahead", "unfinished"}}
        elif self.mode == "offline":
            inert = {"run": {"shared_dir"}, "window": set(WindowConfig.model_fields) - IN_EVERY_MODE}
        else:
            inert = {"run": {"shared_dir"}}
        problems = [
            f"{section}.{name}: has no effect with mode={self.mode}; remove it"
            for section, names in inert.items()
            for name in sorted(names & getattr(self, section).changed_from_default())
        ]
        if self.mode == "detached" and self.sampler.dtype == "int8":
            problems.append("sampler.dtype=int8: a published policy has float32 or bfloat16; choose one of them")
        return problems

    def _offline_problems(self) -> list[str]:
        if (self.mode == "offline") != (self.offline is not None):
            return [f"mode={self.mode}: the section offline is there exactly with mode=offline"]
        if self.offline is None:
            return []
        problems = []
        for i, data in enumerate(self.offline.rounds):
            if data.log is None and data.prompts is None and self.data.task is not None:
                problems.append(f"offline.rounds.{i}.prompts: how many? The task {self.data.task!r} has no end")
        return problems


class GenerationConfig(Section):
    """How much is generated, and how processes share the work."""

    prompts: Count | None = None
    """So many prompts of the data, drawn by ``run.seed``; null: all. Required for the toy tasks, which have no end."""
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
    """``python -m oapl_jax generate``: responses of a policy to the prompts of a dataset."""

    run: RunDirConfig
    model: ModelConfig
    data: DataConfig
    sampler: SamplerConfig
    reward: RewardConfig = RewardConfig()
    generation: GenerationConfig = GenerationConfig()
    filter: FilterConfig = FilterConfig()
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "GenerateConfig":
        problems = []
        if self.data.task is not None and self.generation.prompts is None:
            problems.append(f"generation.prompts: how many prompts? The built-in task {self.data.task!r} has no end")
        problems += _reward_problems(self.data, self.reward)
        _raise_all(problems)
        return self


class SftDataConfig(Section):
    """Pairs of prompt and response. Exactly one of ``task`` and ``path``."""

    task: Literal["chain", "countdown"] | None = None
    """A built-in toy task's demonstrations."""
    path: str | None = None
    """JSONL file with a prompt and a response in each row."""
    prompt_column: str = "prompt"
    """Column of the prompt."""
    response_column: str = "response"
    """Column of the response."""
    system: str | None = None
    """System message of the chat template; null: the template's own default."""
    max_prompt_tokens: Count = 1024
    """Limit of a tokenised prompt."""
    max_response_tokens: Count = 1024
    """Limit of a tokenised response."""
    overlong: Literal["drop", "error"] = "drop"
    """What happens to a row over a limit: dropped and counted, or an error."""

    @model_validator(mode="after")
    def _one_source(self) -> "SftDataConfig":
        if (self.task is None) == (self.path is None):
            raise ValueError("give exactly one of task and path")
        inert = {"prompt_column", "response_column", "system"} & self.changed_from_default()
        if self.task is not None and inert:
            raise ValueError(f"{', '.join(sorted(inert))}: has no effect on the built-in task {self.task!r}; remove it")
        return self


def _rounding_problems(model: ModelConfig, lora: LoraConfig) -> list[str]:
    if model.param_dtype == "float32" or lora.rank:
        return []
    return [
        f"model.param_dtype={model.param_dtype}: trained weights would lose small updates in rounding; use float32 with"
        " model.compute_dtype=bfloat16, or train adapters (lora.rank)"
    ]


class SftConfig(Section):
    """``python -m oapl_jax sft``: supervised fine-tuning, the toy models' warm start."""

    run: RunConfig
    model: ModelConfig
    data: SftDataConfig
    learner: LearnerConfig = LearnerConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _trains_in_float32(self) -> "SftConfig":
        if problems := _rounding_problems(self.model, self.lora):
            raise ValueError(problems[0])
        return self


class EvaluateRunConfig(Section):
    """Where an evaluation lies, and what of a run it evaluates."""

    dir: str
    """Directory of the evaluation: its samples (a rollout log), tables and pictures; the same command again goes on."""
    label: str | None = None
    """Name of the policy in tables and pictures; null: the last part of ``model.path``, of an export the run's."""
    step: CountOrZero | None = None
    """Checkpoint, where ``model.path`` is a run directory; null: the newest."""
    seed: CountOrZero = 0
    """Root of the random streams; the same seed draws the same random numbers for every policy."""
    watch_deadline: Positive = 3600.0
    """With ``--watch``: seconds to wait for the next version of a run that has not ended."""
    allow_config_change: bool = False
    """Go on in a directory that was started with another config: its samples are kept."""
    compile_cache: str | None = "~/.cache/oapl_jax"
    """Folder of compiled programs, as in a run."""


class BenchmarksConfig(Section):
    """Which problems. Exactly one of ``names`` and the section ``data``."""

    names: tuple[DatasetName, ...] = ()
    """Published data sets, from the hub unless there is a copy in ``folder``."""
    folder: str | None = None
    """Folder of local copies: NAME.jsonl, NAME.json, NAME.jsonl.gz, NAME.parquet, or a folder NAME."""
    split: str = "test"
    """Split of each of ``names``."""
    problems: Count | None = None
    """The first so many of each; null: all, and 128 of a built-in task, which has no end."""
    max_prompt_tokens: Count = 4096
    """Limit of a tokenised prompt of ``names``; a longer one is an error."""


class EvaluateSamplerConfig(Section):
    """How samples are drawn; the defaults are the paper's for mathematics."""

    samples: Count = 10
    """n: samples of each problem (the paper: 10, and 20 of LiveCodeBench)."""
    max_response_tokens: Count = 16_384
    """Limit of a response (the paper: 16,384, and 65,536 of LiveCodeBench)."""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """Temperature; 0: greedy."""
    top_k: CountOrZero = 0
    """Top-k; 0: all."""
    top_p: Fraction = 0.95
    """Top-p; 1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Min-p; 0: all."""
    rows: Count = 64
    """Samples that are decoded at once, over all replicas."""
    decode_steps: Count = 32
    """Most tokens of a sample decoded per call to the device."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """As ``sampler.dtype`` of a run."""
    kv_dtype: Literal["int8"] | None = None
    """As ``sampler.kv_dtype`` of a run."""
    kv_memory: Fraction = 0.8
    """As ``sampler.kv_memory`` of a run."""


class EvaluateConfig(Section):
    """``python -m oapl_jax evaluate``: pass@k of a policy on benchmarks. ``model.path`` may be a run directory."""

    run: EvaluateRunConfig
    model: ModelConfig
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    data: DataConfig | None = None
    """Problems that are no published data set, as in a run: a task or a file."""
    sampler: EvaluateSamplerConfig = EvaluateSamplerConfig()
    reward: RewardConfig = RewardConfig()
    """Options of the graders; for ``benchmarks.names`` the function is the data set's own, whatever ``functions`` says."""
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _one_source(self) -> "EvaluateConfig":
        problems = []
        if bool(self.benchmarks.names) == (self.data is not None):
            problems.append("give exactly one of benchmarks.names and the section data")
        if self.data is not None:
            inert = sorted({"folder", "split", "max_prompt_tokens"} & self.benchmarks.changed_from_default())
            problems += [f"benchmarks.{name}: has no effect with the section data; remove it" for name in inert]
            problems += _reward_problems(self.data, self.reward)
        inert = sorted({"tensorboard", "wandb_project"} & self.logging.changed_from_default())
        problems += [f"logging.{name}: has no effect on an evaluation; remove it" for name in inert]
        _raise_all(problems)
        return self


def reward_of(dataset: str) -> str:
    """The reward function that grades a published data set."""
    return "code" if dataset in get_args(CodeDataset) else "math"


def _reward_problems(data: DataConfig, reward: RewardConfig) -> list[str]:
    inert = [f"reward.{name}" for name in sorted(reward.changed_from_default())]
    if data.task is None or not inert:
        return []
    return [f"{', '.join(inert)}: has no effect on the built-in task {data.task!r}, which grades itself"]


def _raise_all(problems: list[str]) -> None:
    """One error of a line per problem, which ``validate`` counts one by one."""
    if problems:
        raise ValueError("\n".join(problems))

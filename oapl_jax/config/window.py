"""The time between two weight syncs."""

from typing import Annotated, Literal

from oapl_jax.config.applies import AppliesWhen, one_of
from oapl_jax.config.section import Count, CountOrZero, Positive, Section

IN_PROCESS = AppliesWhen("mode", condition=one_of("online"))
WITH_SAMPLER = AppliesWhen("mode", condition=one_of("online", "detached"))


class WindowConfig(Section):
    """The time between two weight syncs."""

    sync_every: Annotated[Count, WITH_SAMPLER] = 50
    """Learner steps in a window (the paper's L)."""
    order: Annotated[Literal["index", "ready"], WITH_SAMPLER] = "index"
    """index: the learner takes groups in the order of their prompts, so that a run depends on its seed only and slow
    groups are not left behind; ready: as they are finished, so that it never waits for a slow one."""
    max_version_lag: Annotated[Literal[0, 1], IN_PROCESS] = 0
    """0: the groups of a window are of its own policy version. 1: the sampler goes on for the next window too, which takes
    first what the last one left; so the sampler never waits for the learner. The paper's GRPO, with ``sync_every`` 1."""
    epochs: Annotated[Count, WITH_SAMPLER] = 1
    """Passes over a window's groups: the first ``sync_every / epochs`` steps take new groups, each later pass the same
    ones in another order."""
    max_uses: Annotated[Count, WITH_SAMPLER] = 1
    """How often a group may be trained on where new ones are lacking: a step that would wait takes used ones again."""
    min_groups: Annotated[CountOrZero, WITH_SAMPLER] = 0
    """Groups that must be ready before the first step of a window; 0: those of that step."""
    unfinished: Annotated[Literal["abort", "finish"], IN_PROCESS] = "abort"
    """Groups in progress at a sync. Both drop them; abort: at once; finish: they go on with the old weights, and are
    logged, before the first group of the new version begins."""
    max_groups_ahead: Annotated[Count | None, IN_PROCESS] = None
    """Groups that the sampler may be ahead of the learner; null: the rest of the window."""
    sync_chunk_mib: Count = 1024
    """MiB of a chunk in which weights are copied at a sync; a device needs about as much beside the old and the new ones."""
    deadline: Positive = 1800.0
    """Seconds that the learner waits for groups before it stops with an explanation. Half of it after another process
    claimed groups and has written none of them, a sampler samples them too."""
    imports: Annotated[str | None, WITH_SAMPLER] = None
    """Folder of rollouts that others collected (docs/offline.md): at each sync the next file there becomes a window of its
    own; null: none."""
    keep_checkpoints: Annotated[bool, WITH_SAMPLER] = False
    """Save after each sync, and keep that checkpoint for good."""
    shard_groups: Annotated[Count, WITH_SAMPLER] = 8
    """Samplers in other processes: groups that one leases at once and writes as one file."""
    publish: Annotated[
        Literal["model", "adapters"], AppliesWhen("mode", condition=one_of("detached")), AppliesWhen("lora.rank")
    ] = "model"
    """What samplers in other processes get at a sync of a run with adapters. model: the whole model, adapters merged;
    adapters: these alone, for ``--engine vllm``, which adds them to the model in ``model.path``."""
    lease_seconds: Positive = 30.0
    """Seconds without a beat after which a process counts as gone: others take over its shards, or its run."""
    parity_tolerance: Positive = 1e-3
    """Largest mean difference in nats a token between a freshly synced sampler and the learner, before step 1. The toy
    model measures 3e-7 with a float32 sampler, 2.5e-3 with bfloat16, 2.9e-3 with int8 and 3.3e-3 with an int8 cache
    too: give these 1e-2."""

"""Several updates on a batch: mini-batches, the old policy of the batch's start, learning rate, metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import tiny
from oapl_jax.build.learner import make_learner
from oapl_jax.config.commands import SftConfig
from oapl_jax.config.data import SftDataConfig
from oapl_jax.config.learner import LearnerConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.config.model import LoraConfig, ModelConfig
from oapl_jax.config.run import RunConfig
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.learner.batch import work
from oapl_jax.learner.state import make_schedule
from oapl_jax.model import qwen
from oapl_jax.model.lora import attached, trained
from oapl_jax.objectives.catalogue import OBJECTIVES
from rollouts.groups import group

CONFIG = tiny.config("qwen3_tied")
GROUPS = [group(index) for index in range(4)]
CLIP = 0.05
KL_WEIGHT = 10.0
NO_ADAPTERS = LoraConfig()


def make(updates_per_batch, objective="grpo", mesh="fsdp=1", lora=NO_ADAPTERS, kl_weight=0.0, **options):
    objective = OBJECTIVES[objective]
    config = SftConfig(
        run=RunConfig(dir="unused", steps=3),
        model=ModelConfig(path="tiny"),
        data=SftDataConfig(path="unused", max_prompt_tokens=4),
        learner=LearnerConfig(batch_rollouts=8, micro_batch_rows=2, learning_rate=1e-2, clip_norm=1.0),
        lora=lora,
    )
    learner = make_learner(
        config,
        CONFIG,
        make_meshes(MeshConfig(trainer=mesh))[0],
        max_response_tokens=4,
        group_size=2,
        objective=objective,
        options=objective.options(**options),
        temperature=1.0,
        vocab_size=45,
        updates_per_batch=updates_per_batch,
        kl_weight=kl_weight,
    )
    return learner, learner.init(start(learner, lora))


def start(learner, lora=NO_ADAPTERS):
    """The weights of step 0: those of the tiny model, with new adapters if any."""
    params = jax.tree.map(jnp.copy, tiny.split(CONFIG)[1])
    if lora.rank:
        params = attached(params, trained(nnx.split(qwen.Qwen(CONFIG, rngs=nnx.Rngs(0), lora=lora))[1]))
    return jax.device_put(params, jax.tree.map(lambda shape: shape.sharding, learner.shapes.params))


def test_a_batch_is_split_by_groups_in_their_order():
    learner, _ = make(2)
    parts = learner.mini_batches(GROUPS)
    assert [int(part.segment_mask.sum()) for part in parts] == [4, 4]
    prompts = [source.prompt.token_ids.tolist() for source in GROUPS]
    found = [part.tokens[row, :3].tolist() for part in parts for row in (0, 2)]
    assert found == prompts


def test_the_flops_of_a_batch_are_those_of_its_tokens_however_it_is_split():
    """Six for each weight and token, and twelve for each pair of tokens, head and channel of it (forward and backward)."""
    whole, halves = make(1)[0], make(2)[0]
    parts = whole.mini_batches(GROUPS)
    tokens, pairs, scored = work(parts[0])
    embedding = CONFIG.vocab_size * CONFIG.hidden_size
    weights = CONFIG.num_params - embedding
    attention = 4 * CONFIG.num_hidden_layers * CONFIG.num_attention_heads * CONFIG.head_dim * pairs
    forward = 2 * weights * tokens + 2 * embedding * scored + attention
    assert whole.flops(parts) == pytest.approx(3 * forward)
    assert halves.flops(halves.mini_batches(GROUPS)) == pytest.approx(4 * forward), "the old policy is scored too"
    adapted = make(1, lora=LoraConfig(rank=2))[0]
    trained_weights = adapted.architecture.num_params - embedding
    assert adapted.flops(parts) == pytest.approx(
        2 * (forward - attention) + 3 * attention + 4 * (trained_weights - weights) * tokens
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=1", "fsdp=2"])
def test_the_second_update_is_clipped_against_the_policy_of_the_start(mesh):
    """Its loss is the transcription of section 2 with pi_old from before the first update."""
    learner, state = make(2, mesh=mesh, clip_low=CLIP, clip_high=CLIP)
    parts = learner.mini_batches(GROUPS)
    placed = [learner.prepare(part, state.params) for part in parts]
    old = np.asarray(placed[1].old_logprobs)
    state, first, _ = learner.train_step(state, placed[0])
    new = np.asarray(learner.score(state.params, placed[1]))
    state, metrics, _ = learner.train_step(state, placed[1])

    part, losses, num_clipped = parts[1], [], 0
    for row in range(4):
        places = np.flatnonzero(part.response_mask[row])
        log_old, log_new = (np.float64(x.reshape(part.tokens.shape)[row, places]) for x in (old, new))
        a, ratio = float(part.advantages[row, 0]), np.exp(log_new - log_old)
        gains = np.minimum(ratio * a, np.clip(ratio, 1 - CLIP, 1 + CLIP) * a)
        num_clipped += int((gains < ratio * a - 1e-9).sum())
        losses.append(-np.mean(np.exp(log_old - part.sampler_logprobs[row, places]) * gains))
    assert num_clipped > 1
    assert float(metrics["learner/loss"]) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(first["learner/learning_rate"]) == float(metrics["learner/learning_rate"])
    assert int(state.step) == 2


@pytest.mark.slow
@pytest.mark.parametrize("lora", [NO_ADAPTERS, LoraConfig(rank=2)], ids=["copy", "adapters"])
def test_the_penalty_is_the_divergence_from_the_model_of_the_start(lora):
    """In the second update, when the policy has moved; adapters need no copy of that model."""
    learner, state = make(2, "kimi", mesh="fsdp=2", lora=lora, kl_weight=KL_WEIGHT, beta2=0.1)
    assert learner.keeps_reference == (not lora.rank)
    reference = start(learner) if learner.keeps_reference else None
    parts = learner.mini_batches(GROUPS)
    state, first, _ = learner.train_step(state, learner.prepare(parts[0], state.params, reference))
    placed = learner.prepare(parts[1], state.params, reference)
    new, base = (np.asarray(learner.score(params, placed)) for params in (state.params, start(learner, lora)))
    _, metrics, _ = learner.train_step(state, placed)

    part, regressions, divergences = parts[1], [], []
    for row in range(4):
        places = np.flatnonzero(part.response_mask[row])
        log_new, log_base = (np.float64(x.reshape(part.tokens.shape)[row, places]) for x in (new, base))
        log_ratio = (log_new - part.sampler_logprobs[row, places]).sum()
        regressions.append((0.1 * log_ratio - float(part.advantages[row, 0])) ** 2)
        divergences.append(np.mean(np.exp(log_base - log_new) - (log_base - log_new) - 1))
    assert float(first["learner/reference_kl"]) == pytest.approx(0, abs=1e-7)
    assert float(metrics["learner/reference_kl"]) == pytest.approx(np.mean(divergences), rel=1e-3)
    expected = np.mean(regressions) + KL_WEIGHT * np.mean(divergences)
    assert float(metrics["learner/loss"]) == pytest.approx(expected, rel=1e-4)
    assert KL_WEIGHT * np.mean(divergences) > 1e-3 * expected, "the penalty must count"


def test_the_old_policy_is_scored_only_where_it_differs():
    assert [make(*which)[0].scores_old for which in [(1, "grpo"), (2, "grpo"), (2, "oapl")]] == [False, True, False]


def test_the_learning_rate_is_that_of_the_step():
    config = LearnerConfig(learning_rate=1.0, warmup_steps=2, schedule="cosine")
    by_step = make_schedule(config, 4)
    rates = [float(make_schedule(config, 4, 3)(update)) for update in range(12)]
    assert rates == [float(by_step(step)) for step in range(4) for _ in range(3)]
    assert rates[0] == 0.5

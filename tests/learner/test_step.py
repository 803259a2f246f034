"""The train step against NumPy and an unchunked reference; splits and meshes that must not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import tiny
from oapl_jax.config.learner import LearnerConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import TRAINER_RULES, make_meshes, shardings
from oapl_jax.learner.batch import RowLayout, from_pairs, place
from oapl_jax.learner.divergence import measure
from oapl_jax.learner.state import init_state, make_optimizer, make_schedule
from oapl_jax.learner.step import make_train_step
from oapl_jax.model import qwen
from oapl_jax.objectives import grpo, gspo, oapl, supervised
from oapl_jax.preflight import hlo

CONFIG = tiny.config("qwen3_tied")
BETA2, TEMPERATURE, VOCAB = 0.3, 0.8, 45
LEARNER = LearnerConfig(learning_rate=1e-4, clip_norm=1e9, weight_decay=0.1)
CLIPPED = LearnerConfig(learning_rate=3e-3, clip_norm=1e-2, weight_decay=0.0)
OBJECTIVES = {
    "oapl": (oapl.OBJECTIVE, oapl.OaplOptions(beta2=BETA2)),
    "grpo": (grpo.OBJECTIVE, grpo.OBJECTIVE.options()),
    "gspo": (gspo.OBJECTIVE, gspo.OBJECTIVE.options(clip_low=0.1, clip_high=0.1)),
    "supervised": (supervised.OBJECTIVE, supervised.OBJECTIVE.options()),
}


@functools.cache
def make_step(mesh="fsdp=1", learner=LEARNER, objective="oapl"):
    """The compiled step on a mesh, and a function that makes its state at step 0."""
    mesh = make_meshes(MeshConfig(trainer=mesh))[0]
    graphdef, abstract = qwen.abstract(CONFIG, mesh=mesh)
    schedule = make_schedule(learner, 10)
    optimizer = make_optimizer(learner, schedule)

    def init():
        params = jax.device_put(tiny.split(CONFIG)[1], shardings(abstract, mesh, TRAINER_RULES))
        return init_state(jax.tree.map(jnp.copy, params), optimizer, mesh)

    step = make_train_step(
        graphdef,
        optimizer,
        schedule,
        *OBJECTIVES[objective],
        temperature=TEMPERATURE,
        vocab_size=VOCAB,
        mesh=mesh,
        shardings=init()[1],
    )
    return step, lambda: init()[0], mesh


@functools.cache
def make_batch(num_pairs=6, num_rows=8, seed=0):
    """Rows of several lengths; the sampler's distribution is near the learner's."""
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(1, 5)), int(rng.integers(1, 9))) for _ in range(num_pairs)]
    pairs = [tuple(rng.integers(0, VOCAB, n).astype(np.int32) for n in size) for size in sizes]
    batch = from_pairs(
        pairs,
        RowLayout(num_rows, 16),
        sampler_logprobs=[np.zeros(n, np.float32) for _, n in sizes],
        advantages=rng.normal(size=num_pairs).tolist(),
    )
    noise = rng.normal(size=batch.tokens.shape).astype(np.float32) * batch.response_mask
    return batch._replace(sampler_logprobs=learner_logprobs(batch) + 0.2 * noise)


def score(params, batch):
    graphdef = tiny.split(CONFIG)[0]
    args = (graphdef, params, jnp.asarray(batch.tokens), jnp.asarray(batch.response_mask))
    return tuple(map(np.asarray, tiny.sequence_logprobs(*args, temperature=TEMPERATURE, vocab_size=VOCAB)))


def learner_logprobs(batch):
    return score(tiny.split(CONFIG)[1], batch)[0]


def run(batch, num_steps=1, num_micro_batches=1, **options):
    step, init, mesh = make_step(**options)
    rows, row_tokens = batch.tokens.shape
    shares = batch.prompt_ids is not None
    layout = RowLayout(rows, 16, row_tokens if shares else None, rows // num_micro_batches, mesh, shares_prompts=shares)
    placed = place(batch, layout)
    state = init()
    for _ in range(num_steps):
        state, *on_device = step(state, placed)
    metrics, scores = jax.device_get(on_device)
    return state, {name: float(value) for name, value in metrics.items()} | measure([(batch, scores)], BETA2)


def gradient(state):
    """The gradient of the first step: Adam's first moment is (1 - b1) times it."""
    (moment,) = [s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    return jax.tree.map(lambda m: np.asarray(m) / (1 - LEARNER.adam_b1), moment)


def assert_close(found, expected, atol):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


def norm(tree):
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))))


def reference_loss(batch, params):
    """OAPL over whole logits, a loop over rows and tokens."""
    logits = tiny.logits(tiny.split(CONFIG)[0], params, jnp.asarray(batch.tokens))
    distribution = jax.nn.log_softmax(logits[..., :VOCAB].astype(jnp.float32) / TEMPERATURE)
    losses = []
    for row in np.flatnonzero(batch.segment_mask[:, 0]):
        places = np.flatnonzero(batch.response_mask[row])
        ratio = sum(distribution[row, t - 1, batch.tokens[row, t]] - batch.sampler_logprobs[row, t] for t in places)
        losses.append((BETA2 * ratio - batch.advantages[row, 0]) ** 2)
    return sum(losses) / len(losses)


def reference_gradient(batch):
    return jax.jit(jax.value_and_grad(functools.partial(reference_loss, batch)))(tiny.split(CONFIG)[1])


@pytest.mark.slow
def test_metrics_equal_numpy():
    batch = make_batch()
    _, metrics = run(batch)
    logprobs, entropy = (x.astype(np.float64) for x in score(tiny.split(CONFIG)[1], batch))
    rows = batch.segment_mask[:, 0]
    ratio = ((logprobs - batch.sampler_logprobs) * batch.response_mask).sum(axis=1)[rows]
    advantages = batch.advantages[rows, 0].astype(np.float64)
    loss, reference = reference_gradient(batch)
    expected = {
        "learner/loss": np.mean((BETA2 * ratio - advantages) ** 2),
        "learner/grad_norm": norm(reference),
        "learner/log_ratio": ratio.mean(),
        "learner/log_ratio_abs": np.abs(ratio).mean(),
        "learner/log_ratio_min": ratio.min(),
        "learner/residual": np.abs(BETA2 * ratio - advantages).mean(),
        "learner/advantage_abs": np.abs(advantages).mean(),
        "learner/entropy": entropy[batch.response_mask].mean(),
        "learner/learning_rate": 1e-4,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert metrics["learner/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert abs(ratio).min() > 1e-3, "the test must have something to compare"


@pytest.mark.slow
def test_the_smallest_log_ratio_is_of_a_row_that_counts():
    batch = make_batch()
    shifted = batch._replace(sampler_logprobs=batch.sampler_logprobs - 1.0 * batch.response_mask)
    ratio = ((learner_logprobs(batch) - shifted.sampler_logprobs) * batch.response_mask).sum(axis=1)[
        batch.segment_mask[:, 0]
    ]
    assert ratio.min() > 0.1
    for splits in (1, 4):
        assert run(shifted, num_micro_batches=splits)[1]["learner/log_ratio_min"] == pytest.approx(
            ratio.min(), rel=1e-4
        )


@pytest.mark.slow
def test_the_gradient_equals_that_of_an_unchunked_reference():
    batch = make_batch()
    _, reference = reference_gradient(batch)
    assert norm(reference) > 0.1
    assert_close(gradient(run(batch)[0]), reference, atol=2e-6 * norm(reference))


@pytest.mark.slow
def test_the_gradient_is_the_slope_of_the_loss():
    """A finite difference along the gradient, in the step's own loss."""
    batch = make_batch()
    slope = gradient(run(batch)[0])
    loss = jax.jit(functools.partial(reference_loss, batch))
    size = 1e-3 / norm(slope)
    params = tiny.split(CONFIG)[1]
    ahead, behind = (jax.tree.map(lambda p, g, s=s: p + s * size * g, params, slope) for s in (1, -1))
    assert float(loss(ahead) - loss(behind)) / (2 * size) == pytest.approx(norm(slope) ** 2, rel=0.02)


@pytest.mark.slow
def test_the_update_is_adamw():
    batch = make_batch()
    state, _ = run(batch)
    g = gradient(state)

    def expected(p, g):
        p, g = np.asarray(p, np.float64), g.astype(np.float64)
        return p - 1e-4 * (g / (np.abs(g) + 1e-8) + 0.1 * p)

    assert_close(state.params, jax.tree.map(expected, tiny.split(CONFIG)[1], g), atol=1e-6)
    assert int(state.step) == 1


@pytest.mark.slow
def test_the_gradient_is_clipped_to_the_norm_and_reported_before():
    batch = make_batch()
    whole = gradient(run(batch)[0])
    state, metrics = run(batch, learner=CLIPPED)
    assert metrics["learner/grad_norm"] == pytest.approx(norm(whole), rel=1e-5)
    assert norm(gradient(state)) == pytest.approx(1e-2, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["oapl", "supervised"])
@pytest.mark.parametrize("num_pairs", [8, 6, 3])
def test_micro_batches_equal_the_whole_batch(objective, num_pairs):
    """With 3 pairs one of the four micro-batches has only rows that fill."""
    batch = make_batch(num_pairs)
    whole, metrics = run(batch, objective=objective)
    split, split_metrics = run(batch, objective=objective, num_micro_batches=4)
    g = gradient(whole)
    assert_close(gradient(split), g, atol=2e-6 * norm(g))
    # Adam's first step is a gradient over its own size: of one that is little more than rounding errors, so is the step.
    is_clear = jax.tree.map(lambda g: (np.abs(g) > 1e-6) | (g == 0), g)
    assert np.mean(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(is_clear)])) > 0.99
    clear = [jax.tree.map(lambda p, keep: np.asarray(p) * keep, state.params, is_clear) for state in (split, whole)]
    assert_close(*clear, atol=1e-6)
    assert split_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert "learner/clipped" not in metrics


@pytest.mark.slow
def test_the_clipped_share_is_that_of_the_tokens_of_all_micro_batches():
    batch = make_batch()
    lengths, advantages = batch.response_mask.sum(axis=1), batch.advantages[:, 0]
    log_ratios = ((learner_logprobs(batch) - batch.sampler_logprobs) * batch.response_mask).sum(axis=1)
    ratios = np.exp(log_ratios / np.maximum(lengths, 1))
    is_clipped = ((advantages > 0) & (ratios > 1.1)) | ((advantages < 0) & (ratios < 0.9))
    assert 0 < (is_clipped * lengths).sum() < lengths.sum()
    metrics = run(batch, objective="gspo", num_micro_batches=4)[1]
    assert metrics["learner/clipped"] == pytest.approx((is_clipped * lengths).sum() / lengths.sum())


@pytest.mark.slow
def test_rows_that_fill_the_batch_do_not_matter():
    batch = make_batch(8, 16)
    bare = jax.tree.map(lambda array: array[:8], batch)
    filled, metrics = run(batch)
    exact, exact_metrics = run(bare)
    assert_close(gradient(filled), gradient(exact), atol=2e-6 * norm(gradient(exact)))
    # A percentile is the value of one token or rollout, with the rounding of its row.
    whole = {name: value for name, value in exact_metrics.items() if not name[-1].isdigit()}
    assert {name: metrics[name] for name in whole} == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert metrics == pytest.approx(exact_metrics, rel=1e-4, abs=1e-5)
    tokens = batch.tokens.copy()
    tokens[8:] = 17
    assert_close(gradient(run(batch._replace(tokens=tokens))[0]), gradient(filled), atol=0)


@pytest.mark.slow
def test_what_stands_outside_the_response_does_not_matter():
    """Padding tokens, and log-probabilities at prompt and padding, even where these are NaN."""
    batch = make_batch()
    is_padding = np.cumsum(batch.response_mask[:, ::-1], axis=1)[:, ::-1] == 0
    is_padding[~batch.segment_mask[:, 0]] = True
    changed = batch._replace(
        tokens=np.where(is_padding, 11, batch.tokens).astype(np.int32),
        sampler_logprobs=np.where(batch.response_mask, batch.sampler_logprobs, np.nan).astype(np.float32),
    )
    assert (changed.tokens != batch.tokens).any()
    state, metrics = run(batch)
    other, other_metrics = run(changed)
    assert_close(gradient(other), gradient(state), atol=0)
    assert other_metrics == metrics


@pytest.mark.slow
def test_prompt_tokens_are_read_but_not_trained_on():
    """A prompt token changes the loss through the response; its own log-probability has no part in it."""
    batch = make_batch()
    only_prompt = batch._replace(response_mask=np.zeros_like(batch.response_mask))
    state, metrics = run(only_prompt)
    assert norm(gradient(state)) == 0
    assert metrics["learner/log_ratio_abs"] == 0
    tokens = batch.tokens.copy()
    tokens[:, 0] = (tokens[:, 0] + 1) % VOCAB
    assert run(batch._replace(tokens=tokens))[1]["learner/loss"] != run(batch)[1]["learner/loss"]


@pytest.mark.slow
def test_supervised_loss_is_the_mean_over_tokens():
    batch = make_batch()
    logprobs = learner_logprobs(batch)[batch.response_mask]
    for splits in (1, 4):
        metrics = run(batch, objective="supervised", num_micro_batches=splits)[1]
        assert metrics["learner/loss"] == pytest.approx(-logprobs.mean(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "num_pairs", "num_rows", "num_micro_batches"),
    [
        ("fsdp=8", 12, 16, 2),
        ("data=2,fsdp=2,tensor=2", 6, 8, 1),
        ("data=2,fsdp=2,tensor=2", 12, 16, 4),
        ("data=2,fsdp=2,context=2", 12, 16, 2),
    ],
)
def test_sharded_trainers_equal_a_single_device(mesh, num_pairs, num_rows, num_micro_batches):
    batch = make_batch(num_pairs, num_rows)
    single, metrics = run(batch)
    sharded, sharded_metrics = run(batch, mesh=mesh, num_micro_batches=num_micro_batches)
    assert len(jax.tree.leaves(sharded.params)[0].devices()) == 8
    assert_close(gradient(sharded), gradient(single), atol=2e-6 * norm(gradient(single)))
    assert_close(sharded.params, single.params, atol=2e-6)
    assert sharded_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "is_once_a_step"), [("data=2,fsdp=2,tensor=2", True), ("fsdp=8", False)])
def test_gradients_cross_the_axis_data_once_a_step(mesh, is_once_a_step):
    """The halves of the devices are slices, which ``data`` joins, or ``fsdp``: what crosses does so in a loop or not."""
    step, init, devices = make_step(mesh=mesh)
    placed = place(make_batch(12, 16), RowLayout(16, 16, None, 8, devices))
    text = step.lower(init(), placed).compile().as_text()
    one, many = (hlo.analyze(text, expected_trips=[n], slices=[0] * 4 + [1] * 4) for n in (1, 100))
    assert many.network_bytes("ICI") > 50 * one.network_bytes("ICI") or not is_once_a_step
    assert (many.network_bytes("DCN") == one.network_bytes("DCN") > 0) == is_once_a_step
    if is_once_a_step:
        # Each device receives its quarter of the float32 gradient once from the other slice; loss, counts and scores are
        # small.
        gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(init().params)) / 4
        assert gradient <= one.network_bytes("DCN") < 1.5 * gradient


@pytest.mark.slow
def test_the_parts_of_the_step_have_names_in_the_compiled_program():
    step, init, mesh = make_step()
    program = step.lower(init(), place(make_batch(), RowLayout(8, 16, mesh=mesh)))
    parts = {"embedding", "qkv", "attention", "attention_output", "mlp", "token_logprobs", "loss", "optimizer"}
    assert parts - tiny.scopes(program) == set()


@pytest.mark.slow
def test_steps_bring_the_log_ratio_to_its_target():
    """The minimum of the loss: beta2 * log-ratio = advantage (paper Eq. 3)."""
    batch = make_batch()
    _, first = run(batch, learner=CLIPPED)
    _, last = run(batch, num_steps=60, learner=CLIPPED)
    assert last["learner/loss"] < 0.02 * first["learner/loss"]


def test_the_schedule_warms_up_to_the_peak_and_stays():
    schedule = make_schedule(LearnerConfig(learning_rate=8.0, warmup_steps=4), 20)
    assert [float(schedule(step)) for step in range(6)] == [2, 4, 6, 8, 8, 8]
    constant = make_schedule(LearnerConfig(learning_rate=8.0), 20)
    assert {float(constant(step)) for step in (0, 1, 19, 100)} == {8.0}


@pytest.mark.parametrize(("warmup", "steps"), [(0, 11), (5, 16), (5, 6)])
def test_a_cosine_ends_at_a_tenth_at_the_last_step(warmup, steps):
    schedule = make_schedule(LearnerConfig(learning_rate=8.0, warmup_steps=warmup, schedule="cosine"), steps)
    rates = [float(schedule(step)) for step in range(steps)]
    if steps - warmup > 1:
        assert rates[warmup] == pytest.approx(8.0)
        assert rates[-1] == pytest.approx(0.8)
        assert rates[(warmup + steps - 1) // 2] == pytest.approx(4.4)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert float(schedule(steps + 100)) == pytest.approx(0.8)

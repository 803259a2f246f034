"""The sampler against the learner and against itself: exact log-probabilities, keys, stops, limits."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import tiny
from oapl_jax.build.sampler import structure
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import SAMPLER_RULES, make_meshes, placed, reshard, shardings
from oapl_jax.learner.batch import RowLayout, from_pairs
from oapl_jax.model import qwen
from oapl_jax.model.logprob import sequence_logprobs
from oapl_jax.model.quantized import dequantize, quantize_weights
from oapl_jax.rollouts import sampling
from oapl_jax.rollouts.sampling import Request, SamplingDistribution
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.sampler import JaxSampler, replica_meshes
from oapl_jax.sampler.scheduler import Scheduler
from oapl_jax.types import FinishReason

VOCAB, PADDED_VOCAB, STOPS = 29, 32, (1, 5)
MAX_PROMPT, MAX_RESPONSE = 20, 12
CONFIG = qwen.QwenConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": PADDED_VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "rope_theta": 1e4,
    }
)
GRAPHDEF, PARAMS = nnx.split(qwen.Qwen(CONFIG, rngs=nnx.Rngs(0)))
PROMPTS = [
    np.random.default_rng(i).integers(2, VOCAB, size).astype(np.int32) for i, size in enumerate([1, 7, 16, 20, 3])
]


DISTRIBUTION = SamplingDistribution()


@functools.cache
def make_engine(
    num_rows=8,
    decode_steps=4,
    sampler_mesh="tensor=1",
    stop_ids=STOPS,
    page_size=4,
    mesh=None,
    can_truncate=False,
    **options,
):
    return Engine(
        GRAPHDEF,
        CONFIG,
        vocab_size=VOCAB,
        stop_ids=stop_ids,
        num_rows=num_rows,
        max_prompt_tokens=MAX_PROMPT,
        max_response_tokens=MAX_RESPONSE,
        decode_steps=decode_steps,
        mesh=mesh or make_meshes(MeshConfig(trainer=sampler_mesh))[0],
        page_size=page_size,
        can_truncate=can_truncate,
        **options,
    )


def run(scheduler, requests, params=PARAMS):
    """Rollouts by tag."""
    for request in requests:
        scheduler.submit(request)
    done = {}
    while not scheduler.is_idle:
        finished = dict(scheduler.step(params))
        assert not finished.keys() & done.keys(), "a group came twice"
        done |= finished
    return done


def sample(engine, prompts=PROMPTS, num_rollouts=4, seed=7, order=None, params=PARAMS, distribution=DISTRIBUTION, **o):
    requests = [Request(i, p, num_rollouts, (seed, 0, i), distribution) for i, p in enumerate(prompts)]
    if order is not None:
        requests = [requests[i] for i in order]
    done = run(Scheduler(engine, contextlib.nullcontext(), **o), requests, params)
    return [done[i] for i in sorted(done)]


@pytest.mark.slow
def test_the_parts_of_the_programs_have_names_in_the_compiled_programs():
    engine = make_engine()
    layers = {"qkv", "attention", "attention_output", "mlp"}
    assert layers | {"prefill", "embedding", "logits"} <= tiny.scopes(engine.lower_prefill(PARAMS))
    assert layers | {"decode", "logits", "draw"} <= tiny.scopes(engine.lower_generate(PARAMS))


def learner_logprobs(prompt, rollouts, temperature=1.0):
    batch = from_pairs([(prompt, r.token_ids) for r in rollouts], RowLayout(len(rollouts), MAX_PROMPT + MAX_RESPONSE))
    logprobs, _ = sequence_logprobs(
        GRAPHDEF,
        PARAMS,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.response_mask),
        temperature=temperature,
        vocab_size=VOCAB,
    )
    return [np.asarray(row)[mask] for row, mask in zip(logprobs, batch.response_mask, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_learners_up_to_and_including_the_stop_token(temperature):
    groups = sample(make_engine(), distribution=SamplingDistribution(temperature))
    reasons = set()
    for prompt, rollouts in zip(PROMPTS, groups, strict=True):
        for rollout, expected in zip(rollouts, learner_logprobs(prompt, rollouts, temperature), strict=True):
            assert rollout.logprobs.shape == rollout.token_ids.shape
            np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-5)
            reasons.add(rollout.finish_reason)
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}, "the test must have seen both ends"


@pytest.mark.slow
def test_responses_end_at_the_first_stop_token_or_at_the_limit():
    rollouts = [r for group in sample(make_engine()) for r in group]
    for rollout in rollouts:
        is_stop = np.isin(rollout.token_ids, STOPS)
        assert not is_stop[:-1].any()
        assert (rollout.finish_reason is FinishReason.STOP) == is_stop[-1]
        assert is_stop[-1] or len(rollout.token_ids) == MAX_RESPONSE
    assert {r.token_ids[-1] for r in rollouts if r.finish_reason is FinishReason.STOP} == set(STOPS)


@pytest.mark.slow
def test_ids_beyond_the_tokenizer_are_never_drawn():
    """The padding rows of the embedding are made the likeliest by far."""
    params = jax.tree.map(lambda x: x, PARAMS)
    params["embedding"].value = params["embedding"].value.at[VOCAB:].mul(50.0)
    raw = nnx.merge(GRAPHDEF, params)
    hidden, _ = raw.hidden(jnp.asarray(PROMPTS[1][None]), jnp.arange(7)[None])
    assert jax.nn.softmax(raw.logits(hidden))[..., VOCAB:].max() > 0.9
    assert max(r.token_ids.max() for group in sample(make_engine(), params=params) for r in group) < VOCAB


def same(first, second):
    return all(
        np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.slow
def test_a_seed_repeats_bit_for_bit_whatever_the_order_rows_and_mates():
    reference = sample(make_engine())
    assert same(reference, sample(make_engine(), order=[3, 1, 4, 0, 2]))
    assert same(reference[2:3], sample(make_engine(), order=[2]))


def assert_alike(groups, reference):
    """The same tokens; log-probabilities to 1e-5."""
    for group, other in zip(reference, groups, strict=True):
        for rollout, expected in zip(other, group, strict=True):
            np.testing.assert_array_equal(rollout.token_ids, expected.token_ids)
            np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=1e-5)
            assert rollout.finish_reason is expected.finish_reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "scheduler"),
    [
        pytest.param({"num_rows": 1}, {}, id="one row"),
        pytest.param({"num_rows": 64}, {}, id="64 rows"),
        pytest.param({"decode_steps": 1, "page_size": 1}, {}, id="a page for each token"),
        pytest.param({"page_size": 16}, {"chunks_ahead": 1}, id="results read late"),
        pytest.param({"attention": "xla"}, {}, id="paged attention"),
        pytest.param({"attention": "xla", "join_layers": True}, {}, id="paged attention, layers apart"),
        pytest.param({"share_layers": True}, {}, id="layers in the memory of their stack"),
        pytest.param({"num_pages": 11, "decode_steps": 2}, {}, id="pages run out"),
        pytest.param({"num_pages": 11, "decode_steps": 2}, {"chunks_ahead": 1}, id="pages run out, results read late"),
    ],
)
def test_same_tokens_whatever_the_rows_pages_chunks_and_preemptions(engine, scheduler):
    assert_alike(sample(make_engine(**engine), **scheduler), sample(make_engine()))


@pytest.mark.slow
def test_running_out_of_pages_preempts_and_loses_nothing():
    scheduler = Scheduler(make_engine(num_pages=11, decode_steps=2), contextlib.nullcontext())
    requests = [Request(i, p, 4, (7, 0, i)) for i, p in enumerate(PROMPTS)]
    done = run(scheduler, requests)
    assert scheduler.stats.preemptions > 0
    assert scheduler.stats.tokens == sum(len(r.token_ids) for group in done.values() for r in group)
    assert scheduler._pool.num_free == 11


@pytest.mark.slow
def test_another_seed_another_group_and_another_rollout_draw_differently():
    first, second = sample(make_engine(), prompts=[PROMPTS[1]] * 2)
    assert not same([first], [second]), "two groups of one prompt"
    assert not same([first], sample(make_engine(), prompts=[PROMPTS[1]], seed=8)), "two seeds"
    assert len({tuple(r.token_ids) for r in first}) > 1, "rollouts of one group"


@pytest.mark.slow
def test_sharded_replicas_draw_the_same_tokens_and_share_the_requests():
    whole = make_meshes(MeshConfig(trainer="data=2,tensor=2"))[0]
    engines = [make_engine(num_rows=4, mesh=replica) for replica in replica_meshes(whole)]
    sampler = JaxSampler(engines, whole)
    sampler.set_weights(reshard(PARAMS, shardings(qwen.abstract(CONFIG)[1], whole, SAMPLER_RULES)))
    requests = [Request(i, p, 4, (7, 0, i)) for i, p in enumerate(PROMPTS)]
    done = dict(sampling.run(sampler, requests[:1]))
    assert [scheduler.stats.tokens > 0 for scheduler in sampler._schedulers] == [True, False]
    done |= dict(sampling.run(sampler, requests[1:]))
    assert all(scheduler.stats.tokens > 0 for scheduler in sampler._schedulers)
    assert_alike([done[i] for i in sorted(done)], sample(make_engine()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tensor", "is_int8"),
    [("qwen2_tied", 1, False), ("moe", 1, False), ("moe", 2, False), ("moe", 2, True)],
)
def test_other_architectures_sample_as_they_score(name, tensor, is_int8):
    """Over two devices the mixture reads its experts in the stack of all layers, unless they are integers."""
    config = tiny.config(name)
    graphdef, params = tiny.split(config)
    options = {"max_prompt_tokens": 8, "max_response_tokens": 6, "decode_steps": 3, "page_size": 4}
    mesh = make_meshes(MeshConfig(trainer=f"tensor={tensor}"))[0]
    if tensor > 1:
        graphdef = qwen.abstract(config, mesh=mesh)[0]
        params = quantize_weights(params) if is_int8 else params
        params = reshard(params, shardings(jax.eval_shape(lambda: params), mesh, SAMPLER_RULES))
        options["attention"] = "xla"
    engine = Engine(graphdef, config, vocab_size=48, stop_ids=(0,), num_rows=4, mesh=mesh, **options)
    prompt = np.arange(1, 8, dtype=np.int32)
    rollouts = run(Scheduler(engine, contextlib.nullcontext()), [Request("", prompt, 3, (0, 0, 0))], params)[""]
    batch = from_pairs([(prompt, r.token_ids) for r in rollouts], RowLayout(3, 14))
    floats = jax.tree.map(
        lambda param: param.replace(dequantize(param.get_value(), jnp.float32)),
        params,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    logprobs, _ = tiny.sequence_logprobs(
        graphdef, floats, batch.tokens, batch.response_mask, temperature=1.0, vocab_size=48
    )
    for rollout, row, mask in zip(rollouts, np.asarray(logprobs), batch.response_mask, strict=True):
        np.testing.assert_allclose(rollout.logprobs, row[mask], atol=1e-5)


@pytest.mark.slow
def test_a_mixture_over_devices_is_lowered_for_a_tpu_with_kernels_for_the_products_of_experts():
    """Without the mesh in its structure the partitioner would meet the kernels, which it cannot split."""
    config = tiny.config("moe")
    mesh = make_meshes(MeshConfig(trainer="tensor=2"))[0]
    options = {"max_prompt_tokens": 8, "max_response_tokens": 6, "decode_steps": 3, "page_size": 4, "attention": "xla"}
    graphdef = structure(config, mesh, "float32")
    engine = Engine(graphdef, config, vocab_size=48, stop_ids=(0,), num_rows=4, mesh=mesh, **options)
    shapes = qwen.abstract(config)[1]
    params = placed(shapes, shardings(shapes, mesh, SAMPLER_RULES))
    prefill = engine._prefill.trace(params, np.zeros((1, 8), np.int32), np.array([8], np.int32))
    assert prefill.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 2  # gate and up share one


@pytest.mark.slow
def test_generate_stops_early_when_all_rows_are_done():
    """With every id a stop, the token that insert draws is the last and no step may run."""
    engine = make_engine(stop_ids=tuple(range(VOCAB)))
    rollouts = sample(engine, prompts=PROMPTS[:1])[0]
    assert [len(r.token_ids) for r in rollouts] == [1] * 4
    np.testing.assert_allclose(
        np.concatenate([r.logprobs for r in rollouts]),
        np.concatenate(learner_logprobs(PROMPTS[0], rollouts)),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_token_ids": np.zeros(0, np.int32)}, "prompt of 0 tokens; the limit is 1 to 20"),
        ({"prompt_token_ids": np.zeros(21, np.int32)}, "prompt of 21 tokens; the limit is 1 to 20"),
        ({"num_rollouts": 0}, "0 rollouts asked for; at least 1"),
        ({"max_tokens": 13}, "max_tokens=13; .* from 1 to 12"),
        ({"max_tokens": (1, 2)}, r"max_tokens=\(1, 2\); one number for each of 3 rollouts"),
        ({"distribution": SamplingDistribution(0.0)}, "temperature=0 has no log-probabilities to learn from"),
        ({"distribution": SamplingDistribution(top_k=2)}, "on an engine that was made with can_truncate=False"),
        ({"distribution": SamplingDistribution(stop_strings=("x",))}, "needs a scheduler that was given `decode`"),
        ({"distribution": SamplingDistribution(stop_token_ids=(9,))}, "on an engine that was made with stop_ids="),
    ],
)
def test_bad_requests_are_refused_by_name(changes, message):
    request = Request("math/7", PROMPTS[1], 3, (0, 0, 0))
    with pytest.raises(ValueError, match=f"request 'math/7': .*{message}"):
        Scheduler(make_engine(), contextlib.nullcontext()).submit(dataclasses.replace(request, **changes))


def test_a_cache_without_room_for_one_sequence_is_refused():
    with pytest.raises(
        ValueError, match=r"no room for one sequence: 20 \+ 12 tokens need 8 pages of 4 tokens, .* has 7"
    ):
        make_engine(num_pages=7)


def test_parameters_of_another_architecture_are_refused():
    other = tiny.split(tiny.config("qwen3_tied"))[1]
    with pytest.raises(ValueError, match=r"parameter embedding is \[48, 32\], the engine's model has \[32, 32\]"):
        sample(make_engine(), params=other)


@pytest.mark.slow
def test_each_request_has_its_own_distribution_and_limits():
    requests = [
        Request("greedy", PROMPTS[1], 2, (0, 0, 0), SamplingDistribution(0.0), needs_logprobs=False),
        Request("likeliest", PROMPTS[1], 2, (0, 0, 0), SamplingDistribution(top_k=1)),
        Request("limits", PROMPTS[1], 2, (0, 0, 1), max_tokens=(1, 3)),
    ]
    done = run(Scheduler(make_engine(can_truncate=True), contextlib.nullcontext()), requests)
    for greedy, likeliest in zip(done["greedy"], done["likeliest"], strict=True):
        np.testing.assert_array_equal(greedy.token_ids, likeliest.token_ids)
        assert np.isnan(greedy.logprobs).all()
        np.testing.assert_allclose(likeliest.logprobs, 0, atol=1e-6)
    one, three = done["limits"]
    assert len(one.token_ids) == 1
    assert len(three.token_ids) == 3 or three.finish_reason is FinishReason.STOP


@pytest.mark.slow
def test_a_stop_string_ends_a_response_at_the_token_that_completes_it():
    def decode(ids):
        return "".join(chr(ord("A") + i) for i in ids)

    engine = make_engine()
    [free] = sample(engine, prompts=PROMPTS[1:2])
    long = max(free, key=lambda rollout: len(rollout.token_ids))
    stop = decode(long.token_ids.tolist())[4:6]
    scheduler = Scheduler(engine, contextlib.nullcontext(), decode=decode)
    ends = SamplingDistribution(stop_strings=(stop,))
    stopped = run(scheduler, [Request(0, PROMPTS[1], 4, (7, 0, 0), ends)])[0]
    for rollout, whole in zip(stopped, free, strict=True):
        text = decode(whole.token_ids.tolist())
        length = text.index(stop) + 2 if stop in text else len(text)
        assert decode(rollout.token_ids.tolist()) == text[:length]
        np.testing.assert_allclose(rollout.logprobs, whole.logprobs[:length], atol=1e-5)
        if stop in text:
            assert rollout.finish_reason is FinishReason.STOP
    # The last token that the limit allows completes it; another chunk is under way when it is found.
    limits = tuple(len(rollout.token_ids) for rollout in stopped)
    ahead = Scheduler(engine, contextlib.nullcontext(), chunks_ahead=1, decode=decode)
    at_limit = run(ahead, [Request(0, PROMPTS[1], 4, (7, 0, 0), ends, limits)])[0]
    for rollout, expected in zip(at_limit, stopped, strict=True):
        np.testing.assert_array_equal(rollout.token_ids, expected.token_ids)
        assert rollout.finish_reason is expected.finish_reason
    assert scheduler._pool.num_free == engine.num_pages


@pytest.mark.slow
def test_abort_frees_rows_and_pages():
    engine = make_engine()
    for chunks_ahead in (0, 1):
        scheduler = Scheduler(engine, contextlib.nullcontext(), chunks_ahead=chunks_ahead)
        for tag in ("live", "waiting"):
            scheduler.submit(Request(tag, PROMPTS[1], 12, (7, 0, 0)))
        scheduler.step(PARAMS)
        assert 0 < scheduler.num_live < scheduler.num_unfinished
        scheduler.abort()
        assert scheduler.is_idle
        assert scheduler._pool.num_free == engine.num_pages
        reference = sample(engine, prompts=PROMPTS[1:2])
        assert_alike([run(scheduler, [Request(0, PROMPTS[1], 4, (7, 0, 0))])[0]], reference)


@pytest.mark.slow
def test_after_warm_up_nothing_is_compiled():
    engine = make_engine(num_rows=8, page_size=9)  # four pages, which prompts are padded to, exceed the limit of 32
    scheduler = Scheduler(engine, contextlib.nullcontext())
    compiled = []
    listen = lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        scheduler.warm_up(PARAMS, [len(prompt) for prompt in PROMPTS], 4)
        assert compiled, "the test must see what is compiled"
        compiled.clear()
        run(scheduler, [Request(i, p, 4, (7, 0, i)) for i, p in enumerate(PROMPTS)])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.slow
def test_slot_use_counts_rows_that_draw():
    """Two rollouts of 1 and 9 tokens in a program of 4 rows: 8 live row steps, the others idle."""
    scheduler = Scheduler(make_engine(num_rows=4, stop_ids=(28,)), contextlib.nullcontext())
    rollouts = run(scheduler, [Request(0, PROMPTS[0], 2, (1, 0, 0), max_tokens=(1, 9))])[0]
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    assert lengths == [1, 9], "a stop token was drawn; take another seed"
    assert scheduler.stats.live_row_steps == 8
    assert scheduler.stats.row_steps == 4 * 8
    assert scheduler.stats.slot_use == 0.25
    assert scheduler.stats.prefill_tokens == len(PROMPTS[0])

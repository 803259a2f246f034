"""A tiny policy, its sampler, and loops over it, for the tests of this folder."""

import contextlib
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from oapl_jax.config.data import DataConfig
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.data.prompts import load_prompts
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.model import qwen
from oapl_jax.objectives import oapl
from oapl_jax.rewards.grader import ToyGrader
from oapl_jax.rollouts.buffer import GroupBuffer, Window
from oapl_jax.rollouts.grading import Advantages, Grading
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.sampler import JaxSampler
from oapl_jax.sources.sampling_loop import SamplingLoop
from oapl_jax.sources.turns import SamplerTurns

DEADLINE, GROUP_SIZE, SEED = 60.0, 3, 11
TOKENIZER = CharacterTokenizer()
CONFIG = qwen.QwenConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 18,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "rope_theta": 1e4,
    }
)
PROMPTS = load_prompts(DataConfig(task="chain", max_prompt_tokens=12), TOKENIZER, SEED)


@functools.cache
def weights(version):
    graphdef, params = nnx.split(qwen.Qwen(CONFIG, rngs=nnx.Rngs(0)))
    return graphdef, jax.tree.map(lambda x: x * (1 + 0.2 * version), params)


@functools.cache
def make_engine():
    return Engine(
        weights(0)[0],
        CONFIG,
        vocab_size=TOKENIZER.vocab_size,
        stop_ids=TOKENIZER.stop_ids,
        num_rows=4 * GROUP_SIZE,
        max_prompt_tokens=12,
        max_response_tokens=5,
        decode_steps=2,
        mesh=make_meshes(MeshConfig(trainer="fsdp=1"))[0],
        cache_dtype=jnp.float32,
    )


def make_turns():
    """A sampler of its own; its programs are shared."""
    return SamplerTurns(JaxSampler([make_engine()], make_engine().mesh))


def make_grading(grader=None):
    return Grading(
        TOKENIZER.decode,
        grader or ToyGrader("chain"),
        Advantages(lambda rewards, _: oapl.advantages(rewards, 1.0), functools.partial(oapl.optimal_value, beta1=1.0)),
    )


def make_loop(groups, log, *, turns=None, grader=None, finish_old=False):
    return SamplingLoop(
        turns or make_turns(),
        PROMPTS,
        make_grading(grader),
        groups,
        log,
        distribution=SamplingDistribution(),
        group_size=GROUP_SIZE,
        seed=SEED,
        finish_old=finish_old,
    )


@contextlib.contextmanager
def working(directory, grader=None, max_groups_ahead=None, finish_old=False, turns=None):
    """A started loop on a window of six groups; yields what a test examines."""
    buffer = GroupBuffer(lambda group: len(group.usable) >= 2, max_groups_ahead)
    log = RolloutLog(directory)
    loop = make_loop(buffer, log, turns=turns, grader=grader, finish_old=finish_old)
    loop.set_weights(0, weights(0)[1])
    buffer.open_window(Window(0, 0, 6))
    loop.start()
    try:
        yield loop, buffer, log
    finally:
        loop.stop()


def take_two_windows(directory, between=lambda: None, **options):
    """The batches of two windows of three batches of two groups each, and the log."""
    with working(directory, **options) as (loop, buffer, log):
        taken = []
        for version in (0, 1):
            if version:
                loop.set_weights(version, weights(version)[1])
                buffer.open_window(Window(version, buffer.cursor, 6))
            for _ in range(3):
                taken += buffer.take(2, DEADLINE)
                between()
        metrics = loop.report()
    return taken, log, metrics

"""A program: JetStream's own tests of its orchestrator and server, with our engine in the place of its mock.

The tests are those of the wheel, unchanged: ``jetstream.tests.core.test_orchestrator`` and ``test_server``.
They make ``mock_engine.TestEngine``, whose arithmetic answers "AB" by 266, 332, 415 (weight 4) or by 266,
399, 598 (weight 2). Here that name makes a ``JetStreamEngine`` over a Qwen model with weights that say the
same: the likeliest token after B is 266, and so on. Prefill, insert, generate, the greedy draw and the
hand-over from a prefill engine to a generate engine are ours. Run by test_jetstream.py.
"""

import functools
import logging
import sys
import unittest

import jax
import jax.numpy as jnp
import numpy as np
from jetstream.engine import mock_engine

from oapl_jax.distributed.sharding import AXES
from oapl_jax.model import qwen
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.jetstream.engine import JetStreamEngine

VOCAB, WIDTH = 1024, 64
NEXT = {4.0: {66: 266, 266: 332, 332: 415}, 2.0: {66: 266, 266: 399, 399: 598}}
"""Weight of the mock -> token -> the token that follows it."""

CONFIG = qwen.QwenConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "rope_theta": 1e4,
    }
)


class CodePoints:
    """A token for each character, as in the mock's tokenizer."""

    pad_id, eos_id, stop_ids, vocab_size, has_chat_template = 0, 1, (1,), VOCAB, False

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def make_params(follows):
    """Layers that add nothing, so that the likeliest token follows from the last one alone."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), qwen.abstract(CONFIG)[1])
    embedding = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    head = np.zeros((WIDTH, VOCAB), np.float32)
    for token, successor in follows.items():
        head[:, successor] = embedding[token]
    for name, value in (("embedding", embedding), ("final_norm", np.ones(WIDTH, np.float32)), ("lm_head", head)):
        assert params[name].shape == value.shape
        params[name] = params[name].replace(jnp.asarray(value))
    return params


@functools.cache
def make_programs(batch_size, cache_length):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape([1] * len(AXES)), AXES)
    return Engine(
        qwen.abstract(CONFIG)[0],
        CONFIG,
        vocab_size=VOCAB,
        stop_ids=CodePoints.stop_ids,
        num_rows=batch_size,
        max_prompt_tokens=cache_length - 1,
        max_response_tokens=cache_length,
        decode_steps=1,
        mesh=mesh,
    )


class PolicyEngine(JetStreamEngine):
    """Ours, made by the arguments of the mock."""

    def __init__(self, batch_size, cache_length, weight):
        programs, params = make_programs(batch_size, cache_length), make_params(NEXT[weight])
        super().__init__(programs, params, CodePoints(), samples_per_slot=1, sampling=SamplingDistribution(0), seed=0)

    def generate(self, params, decode_state):
        calls.append(decode_state)
        return super().generate(params, decode_state)


calls = []


def main():
    mock_engine.TestEngine = PolicyEngine
    from jetstream.tests.core import test_orchestrator, test_server

    logging.disable(logging.INFO)
    loader = unittest.defaultTestLoader
    suite = unittest.TestSuite(map(loader.loadTestsFromModule, (test_orchestrator, test_server)))
    result = unittest.TextTestRunner(stream=sys.stderr).run(suite)
    assert calls, "our engine was not asked"
    sys.exit(not result.wasSuccessful())


if __name__ == "__main__":
    main()

"""Pretrained models, in Hugging Face folders below ``OAPL_JAX_MODELS``; by hand, with ``make test-long``."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import TRAINER_RULES, make_meshes
from oapl_jax.model import hf, qwen

TEXT = "What is 17 + 25? Let us add the tens first: 10 + 20 = 30. def add(a, b):\n    return a + b\n"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-as-qwen2", "Qwen2.5-Coder-0.5B-Instruct"]
)
def test_logits_of_a_pretrained_model_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = pathlib.Path(os.environ.get("OAPL_JAX_MODELS", ""), name)
    if not folder.is_dir():
        pytest.skip(f"needs the model folder {name} below the folder that OAPL_JAX_MODELS names")
    token_ids = np.array([transformers.AutoTokenizer.from_pretrained(folder).encode(TEXT)], np.int32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.from_numpy(token_ids).long()).logits, -1).numpy()
    del model
    mesh = make_meshes(MeshConfig(trainer="data=1"))[0]
    config, params = hf.load_params(folder, mesh, TRAINER_RULES, jnp.float32)
    actual = jax.nn.log_softmax(tiny.logits(qwen.abstract(config)[0], params, token_ids))
    next_ids = token_ids[:, 1:, None]
    actual, expected = (np.take_along_axis(np.asarray(table)[:, :-1], next_ids, -1) for table in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)

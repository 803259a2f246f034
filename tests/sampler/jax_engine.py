"""Our own engine behind ``sampler/runner.py``, where the tests have no vLLM: a real model, real draws, real reloads."""

import os
import pathlib

import jax.numpy as jnp
import numpy as np

from model import tiny
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import SAMPLER_RULES, make_meshes
from oapl_jax.model import hf
from oapl_jax.rollouts.sampling import Request, SamplingDistribution
from oapl_jax.sampler import engine as engines
from oapl_jax.sampler.sampler import JaxSampler
from oapl_jax.types import FinishReason

ROWS, PROMPT_TOKENS = 12, 12


class Engine:
    """``options["reload"]``: ``works``; ``stale``: it keeps the old weights and does not say so; ``fails``: it says so;
    ``version 1``: it loads this one and is stale with any other."""

    def start(self, folder, settings):
        folder = pathlib.Path(folder)
        self._kind = settings["options"].get("reload", "works")
        self._mesh = make_meshes(MeshConfig(trainer="fsdp=1"))[0]
        self._graphdef = tiny.split(hf.load_config(folder))[0]
        engine = engines.Engine(
            self._graphdef,
            hf.load_config(folder),
            vocab_size=settings["vocab_size"],
            stop_ids=settings["stop_token_ids"],
            num_rows=ROWS,
            max_prompt_tokens=PROMPT_TOKENS,
            max_response_tokens=settings["max_tokens"] - PROMPT_TOKENS,
            decode_steps=2,
            mesh=self._mesh,
            cache_dtype=jnp.float32,
        )
        self._sampler = JaxSampler([engine], self._mesh)
        self._load(folder)
        return {"engine": "ours", "version": "0", "settings": settings["options"]}

    def _load(self, folder):
        self._params = hf.load_params(pathlib.Path(folder), self._mesh, SAMPLER_RULES, "float32")[1]
        self._sampler.set_weights(self._params)

    def reload(self, folder):
        if self._kind == "fails":
            raise RuntimeError("this engine cannot")
        if self._kind == "works" or (self._kind == "version 1" and int(pathlib.Path(folder).name) == 1):
            self._load(folder)

    def probe(self, ids):
        logits = np.asarray(tiny.logits(self._graphdef, self._params, np.array([ids], np.int32)))[0, :-1]
        log_sums = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        return (logits[np.arange(len(ids) - 1), ids[1:]] - log_sums).tolist()

    def submit(self, number, prompt, num, max_tokens, distribution):
        if prompt == [1, 2, 3]:
            os._exit(7)
        asked = SamplingDistribution(**{key: tuple(v) if isinstance(v, list) else v for key, v in distribution.items()})
        self._sampler.submit(Request(number, np.array(prompt, np.int32), num, (0, 0, number), asked, max_tokens))

    def step(self):
        return [(number, list(map(_response, rollouts))) for number, rollouts in self._sampler.step()]

    def abort(self):
        self._sampler.abort()


def _response(rollout):
    is_stopped = rollout.finish_reason is FinishReason.STOP
    return {"ids": rollout.token_ids.tolist(), "logprobs": rollout.logprobs.tolist(), "is_stopped": is_stopped}

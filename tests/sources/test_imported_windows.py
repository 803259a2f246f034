"""Windows of imported rollouts, without a run around them."""

import contextlib
import json

import pytest

from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.data.prompts import HeldOut
from oapl_jax.distributed.team import Team
from oapl_jax.rollouts.buffer import Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.source import Weights, WindowPlan
from oapl_jax.sources.imported import ImportedWindows
from oapl_jax.sources.setup import SamplingSetup
from rollouts.groups import GRADING
from sources.loops import PROMPTS, TOKENIZER

RAW = {
    "model": {"config": "unused.json", "tokenizer": "characters"},
    "data": {"task": "chain", "max_prompt_tokens": 12},
    "sampler": {"group_size": 2, "max_response_tokens": 5},
    "learner": {"batch_rollouts": 2},
    "mode": "detached",
}


class Others:
    """The source of the other windows: it notes their versions."""

    def __init__(self):
        self.versions = []

    def open_window(self, window, weights, taken):
        self.versions.append(window.policy_version)
        return WindowPlan(1)

    def take(self, num_groups, is_cancelled, recorded=None):
        return None

    def report(self):
        return {}

    def finish(self):
        pass

    def close(self):
        pass


def test_a_version_that_samplers_have_is_not_imported(tmp_path):
    """A trainer that was killed has published it, and no sampler has written a group yet."""
    folder = tmp_path / "others"
    sections = {"run": {"dir": str(tmp_path), "steps": 4}, "window": {"imports": str(folder)}}
    config = config_file.validate(TrainConfig, RAW | sections, "test", CHECKS)
    lock, alone, others = contextlib.nullcontext(), Team.alone(), Others()
    setup = SamplingSetup(config, TOKENIZER, PROMPTS, HeldOut(), GRADING, None, lock, alone, alone, None)
    source = ImportedWindows(others, setup, tmp_path, RolloutLog(tmp_path / "rollouts"), print)
    ids = {"prompt_token_ids": [5, 6], "token_ids": [7, 1], "logprobs": [-1.0, -1.0], "finish_reason": "stop"}
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({**ids, "reward": float(i)}) + "\n" for i in range(2)))
    (tmp_path / "policy/000003").mkdir(parents=True)
    (tmp_path / "policy/000003/manifest.json").write_text("{}")
    source.open_window(Window(3, 0, 1), Weights(None, None), [])
    assert others.versions == [3]
    assert source.open_window(Window(4, 0, 1), Weights(None, None), []).num_steps == 1
    assert others.versions == [3]
    log = RolloutLog(tmp_path / "rollouts")
    assert [group.policy_version for group in log.read(4)] == [4]
    # A sampler writes there too, and the trainer starts again.
    whole = log.path(4, 0).read_bytes()
    for part, content in ((1, whole), (1, b"torn"), (0, b"torn")):
        log.path(4, part).write_bytes(content)
        assert source.open_window(Window(4, 0, 1), Weights(None, None), []).num_steps == 1
        assert [path.read_bytes() for path in log.folder(4).iterdir()] == [whole]
    # Another file has its name, without a batch.
    log.path(4, 0).write_bytes(b"torn")
    (folder / "a.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"a.jsonl: has changed, and has no batch of version 4"):
        source.open_window(Window(4, 0, 1), Weights(None, None), [])

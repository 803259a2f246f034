"""An engine in another process: it samples the policy that it was given last, and proves it."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from model import tiny
from oapl_jax.model import hf
from oapl_jax.rollouts.sampling import Request, Sampler, run
from oapl_jax.sampler import engine_process
from oapl_jax.sampler.engine_process import EngineProcess, is_reloaded
from oapl_jax.types import FinishReason, RunError
from project.test_layers import MODULES, ROOT, internal_imports, libraries_of
from test_torch_generate import Letters
from train.runs import make_config

LIMIT, STOP, VOCABULARY = 6, 3, 40
PROMPTS = [np.array([5, 6, 7], np.int32), np.array([8, 9, 10, 11], np.int32)]
CONFIG = tiny.config("qwen3_wide_heads")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three versions of a policy: 1 is another one than 0, and 2 is 1 again."""
    graphdef, params = tiny.split(CONFIG)
    root = tmp_path_factory.mktemp("policy")
    versions = [params, *[jax.tree.map(lambda x: 1.2 * x, params)] * 2]
    return graphdef, versions, [hf.save_folder(root / f"{i:06d}", CONFIG, each) for i, each in enumerate(versions)]


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    made = []

    def make(**options):
        sections = {"max_response_tokens": LIMIT, "groups_in_flight": 2, "group_size": 4}
        config = make_config(ROOT, mode="detached", sampler=sections)
        made.append(EngineProcess("sampler.jax_engine", sys.executable, config, Letters(), options))
        return made[-1]

    yield make
    for sampler in made:
        sampler.release()


def policy(folders, version):
    return folders[2][version]


def sampled(sampler, num=4):
    return dict(run(sampler, [Request(i, prompt, num, (0, 0, i)) for i, prompt in enumerate(PROMPTS)]))


def assert_drawn_from(folders, version, rollouts):
    """The log-probabilities are those of this version."""
    for number, group in rollouts.items():
        for rollout in group:
            tokens = np.concatenate([PROMPTS[number], rollout.token_ids])
            logits = np.asarray(tiny.logits(folders[0], folders[1][version], tokens[None]))[0, :-1, :VOCABULARY]
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            expected = logprobs[np.arange(len(tokens) - 1), tokens[1:]][len(PROMPTS[number]) - 1 :]
            np.testing.assert_allclose(rollout.logprobs, expected, atol=2e-5)


@pytest.mark.slow
def test_weights_are_reloaded_in_place_and_the_first_time_a_new_engine_confirms_it(folders, make, capfd):
    sampler = make()
    assert isinstance(sampler, Sampler)
    engines, manners = [], []
    for version in (0, 1, 2, 0):
        sampler.set_weights(policy(folders, version))
        engines.append(sampler._process)
        manners.append(sampler.facts[version]["loaded"])
        assert_drawn_from(folders, version, sampled(sampler))
    # 1: the first reload. 2: the weights did not change, so the probe cannot say that they did.
    assert manners == ["a new engine", "a new engine", "a new engine", "in place"]
    assert engines[2] is engines[3]
    facts = sampler.facts[0]
    assert facts["engine"] == "ours"
    assert facts["probe"]["tokens"] == 12 + LIMIT - 2
    assert capfd.readouterr().out.count("in place are those of a new engine") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("stale", "in place are not those of a new engine"),
        ("version 1", "in place are not those of a new engine"),
        ("fails", "this engine cannot"),
    ],
    ids=["always", "after one that worked", "and says so"],
)
def test_an_engine_that_does_not_reload_is_found_out_and_each_version_gets_a_new_one(folders, make, capfd, kind, told):
    sampler, engines = make(reload=kind), set()
    for version in (0, 1, 0):
        sampler.set_weights(policy(folders, version))
        engines.add(sampler._process)
        assert_drawn_from(folders, version, sampled(sampler))
    assert len(engines) == 3
    assert capfd.readouterr().out.count(told) == 1


@pytest.mark.slow
def test_what_is_dropped_does_not_come_back_and_an_engine_that_ends_says_why(folders, make):
    sampler = make()
    sampler.set_weights(policy(folders, 0))
    sampler.submit(Request("dropped", PROMPTS[0], 4, (0, 0, 0)))
    sampler.abort()
    assert sampler.is_idle
    assert set(sampled(sampler)) == {0, 1}
    sampler.submit(Request("deadly", np.array([1, 2, 3], np.int32), 1, (0, 0, 0)))
    with pytest.raises(RunError, match="has ended with code 7"):
        list(run(sampler, []))


def test_a_probe_tells_new_weights_from_old_ones():
    before, fresh = [-1.0, -2.0, -3.0], [-1.5, -2.5, -3.0]
    assert is_reloaded(before, fresh, fresh)
    assert is_reloaded(before, [-1.5, -2.5001, -3.0], fresh), "rounding"
    assert is_reloaded(before, before, fresh) is False, "a reload that was skipped"
    assert is_reloaded(before, [-1.5, -2.0, -3.0], fresh) is False, "half of the weights"
    assert is_reloaded(before, [-1.5, -2.49, -3.0], fresh) is False, "all but some"
    assert is_reloaded(before, fresh, before) is False, "a reload of other weights"
    assert is_reloaded(before, before, before) is None


def test_responses_end_where_the_run_says_and_lack_no_logprob(make):
    rollout = make()._rollout([5, 6, STOP, 7], [-1.0, -2.0, -3.0, -4.0], is_stopped=False)
    assert rollout.token_ids.tolist() == [5, 6, STOP]
    assert rollout.finish_reason is FinishReason.STOP
    with pytest.raises(ValueError, match="2 tokens with 1 log-prob"):
        make()._rollout([5, 6], [-1.0], is_stopped=False)


def test_an_interpreter_that_is_not_there_is_named(make, folders):
    sampler = make()
    sampler._python = "/no/such/python"
    with pytest.raises(ValueError, match="OAPL_JAX_VLLM: /no/such/python cannot be started"):
        sampler.set_weights(policy(folders, 0))


RUNNER = [f"oapl_jax.sampler.{name}" for name in ("runner", "vllm_engine")]


@pytest.mark.parametrize("module", RUNNER)
def test_the_runner_needs_neither_jax_nor_what_this_package_requires(module):
    path = MODULES[module]
    assert not internal_imports(path)
    assert libraries_of(path) <= {"vllm"}


def test_the_runner_starts_without_site_packages_and_without_jax():
    """As it is started, in an interpreter that has the standard library alone."""
    program = engine_process.BOOT.replace("main(module)", "assert not {'jax', 'numpy'} & set(sys.modules)")
    command = [sys.executable, "-I", "-S", "-c", program, str(ROOT / "oapl_jax"), "none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr

"""Samplers in other processes: the same run as with the sampler inside, whatever becomes of them."""

import json
import pathlib
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from oapl_jax import train
from oapl_jax.config import config_file
from oapl_jax.config.commands import SftConfig
from oapl_jax.io import storage
from oapl_jax.io.console import ExitCode
from oapl_jax.io.lease import Leases
from oapl_jax.rollouts.audit import audit
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.sft import sft
from oapl_jax.sources.sampling_process import SamplingProcess
from oapl_jax.weights.policies import PolicyStore
from rollouts.groups import bits
from rollouts.late_listings import make_place
from runs import ROOT, finish, make_config, read_lines, start, start_sampler, weights, write_config

pytestmark = pytest.mark.slow

DEADLINE = 240
DETACHED = {"shard_groups": 2, "lease_seconds": 10.0}


def wait_until(is_so, process=None, deadline=DEADLINE):
    end = time.monotonic() + deadline
    while not is_so():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def trained_groups(run_dir):
    log = RolloutLog(run_dir / "rollouts")
    groups = {group.id: bits(group) for version in log.versions() for group in log.read(version)}
    return [groups[name] for row in read_lines(run_dir / "batches.jsonl") for name in row["groups"]]


@pytest.fixture(scope="module")
def detached(tmp_path_factory):
    """A run with one sampler process, which was started first."""
    directory = tmp_path_factory.mktemp("detached") / "run"
    sampler = start_sampler(directory)
    try:
        train.run(make_config(directory, mode="detached", window=DETACHED, checkpoint={"keep": 9}))
        code, output = finish(sampler)
    finally:
        sampler.kill()
    return directory, code, output


def test_a_detached_run_is_the_online_run_bit_for_bit(detached, finished):
    (directory, code, output), (online, _) = detached, finished
    assert code == 0, output
    assert "sampling version 0" in output
    assert read_lines(directory / "batches.jsonl") == read_lines(online / "batches.jsonl")
    assert trained_groups(directory) == trained_groups(online)
    for name, tensor in weights(online).items():
        np.testing.assert_array_equal(tensor, weights(directory)[name], err_msg=name)
    assert audit(directory) == audit(online) == "10 steps, 3 windows, 40 groups, 320 rollouts: all as recorded"


def test_a_run_over_an_object_store_that_lists_late_is_the_online_run_bit_for_bit(finished, tmp_path):
    """Two samplers, in threads; a torn file lies in the way, and is listed for a while after it was moved away."""
    root = storage.shared_path(make_place())
    torn = RolloutLog(root / "rollouts").path(1, 1)
    storage.replace(torn, b"PAR1 torn")
    directory, online = tmp_path / "run", finished[0]
    config = make_config(directory, mode="detached", run={"shared_dir": str(root)}, window=DETACHED)
    failures, stop = [], threading.Event()

    def sample():
        try:
            SamplingProcess(root, "jax", "data=1", 120.0, stop).run()
        except BaseException as error:
            failures.append(error)
            raise

    samplers = [threading.Thread(target=sample) for _ in range(2)]
    for sampler in samplers:
        sampler.start()
    try:
        train.run(config)
    finally:
        stop.set()
        for sampler in samplers:
            sampler.join(60)
    assert not failures
    assert storage.exists(torn.with_name(torn.name + ".damaged"))
    assert read_lines(directory / "batches.jsonl") == read_lines(online / "batches.jsonl")
    for name, tensor in weights(online).items():
        np.testing.assert_array_equal(tensor, weights(directory)[name], err_msg=name)
    assert audit(directory).startswith("10 steps, 3 windows, 40 groups")


@pytest.mark.parametrize("mode", ["online", "detached"])
def test_without_learning_sampler_and_learner_agree_in_every_window(mode, tmp_path):
    """Learning rate 0 over five windows: the log-ratio is numerical noise; a drift would be a sync that loses something."""
    directory = tmp_path / "run"
    config = make_config(
        directory,
        mode=mode,
        learner={"learning_rate": 0.0},
        window={"sync_every": 2, **(DETACHED if mode == "detached" else {})},
        evaluation={"every": 0, "final_samples": 1},
    )
    sampler = start_sampler(directory) if mode == "detached" else None
    try:
        train.run(config)
        if sampler is not None:
            code, output = finish(sampler)
            assert code == 0, output
    finally:
        if sampler is not None:
            sampler.kill()
    rows = read_lines(directory / "metrics.jsonl")[1:]
    assert [row["window/version"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert max(row["learner/log_ratio_abs"] for row in rows) < 1e-4, "nats a response"
    start = load_file(pathlib.Path(str(config.model.path)) / "model.safetensors")
    for name, tensor in weights(directory).items():
        np.testing.assert_array_equal(tensor, start[name], err_msg=name)


def test_what_a_detached_run_leaves(detached):
    directory, *_ = detached
    store = PolicyStore(directory / "policy")
    assert store.current() == (2, True)
    assert store.versions() == [1, 2], "older ones were collected"
    rows = read_lines(directory / "metrics.jsonl")[1:]
    page = (ROOT / "docs/metrics.md").read_text()
    assert all(f"| `{name}` |" in page for row in rows for name in row if name != "step")
    assert [row["sync/publish_bytes"] > 0 for row in rows if "sync/publish_bytes" in row] == [True] * 3
    assert max(row["sampler/processes"] for row in rows) == 1


def test_a_replay_from_the_log_alone_is_the_run_bit_for_bit(detached, tmp_path):
    """One process, no sampler, the first checkpoint: log and record are the whole of the rest."""
    directory, again = detached[0], tmp_path / "run"
    shutil.copytree(directory, again)
    for name in ("config.yaml", "metrics.jsonl"):
        (again / name).unlink()
    for path in (again / "checkpoints").iterdir():
        if path.name != "0":
            shutil.rmtree(path)
    train.run(make_config(again, mode="detached", window=DETACHED, checkpoint={"keep": 9}))
    for name, tensor in weights(directory).items():
        np.testing.assert_array_equal(tensor, weights(again)[name], err_msg=name)
    assert read_lines(directory / "batches.jsonl") == read_lines(again / "batches.jsonl")


def test_a_second_trainer_on_a_run_directory_refuses(tmp_path):
    with Leases(tmp_path / "leases", DETACHED["lease_seconds"]) as leases:
        assert leases.claim("trainer") is not None
        with pytest.raises(ValueError, match="another trainer works on it"):
            train.run(make_config(tmp_path, mode="detached", window=DETACHED))
    assert not (tmp_path / "batches.jsonl").exists()


def test_a_sampler_ends_within_ten_seconds_of_sigterm_and_gives_its_shards_back(tmp_path):
    directory = tmp_path / "run"
    path = write_config(tmp_path / "config.yaml", make_config(directory, mode="detached", window=DETACHED))
    trainer, sampler = start(path), start_sampler(directory)
    try:
        wait_until(lambda: list((directory / "leases").glob("shards/*")), sampler)
        trainer.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        sampler.send_signal(signal.SIGTERM)
        code, output = finish(sampler)
        assert time.monotonic() - begin < 10
        assert code == ExitCode.PREEMPTED, output
        leases = sorted((directory / "leases" / "shards").iterdir())
        assert all(json.loads(lease.read_text())["is_released"] for lease in leases)
    finally:
        for process in (trainer, sampler):
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("key", "value", "message"), [("schema_version", 99, "schema version 99"), ("config", "x", "config is not")]
)
def test_a_sampler_of_another_release_or_config_refuses(detached, tmp_path, key, value, message):
    run = tmp_path / "run"
    shutil.copytree(detached[0], run)
    manifest = run / "policy" / "000002" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), key: value}))
    (run / "policy" / "current.json").write_text('{"policy_version": 2, "is_finished": false}')
    with pytest.raises(ValueError, match=message):
        SamplingProcess(run, "jax", "data=1", 120.0, threading.Event()).run()


def test_adapters_alone_are_published_and_refused_by_an_engine_that_loads_whole_models(tmp_path):
    directory = tmp_path / "run"
    config = make_config(directory, mode="detached", lora={"rank": 2}, window={**DETACHED, "publish": "adapters"})
    trainer = start(write_config(tmp_path / "config.yaml", config))
    try:
        with pytest.raises(ValueError, match="adapters alone, which --engine jax cannot load"):
            SamplingProcess(directory, "jax", "data=1", 120.0, threading.Event()).run()
        names = {path.name for path in (directory / "policy/000000").iterdir()}
        assert "adapter_model.safetensors" in names
        assert "model.safetensors" not in names
    finally:
        trainer.kill()
        trainer.communicate()


def run_with_a_pytorch_sampler(config):
    """Trains, with the sampler in a process of its own; returns the summary and the metrics."""
    pytest.importorskip("torch")
    directory = pathlib.Path(config.run.dir)
    sampler = start_sampler(directory, "--engine", "transformers")
    try:
        summary = train.run(config)
        code, output = finish(sampler)
    except BaseException:
        sampler.kill()
        print(sampler.communicate()[0])
        raise
    assert code == 0, output
    return summary, read_lines(directory / "metrics.jsonl")[1:]


def test_a_pytorch_sampler_agrees_with_the_learner_after_a_sync(tmp_path):
    """Then both have the same weights, in two frameworks."""
    config = make_config(
        tmp_path / "run",
        mode="detached",
        run={"steps": 3},
        window={"sync_every": 2, **DETACHED},
        evaluation={"every": 0, "prompts": 1},
    )
    _, rows = run_with_a_pytorch_sampler(config)
    assert audit(tmp_path / "run").startswith("3 steps, 2 windows, 12 groups")
    log_ratios = [abs(row["learner/log_ratio"]) for row in rows if row["window/lag"] == 0]
    assert len(log_ratios) == 2
    assert max(log_ratios) < 1e-4


@pytest.mark.long
def test_oapl_learns_from_a_pytorch_sampler(tmp_path):
    """Neither the engine nor its numbers are the learner's: the objective has the sampler's own log-probabilities."""
    words = [f"run.dir={tmp_path / 'sft'}", f"model.config={ROOT / 'configs/toy_qwen3.json'}"]
    config = make_config(
        tmp_path / "run",
        mode="detached",
        run={"steps": 50},
        model={"path": str(sft.run(config_file.load(SftConfig, ROOT / "configs/chain_sft.yaml", words)))},
        sampler={"groups_in_flight": 16},
        learner={"batch_rollouts": 128, "learning_rate": 3e-4},
        window={"sync_every": 25, "shard_groups": 8},
        checkpoint={"every": 50},
        evaluation={"every": 0, "prompts": 64},
    )
    summary, rows = run_with_a_pytorch_sampler(config)
    assert audit(tmp_path / "run").startswith("50 steps, 2 windows, 800 groups")
    assert max(abs(row["learner/log_ratio"]) for row in rows if row["window/lag"] == 0) < 1e-4
    assert summary["after"]["pass@1"] > summary["before"]["pass@1"] + 0.1, summary

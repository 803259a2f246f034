"""Runs whose whole directory is in an object store: killed in bad weather and resumed, they are the undisturbed run."""

import contextlib
import signal
import time

import jax
import pytest

import stores
import test_evaluate
import test_generate
from jobs import finish_job, start_job
from oapl_jax import train
from oapl_jax.build import policy
from oapl_jax.cli import evaluate, generate
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.io import json_lines, storage
from oapl_jax.report.report import write_report
from oapl_jax.rollouts.audit import audit
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.run.export import export
from oapl_jax.run.start import make_warm_start, model_path, outline
from oapl_jax.sft import sft
from oapl_jax.weights.checkpoint_store import CheckpointStore
from oapl_jax.weights.checkpoints import fingerprint
from runs import (
    BASE,
    assert_same_run,
    finish,
    make_config,
    make_sft_config,
    read_lines,
    start,
    start_sampler,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STORMY = {
    "rates": {"429": 0.01, "503": 0.01, "cut before": 0.01, "cut after": 0.01, "cut answer": 0.005},
    "seconds": 0.0,
    "listing_lag": 1.0,
}
MESH = MeshConfig(trainer="fsdp=1")
DETACHED = {"shard_groups": 2, "lease_seconds": 60.0}  # a request that is tried again takes seconds


@contextlib.contextmanager
def place(name):
    """The address of an empty run directory, and the weather: ``GCS`` in bad weather."""
    if name == "S3":
        with stores.s3() as address:
            yield f"{address}/toy/run", stores.Weather()
    else:
        weather = stores.Weather(**STORMY)
        with stores.gcs(weather) as address:
            yield f"{address}/toy/run", weather
        assert weather.num_faults > 0


def wait_until(process, is_there, deadline=300):
    """Returns when something is there that a process does."""
    end = time.monotonic() + deadline
    while not is_there():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.2)


def wait_for_step(process, address, step):
    """Returns when the batch of a step is recorded."""
    path = storage.shared_path(address) / "batches.jsonl"
    wait_until(process, lambda: any(row["step"] >= step for row in json_lines.read(path)))


def check(address, online, folder):
    """Nothing lost, nothing twice: weights, batches and metrics of the online run on a disk; what looks at runs works."""
    run = storage.shared_path(address)
    assert audit(run) == audit(online) == "10 steps, 3 windows, 40 groups, 320 rollouts: all as recorded"
    assert CheckpointStore(run / "checkpoints").steps() == [9, 10]
    assert str(write_report(run)) == f"{address}/report.html"
    assert b"<html" in storage.read(run / "report.html")
    copy = stores.copied(address, folder / "copy")
    published = ("publish_seconds", "publish_bytes", "sampler/processes", "damaged_files", "idle_seconds")
    assert_same_run(online, copy, but=published)
    return copy


def check_sampling(address, online, folder):
    """Responses and scores of the run in the store, written into the store, are those of a run on a disk."""
    found = []
    for root, model in ((str(folder), str(online)), (address, address)):
        policy = {"path": model, "tokenizer": "model"}
        config = test_generate.make_config(f"{root}/generated", model=policy, generation={"prompts": 4})
        summary = generate.run(config)
        assert summary is not None
        assert generate.run(config) == summary, "it has ended"
        table = evaluate.evaluate(test_evaluate.make_config(f"{root}/evaluated", {"path": model}, label="run"))
        generated = RolloutLog(storage.shared_path(root) / "generated" / "rollouts").read(0)
        samples = [[item.rollout.token_ids.tolist() for item in group.rollouts] for group in generated]
        found.append((summary, table, samples))
    assert found[0] == found[1]
    evaluated, generated = (storage.shared_path(address) / name for name in ("evaluated", "generated"))
    assert storage.read(evaluated / "passk.png").startswith(b"\x89PNG")
    no_weights = {"config.yaml", "passk.png", "results.csv", "results.json", "rollouts", "run.json"}
    assert set(storage.names(evaluated)) == no_weights
    assert "policy" not in storage.names(generated)


@pytest.mark.parametrize("store", ["GCS", pytest.param("S3", marks=pytest.mark.long)])
def test_an_online_run_that_is_killed_goes_on_from_the_store(store, finished, tmp_path):
    with place(store) as (address, weather):
        config = make_config(address, run={"tracker": "tensorboard"})
        trainer = start(write_config(tmp_path / "config.yaml", config))
        try:
            wait_for_step(trainer, address, 5)
        finally:
            trainer.kill()
            trainer.communicate()
        summary = train.run(config)
        assert summary["steps"] == 10
        assert train.run(config) == summary, "it has ended"
        copy = check(address, finished[0], tmp_path)
        assert len(list((copy / "tensorboard").iterdir())) >= 3, "a file a checkpoint"
        exported = export(storage.shared_path(address), tmp_path / "exported", 9)
        assert (exported / "model.safetensors").stat().st_size > 0
        weather.listing_lag = 0.0  # as of today's stores; generate and evaluate rely on it
        check_sampling(address, finished[0], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("store", ["GCS", "S3"])
def test_a_detached_run_outlives_a_kill_of_each_role(store, finished, tmp_path):
    with place(store) as (address, _), contextlib.ExitStack() as stack:

        def started(process):
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        config = make_config(address, mode="detached", window=DETACHED)
        path = write_config(tmp_path / "config.yaml", config)
        samplers = [started(start_sampler(address)) for _ in range(2)]
        trainer = started(start(path))
        wait_for_step(trainer, address, 2)
        samplers[0].kill()
        samplers.append(started(start_sampler(address)))
        wait_for_step(trainer, address, 5)
        trainer.send_signal(signal.SIGKILL)
        trainer.communicate()
        trainer = started(start(path))
        code, output = finish(trainer, 400)
        assert code == 0, output
        for sampler in samplers[1:]:
            code, output = finish(sampler)
            assert code == 0, output
        check(address, finished[0], tmp_path)


def test_supervised_training_that_is_killed_goes_on_from_the_store_and_is_a_warm_start(tmp_path):
    with stores.s3() as address:
        directory = storage.shared_path(f"{address}/toy/sft")
        config = make_sft_config(directory, "checkpoint.every=20", "run.tracker=tensorboard")
        path, checkpoints = write_config(tmp_path / "sft.yaml", config), CheckpointStore(directory / "checkpoints")
        trainer = start(path, command="sft")
        try:
            wait_until(trainer, checkpoints.steps)
        finally:
            trainer.kill()
            trainer.communicate()
        assert checkpoints.steps()[0] == 20
        assert not sft.is_finished(config)
        assert sft.run(config) == directory / "export"
        assert checkpoints.steps() == [40, 60]
        assert [row["step"] for row in json_lines.read(directory / "metrics.jsonl")] == list(range(1, 61))
        assert len(storage.names(directory / "tensorboard")) >= 3, "a file a checkpoint"
        run = make_config(tmp_path / "run", model={"warm_start": str(path), "path": None})
        make_warm_start(run)
        of_store, of_disk = (
            policy.load_params(run.model, source, outline(run.model)[0], make_meshes(MESH)[0], 0)
            for source in (model_path(run.model), BASE["model"]["path"])
        )
        assert fingerprint(jax.tree.leaves(of_store)) == fingerprint(jax.tree.leaves(of_disk))


JOB = {
    "mesh": {"trainer": "fsdp=2"},
    "window": {"shard_groups": 2, "lease_seconds": 60.0, "deadline": 240.0},
    "evaluation": {"every": 0, "prompts": 4, "final_samples": 2},
}


def start_trainers(config, path):
    return start_job(["-m", "oapl_jax.train", "--config", str(write_config(path, config))], 2, 1)


@pytest.mark.long
def test_a_job_of_two_processes_that_is_killed_goes_on_from_the_store(tmp_path):
    with stores.s3() as address:
        directory = storage.shared_path(f"{address}/toy/job")
        config = make_config(directory, run={"steps": 8}, **JOB)
        job = start_trainers(config, tmp_path / "config.yaml")
        try:
            wait_until(job[0], lambda: 3 in CheckpointStore(directory / "checkpoints").steps())
        finally:
            for process in job:
                process.kill()
            finish_job(job)
        codes, outputs = finish_job(start_trainers(config, tmp_path / "config.yaml"))
        assert codes == [0, 0], "\n".join(outputs)
        assert "resumed at step" in outputs[0], "3 or 6"
        assert audit(directory).startswith("8 steps, 2 windows")
        copy = stores.copied(str(directory), tmp_path / "copy")
        assert [row["step"] for row in read_lines(copy / "metrics.jsonl")] == list(range(9))
        assert len(storage.names(directory / "samplers")) == 4, "each process samples"
        shards = [name for name in storage.names(directory / "export") if name.endswith(".safetensors")]
        assert len(shards) >= 2, "one of each process"
        found = [
            policy.load_params(config.model, str(folder), outline(config.model)[0], make_meshes(MESH)[0], 0)
            for folder in (directory / "export", export(directory, tmp_path / "exported"))
        ]
        assert fingerprint(jax.tree.leaves(found[0])) == fingerprint(jax.tree.leaves(found[1]))

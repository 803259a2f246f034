"""A run over two processes that train and two that sample, of one JAX job: preempted, resumed, and one all the same."""

import json
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from jobs import finish_job, start_job
from oapl_jax.rollouts.audit import audit
from oapl_jax.weights.policies import PolicyStore
from runs import ROOT, finish, make_config, read_lines, signal_after, start_sampler, write_config

pytestmark = pytest.mark.slow

MODEL = {"vocab_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4}


def start_run(run_dir, num_processes=4, devices_each=4, **sections):
    """By default the trainer has eight devices of two processes, each replica of the sampler four of one."""
    model = run_dir.parent / "model.json"
    model.write_text(json.dumps(json.loads((ROOT / "configs/toy_qwen3.json").read_text()) | MODEL))
    config = make_config(
        run_dir,
        **{
            "run": {"steps": 11, "seed": 3},
            "model": {"path": None, "config": str(model), "tokenizer": "characters"},
            "window": {"sync_every": 4, "deadline": 240.0, "shard_groups": 2},
            "evaluation": {"every": 5, "prompts": 6, "samples": 2, "final_samples": 4},
            "mesh": {"trainer": "fsdp=8", "sampler": "data=2,tensor=4"},
            **sections,
        },
    )
    path = write_config(run_dir.with_suffix(".yaml"), config)
    return start_job(["-m", "oapl_jax.train", "--config", str(path)], num_processes, devices_each)


def weights(run_dir):
    return {name: x for path in run_dir.glob("export/*.safetensors") for name, x in load_file(path).items()}


@pytest.fixture(scope="module")
def preempted(tmp_path_factory):
    """A run whose machines were taken away twice: of a process that samples, and of one that trains."""
    directory = tmp_path_factory.mktemp("preempted") / "run"
    for process, step in ((3, 3), (1, 7)):
        job = start_run(directory)
        assert signal_after(job[process], directory, step, signal.SIGTERM)
        codes, outputs = finish_job(job)
        assert codes == [42] * 4, "\n".join(outputs)
        last = read_lines(directory / "metrics.jsonl")[-1]["step"]
        assert f"saved at step {last};" in outputs[0]
        assert step <= last < 11
    codes, outputs = finish_job(start_run(directory))
    assert codes == [0] * 4, "\n".join(outputs)
    assert f"resumed at step {last}," in outputs[0]
    return directory


def test_a_run_of_four_processes_ends_as_recorded(preempted):
    assert audit(preempted).startswith("11 steps, 3 windows")
    rows = read_lines(preempted / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["window/lag"] for row in rows[1:]] == [0, 1, 2, 3] * 2 + [0, 1, 2]
    assert max(row["learner/log_ratio_abs"] for row in rows[1:] if row["window/lag"] == 0) < 1e-4
    assert {"evaluation/pass@1", "evaluation/pass@2"} <= rows[5].keys()
    assert json.loads((preempted / "summary.json").read_text())["policy_versions"] == 3
    assert len(list((preempted / "samplers").iterdir())) == 6  # two in each of three jobs


def test_it_is_the_run_that_its_log_makes_without_interruption(preempted, tmp_path):
    # A sampler over several devices sums in an order that depends on the row, so another run draws other last bits.
    shutil.copytree(preempted / "rollouts", tmp_path / "run/rollouts")
    codes, outputs = finish_job(start_run(tmp_path / "run"))
    assert codes == [0] * 4, "\n".join(outputs)
    for name, tensor in weights(preempted).items():
        np.testing.assert_array_equal(tensor, weights(tmp_path / "run")[name], err_msg=name)
    assert read_lines(preempted / "batches.jsonl") == read_lines(tmp_path / "run/batches.jsonl")


def test_all_processes_may_do_both(tmp_path):
    codes, outputs = finish_job(start_run(tmp_path / "run", 2, 2, run={"steps": 5}, mesh={"trainer": "fsdp=4"}))
    assert codes == [0, 0], "\n".join(outputs)
    assert audit(tmp_path / "run").startswith("5 steps, 2 windows")
    assert len(list((tmp_path / "run/samplers").iterdir())) == 2


def test_a_trainer_of_two_processes_publishes_for_a_detached_sampler(tmp_path):
    directory = tmp_path / "run"
    job = start_run(directory, 2, 2, mode="detached", run={"steps": 5}, mesh={"trainer": "fsdp=4"})
    sampler = start_sampler(directory)
    try:
        codes, outputs = finish_job(job)
        assert codes == [0, 0], "\n".join(outputs)
        assert finish(sampler)[0] == 0
    finally:
        sampler.kill()
    assert audit(directory).startswith("5 steps, 2 windows")
    manifest = PolicyStore(directory / "policy").manifest(1)
    assert len([name for name in manifest.files if name.endswith(".safetensors")]) >= 2


def test_a_process_that_fails_ends_all_with_its_reason(tmp_path):
    codes, outputs = finish_job(start_run(tmp_path / "run", window={"parity_tolerance": 1e-12}))
    assert codes == [1] * 4, "\n".join(outputs)
    assert all("parity gate" in output for output in outputs)


def test_meshes_that_part_a_process_are_refused(tmp_path):
    codes, outputs = finish_job(start_run(tmp_path / "run", 2, mesh={"trainer": "fsdp=6", "sampler": "tensor=2"}))
    assert codes == [2] * 2, "\n".join(outputs)
    assert "process 1 would have devices of both" in outputs[0]

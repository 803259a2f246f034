"""Runs over several processes of one JAX job: preempted, resumed, and one run all the same."""

import dataclasses
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


def random_model(folder):
    """The section of a model of random weights that ``tensor=4`` divides; all processes draw the same ones."""
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads((ROOT / "configs/toy_qwen3.json").read_text()) | MODEL))
    return {"path": None, "config": str(path), "tokenizer": "characters"}


def start_run(run_dir, num_processes, devices_each, **sections):
    config = make_config(
        run_dir,
        **{
            "window": {"sync_every": 4, "deadline": 240.0, "shard_groups": 2},
            "evaluation": {"every": 5, "prompts": 6, "samples": 2, "final_samples": 4},
            **sections,
        },
    )
    path = write_config(run_dir.with_suffix(".yaml"), config)
    return start_job(["-m", "oapl_jax.train", "--config", str(path)], num_processes, devices_each)


def weights(run_dir):
    return {name: x for path in run_dir.glob("export/*.safetensors") for name, x in load_file(path).items()}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A job whose first two processes train, and sample too where no others do."""

    num_processes: int
    devices_each: int
    mesh: dict[str, str]
    num_samplers: int
    preempted: tuple[tuple[int, int], ...]
    """The process that gets SIGTERM, and the step before which it does not; one job after another."""
    is_random: bool
    """The model has random weights; else it is the toy model of this folder."""

    def start(self, run_dir):
        sections = {"model": random_model(run_dir.parent)} if self.is_random else {}
        run = {"steps": 11, "seed": 3}
        return start_run(run_dir, self.num_processes, self.devices_each, run=run, mesh=self.mesh, **sections)


SMALL = Layout(2, 1, {"trainer": "fsdp=2"}, 2, ((1, 3),), is_random=False)
LARGE = Layout(4, 4, {"trainer": "fsdp=8", "sampler": "data=2,tensor=4"}, 2, ((3, 3), (1, 7)), is_random=True)


@pytest.fixture(scope="module", params=[SMALL, pytest.param(LARGE, marks=pytest.mark.long)], ids=["small", "large"])
def preempted(request, tmp_path_factory):
    """A run one of whose machines was taken away, in turn of each process of ``preempted``, and that was resumed."""
    layout, directory = request.param, tmp_path_factory.mktemp("preempted") / "run"
    for process, step in layout.preempted:
        job = layout.start(directory)
        assert signal_after(job[process], directory, step, signal.SIGTERM)
        codes, outputs = finish_job(job)
        assert codes == [42] * layout.num_processes, "\n".join(outputs)
        last = read_lines(directory / "metrics.jsonl")[-1]["step"]
        assert f"saved at step {last};" in outputs[0]
        assert step <= last < 11
    codes, outputs = finish_job(layout.start(directory))
    assert codes == [0] * layout.num_processes, "\n".join(outputs)
    assert f"resumed at step {last}," in outputs[0]
    return layout, directory


def test_a_preempted_run_ends_as_recorded(preempted):
    layout, directory = preempted
    assert audit(directory).startswith("11 steps, 3 windows")
    rows = read_lines(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["window/lag"] for row in rows[1:]] == [0, 1, 2, 3] * 2 + [0, 1, 2]
    assert max(row["learner/log_ratio_abs"] for row in rows[1:] if row["window/lag"] == 0) < 1e-4
    assert {"evaluation/pass@1", "evaluation/pass@2"} <= rows[5].keys()
    assert json.loads((directory / "summary.json").read_text())["policy_versions"] == 3
    num_jobs = len(layout.preempted) + 1
    assert len(list((directory / "samplers").iterdir())) == layout.num_samplers * num_jobs


@pytest.mark.long
def test_it_is_the_run_that_its_log_makes_without_interruption(preempted, tmp_path):
    # A sampler over several devices sums in an order that depends on the row, so another run draws other last bits.
    layout, directory = preempted
    shutil.copytree(directory / "rollouts", tmp_path / "run/rollouts")
    codes, outputs = finish_job(layout.start(tmp_path / "run"))
    assert codes == [0] * layout.num_processes, "\n".join(outputs)
    for name, tensor in weights(directory).items():
        np.testing.assert_array_equal(tensor, weights(tmp_path / "run")[name], err_msg=name)
    assert read_lines(directory / "batches.jsonl") == read_lines(tmp_path / "run/batches.jsonl")


def test_two_processes_train_and_a_third_one_samples(tmp_path):
    mesh, model = {"trainer": "fsdp=2", "sampler": "data=1"}, random_model(tmp_path)
    codes, outputs = finish_job(start_run(tmp_path / "run", 3, 1, run={"steps": 5}, mesh=mesh, model=model))
    assert codes == [0] * 3, "\n".join(outputs)
    assert audit(tmp_path / "run").startswith("5 steps, 2 windows")
    assert len(list((tmp_path / "run/samplers").iterdir())) == 1


def test_a_trainer_of_two_processes_publishes_for_a_detached_sampler(tmp_path):
    directory = tmp_path / "run"
    job = start_run(directory, 2, 1, mode="detached", run={"steps": 5}, mesh={"trainer": "fsdp=2"})
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
    codes, outputs = finish_job(
        start_run(tmp_path / "run", 2, 1, mesh={"trainer": "fsdp=2"}, window={"parity_tolerance": 1e-12})
    )
    assert codes == [1] * 2, "\n".join(outputs)
    assert all("parity gate" in output for output in outputs)


def test_meshes_that_part_a_process_are_refused(tmp_path):
    codes, outputs = finish_job(start_run(tmp_path / "run", 2, 4, mesh={"trainer": "fsdp=6", "sampler": "tensor=2"}))
    assert codes == [2] * 2, "\n".join(outputs)
    assert "process 1 would have devices of both" in outputs[0]

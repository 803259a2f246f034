"""The command: its verdict, its words, and, where libtpu is installed, all of it end to end."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.io.console import ExitCode
from oapl_jax.preflight import preflight, programs, topology
from preflight.tpu_compiler import needs_libtpu

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.36G) exceeds"
            " available HBM (15.75G).",
            33.36,
        ),
        (
            "RESOURCE_EXHAUSTED: Compilation failure: Ran out of memory in memory space hbm. Used 43.02G of 15.75G hbm.",
            43.02,
        ),
        ("RESOURCE_EXHAUSTED: Used 512.00M of 400.00M hbm", 0.5),
        ("RESOURCE_EXHAUSTED: of something else", 0),
    ],
)
def test_the_compilers_refusal_is_read(message, gib):
    assert preflight.parse_refusal(message) == pytest.approx(gib * GIB)


def test_the_slowest_resource_is_the_bound():
    chip = topology.parse("v5e-8").chip
    cost = preflight.hlo.Cost(
        0,
        4 * chip.hbm_bandwidth,
        (
            preflight.hlo.Collective("all-gather", "ICI", 1, 2 * chip.ici_bandwidth),
            preflight.hlo.Collective("all-reduce", "DCN", 1, 5 * chip.dcn_bandwidth),
        ),
        0,
    )
    least = preflight.roofline(3 * chip.flops, cost, chip)
    assert least == {"compute": 3, "hbm": 4, "ici": 2, "dcn": 5}
    assert preflight.Result("train_step", 1, seconds=least).bound == ("dcn", 5)


def result_of(name, total, refusal=""):
    return preflight.Result(name, 1, total=total, usable=16 * GIB, refusal=refusal)


def test_the_verdict_and_the_way_out(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan, unaligned = (
        programs.make_plan(config_file.load(TrainConfig, TINY[1], [*TINY[2:], every]), jax.devices(), 16 * GIB)
        for every in ("evaluation.every=100", "evaluation.every=30")  # a window has 50 steps
    )
    assert "FITS" in preflight.describe(result_of("train_step", 15 * GIB), plan)
    text = preflight.describe(result_of("train_step", 18 * GIB), plan)
    assert "DOES NOT FIT: 2.00 GiB short" in text
    assert "try   model.remat=layer" in text
    assert "try   learner.micro_batch_rows=64 (now 128)" in text
    assert "try   evaluation.every" not in preflight.describe(result_of("decode", 18 * GIB), plan)
    text = preflight.describe(result_of("decode", 18 * GIB), unaligned)
    assert "try   evaluation.every a multiple of window.sync_every" in text
    broken = preflight.describe(result_of("decode", 16 * GIB, refusal="INTERNAL: of the compiler's own"), plan)
    assert "DOES NOT COMPILE" in broken
    assert "INTERNAL: of the compiler's own" in broken


def run(*words):
    """The command in a process of its own: libtpu is loaded once, and 8 CPU devices are not wanted."""
    return python("-m", "oapl_jax", "preflight", *words)


def python(*words):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


TINY = [
    *("--config", "configs/quickstart.yaml", "model.warm_start=null", "model.config=configs/toy_qwen3.json"),
    *("model.tokenizer=characters", "model.scan_layers=true", "mesh.trainer=data=2,fsdp=4"),
]


@needs_libtpu
@pytest.mark.slow
def test_a_run_that_fits(tmp_path):
    done = run(*TINY, "--topology", "v5e-4", "--num-slices", "2", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("\nFITS")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fits"]
    assert report["topology"]["devices"] == 8
    assert [program["name"] for program in report["programs"]] == ["train_step", "score", "prefill", "decode", "sync"]
    step = report["programs"][0]
    assert step["total"] < step["usable"] == 15.75 * GIB
    # Rows are split over both slices by `data`: the gradient is summed over the data center network.
    networks = {collective["network"] for collective in step["collectives"]}
    assert networks == {"ICI", "DCN"}
    assert step["seconds"]["dcn"] > 0
    # A step is at least three forward passes; the tiny model's attention is done in full and not halved.
    assert 1 < step["flops"] * 8 / step["model_flops"] < 2.5


@needs_libtpu
@pytest.mark.slow
def test_a_run_that_does_not_fit_says_so_in_seconds():
    config = ["model.config=configs/models/deepseek_r1_distill_qwen_14b.json", "sampler.dtype=bfloat16"]
    done = run(*TINY, *config, "--topology", "v5e-8")
    assert done.returncode == ExitCode.FAILED
    assert "DOES NOT FIT before anything is compiled" in done.stdout


@needs_libtpu
@pytest.mark.slow
def test_a_program_that_the_compiler_refuses_is_weighed_by_its_words():
    """Two matrices of 16 GiB, in a process of their own as above."""
    done = python("-c", REFUSED)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["fits"]
    assert "RESOURCE_EXHAUSTED" in result["refusal"]
    assert result["temporaries"] > 16 * GIB


REFUSED = """
import json
import jax
from oapl_jax.preflight import preflight, topology
from oapl_jax.preflight.programs import Program

slices = topology.parse("v5e-1")
(device,) = topology.devices(slices)
mesh = jax.sharding.Mesh([device], "x")
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
matrix = jax.ShapeDtypeStruct((65536, 65536), "float32", sharding=place)
program = Program("square", lambda: jax.jit(lambda x: x @ x).lower(matrix), mesh, 0, 2.0 * 65536**3, 0)
result = preflight.compile_program(program, slices)
print(json.dumps({"fits": result.fits, "refusal": result.refusal, "temporaries": result.temporaries}))
"""


@needs_libtpu
@pytest.mark.slow
def test_bad_input_is_2():
    done = run(*TINY, "--topology", "v5e-9")
    assert done.returncode == 2
    assert "error: topology 'v5e-9'" in done.stderr
    assert "v5e-8 (2x4)" in done.stderr

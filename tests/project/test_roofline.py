"""benchmarks/roofline.py against ratios worked out by hand."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import roofline  # noqa: E402

WORDS = "configs/math_qwen2.5_0.5b.yaml --topology v5e-4 --num-slices 2 mesh.trainer=data=2,fsdp=2,tensor=-1"


def test_the_ratios_of_a_report(monkeypatch):
    monkeypatch.chdir(ROOT)
    num_params, layers, width, steps = 494_032_768, 24, 896, 32
    gathered = num_params / 4 * (2 + 4)  # fsdp=2: the other half of each weight, and of each gradient
    tokens = 128 * (640 + 384 / 8) / 4  # of the two devices of a tensor group
    summed = 4 * layers * tokens * width * 2 * 2 * (1 / 2)
    crossed = num_params / 4 * 4
    weights, cache = 5e8, 2e8
    live = steps * (weights + cache * (384 + 320) / 2048)
    bandwidth = 0.819e12
    report = {
        "topology": {"generation": "v5e", "devices": 8, "num_slices": 2},
        "memory": {"sampler_weights": weights, "kv_cache": cache},
        "kv_cache": {"tokens": 2048 * 128, "rows": 128},
        "programs": [
            {
                "name": "train_step",
                "flops": 3e14,
                "model_flops": 2e15,
                "mfu": 0.4,
                "seconds": {"compute": 2.0, "hbm": 3.0},
                "collectives": [
                    {"network": "ICI", "num_bytes": 2 * gathered},
                    {"network": "ICI", "num_bytes": 2 * summed},
                    {"network": "DCN", "num_bytes": 1.5 * crossed},
                ],
            },
            {"name": "decode", "seconds": {"hbm": 1.25 * live / bandwidth}},
        ],
    }
    assert roofline.ratios(report, WORDS) == pytest.approx(
        {
            "decode_hbm": 1.25,
            "train_flops": 1.2,
            "train_hbm_over_compute": 1.5,
            "train_mfu": 0.4,
            "train_ici": 2.0,
            "train_dcn": 1.5,
        }
    )

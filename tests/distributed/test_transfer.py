"""Weights from the processes of one role to those of the other: each bit arrives, in any dtype and any two meshes."""

import pytest

from jobs import ROOT, finish_job, start_job

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("trainer", "sampler", "dtype", "chunk"),
    [
        ("fsdp=8", "data=2,tensor=4", "bfloat16", 40_000),  # a layer a chunk, one round
        ("data=2,fsdp=2,tensor=2", "data=8", "int8", 10**9),  # copies do not travel; more receivers than senders
    ],
)
def test_each_bit_arrives(trainer, sampler, dtype, chunk):
    words = [
        "tests/distributed/transfer_job.py",
        "--trainer",
        trainer,
        "--sampler",
        sampler,
        "--dtype",
        dtype,
        "--chunk",
        str(chunk),
    ]
    codes, outputs = finish_job(start_job([str(ROOT / words[0]), *words[1:]], 4, 4))
    assert codes == [0] * 4, "\n".join(outputs)

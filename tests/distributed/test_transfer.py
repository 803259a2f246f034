"""Weights from the processes of one role to those of the other: each bit arrives, in any dtype and any two meshes."""

import pytest

from jobs import ROOT, finish_job, start_job

pytestmark = pytest.mark.slow

CASES = [
    ("fsdp=8", "data=2,tensor=4", "bfloat16", "40000"),  # a layer a chunk, one round
    ("data=2,fsdp=2,tensor=2", "data=8", "int8", "1000000000"),  # copies do not travel; more receivers than senders
]


def test_each_bit_arrives():
    """One job makes both transfers; a process that fails says in which."""
    words = [word for case in CASES for word in ("--case", *case)]
    codes, outputs = finish_job(start_job([str(ROOT / "tests/distributed/transfer_job.py"), *words], 4, 4))
    assert codes == [0] * 4, "\n".join(outputs)

"""Which environments mean a job of several processes, and what is said of half a description of one."""

import argparse

import pytest

from oapl_jax.distributed import start
from oapl_jax.distributed.team import Team


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "w-0.svc,w-1.svc", "TPU_WORKER_ID": "1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # in an allocation, not under srun
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_the_environment_says_whether_there_are_several(environment, expected):
    assert start.is_one_of_several(environment) is expected


@pytest.mark.parametrize(
    "words",
    [
        ["--process-id", "0"],
        ["--coordinator", "a:1", "--num-processes", "2"],
        ["--coordinator", "auto", "--process-id", "0"],
    ],
)
def test_half_a_description_is_refused(words):
    parser = argparse.ArgumentParser()
    start.add_options(parser)
    with pytest.raises(ValueError, match="give all three, or none, or --coordinator auto"):
        start.initialize(parser.parse_args(words), environment={})


def test_one_process_agrees_with_itself():
    alone = Team("alone", [0])
    assert alone.is_leader
    assert alone.rank == 0
    assert alone.agree(lambda: {"groups": [1, 2]}, deadline=0.0) == {"groups": [1, 2]}
    alone.wait()

"""How a process joins a JAX job of several processes (``jax.distributed``)."""

import argparse
import os
from collections.abc import Mapping

import jax

HEARTBEAT_SECONDS = 100
"""After so long a process that died without a word ends the whole job."""
START_SECONDS = 300


def add_options(parser: argparse.ArgumentParser) -> None:
    """The explicit way to join a job, where the environment does not say it."""
    job = parser.add_argument_group("several processes", "found in the environment on GKE TPUs, Slurm and OpenMPI")
    job.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of the process with id 0; auto: JAX finds out (TPU VMs, Kubernetes)"
    )
    job.add_argument("--num-processes", type=int, metavar="N", help="in the job")
    job.add_argument("--process-id", type=int, metavar="I", help="of this one, from 0")


def initialize(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the job that the options or the environment name, if there is one; before any other use of JAX.

    Raises:
        ValueError: the options are not all there.
    """
    explicit = {
        "coordinator_address": arguments.coordinator,
        "num_processes": arguments.num_processes,
        "process_id": arguments.process_id,
    }
    given = {key: value for key, value in explicit.items() if value is not None}
    if given == {"coordinator_address": "auto"}:
        given = {}
    elif not given and not is_one_of_several(environment):
        return
    elif given and (len(given) < len(explicit) or arguments.coordinator == "auto"):
        raise ValueError(
            "--coordinator, --num-processes and --process-id: give all three, or none, or --coordinator auto"
        )
    # JAX's own listener for SIGTERM would take the signal away from ours.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **given, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether the environment is that of a job of several processes which JAX can join by itself."""
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    return len(hosts) > 1 or any(int(environment.get(name) or 1) > 1 for name in counts)

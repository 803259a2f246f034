"""Jobs of several processes on this machine, joined by ``jax.distributed`` over gloo."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def start_job(words, num_processes, devices_each):
    """Starts ``python WORDS`` in each process of one job; returns the processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_each} --xla_backend_optimization_level=0",
    }
    job = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(num_processes), "--process-id"]
    return [
        subprocess.Popen(
            [sys.executable, *words, *job, str(i)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(num_processes)
    ]


def finish_job(job, timeout=400):
    """Waits for all; returns exit codes and outputs."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in job]
    finally:
        for process in job:
            process.kill()
    return [process.returncode for process in job], outputs

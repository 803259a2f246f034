"""The model that the runs of this folder start from, and the run that several files compare with."""

import fcntl
import json
import os

import pytest

import runs
from oapl_jax import train
from oapl_jax.sft import sft


def once(tmp_path_factory, name, make):
    """A folder, and what ``make(folder)`` returned, as JSON: made by the first of the session's workers that asks."""
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    result = session / f"{name}.json"
    with (session / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            result.write_text(json.dumps(make(session / name)))
    return session / name, json.loads(result.read_text())


@pytest.fixture(scope="session", autouse=True)
def toy_model(request, tmp_path_factory):
    """A toy model that has learned the form of an answer and guesses its digits: about one in ten is right.

    It is trained for slow tests only.
    """
    if any(item.get_closest_marker("slow") for item in request.session.items):
        _, path = once(tmp_path_factory, "toy_model", lambda run_dir: str(sft.run(runs.make_sft_config(run_dir))))
        runs.BASE["model"] = {"path": path}


@pytest.fixture(scope="session")
def finished(toy_model, tmp_path_factory):
    """A run of ``runs.BASE`` that nothing disturbed, and what ``train.run`` returned; tests only read it."""
    return once(tmp_path_factory, "finished", lambda run_dir: train.run(runs.make_config(run_dir)))

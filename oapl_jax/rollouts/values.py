"""V* of prompts from samples of a reference policy, which ``oapl-jax generate`` has drawn and logged."""

import collections
import pathlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import Verdict


def read_values(folder: pathlib.Path, value: Callable[[Float[np.ndarray, "G"]], float]) -> dict[str, float]:
    """``value`` of the rewards of each prompt, by its id; invalid verdicts are left out.

    ``folder``: ``run.dir`` of the generation.

    Raises:
        ValueError: there is no log, it cannot be read, or it has samples of several policies.
    """
    log, rewards = RolloutLog(folder / "rollouts"), collections.defaultdict(list)
    versions = log.versions()
    if len(versions) != 1:
        found = f"policy versions {versions}" if versions else "no rollouts"
        raise ValueError(f"objective.values={str(folder)!r}: has {found}; name the run.dir of one `oapl-jax generate`")
    for part in log.parts(versions[0]):
        for row in log.read_columns(versions[0], part, ["prompt_id", "verdict", "reward"]).to_pylist():
            if row["verdict"] != Verdict.INVALID:
                rewards[row["prompt_id"]].append(row["reward"])
    return {prompt_id: value(np.array(found, np.float64)) for prompt_id, found in rewards.items()}

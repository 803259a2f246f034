"""A metric that is no number stops a run."""

import math

import jax.numpy as jnp
import pytest

from oapl_jax.io.non_finite import check_finite
from oapl_jax.types import RunError


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, jnp.float32(jnp.nan)])
def test_a_non_finite_metric_stops_the_run_and_names_itself(value):
    step_metrics = {"learner/loss": 1.0, "learner/grad_norm": value, "learner/entropy": math.nan}
    with pytest.raises(RunError, match=r"learner/grad_norm is -?(nan|inf) at step 17") as caught:
        check_finite(17, step_metrics, ["learner/loss", "learner/grad_norm"])
    assert "learning_rate" in str(caught.value)
    check_finite(17, step_metrics, ["learner/loss"])

import numpy as np
import pytest

from oapl_jax.report.curves import MOST_POINTS, Curve


@pytest.mark.parametrize("num_steps", [1, MOST_POINTS, MOST_POINTS + 1, 10_000])
def test_a_curve_has_few_points_that_keep_the_mean_and_the_bounds(num_steps):
    values = np.random.default_rng(0).normal(size=num_steps)
    curve = Curve(enumerate(values))
    points = curve.points()
    assert len(points["x"]) <= MOST_POINTS
    assert curve.total == pytest.approx(values.sum())
    if num_steps <= MOST_POINTS:
        assert points["x"] == list(range(num_steps))
        np.testing.assert_allclose(points["y"], values, rtol=1e-5)
        assert not points["low"]
    else:
        assert len(points["x"]) > MOST_POINTS / 4
        assert min(points["low"]) == pytest.approx(values.min(), rel=1e-5)
        assert max(points["high"]) == pytest.approx(values.max(), rel=1e-5)


def test_a_point_is_the_mean_of_neighbouring_steps():
    points = Curve((step, float(step)) for step in range(4 * MOST_POINTS)).points()
    np.testing.assert_allclose(points["x"], points["y"])
    np.testing.assert_allclose(np.diff(points["x"]), np.diff(points["x"])[0])
    assert points["x"][0] == np.mean([points["low"][0], points["high"][0]])


def test_a_metric_of_few_steps_keeps_them():
    assert Curve((step, 1.0) for step in range(0, 100_000, 1000)).points()["x"] == list(range(0, 100_000, 1000))


def test_the_ends_are_means_over_a_tenth():
    assert Curve([(i, float(i)) for i in range(100)]).ends() == (4.5, 94.5)
    assert Curve([(3, 2.0)]).ends() == (2.0, 2.0)
    assert all(np.isnan(Curve().ends()))

"""Damaged files end in the documented error, in bounded time and memory, for every reader (``fuzzing.py``)."""

import pytest

from fuzzing import fuzz, summarise
from readable import READERS


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "num_files",
    [pytest.param(60, marks=pytest.mark.slow), pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.long])],
)
def test_a_damaged_file_ends_in_the_documented_error(name, num_files):
    summary = summarise(fuzz(name, num_files))
    assert not summary["failures"], summary
    assert summary["refused"] > num_files / 10, "the damage does damage"

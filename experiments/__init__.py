"""Experiments: grids of runs, the paper's claims put to the test on them, and the figures."""

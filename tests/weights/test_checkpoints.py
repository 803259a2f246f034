"""Checkpoints: what is saved is what comes back, and damage is noticed."""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oapl_jax.weights.checkpoints import Checkpoints, fingerprint, flatten

# Orbax leaves coroutines behind when a load fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@functools.cache
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))


def make_tree(seed=0):
    """Arrays of several types, split, replicated and on the host's first devices."""
    rng = np.random.default_rng(seed)

    def place(values, *axes):
        return jax.device_put(jnp.asarray(values), NamedSharding(mesh(), P(*axes)))

    odd = rng.normal(size=(64, 256)).astype(np.float32)  # larger than all metadata, see largest_file
    odd[0, :4] = [np.nan, np.inf, -0.0, 1e-45]
    return {
        "params": {
            "kernel": place(odd, "data", "tensor"),
            "half": place(rng.normal(size=(4, 3)).astype(jnp.bfloat16), "tensor"),
            "bias": place(rng.normal(size=7).astype(np.float32)),
        },
        "opt": (place(np.int32(seed)), place(rng.integers(0, 2**32, (2, 2), np.uint32))),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        assert a.sharding == b.sharding, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def save_steps(directory, steps, keep=2):
    """Checkpoints of these steps; the tree of each has its step as seed."""
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, make_tree(step), {"step": step, "nested": {"pass@1": 0.25}, "text": "x"})
    checkpoints.close()


def restore(directory, notes=None):
    checkpoints = Checkpoints(directory, 2)
    try:
        return checkpoints.restore(abstract(make_tree()), (notes if notes is not None else []).append)
    finally:
        checkpoints.close()


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None
    assert Checkpoints(tmp_path, 2).latest_step is None


def test_arrays_and_facts_come_back_bit_for_bit_in_their_shardings(tmp_path):
    save_steps(tmp_path, [3])
    step, tree, meta = restore(tmp_path)
    assert step == 3
    assert_same_bits(tree, make_tree(3))
    assert {name: meta[name] for name in ("step", "nested", "text")} == {
        "step": 3,
        "nested": {"pass@1": 0.25},
        "text": "x",
    }


def test_the_newest_are_kept_and_those_that_are_kept_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, keep_every=(4, 6, 0))
    for step in range(0, 15, 2):
        checkpoints.save(step, make_tree(step), {"step": step})
    checkpoints.close()
    kept = sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
    assert kept == [0, 4, 6, 8, 12, 14]


def test_another_sharding_may_be_asked_for(tmp_path):
    save_steps(tmp_path, [3])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh(), P())), make_tree()
    )
    checkpoints = Checkpoints(tmp_path, 2)
    _, tree, _ = checkpoints.restore(wanted, print)
    checkpoints.close()
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))
    assert np.asarray(tree["params"]["kernel"]).tobytes() == np.asarray(make_tree(3)["params"]["kernel"]).tobytes()


def test_what_is_saved_is_the_state_at_the_save_whatever_donating_steps_do_next(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def advance(tree):
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tree)

    tree = {  # 3 MiB: writing it takes a while
        "split": jax.device_put(jnp.zeros((512, 1024), jnp.float32), NamedSharding(mesh(), P("data", "tensor"))),
        "whole": jax.device_put(jnp.zeros((512, 512), jnp.float32), NamedSharding(mesh(), P())),
        "step": jnp.int32(0),
    }
    checkpoints = Checkpoints(tmp_path, 20)
    for step in range(6):
        checkpoints.save(10 * step, tree, {})
        for _ in range(10):
            tree = advance(tree)
    checkpoints.close()
    abstract_tree = abstract(tree)
    for step in range(6):
        reader = Checkpoints(tmp_path, 20)
        found, restored, _ = reader.restore(abstract_tree, pytest.fail)
        reader.close()
        assert found == 10 * (5 - step)
        assert int(restored["step"]) == found
        np.testing.assert_array_equal(restored["split"], found)
        np.testing.assert_array_equal(restored["whole"], found)
        pathlib.Path(tmp_path / str(found)).rename(tmp_path / f"seen-{found}")


def test_only_the_newest_are_kept(tmp_path):
    save_steps(tmp_path, [0, 5, 7, 12], keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"7", "12"}
    assert restore(tmp_path)[0] == 12


def test_a_run_goes_on_saving_after_a_restart(tmp_path):
    save_steps(tmp_path, [1, 2])
    save_steps(tmp_path, [3])
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(folder):
    largest_file(folder).unlink()


def delete_meta(folder):
    for path in (folder / "meta").rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, delete, delete_meta])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_loaded(tmp_path, damage):
    save_steps(tmp_path, [4, 8])
    damage(tmp_path / "8")
    notes = []
    step, tree, meta = restore(tmp_path, notes)
    assert (step, meta["step"]) == (4, 4)
    assert_same_bits(tree, make_tree(4))
    (note,) = notes
    assert note.startswith("checkpoint 8 cannot be loaded")
    assert str(tmp_path / "8.damaged") in note
    assert {path.name for path in tmp_path.iterdir()} == {"4", "8.damaged"}


def test_after_a_fall_back_the_same_step_is_saved_again_and_may_be_damaged_again(tmp_path):
    save_steps(tmp_path, [4, 8])
    for _ in range(2):
        flip(tmp_path / "8")
        checkpoints = Checkpoints(tmp_path, 2)
        assert checkpoints.restore(abstract(make_tree()), lambda note: None)[0] == 4
        assert checkpoints.latest_step == 4
        checkpoints.save(8, make_tree(8), {"step": 8})
        checkpoints.close()
    assert restore(tmp_path)[0] == 8
    assert len(list(tmp_path.glob("8.damaged*"))) == 2


def test_where_all_are_damaged_the_run_stops(tmp_path):
    save_steps(tmp_path, [4, 8])
    for step in (4, 8):
        flip(tmp_path / str(step))
    notes = []
    with pytest.raises(RuntimeError, match=r"none of the checkpoints \[8, 4\]"):
        restore(tmp_path, notes)
    assert len(notes) == 2


def checksum(*arrays):
    return int(fingerprint([jnp.asarray(array) for array in arrays]))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.uint8])
def test_the_fingerprint_notices_any_bit_of_any_element(dtype):
    values = (np.random.default_rng(0).normal(size=(3, 5)) * 50).astype(dtype)
    whole = checksum(values)
    assert whole == checksum(values.copy())
    for place in range(values.size):
        for bit in range(8 * values.dtype.itemsize):
            changed = values.copy()
            changed.view(np.uint8).reshape(-1)[place * values.dtype.itemsize + bit // 8] ^= 1 << bit % 8
            assert checksum(changed) != whole, (place, bit)


def test_the_fingerprint_notices_exchanged_elements_of_round_numbers():
    """Bits of such floats differ in high places only, where a weight by position would overflow."""
    values = np.zeros(1025, np.float32)
    values[0] = 1.0
    whole = checksum(values)
    for other in (0.0, 2.0, -1.0, 4.0, 0.5):
        for distance in [2**k for k in range(11)] + [3, 768]:
            values[:] = other
            values[0] = 1.0
            whole = checksum(values)
            values[[0, distance]] = values[[distance, 0]]
            assert checksum(values) != whole, (other, distance)


def test_the_fingerprint_notices_exchanged_elements_rows_and_arrays():
    values = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    whole = checksum(values, values.T)
    flat = values.reshape(-1)
    for first in range(flat.size):
        for second in range(first):
            changed = flat.copy()
            changed[[first, second]] = changed[[second, first]]
            assert checksum(changed.reshape(values.shape), values.T) != whole
    assert checksum(values.T, values) != whole
    assert checksum(np.roll(values, 1, axis=0), values.T) != whole
    assert checksum(values) != checksum(values.T)


def test_the_fingerprint_does_not_depend_on_the_sharding():
    values = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    split = jax.device_put(values, NamedSharding(mesh(), P("data", "tensor")))
    assert int(fingerprint([split])) == checksum(values)


def test_names_of_leaves_are_unique_and_in_order():
    tree = make_tree()
    flat = flatten(tree)
    assert list(flat) == ["opt/0", "opt/1", "params/bias", "params/half", "params/kernel"]
    assert all(a is b for a, b in zip(flat.values(), jax.tree.leaves(tree), strict=True))


SAVE = """
import pathlib, sys
import jax, jax.numpy as jnp
from oapl_jax.weights.checkpoints import Checkpoints
def mib(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(key))
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), 2)
keys = jax.random.split(jax.random.key(0), 16)
arrays = {f"array-{i}": jax.block_until_ready(jax.random.normal(key, (8, 1024, 512))) for i, key in enumerate(keys)}
checkpoints.save(1, {"small": jnp.ones(3)}, {})
checkpoints.wait()
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = mib("VmRSS")
checkpoints.save(2, arrays, {})
checkpoints.close()
print(mib("VmHWM") - before, sum(array.nbytes for array in arrays.values()) // 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
def test_a_save_needs_less_memory_than_another_copy_of_the_arrays(tmp_path):
    result = subprocess.run([sys.executable, "-c", SAVE, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    grown, size = map(int, result.stdout.split())
    assert size == 256
    assert grown < 0.75 * size


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(1, 5):
        checkpoints.best_step = {2: 2, 3: 2, 4: 4}.get(step)
        checkpoints.save(step, make_tree(step), {})
        checkpoints.wait()
        kept = sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
        assert kept == {1: [1], 2: [2], 3: [2, 3], 4: [4]}[step]
    checkpoints.close()

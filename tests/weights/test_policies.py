"""Published policies are whole or not there, are pointed to last, and stay while somebody uses them."""

import json
import os
import time

import jax
import numpy as np
import pytest

from model import tiny
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.data.tokenizer import CharacterTokenizer
from oapl_jax.distributed.sharding import SAMPLER_RULES, make_meshes
from oapl_jax.distributed.team import Team
from oapl_jax.model import hf
from oapl_jax.rollouts.buffer import Window
from oapl_jax.weights.policies import Current, Manifest, PolicyGoneError, PolicyStore, VersionLeases

CONFIG = tiny.config("qwen3_tied")


def manifest(version, start=0):
    return Manifest(Window(version, start, 8, (3, 1)), 2, "digest", {})


def publish(store, version, **options):
    return store.publish(
        manifest(version, **options), CONFIG, tiny.split(CONFIG)[1], CharacterTokenizer(), Team.alone()
    )


@pytest.fixture
def store(tmp_path):
    return PolicyStore(tmp_path / "policy")


def test_what_is_published_is_pointed_to_and_loads_bit_for_bit(store, tmp_path):
    assert store.current() is None
    metrics = publish(store, 3)
    assert metrics["sync/publish_bytes"] > 1000
    assert store.current() == Current(3, is_finished=False)
    found = store.manifest(3)
    assert found.window == Window(3, 0, 8, (3, 1))
    assert set(found.files) >= {"model.safetensors", "config.json", "character_tokenizer.json"}
    folder = store.fetch(3, tmp_path / "cache")
    mesh = make_meshes(MeshConfig(trainer="tensor=2"))[0]
    _, params = hf.load_params(folder, mesh, SAMPLER_RULES, "float32")
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(tiny.split(CONFIG)[1]), strict=True):
        np.testing.assert_array_equal(one, other)
    store.finish(3)
    assert store.current() == Current(3, is_finished=True)


def test_a_window_that_goes_on_wants_more_groups(store):
    """Its run had ended in it; the weights stay."""
    publish(store, 0)
    more = manifest(0)._replace(window=Window(0, 0, 12, (3, 1)))
    store.publish(more, CONFIG, tiny.split(CONFIG)[1], CharacterTokenizer(), Team.alone())
    assert store.manifest(0).window.num_groups == 12
    assert "model.safetensors" in store.manifest(0).files


def test_a_version_that_is_there_is_only_pointed_to_again(store):
    publish(store, 0)
    publish(store, 1)
    weights = store.folder(0) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert publish(store, 0)["sync/publish_bytes"] == 0
    assert weights.stat().st_mtime_ns == before
    assert store.current() == Current(0, is_finished=False), "a resumed trainer may be a version behind"
    assert publish(store, 0, start=5)["sync/publish_bytes"] > 0, "what another program put there is replaced"


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "null", "9" * 400, "[" * 100_000, '{"policy_version": null, "is_finished": false}'),
        *('{"policy_version": 1e999, "is_finished": 0}', '{"policy_version": 3}', "\udcff"),
    ],
)
def test_a_pointer_that_another_program_wrote_is_none(store, content):
    store.directory.mkdir()
    (store.directory / "current.json").write_bytes(content.encode(errors="surrogateescape"))
    assert store.current() is None


@pytest.mark.parametrize(
    "change",
    [
        *({"files": {"../../x": {}}}, {"files": {"/etc/passwd": {}}}, {"files": {"..": {}}}, {"files": 3}),
        *({"window": []}, {"window": None}, {"shard_groups": -1}, {"shard_groups": "8"}),
    ],
)
def test_a_manifest_that_another_program_wrote_is_none(store, tmp_path, change):
    publish(store, 0)
    manifest = store.folder(0) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(PolicyGoneError, match="no manifest that can be read"):
        store.fetch(0, tmp_path)


def test_stray_folders_neither_end_the_trainer_nor_cost_it_its_policy(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "manifest.json").write_text("kept")
    for name in ("999998", "999999", "\u00b2", "1", "9" * 200):
        (store.directory / name).mkdir(parents=True)
    (store.directory / "000000").symlink_to(tmp_path / "elsewhere")
    (store.directory / "000001").write_text("no folder")
    os.mkfifo(store.directory / "current.json")
    publish(store, 1)
    publish(store, 2)
    publish(store, 3)
    with VersionLeases(tmp_path / "leases") as trainer:
        assert store.collect(trainer) == [0, 1]
    assert store.versions() == [2, 3, 999998, 999999]
    assert store.current() == Current(3, is_finished=False)
    assert (tmp_path / "elsewhere" / "manifest.json").read_text() == "kept"


def test_half_a_version_is_not_there_and_is_written_anew(store, tmp_path):
    publish(store, 0)
    (store.folder(0) / "manifest.json").unlink()
    with pytest.raises(PolicyGoneError, match="no manifest"):
        store.fetch(0, tmp_path)
    assert publish(store, 0)["sync/publish_bytes"] > 0
    (store.folder(0) / "model.safetensors").unlink()
    with pytest.raises(PolicyGoneError, match=r"lacks model\.safetensors, which its manifest names"):
        store.fetch(0, tmp_path)
    publish(store, 0)
    store.fetch(0, tmp_path)
    with pytest.raises(PolicyGoneError):
        store.manifest(1)


def test_a_damaged_file_is_named(store, tmp_path):
    publish(store, 0)
    path = store.folder(0) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        store.fetch(0, tmp_path)


def test_a_torn_pointer_is_no_pointer(store):
    publish(store, 0)
    (store.directory / "current.json").write_text('{"policy_ver')
    assert store.current() is None


def test_old_versions_are_collected_when_no_one_uses_them(store, tmp_path):
    trainer, sampler = VersionLeases(tmp_path / "leases", 0.6), VersionLeases(tmp_path / "leases", 0.6)
    for version in range(4):
        publish(store, version)
    held = sampler.use(0, "a")
    assert store.collect(trainer) == [1], "the two newest stay, and the one that is used"
    assert store.versions() == [0, 2, 3]
    held.release()
    assert store.collect(trainer) == [0]

    silent = sampler.use(2, "b")
    publish(store, 4)
    assert store.collect(trainer) == []
    sampler.close()  # it beats no longer
    assert silent is not None
    end = time.monotonic() + 20
    while store.collect(trainer) != [2]:
        assert time.monotonic() < end
        time.sleep(0.1)
    trainer.close()
    assert json.loads((store.directory / "current.json").read_text())["policy_version"] == 4


def test_a_lease_that_is_renewed_for_ever_does_not_keep_an_old_version(store, tmp_path):
    with VersionLeases(tmp_path / "leases", 0.6) as trainer, VersionLeases(tmp_path / "leases", 0.6) as sampler:
        for version in range(3):
            publish(store, version)
        assert sampler.use(0, "a") is not None
        assert store.collect(trainer, 2, 0.5) == []
        time.sleep(0.6)
        assert store.collect(trainer, 2, 0.5) == [0]


def test_the_leases_of_a_version_disappear_with_it(store, tmp_path):
    """Ten versions, one sampler that finishes its leases, one that only releases them, and one that was killed."""
    folder = tmp_path / "leases"
    trainer, sampler = VersionLeases(folder, 30.0), VersionLeases(folder, 30.0)
    killed = json.dumps({"host": "elsewhere", "pid": 1, "started": "0", "beat": 1, "is_released": True})
    for version in range(10):
        publish(store, version)
        own, other = sampler.use(version, "a"), sampler.use(version, "b.c")
        (folder / f"{version:06d}-gone.0").write_text(killed)
        store.collect(trainer)
        own.finish()
        other.release()
    living = sampler.use(0, "late")
    store.collect(trainer)
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == {"000000", "000008", "000009"}
    living.finish()
    trainer.close()
    sampler.close()
    assert sorted(path.name for path in folder.iterdir()) == [
        f"00000{version}-{name}.0" for version in (8, 9) for name in ("b.c", "gone")
    ], "of the two versions that are there"

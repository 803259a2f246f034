"""Checkpoints of a run as Hugging Face folders."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from oapl_jax import export, train
from runs import BASE, make_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    train.run(make_config(directory, run={"steps": 5}, checkpoint={"every": 3}, evaluation={"every": 0}))
    return directory


def weights(folder):
    return load_file(folder / "model.safetensors")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_newest_checkpoint_is_the_models_of_the_run(run_dir, tmp_path):
    """Bit for bit, with every file, whatever mesh it was trained on and loaded by."""
    assert export.export(run_dir, tmp_path / "out") == tmp_path / "out"
    assert contents(tmp_path / "out") == contents(run_dir / "export")


def test_an_older_step_is_another_model(run_dir, capsys):
    export.main([str(run_dir), "--step", "3"])
    assert capsys.readouterr().out.strip() == str(run_dir / "export-3")
    older, newest = weights(run_dir / "export-3"), weights(run_dir / "export")
    assert older.keys() == newest.keys()
    assert any(not np.array_equal(older[name], newest[name]) for name in older)


def test_bfloat16_is_the_rounded_weights(run_dir, tmp_path):
    export.main([str(run_dir), str(tmp_path / "out"), "--dtype", "bfloat16"])
    for name, tensor in weights(tmp_path / "out").items():
        assert tensor.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor, weights(run_dir / "export")[name].astype(ml_dtypes.bfloat16))


def test_mistakes_are_named(run_dir, tmp_path, capsys):
    for arguments, message in (
        ([str(run_dir), "--step", "4"], "no checkpoint of step 4; it has 3, 5"),
        ([str(tmp_path)], "no run directory"),
        ([str(run_dir), str(run_dir)], "choose another"),
    ):
        with pytest.raises(SystemExit) as stopped:
            export.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert (run_dir / "checkpoints").is_dir()


def test_a_damaged_checkpoint_is_refused(run_dir, tmp_path):
    """Orbax itself does not notice this."""
    shutil.copytree(run_dir, tmp_path / "run")
    files = [file for file in (tmp_path / "run/checkpoints/5").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoints/5.*damaged"):
        export.export(tmp_path / "run")
    assert not (tmp_path / "run/export-5").exists()


def test_a_checkpoint_of_another_model_is_refused(run_dir, tmp_path):
    """The model's config file was changed after the run."""
    shutil.copytree(run_dir, tmp_path / "run")
    model = tmp_path / "model"
    shutil.copytree(BASE["model"]["path"], model)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    saved = tmp_path / "run/config.yaml"
    saved.write_text(saved.read_text().replace(BASE["model"]["path"], str(model)))
    with pytest.raises(ValueError, match=r"checkpoints/5: has no array .*lm_head"):
        export.export(tmp_path / "run")

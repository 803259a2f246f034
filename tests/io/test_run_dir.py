"""A run directory belongs to one config and one layout."""

import json
import os
import pathlib

import pytest

from oapl_jax import __version__
from oapl_jax.build.checks import CHECKS
from oapl_jax.config import config_file
from oapl_jax.config.commands import TrainConfig
from oapl_jax.io.run_dir import LAYOUT, check_release, check_run, identity, open_run, read_config, save_config
from oapl_jax.io.storage import shared_path
from rollouts.late_listings import make_place

RAW = {
    "run": {"steps": 10},
    "model": {"config": "model.json", "tokenizer": "characters"},
    "data": {"task": "chain", "max_prompt_tokens": 12},
    "sampler": {"group_size": 4, "max_response_tokens": 6},
    "objective": {},
    "learner": {"batch_rollouts": 16},
}


def make_config(directory, **sections):
    raw = {name: {**RAW.get(name, {}), **sections.get(name, {})} for name in RAW | sections}
    raw["run"]["dir"] = str(directory)
    return config_file.validate(TrainConfig, raw, "test", CHECKS)


def test_a_new_directory_is_made_and_has_the_resolved_config(tmp_path):
    config = make_config(tmp_path / "a" / "b")
    directory = open_run(config)
    assert directory == tmp_path / "a" / "b"
    assert config_file.load(TrainConfig, directory / "config.yaml") == config


def test_the_same_config_opens_it_again(tmp_path):
    for _ in range(3):
        assert open_run(make_config(tmp_path)) == tmp_path


def test_another_config_is_refused_naming_every_key_that_differs(tmp_path):
    open_run(make_config(tmp_path))
    before = (tmp_path / "config.yaml").read_text()
    other = make_config(tmp_path, run={"seed": 20}, learner={"batch_rollouts": 32}, objective={"beta2": 0.5})
    with pytest.raises(ValueError, match="belongs to a run of another config") as caught:
        open_run(other)
    differing = [line.strip() for line in str(caught.value).splitlines() if "->" in line]
    assert differing == ["run.seed: 0 -> 20", "objective.beta2: 0.001 -> 0.5", "learner.batch_rollouts: 16 -> 32"]
    assert "run.allow_config_change=true" in str(caught.value)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_change_that_is_allowed_is_saved(tmp_path):
    open_run(make_config(tmp_path))
    other = make_config(tmp_path, run={"allow_config_change": True}, learner={"learning_rate": 0.5})
    assert open_run(other) == tmp_path
    assert config_file.load(TrainConfig, tmp_path / "config.yaml") == other
    with pytest.raises(ValueError, match=r"learner\.learning_rate: 0\.5 -> 1e-06"):
        open_run(make_config(tmp_path))


def test_leave_to_change_is_itself_no_change(tmp_path):
    open_run(make_config(tmp_path))
    allowing = make_config(tmp_path, run={"allow_config_change": True})
    assert open_run(allowing) == tmp_path
    assert identity(allowing) == identity(make_config(tmp_path))
    assert identity(allowing) == identity(make_config(tmp_path, run={"steps": 20})), "a run may go on with more steps"
    assert identity(allowing) != identity(make_config(tmp_path, run={"seed": 20}))


@pytest.mark.parametrize("look", [check_run, open_run])
def test_a_directory_that_cannot_be_made_is_named(tmp_path, look):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run\.dir='.*/file/run': cannot be written"):
        look(make_config(tmp_path / "file" / "run"))


@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="needs a folder where nobody may write, not even root")
def test_a_directory_that_cannot_be_written_is_named():
    with pytest.raises(ValueError, match=r"run\.dir='/proc': cannot be written"):
        open_run(make_config("/proc"))


def test_a_crash_while_the_config_is_saved_leaves_the_one_before(tmp_path):
    config = make_config(tmp_path)
    open_run(config)
    descriptor = os.open(tmp_path / "config.yaml", os.O_RDONLY)  # the file of before, whatever its name becomes
    try:
        before = os.read(descriptor, 100_000)
        open_run(make_config(tmp_path, run={"steps": 20, "allow_config_change": True}))
        os.lseek(descriptor, 0, os.SEEK_SET)
        assert os.read(descriptor, 100_000) == before, "it is replaced, not written over"
    finally:
        os.close(descriptor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "run.json"]


def test_a_saved_config_that_a_crash_tore_is_named(tmp_path):
    open_run(make_config(tmp_path))
    saved = tmp_path / "config.yaml"
    saved.write_text(saved.read_text()[:50])
    with pytest.raises(ValueError, match=r"config\.yaml"):
        open_run(make_config(tmp_path))


def test_a_saved_config_with_fields_of_another_release_is_refused_in_one_line(tmp_path):
    config = make_config(tmp_path)
    open_run(config)
    saved = tmp_path / "config.yaml"
    saved.write_text(saved.read_text().replace("beta2:", "beta_two:").replace("seed:", "sead:"))
    for read in (lambda: open_run(config), lambda: read_config(tmp_path, TrainConfig)):
        with pytest.raises(ValueError, match=r"run\.sead: unknown key") as caught:
            read()
        message = str(caught.value)
        assert message.startswith(f"{saved}: oapl_jax {__version__} cannot read this config")
        assert message.endswith("restore the file, use that release, or choose another run directory")
        assert "\n" not in message


def test_the_config_of_an_existing_run_is_read_from_a_folder_and_from_an_object_store(tmp_path):
    for run in (tmp_path, shared_path(make_place())):
        config = make_config(tmp_path)
        save_config(run, config)
        assert read_config(run, TrainConfig) == config


def refusals(directory):
    """What each reader of a run directory says; the first is that of a run that would go on in it."""
    config = make_config(directory)
    readers = (
        lambda: check_run(config),
        lambda: open_run(config),
        lambda: read_config(directory, TrainConfig),
        lambda: check_release(directory),
    )
    for read in readers:
        with pytest.raises(ValueError, match="was written by") as caught:
            read()
        yield str(caught.value)


def test_a_run_directory_of_another_layout_is_refused_in_one_line_that_names_both_releases(tmp_path):
    open_run(make_config(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({"layout": LAYOUT + 1, "version": "9.8.7"}))
    (tmp_path / "config.yaml").write_text("unknown: 1\n")  # which is not read
    (message,) = set(refusals(tmp_path))
    assert message == (
        f"{str(tmp_path)!r} was written by oapl_jax 9.8.7, layout {LAYOUT + 1}, and this is oapl_jax {__version__},"
        f" layout {LAYOUT}: use the release that wrote it, or choose another run directory"
    )
    assert (tmp_path / "config.yaml").read_text() == "unknown: 1\n"


def test_a_run_directory_of_before_there_were_layouts_is_refused(tmp_path):
    """As commit 29ded25 left them: config.yaml, and what the run wrote."""
    (tmp_path / "config.yaml").write_text("unknown: 1\n")
    (tmp_path / "metrics.jsonl").write_text("")
    (message,) = set(refusals(tmp_path))
    assert "was written by oapl_jax 0.1.0 (commit 29ded25 or before), layout 1, and this is oapl_jax" in message
    assert "\n" not in message


def test_a_config_that_lies_in_the_folder_of_a_new_run_is_no_run(tmp_path):
    config = make_config(tmp_path)
    (tmp_path / "config.yaml").write_text(config_file.to_yaml(config))
    assert open_run(config) == tmp_path
    assert read_config(tmp_path, TrainConfig) == config


@pytest.mark.parametrize("content", ["", "[1]", '{"layout": 2}', "null"])
def test_a_damaged_mark_is_named(tmp_path, content):
    open_run(make_config(tmp_path))
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json: has no layout and version"):
        read_config(tmp_path, TrainConfig)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=r"is no run directory: it has no run\.json"):
            check_release(folder)

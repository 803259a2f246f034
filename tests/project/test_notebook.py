"""The notebooks run to their end with small settings, are what their sources say, and stop where nothing can be installed."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
VOCABULARY = 264
CURATED = "quickstart"
"""The notebook that keeps the outputs of a whole run, for people who read it without running it."""


def cells(name):
    """Of a notebook's source: the kind and the text of each cell."""
    _, *parts = re.split(r"^# %%", (ROOT / f"notebooks/{name}.py").read_text(), flags=re.MULTILINE)
    for part in parts:
        head, _, text = part.partition("\n")
        if "[markdown]" in head:
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        yield "markdown" if "[markdown]" in head else "code", text.strip()


def install_cell(name):
    return next(text for kind, text in cells(name) if kind == "code")


@pytest.fixture(scope="module")
def smoke_folder(tmp_path_factory):
    """A tiny random model with a tokenizer of bytes, and a few questions in GSM8K's form."""
    pytest.importorskip("tokenizers")
    from safetensors.numpy import save_file

    import readable
    from model import tiny

    folder = tmp_path_factory.mktemp("smoke")
    (folder / "model").mkdir()
    readable.write_tokenizer(folder / "model")
    embedding = np.random.default_rng(0).normal(0, 0.3, (VOCABULARY, 32)).astype(np.float32)
    config = tiny.HF_CONFIGS[readable.MODEL] | {"vocab_size": VOCABULARY}
    (folder / "model/config.json").write_text(json.dumps(config))
    weights = tiny.weights(readable.MODEL) | {"model.embed_tokens.weight": embedding}
    save_file(weights, folder / "model/model.safetensors")
    rows = [{"question": f"What is {i} + {i}?", "answer": f"They are {2 * i}.\n#### {2 * i}"} for i in range(8)]
    readable.write_lines(folder / "gsm8k.jsonl", rows)
    return folder


def executed(name, folder, smoke, monkeypatch):
    """The text that a notebook prints, and the kinds of what it shows."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    shutil.copytree(ROOT / "configs", folder / "configs")
    warm_start = folder / "configs/chain_sft.yaml"
    shortened = warm_start.read_text().replace("  steps: 700", "  steps: 20").replace("steps: 100", "steps: 5")
    warm_start.write_text(shortened)  # what the policy has learnt before does not matter here
    monkeypatch.setenv("OAPL_SMOKE", str(smoke))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # One device, as on a laptop; the tests' eight would only be slower.
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=1000, resources={"metadata": {"path": str(folder)}})
    client.execute(env=dict(os.environ))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs), {kind for o in outputs for kind in o.get("data", {})}


@pytest.mark.slow
def test_the_quickstart_runs_to_the_end_and_shows_its_curves(tmp_path, smoke_folder, monkeypatch):
    text, shown = executed("quickstart", tmp_path, smoke_folder, monkeypatch)
    assert "image/png" in shown
    assert "pass@16" in text
    assert "step 20/20" in text
    assert (tmp_path / "runs/notebook/summary.json").exists()
    assert (tmp_path / "runs/notebook/report.html").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_real_model_trains_on_sums_and_on_questions(tmp_path, smoke_folder, monkeypatch):
    text, _ = executed("real_model", tmp_path, smoke_folder, monkeypatch)
    assert "step 2/2" in text
    assert "step 1/1" in text
    assert text.count("trainer mesh") == 2
    assert "'fsdp'" in text  # how the parameters are split
    assert (tmp_path / "runs/notebook_gsm8k/summary.json").exists()


@pytest.mark.slow
def test_the_offline_notebook_trains_on_imported_and_generated_rollouts(tmp_path, smoke_folder, monkeypatch):
    text, _ = executed("offline", tmp_path, smoke_folder, monkeypatch)
    assert "32 groups, 256 rollouts" in text
    assert re.search(r"after +{'pass@1'", text)
    assert "2 windows" in text
    assert len(list((tmp_path / "runs/notebook_offline/rounds").glob("*.json"))) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_source_says(name):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == list(cells(name))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    if name != CURATED:
        assert not outputs
        return
    assert not [output for output in outputs if output.output_type == "error"]
    assert "image/png" in {kind for output in outputs for kind in output.get("data", {})}
    text = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"before +0\.2.*\nafter +0\.9", text), "it has learned"


def test_the_notebooks_have_one_install_cell():
    assert len(NAMES) == 3
    assert len({install_cell(name) for name in NAMES}) == 1


def run_install_cell(folder, code=None):
    return subprocess.run(
        [sys.executable, "-c", code or install_cell("quickstart")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_with_nothing_to_install_the_cell_says_so(tmp_path):
    done = run_install_cell(tmp_path)
    assert done.returncode == 1
    assert "nothing to install: give REPOSITORY an address, or upload" in done.stderr


def test_an_archive_that_is_not_the_repository_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    shutil.make_archive(str(tmp_path / "oapl_jax"), "zip", tmp_path / "other")
    done = run_install_cell(tmp_path)
    assert "oapl_jax_source has no configs/quickstart.yaml: is it the repository" in done.stderr


def test_an_archive_and_a_clone_give_the_configs(tmp_path):
    """Up to the installation itself, which takes minutes."""
    source = tmp_path / "source/repository"
    shutil.copytree(ROOT / "configs", source / "configs")
    subprocess.run(["git", "init", "-q", "."], cwd=source, check=True)
    author = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    subprocess.run(["git", "add", "-A"], cwd=source, check=True)
    subprocess.run(["git", *author, "commit", "-q", "-m", "configs"], cwd=source, check=True)
    for name in ("archive", "clone"):
        (folder := tmp_path / name).mkdir()
        cell = install_cell("quickstart")
        if name == "archive":
            shutil.make_archive(str(folder / "oapl_jax-main"), "gztar", source.parent, source.name)
        else:
            cell = cell.replace('REPOSITORY = ""', f"REPOSITORY = {source.as_uri()!r}")
        done = run_install_cell(folder, cell)
        assert "requirements.txt" in done.stderr, "pip is where it ends: these sources have no requirements"
        assert len(list(folder.glob("oapl_jax_source/**/configs/quickstart.yaml"))) == 1


def test_the_settings_of_each_runtime_load(monkeypatch):
    from oapl_jax.build.checks import CHECKS
    from oapl_jax.config import config_file
    from oapl_jax.config.commands import TrainConfig

    monkeypatch.chdir(ROOT)
    (cell,) = (text for kind, text in cells("real_model") if kind == "code" and "SETTINGS = {" in text)
    settings = {}
    exec(cell[cell.index("SETTINGS = {") : cell.index("\n}\n") + 3], settings)
    assert settings["SETTINGS"].keys() == {"v5e-8", "v5e-1", "T4", "other"}
    for overrides in settings["SETTINGS"].values():
        config = config_file.load(TrainConfig, "configs/math_qwen2.5_0.5b.yaml", overrides, CHECKS)
        assert config.learner.batch_rollouts % config.sampler.group_size == 0


def test_the_memory_tables_are_those_of_the_page():
    """In the notebook without the columns of time."""
    page = (ROOT / "docs/preflight.md").read_text().partition("### Qwen2.5-0.5B")[2]
    (text,) = (text for kind, text in cells("real_model") if "| `train_step` |" in text)
    rows = re.findall(r"^\| `.*$", text, re.MULTILINE)
    assert len(rows) == 10
    assert not [row for row in rows if row not in page]

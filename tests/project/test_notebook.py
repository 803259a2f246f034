import os
import pathlib
import shutil

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks/quickstart.ipynb"


@pytest.mark.slow
def test_the_quickstart_notebook_runs_to_the_end_and_shows_its_curves(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    warm_start = tmp_path / "configs/chain_sft.yaml"
    shortened = warm_start.read_text().replace("  steps: 700", "  steps: 20").replace("steps: 100", "steps: 5")
    warm_start.write_text(shortened)  # what the policy has learnt before does not matter here
    monkeypatch.setenv("OAPL_SMOKE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # One device, as on a laptop; the tests' eight would only be slower.
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=dict(os.environ))

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    assert "pass@16" in text
    assert "step 20/20" in text
    assert (tmp_path / "runs/notebook/summary.json").exists()
    assert (tmp_path / "runs/notebook/report.html").exists()


def test_the_notebook_is_stored_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]

"""Checkpoints of a run as Hugging Face folders."""

import base64
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from oapl_jax import train
from oapl_jax.cli import commands
from oapl_jax.run import export
from runs import BASE, ROOT, make_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(finished, tmp_path_factory):
    """A copy of the shared run, with checkpoints of the steps 9 and 10."""
    return shutil.copytree(finished[0], tmp_path_factory.mktemp("copy") / finished[0].name)


def weights(folder):
    return load_file(folder / "model.safetensors")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_newest_checkpoint_is_the_models_of_the_run(run_dir, tmp_path):
    """Bit for bit, with every file, whatever mesh it was trained on and loaded by."""
    assert export.export(run_dir, tmp_path / "out") == tmp_path / "out"
    assert contents(tmp_path / "out") == contents(run_dir / "export")


def test_an_older_step_is_another_model(run_dir, capsys):
    assert commands.main(["export", str(run_dir), "--step", "9"]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "export-9")
    older, newest = weights(run_dir / "export-9"), weights(run_dir / "export")
    assert older.keys() == newest.keys()
    assert any(not np.array_equal(older[name], newest[name]) for name in older)


def test_bfloat16_is_the_rounded_weights(run_dir, tmp_path):
    assert commands.main(["export", str(run_dir), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    for name, tensor in weights(tmp_path / "out").items():
        assert tensor.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor, weights(run_dir / "export")[name].astype(ml_dtypes.bfloat16))


def test_the_card_has_the_config_and_what_the_run_measured(run_dir, tmp_path):
    card = (export.export(run_dir, tmp_path / "out") / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "base_model" not in front  # a folder of this machine is no name on the hub
    after = json.loads((run_dir / "summary.json").read_text())["after"]
    assert f"| step 10 | {after['pass@1']:.3f} |" in body
    saved = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert saved["learner"]["batch_rollouts"] == 32
    older = (export.export(run_dir, tmp_path / "older", step=9) / "README.md").read_text()
    assert "The run did not evaluate step 9" in older


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload of small files needs; keeps what is committed."""

    files: ClassVar[dict[str, bytes]] = {}
    made: ClassVar[list[dict]] = []
    refuses = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuses:
            self.send_error(403)
            return
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            answer = {"url": f"http://{self.headers['Host']}/me/model"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            answer = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for f in json.loads(body)["files"]
                ]
            }
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/me/model/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "success": True,
            }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_push_puts_every_file_on_the_hub_or_says_why_not(run_dir, tmp_path):
    """In a process of its own: the hub's address is read when its library is imported."""
    folder = export.export(run_dir, tmp_path / "out")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": "hf_of_this_test",
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-m", "oapl_jax", "export", str(run_dir), str(folder), "--push", "me/model", "--private"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        assert Hub.made[0]["name"] == "model"
        assert Hub.files == contents(folder)
        Hub.refuses = True
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 2
    assert "--push me/model: the hub refuses" in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_are_named(run_dir, tmp_path, capsys):
    for arguments, message in (
        ([str(run_dir), "--step", "4"], "no checkpoint of step 4; it has 9, 10"),
        ([str(tmp_path)], "no run directory"),
        ([str(run_dir), str(run_dir)], "choose another"),
        ([str(run_dir), make_config(run_dir).model.path], "is the model that the run started from"),
    ):
        assert commands.main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert (run_dir / "checkpoints").is_dir()


def test_a_damaged_checkpoint_is_refused(run_dir, tmp_path):
    """Orbax itself does not notice this."""
    shutil.copytree(run_dir, tmp_path / "run")
    files = [file for file in (tmp_path / "run/checkpoints/10").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoints/10.*damaged"):
        export.export(tmp_path / "run")
    assert not (tmp_path / "run/export-10").exists()


def test_a_checkpoint_of_another_model_is_refused(run_dir, tmp_path):
    """The model's config file was changed after the run."""
    shutil.copytree(run_dir, tmp_path / "run")
    model = tmp_path / "model"
    shutil.copytree(BASE["model"]["path"], model)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    saved = tmp_path / "run/config.yaml"
    saved.write_text(saved.read_text().replace(BASE["model"]["path"], str(model)))
    with pytest.raises(ValueError, match=r"checkpoints/10: cannot load array .*lm_head.*absent"):
        export.export(tmp_path / "run")


def test_a_run_of_adapters(tmp_path, capsys):
    """Its checkpoints hold no frozen weights; it resumes; its model has the adapters merged; they are exported alone."""
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "down_proj"]}
    short = {"lora": lora, "checkpoint": {"every": 2}, "evaluation": {"every": 0}, "window": {"sync_every": 2}}
    for steps in (2, 4):
        train.run(make_config(tmp_path / "run", run={"steps": steps, "allow_config_change": True}, **short))
    assert commands.main(["export", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    assert contents(tmp_path / "merged") == contents(tmp_path / "run" / "export")
    start, trained = weights(pathlib.Path(BASE["model"]["path"])), weights(tmp_path / "run" / "export")
    assert start.keys() == trained.keys()
    changed = {name for name in start if not np.array_equal(start[name], trained[name])}
    assert changed == {name for name in start if "q_proj.weight" in name or "down_proj" in name}

    assert commands.main(["export", str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter"]) == 0
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    product = adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
    expected = trained[f"{name}.weight"] - start[f"{name}.weight"]
    np.testing.assert_allclose(4.0 / 2 * product, expected, atol=1e-6)

    capsys.readouterr()
    assert commands.main(["export", str(tmp_path / "run"), str(tmp_path / "no"), "--step", "9", "--adapter"]) == 2
    assert "no checkpoint of step 9" in capsys.readouterr().err

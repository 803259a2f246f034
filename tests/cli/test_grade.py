"""oapl-jax grade names files that it cannot use, and overwrites no rows."""

import pytest

from oapl_jax.cli import commands

ROW = '{"id": 1, "kind": "math", "gold": "1/2", "response": "0.5"}\n'


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("rows.jsonl", "rows.jsonl", "has the rows, and would be overwritten; choose another file for the grades"),
        ("rows.jsonl", "folder", "folder': Is a directory"),
        ("folder", "out.jsonl", "folder: is not a regular file"),
        ("none.jsonl", "out.jsonl", "none.jsonl': No such file or directory"),
        ("binary.jsonl", "out.jsonl", "binary.jsonl: byte 0 is not UTF-8"),
    ],
)
def test_files_that_cannot_be_used_are_named(source, target, message, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.jsonl").write_text(ROW)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff" + ROW.encode())
    assert commands.main(["grade", str(tmp_path / source), str(tmp_path / target)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert (tmp_path / "rows.jsonl").read_text() == ROW

"""Nothing that a model or a file brings reaches the terminal raw."""

import ast
import io
import pathlib

import pytest

import oapl_jax
from oapl_jax.io import console, terminal
from oapl_jax.io.progress_bar import ProgressBar

PACKAGE = pathlib.Path(oapl_jax.__file__).parent


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcode 你好 🙂\n\tand so on", "plain, ünïcode 你好 🙂\n\tand so on"),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("a\rb\x08c\x7f\x00", r"a\rb\x08c\x7f\x00"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202etxt.exe\u2066", r"\u202etxt.exe\u2066"),
        ("\u2028\u2029\ufeff\xad", r"\u2028\u2029\ufeff\xad"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("👩\u200d🚀", "👩\u200d🚀"),
    ],
)
def test_control_characters_are_shown(text, shown):
    assert terminal.visible(text) == shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_note_beside_the_bar_is_visible(stream):
    with ProgressBar(3, stream=stream()) as bar:
        bar.note("group \x1b[31mx\x07")
    assert r"group \x1b[31mx\x07" in bar._stream.getvalue()


@pytest.mark.parametrize("error", [ValueError("id \x1b[2J"), OverflowError("id \x1b[2J"), OSError("id \x1b[2J")])
def test_errors_are_visible_and_so_are_their_tracebacks(error, capsys):
    def fail(argv):
        raise error

    assert console.run(fail, []) in (console.ExitCode.USAGE, console.ExitCode.FAILED)
    told = capsys.readouterr().err
    assert r"id \x1b[2J" in told
    assert "\x1b" not in told


def test_the_package_prints_by_one_function():
    """Programs that run in a sandbox of their own may print; what they say is data."""
    files = [path for path in PACKAGE.rglob("*.py") if "confined" not in path.parts and path.name != "terminal.py"]
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert found == []

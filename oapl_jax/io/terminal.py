"""What is printed: text of models and files has its control characters shown and never reaches the terminal raw."""

import re
import sys
import unicodedata
from typing import Any

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of control and format characters, lone surrogates and other line ends."""
_KEPT = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
"""Format characters that emoji and several scripts need."""


def visible(text: str) -> str:
    r"""The text with an escape such as ``\x1b`` for every control character but line feeds and tabs."""
    return re.sub(r"[^\n\t -~]", lambda match: _shown(match[0]), text)


def say(text: object, stream: Any = None) -> None:
    """Prints a text, visibly, and flushes; ``stream``: standard output unless given."""
    print(visible(str(text)), file=stream or sys.stdout, flush=True)


def _shown(character: str) -> str:
    is_hidden = unicodedata.category(character) in _HIDDEN and character not in _KEPT
    return character.encode("unicode_escape").decode() if is_hidden else character

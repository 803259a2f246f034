r"""Mathematical notation as people and models write it, brought to one form: cleaned text, and its tokens.

``cleaned`` maps Unicode characters to LaTeX and removes what has no meaning (Markdown, dollars, spacing, sizes of
brackets). Nothing that has a meaning is removed: what the parser does not know stays, and makes the text no mathematics.
"""

import re
import unicodedata
from typing import NamedTuple

_LATEX = {
    "−–—‒﹣": "-", "×⋅·∙": r"\cdot ", "÷": r"\div ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∞": r"\infty ",
    "≤⩽": r"\le ", "≥⩾": r"\ge ", "≠": r"\ne ", "≈≅": r"\approx ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ",
    "∖": r"\setminus ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "°º": r"^\circ ", "±": r"\pm ", "∓": r"\mp ",
    "…⋯": r"\ldots ", "′’": "'", "“”": '"', "、": ",", "⁄∕": "/", "∣": "|",
    "\u00a0\u2009\u202f\u2007\u2002\u2003\u3000": " ", "\u200b\u200c\u200d\u2060\ufeff\u2061\u2062": "",
}  # fmt: skip
_CHARACTERS = {ord(character): latex for characters, latex in _LATEX.items() for character in characters}
_FORMS = {
    re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ]+"): "^{{{}}}",
    re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ]+"): "_{{{}}}",
    re.compile("[¼-¾⅐-⅞]"): r"\frac{{{}}}{{{}}}",
    re.compile("[\uff01-\uff5e\U0001d400-\U0001d7ff]"): "{}",
}
"""Raised and lowered characters, fractions and styled letters, and the form of what they are by NFKC."""
_GREEK = re.compile("[Α-Ωα-ω]")

CURRENCIES = frozenset("¤€£¥₹₩¢")
"""Signs; ``¤`` stands for an escaped dollar, because a plain one only delimits formulas."""
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Words after a number that multiply it, as powers of ten."""
_SCALE_WORDS = "|".join(_SCALES)


def _mixed(text: str, whole: str, above: str, below: str) -> str:
    """A number before a proper fraction is a mixed number, and otherwise a factor."""
    return rf"\mixed{{{whole}}}{{{above}}}{{{below}}}" if int(above) < int(below) else text


_REWRITES = tuple(
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in (
        (r"\\\$", "¤"),
        (r"\$|(?<!\\)\\[()[\]]", " "),
        (r"(?<![\w*)])(\*{1,3}|__)(?=\S)(.+?)(?<=\S)\1(?![\w*(])", r"\2"),
        (r"(?<!\w)(`+)([^`]+)\1(?!\w)", r"\2"),
        (r"(?<!\\)\\\\(?=[dtc]?frac|sqrt)", r"\\"),  # escaped twice
        (r"\\(?:left|right)\s*\.", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|boxed|fbox)(?![A-Za-z])", ""),
        (r"\\!\s*", ""),
        (r"(?<!\\)\\(?:[,;:>]|(?=\s|$)|q?quad)|~|\s", " "),
        (r"\{,\}", ","),
        (r"\^\s*(?:\{\s*((?:\\prime\s*)+)\}|\\prime(?![A-Za-z]))", lambda m: "'" * (m[0].count("prime"))),
        (r"\{\s*:\s*\}|\\colon(?![A-Za-z])", ":"),
        (r"\\[dtc](?=(?:frac|binom)(?![A-Za-z]))", r"\\"),
        (r"\\([%_])", r"\1"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:[lr]?vert|mid)(?![A-Za-z])", "|"),
        (r"\\l?dots[a-z]?(?![A-Za-z])|\\cdots(?![A-Za-z])|\.\.\.+", r"\\ldots "),
        (r"\\(?:times|ast)(?![A-Za-z])|\*(?!\*)(?<!\*\*)", r"\\cdot "),
        (r"\*\*", "^"),
        (r"\\not\s*=|!=|\\neq(?![A-Za-z])", r"\\ne "),
        (r"<=|\\leq(?:slant)?(?![A-Za-z])", r"\\le "),
        (r">=|\\geq(?:slant)?(?![A-Za-z])", r"\\ge "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ|\\degree)(?![A-Za-z])|\\degree(?![A-Za-z])", r"\\degrees "),
        (r"\\(?:mathrm|mathbf|mathit|mathsf|operatorname\*?|bm|boldsymbol|text)\s*\{([ei])\}", r" \1 "),
        (r"(?<![\d)} ])\\(?:mathrm|mathbf|mathit|bm|boldsymbol|text)\s*\{\s*(\\?[A-Za-z])\s*\}", r" \1 "),
        (r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d ]*\d)", lambda match: match[0].replace(" ", "")),
        (rf"\\text\s*\{{\s*([¤€£¥₹₩¢]|(?:{_SCALE_WORDS})\b)", r" \1 \\text{"),
        (rf"(?<![\d.,])(\d[\d.,]*)\s*({_SCALE_WORDS})\b", lambda m: f"{m[1]}e{_SCALES[m[2]]}"),
        (
            r"(?<![\d.])(\d+)(?:\s*\\frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))| (\d+)/(\d+)(?![\d.]))",
            lambda m: _mixed(m[0], m[1], m[2] or m[3] or m[6], m[4] or m[5] or m[7]),
        ),
        (r"\\text\{\s*\}", " "),
        (r"(?<![\d.])(\d*\.\d*)\\(?:overline|dot|bar)\s*(?:\{(\d+)\}|(\d))", lambda m: f"{m[1]}({m[2] or m[3]})"),
        (r"\(([0-9A-F]+)\)\s*(?=_)", r"\1"),
        (
            r"(?:(?:US|A|C)?([¤€£¥₹₩])|(?<![A-Za-z])(USD|EUR|GBP|INR|Rs|RMB|CNY|JPY)\b\.?)\s*"
            r"(-?\s*(?:[\d.,]*\d|\\frac\{[^{}]*\}\{[^{}]*\})(?:e\d+)?)",
            lambda m: f"{m[3]} {m[1] or m[2]} ",
        ),
    )
)
_TEXT = r"\\(?:text|textbf|textit|textrm|textsf|texttt|mbox|hbox|mathrm|mathbf|mathit|operatorname\*?)\s*\{(?P<inner>[^{}]*)\}"
_TOKEN = re.compile(
    rf"(?P<space>\s+)|{_TEXT}"
    r"|(?P<based>[0-9][0-9A-F]*_(?:\{\s*\d+\s*\}|\d+))"
    r"|(?P<number>\d+(?:\.\d*\(\d+\)|\.\d+)?(?:[eE][-+]?\d+(?![A-Za-z\d.]))?|\.\d+)"
    r"|(?P<command>\\[A-Za-z]+|\\.)|(?P<letters>[A-Za-z]+)|(?P<mark>.)",
    re.ASCII,
)
_WRAPPERS = "*_\"'"
_END = re.compile(r"\s*(?<![.\\])[.,;](\}?)$")
_LABEL = re.compile(r"^(?:(?:the )?(?:final )?(?:answer|result)(?: is)?\s*[:=]\s*|(?-i:A):\s+)", re.IGNORECASE)


class Token(NamedTuple):
    """A number, a run of letters, a command with its backslash, or one other character."""

    kind: str
    """``number``, ``based`` (digits and base), ``letters``, ``words`` (letters of ``\\text``), ``command`` or ``mark``."""
    text: str
    is_spaced: bool
    """Whether a space stands before it."""


def cleaned(text: str) -> str:
    """The text in plain LaTeX without decoration."""
    text = _unwrapped(text)
    for pattern, form in _FORMS.items():
        text = pattern.sub(lambda match, form=form: form.format(*_normal(match[0]).split("\u2044")), text)
    text = _GREEK.sub(_greek, text.translate(_CHARACTERS))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return _unwrapped(text)


def tokens(text: str) -> list[Token]:
    r"""The tokens of cleaned text; the content of ``\text{...}`` becomes tokens too."""
    found, is_spaced = [], False
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if kind == "inner":
            inner = tokens(match["inner"])
            found += [token._replace(kind="words") if token.kind == "letters" else token for token in inner]
        elif kind != "space":
            value = re.sub(r"^0+|[{} ]", "", match[0]) if kind == "based" else match[0]
            found.append(Token(kind, value, is_spaced))
        is_spaced = kind in ("space", "inner")
    return found


def spelling(text: str) -> str:
    """What is compared where a text is no mathematics: its tokens, with spaces only where they matter.

    Letters are folded if the text consists of words: "Odd" is "odd", but ``x`` is not ``X``.
    """
    parts = tokens(cleaned(text))
    spelled = ""
    for token in parts:
        ends = spelled[-1:] + token.text[0]
        is_joint = len(ends) == 2 and all(character.isalnum() or character == "." for character in ends)
        spelled += f" {token.text}" if is_joint else token.text
    are_words = all(part.kind in ("letters", "words") or part.text in ",.'-" for part in parts)
    return spelled.casefold() if are_words and any(len(part.text) > 1 for part in parts) else spelled


def _normal(characters: str) -> str:
    return unicodedata.normalize("NFKC", characters).replace("\u2212", "-")


def _greek(match: re.Match[str]) -> str:
    *_, size, _, name = ("", *unicodedata.name(match[0]).split())
    name = "lambda" if name == "LAMDA" else name.lower()
    return rf"\{name.title() if size == 'CAPITAL' else name} "


def _unwrapped(text: str) -> str:
    """Removes a final full stop, a label like "Answer:", and marks around the whole text."""
    before = None
    while text != before:
        before, text = text, _LABEL.sub("", _END.sub(r"\1", text.strip()), count=1)
        if len(text) > 2 and text[0] == text[-1] and text[0] in _WRAPPERS and text[0] not in text[1:-1]:
            text = text[1:-1]
    return text

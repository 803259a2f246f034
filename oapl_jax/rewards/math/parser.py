r"""Parses an answer, in LaTeX or plain notation, into a tree. The whole text is read, or it is no mathematics.

The tree keeps the form of the answer: nothing is computed here, so ``3 \cdot 4`` stays a product, and the work of
computing a value is known before it starts. Words are no products of letters: a part that is all letters is a word, and
words after a number are its unit. Commands that are not in the tables below make a text no mathematics.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from oapl_jax.rewards.math.notation import CURRENCIES, Token, cleaned, tokens

MAX_TOKENS = 400
MAX_DEPTH = 14
"""Most nested groups, powers and functions."""
MAX_LETTERS, MAX_CAPITALS = 3, 4
"""Most letters of a product of letters, like ``abc`` or ``ABCD``, in an expression."""


class NotMathematicsError(ValueError):
    """The text cannot be read as mathematics to its end."""


class Node(NamedTuple):
    r"""A part of an answer. The meaning of ``text`` depends on ``kind``.

    ``number``: digits, like ``0.1(6)`` and ``2e5``. ``symbol``, ``word``: a name. ``based``: digits and base, ``101_2``.
    ``add``, ``mul``, ``neg``, ``pow``, ``root``, ``mixed``, ``percent``, ``degrees``: arithmetic, without text.
    ``div``: ``\div`` if it was written so. ``pm``: ``+`` for plus or minus, ``-`` for minus or plus. ``call``: the
    function. ``unit``: the unit. ``list``: brackets, ``()`` ``[)`` ``{}``, or ``,`` and ``or`` without brackets.
    ``ratio``, ``matrix`` (of rows, which are lists). ``relation``: the relations between its sides. ``region``: ``\cup``,
    ``\cap`` or ``\setminus``.
    """

    kind: str
    args: tuple["Node", ...] = ()
    text: str = ""


RELATIONS = {
    "=": "=", r"\approx": "~", "<": "<", r"\lt": "<", ">": ">", r"\gt": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=",
    r"\in": "in", r"\equiv": "==",
}  # fmt: skip
CONSTANTS = {"pi": r"\pi", "e": "e", "i": "i", "infty": r"\infty", "infinity": r"\infty", "inf": r"\infty"}
CONSTANTS |= {"oo": r"\infty", "emptyset": r"\emptyset"}
_CIRCULAR = {f"{arc}{name}{h}" for arc in ("", "arc") for name in ("sin", "cos", "tan", "cot") for h in ("", "h")}
FUNCTIONS = _CIRCULAR | set("sec csc log ln lg exp max min gcd lcm abs floor ceil".split())
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi"
    " varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega angle triangle ell hbar".split()
)
_DECORATIONS = set("overline vec hat bar tilde mathbb mathcal mathfrak overrightarrow widehat boldsymbol".split())
"""Commands that make a symbol of their argument."""
_NAMED = FUNCTIONS | CONSTANTS.keys() | _GREEK | {"sqrt"}
"""Names that are no words, with and without a backslash."""
_COMMANDS = {"frac", "mixed", "binom"}
_SEPARATORS = {",": ",", ";": ",", "and": ",", "or": "or"}
_CLOSING = {"(": ")]", "[": "])", "{": "}", "|": "|"}
_CLOSING |= {r"\{": (r"\}",), r"\lfloor": (r"\rfloor",), r"\lceil": (r"\rceil",)}
_CALLED = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}
_APPLIED = set("fghFGHPQ")
"""Letters before a bracket that are functions rather than factors."""

_UNITS = """m meter metre|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|in inch inche
|ft foot feet|yd yard|mi mile|kg kilogram|g gram|mg milligram|lb pound £ GBP|oz ounce|s sec second|min minute|h hr hour
|day|week|month|yr year|l L liter litre|ml mL milliliter millilitre|mph|kph|deg degree|rad radian|¤ dollar buck USD US US¤
|€ euro EUR|₹ rupee INR Rs|¥ yen JPY|¢ cent|₩ won|yuan RMB CNY|N newton|J joule|W watt|V volt|Hz hertz|kW|kWh|K kelvin"""
UNITS = {name: group.split()[0] for group in _UNITS.split("|") for name in group.split()}
"""Units by their names. Units that are not here are not told apart."""
_NAME = rf"(?:\\frac |[({{] )*(?:[A-Za-z]+|[{''.join(CURRENCIES)}])(?: \^(?: \{{)? (?:- )?\d(?: \}})?| [)}}]| \.)*"
_UNIT = re.compile(rf"{_NAME}(?:(?: \\cdot| /)? {_NAME})*", re.ASCII)
_PERCENT = {"percent", "pct", "percentage", "%"}
_NO_UNITS = set(
    "not no nor never isn is are was wrong false incorrect more less fewer than least most up to from between over under"
    " plus minus times divided by squared cubed half factorial choose mod modulo remainder negative positive if when where"
    " but except for then so because which that".split()
)
_END = Token("end", "", False)


def parse(text: str) -> Node:
    """The tree of a text; raises NotMathematicsError where a part has no place in it, or it is too long or too nested."""
    parser = _Parser(tokens(cleaned(text)))
    node = parser.list()
    parser.expect("")
    return node


def _joined(kind: str, parts: list[Node], text: str = "") -> Node:
    """A node of several parts; one part stands for itself."""
    return parts[0] if len(parts) == 1 else Node(kind, tuple(parts), text)


class _Parser:
    """Reads tokens from left to right. The methods are the rules of the grammar, from the loosest binding down."""

    def __init__(self, found: list[Token]) -> None:
        if len(found) > MAX_TOKENS:
            raise NotMathematicsError("too long")
        self._tokens, self._at, self._depth = [*found, _END], 0, 0
        self._open: list[str] = []
        """The brackets that are open."""

    def _peek(self, ahead: int = 0) -> Token:
        return self._tokens[min(self._at + ahead, len(self._tokens) - 1)]

    def _sees(self, *texts: str, ahead: int = 0) -> bool:
        token = self._peek(ahead)
        return token.text in texts and token.kind != "words"

    def _take(self) -> Token:
        if self._peek() is _END:
            self.expect("more")
        self._at += 1
        return self._tokens[self._at - 1]

    def _takes(self, *texts: str) -> bool:
        is_there = self._sees(*texts)
        self._at += is_there
        return is_there

    def expect(self, *texts: str) -> Token:
        """Takes one of these tokens; an empty text stands for the end."""
        if not self._sees(*texts):
            raise NotMathematicsError(f"unexpected {self._peek().text!r}")
        self._at += 1
        return self._tokens[self._at - 1]

    def _chain(self, part: Callable[[], Node], operators: Mapping[str, str], *, are_words: bool = False) -> Any:
        """The parts between operators, and the operators."""
        parts, found = [part()], []
        while self._peek().text in operators and (are_words or self._peek().kind != "words"):
            found.append(operators[self._take().text])
            if not are_words or self._peek().text not in operators:  # "1, 2, and 3"
                parts.append(part())
        return parts, found

    def list(self) -> Node:
        """Parts that commas, semicolons, "and" or "or" separate."""
        parts, found = self._chain(self._relation, _SEPARATORS, are_words=True)
        return _joined("list", parts, "or" if "or" in found else ",")

    def _relation(self) -> Node:
        self._takes("=", r"\approx")  # "= 5"
        parts, found = self._chain(self._side, RELATIONS)
        return _joined("relation", parts, " ".join(found))

    def _side(self) -> Node:
        """An expression with its unit, a ratio, a set, or words."""
        if words := self._words():
            return Node("word", (), words)
        parts, _ = self._chain(self._region, {":": ":"})
        return self._unit(_joined("ratio", parts))

    def _words(self) -> str:
        """The words up to the next separator, relation or bracket, if there is nothing but words."""
        start = self._at
        while self._peek().kind in ("letters", "words") and self._peek().text not in _SEPARATORS:
            self._at += 1
        texts = [token.text for token in self._tokens[start : self._at]]
        is_whole = self._peek().text in {"", ")", "]", "}", r"\}", *_SEPARATORS, *RELATIONS}
        long = {text for text in texts if len(text) > 1}
        if is_whole and long - _NAMED and not long & FUNCTIONS and "{" not in self._open:
            return " ".join(texts)
        self._at = start
        return ""

    def _region(self) -> Node:
        parts, found = self._chain(self._sum, {name: name for name in (r"\cup", r"\cap", r"\setminus")})
        pairs = zip(found, parts[1:], strict=True)
        return functools.reduce(lambda node, pair: Node("region", (node, pair[1]), pair[0]), pairs, parts[0])

    def _sum(self) -> Node:
        terms = []
        while not terms or self._sees("+", "-", r"\pm", r"\mp"):
            sign = self._take().text if self._sees("+", "-", r"\pm", r"\mp") else "+"
            term = self._product()
            if sign in (r"\pm", r"\mp"):
                term = Node("pm", (term,), "+" if sign == r"\pm" else "-")
            terms.append(Node("neg", (term,)) if sign == "-" else term)
        return _joined("add", terms)

    def _product(self) -> Node:
        above, below, sign = [self._factor()], [], ""
        while True:
            if self._sees("/", r"\div"):
                sign = r"\div" if self._take().text == r"\div" else sign
                below.append(self._factor())
            elif self._takes(r"\cdot") or self._is_factor():
                above.append(self._factor())
            else:
                break
        node = _joined("mul", above)
        return Node("div", (node, _joined("mul", below)), sign) if below else node

    def _is_factor(self) -> bool:
        """Whether the next token is a factor of a product without a sign; a number is not, and a unit is not."""
        token, before = self._peek(), self._tokens[self._at - 1].text
        if token.kind == "number":  # 50! 50!, and (n - 2) 2^n
            return before == "!" or (before == ")" and self._sees("^", ahead=1))
        if token.kind == "words" or self._starts_unit():
            return False
        if token.kind == "letters":
            return token.text not in _SEPARATORS
        if token.text == "|":
            return "|" not in self._open
        return token.text in _CLOSING.keys() - {r"\{"} or token.text[1:] in _NAMED | _COMMANDS | _DECORATIONS

    def _factor(self) -> Node:
        is_negative = False
        while self._sees("-", "+"):
            is_negative ^= self._take().text == "-"
        node = self._power()
        return Node("neg", (node,)) if is_negative else node

    def _power(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NotMathematicsError("too nested")
        node = self._primary()
        while self._sees("^", "!", "%", r"\degrees"):
            mark = self._take().text
            if mark == "^":
                node = Node("pow", (node, self._exponent()))
            elif mark == "!":
                if self._sees("!"):
                    self.expect("one factorial")
                node = Node("call", (node,), "factorial")
            else:
                node = Node("percent" if mark == "%" else "degrees", (node,))
        self._depth -= 1
        return node

    def _exponent(self) -> Node:
        return self._primary() if self._sees("{") else self._factor()

    def _primary(self) -> Node:
        token = self._take()
        if token.kind in ("number", "based"):
            return Node(token.kind, (), token.text)
        if token.kind == "letters" or (token.kind == "words" and len(token.text) == 1):
            return self._letters(token)
        if token.text in _CLOSING:
            return self._group(token.text)
        return self._command(token.text)

    def _letters(self, token: Token) -> Node:
        text = token.text
        if text in _NAMED - CONSTANTS.keys():
            return self._command("\\" + text)
        if text in CONSTANTS and not self._sees("_"):
            return Node("symbol", (), CONSTANTS[text])
        if len(text) > (MAX_CAPITALS if text.isupper() else MAX_LETTERS):
            raise NotMathematicsError(f"{text!r} is a word")
        if len(text) > 1:  # a product of letters; the rest is read next
            self._at -= 1
            self._tokens[self._at] = token._replace(text=text[1:], is_spaced=False)
            return Node("symbol", (), CONSTANTS.get(text[0], text[0]))
        return self._symbol(text)

    def _symbol(self, name: str) -> Node:
        """A name with its index, primes, and arguments if it is that of a function."""
        while self._sees("_", "'") or (self._sees("(") and name[0] in _APPLIED):
            mark = self._take().text
            if mark == "(":
                self._at -= 1
            name += mark if mark == "'" else "_" * (mark == "_") + self._raw()
        return Node("symbol", (), name)

    def _raw(self) -> str:
        """The text of the group that comes next, or the next token."""
        found = [self._take().text]
        depth = found[0] in ("{", "(")
        while depth:
            found.append(self._take().text)
            depth += (found[-1] in ("{", "(")) - (found[-1] in ("}", ")"))
        return "".join(found[1:-1] if found[0] == "{" else found)

    def _command(self, command: str) -> Node:
        name = command.lstrip("\\")
        if name in _COMMANDS:
            parts = (self._argument(), self._argument())
            if name == "mixed":
                return Node("mixed", (parts[0], Node("div", (parts[1], self._argument()))))
            return Node("div", parts) if name == "frac" else Node("call", parts, "binomial")
        if name == "sqrt":
            degree = Node("number", (), "2")
            if self._takes("["):
                degree = self._sum()
                self.expect("]")
            return Node("root", (self._primary(), degree))
        if name in FUNCTIONS:
            return self._call(name)
        if name in CONSTANTS:
            return Node("symbol", (), CONSTANTS[name])
        if name in _DECORATIONS:
            return self._symbol(f"{command}{{{self._raw()}}}")
        if name in _GREEK:
            return self._symbol(command)
        if command == r"\begin":
            return self._matrix()
        raise NotMathematicsError(f"unexpected {command!r}")

    def _argument(self) -> Node:
        r"""A group, or one token: ``\frac12`` is a half."""
        token = self._peek()
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            self._tokens[self._at] = token._replace(text=token.text[1:], is_spaced=False)
            return Node("number", (), token.text[0])
        return self._primary()

    def _call(self, name: str) -> Node:
        """A function with its argument: in brackets, or the factors that follow."""
        power = base = None
        while self._sees("^", "_"):
            if self._take().text == "^":
                power = self._exponent()
            else:
                base = self._primary()
        if self._sees("(", "[", "{", r"\{"):
            argument = self._primary()
        else:
            factors = [self._factor()]
            while self._is_factor() and self._peek().text.lstrip("\\") not in FUNCTIONS:
                factors.append(self._factor())
            argument = _joined("mul", factors)
        arguments = argument.args if argument.kind == "list" else (argument,)
        if power == Node("neg", (Node("number", (), "1"),)) and name in _CIRCULAR:
            return Node("call", arguments, f"arc{name}")
        node = Node("call", arguments if base is None else (*arguments, base), name)
        return node if power is None else Node("pow", (node, power))

    def _group(self, opening: str) -> Node:
        if opening == r"\{" and self._takes(r"\}"):
            return Node("symbol", (), r"\emptyset")
        self._open.append(opening)
        inner = self._sum() if opening in _CALLED else self.list()
        closing = self.expect(*_CLOSING[opening]).text
        self._open.pop()
        is_list = inner.kind == "list" and inner.text == ","
        if opening in _CALLED:
            return Node("call", (inner,), _CALLED[opening])
        if opening == r"\{" or (opening == "{" and is_list):
            return Node("list", inner.args if is_list else (inner,), "{}")
        if is_list:
            return Node("list", inner.args, opening + closing)
        if opening in "([" and closing != _CLOSING[opening][0]:
            self.expect("a pair")
        return inner

    def _matrix(self) -> Node:
        r"""``\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}``."""
        name = self._raw()
        if name == "array":
            self._raw()
        elif not name.endswith("matrix"):
            raise NotMathematicsError(name)
        rows = [[self._relation()]]
        while not self._takes(r"\end"):
            if self.expect("&", r"\\").text == "&":
                rows[-1].append(self._relation())
            elif not self._sees(r"\end"):
                rows.append([self._relation()])
        if self._raw() != name:
            raise NotMathematicsError(name)
        matrix = Node("matrix", tuple(Node("list", tuple(row), "()") for row in rows))
        return Node("symbol", (), f"det {matrix}") if name == "vmatrix" else matrix

    def _starts_unit(self) -> bool:
        """Whether words come that are no factors: ``5 clips``, ``20 km/h``, ``3 m``, but not ``5x``."""
        token, after, before = self._peek(), self._peek(1).text, self._tokens[self._at - 1]
        if token.kind == "words" or token.text in CURRENCIES:
            return token.text not in _SEPARATORS
        if token.text == r"\frac":
            return self._peek(2).text in UNITS
        if before.kind != "number" and before.text not in (")", "}", "%", r"\pi", "pi"):
            return False
        if token.kind != "letters" or token.text in _SEPARATORS or token.text in _NAMED - {"min"}:
            return False
        if token.text in UNITS and len(token.text) == 1:
            return after in ("^", "/") or (token.is_spaced and after in {"", ")", *_SEPARATORS})
        if token.text == "min":
            return after not in ("(", "{")
        return token.text in UNITS or (len(token.text) > 2 and (token.is_spaced or token.text in _PERCENT))

    def _unit(self, node: Node) -> Node:
        if not self._at or not self._starts_unit():
            return node
        words, depth = [], 0
        while (token := self._peek()).text not in {"", *_SEPARATORS, *RELATIONS} and (depth or token.text not in ")]}"):
            depth += (token.text in "({") - (token.text in ")}")
            words.append(self._take().text)
        if len(words) == 1 and words[0].lower() in _PERCENT:
            return Node("percent", (node,))
        if depth or not _UNIT.fullmatch(" ".join(words)) or any(word.lower() in _NO_UNITS for word in words):
            raise NotMathematicsError(f"{' '.join(words)!r} is no unit")
        names = [UNITS.get(word) or UNITS.get(word.removesuffix("s")) or word for word in words if word not in "{}"]
        return Node("unit", (node,), " ".join(names))

r"""Parses an answer, in LaTeX or plain notation, into a tree. The whole text is read, or it is no mathematics.

The tree keeps the form of the answer: nothing is computed here, so ``3 \cdot 4`` stays a product. That makes the form
of an answer a matter of its tree (``answers.py``), and the work of computing its value known before it starts
(``values.py``).

Words are no products of letters: a part that is all letters is a word, and words after a number are its unit.
"""

import re
from typing import NamedTuple

from oapl_jax.rewards.math.notation import MONEY, Token, cleaned, tokens

MAX_TOKENS = 400
MAX_LETTERS, MAX_UPPER = 3, 4
"""Most letters, and most capitals, of a product of letters in an expression."""
MAX_DEPTH = 14
"""Most nested groups, powers and functions."""


class NotMathematicsError(ValueError):
    """The text cannot be read as mathematics to its end."""


class Node(NamedTuple):
    r"""A part of an answer.

    ======== ===================================== =========================================
    kind     args                                  text
    ======== ===================================== =========================================
    number                                         its digits, ``0.1(6)`` and ``2e5`` included
    symbol                                         its name; ``\pi``, ``e``, ``i``, ``\infty``
    word                                           words
    based                                          digits and base, ``101_2``
    add, mul terms, factors
    neg, pm  one                                   pm: ``+`` for plus or minus, ``-`` for minus or plus
    div      numerator, denominator                ``\div``, or empty
    pow      base, exponent
    root     radicand, degree
    mixed    whole number, fraction
    call     arguments                             name of the function
    percent, one
    degrees
    unit     one                                   the unit
    list     parts                                 brackets: ``()`` ``[)`` ``{}``; ``,`` or ``or`` without brackets
    ratio    parts
    matrix   rows, which are lists
    relation sides                                 relations between them, separated by spaces
    region   two sets                              ``\cup``, ``\cap``, ``\setminus``
    ======== ===================================== =========================================
    """

    kind: str
    args: tuple["Node", ...] = ()
    text: str = ""


RELATIONS = {"=": "=", r"\approx": "~", "<": "<", r"\lt": "<", ">": ">", r"\gt": ">", r"\le": "<=", r"\ge": ">="}
RELATIONS |= {r"\ne": "!=", r"\in": "in", r"\equiv": "=="}
CONSTANTS = {r"\pi": r"\pi", "pi": r"\pi", "e": "e", "i": "i", r"\infty": r"\infty", "infinity": r"\infty"}
CONSTANTS |= {"inf": r"\infty", "infty": r"\infty", "oo": r"\infty", r"\emptyset": r"\emptyset"}
_TRIGONOMETRIC = {f"{arc}{name}{h}" for arc in ("", "arc") for name in ("sin", "cos", "tan", "cot") for h in ("", "h")}
FUNCTIONS = _TRIGONOMETRIC | {
    "sec", "csc", "log", "ln", "lg", "exp", "max", "min", "gcd", "lcm", "abs", "floor", "ceil",
}  # fmt: skip
_GREEK = "alpha beta gamma delta epsilon theta lambda mu nu xi rho sigma tau phi chi psi omega".split()
_SEPARATORS = {",": ",", ";": ",", "and": ",", "or": "or"}
_OPEN = {"(": ")", "[": "]", r"\{": r"\}", "{": "}"}
_FACTOR_STARTS = {"(", "[", "{", r"\frac", r"\sqrt", r"\binom", r"\lfloor", r"\lceil", "|"}
_NO_FACTORS = {
    r"\begin", r"\end", r"\cdot", r"\div", r"\pm", r"\mp", r"\cup", r"\cap", r"\setminus", r"\ldots", r"\degrees",
}  # fmt: skip
_NO_FACTORS |= {
    r"\sum", r"\int", r"\prod", r"\lim", r"\not", r"\neg", r"\lnot", r"\bmod", r"\pmod", r"\mod", r"\to", r"\oint",
}  # fmt: skip
_NO_FACTORS |= {
    r"\mapsto", r"\rightarrow", r"\Rightarrow", r"\implies", r"\forall", r"\exists", r"\land", r"\lor", r"\hline",
}  # fmt: skip
_APPLIED = set("fghFGHPQ")
"""Letters before a bracket that are functions rather than factors."""
_DECORATIONS = {
    r"\overline", r"\vec", r"\hat", r"\bar", r"\tilde", r"\mathbb", r"\mathcal", r"\overrightarrow", r"\widehat",
}  # fmt: skip

SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Words after a number that multiply it, as powers of ten."""
_UNIT_NAMES = """m meter metre|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|in inch inche
|ft foot feet|yd yard|mi mile|kg kilogram|g gram|mg milligram|lb pound £|oz ounce|s sec second|min minute|h hr hour|day
|week|month|yr year|l L liter litre|ml mL milliliter millilitre|mph|kph|deg degree|rad radian|dollar USD US $|euro EUR €
|rupee INR Rs ₹|yen JPY ¥|cent ¢|won ₩|yuan RMB CNY|GBP|N newton|J joule|W watt|V volt|Hz hertz|kW|kWh|K kelvin"""
UNITS = {name: group.split()[0] for group in _UNIT_NAMES.split("|") for name in group.split()}
"""Units by their names; units that are none of these equal each other."""
_MONEY = {MONEY: "$", **{sign: sign for sign in "€£¥₹₩¢"}}
_CURRENCIES = {"USD", "US", "EUR", "GBP", "INR", "Rs", "RMB", "CNY", "JPY"}
_NO_UNITS = set(
    "not no nor never isn is are was wrong false incorrect more less fewer than least most up to from between over under"
    " plus minus times divided by squared cubed half factorial choose mod modulo remainder negative positive if when where"
    " but except for then so because which that percent pct percentage".split()
)
_IN_UNITS = {"/", "^", "{", "}", "(", ")", ".", "-", "1", "2", "3", r"\cdot", r"\frac"}
_PERCENT = {"percent", "pct", "percentage", "%"}


def parse(text: str) -> Node:
    """The tree of a text.

    Raises:
        NotMathematicsError: a part of the text has no place in the tree, or it is too long or too nested.
    """
    return _Parser(tokens(cleaned(text))).whole()


class _Parser:
    """Reads tokens from left to right. The methods are the rules of the grammar, from the loosest binding down."""

    def __init__(self, found: list[Token]) -> None:
        if len(found) > MAX_TOKENS:
            raise NotMathematicsError("too long")
        self._tokens, self._at, self._depth = found, 0, 0

    def whole(self) -> Node:
        node = self._list()
        if self._next() is not None:
            self._fail()
        return node

    # ---- tokens ----

    def _next(self, ahead: int = 0) -> Token | None:
        at = self._at + ahead
        return self._tokens[at] if at < len(self._tokens) else None

    def _sees(self, *texts: str, ahead: int = 0) -> bool:
        token = self._next(ahead)
        return token is not None and token.text in texts and token.kind != "words"

    def _take(self) -> Token:
        token = self._next()
        if token is None:
            raise NotMathematicsError("it ends early")
        self._at += 1
        return token

    def _takes(self, *texts: str) -> bool:
        is_there = self._sees(*texts)
        self._at += is_there
        return is_there

    def _expect(self, *texts: str) -> str:
        if not self._sees(*texts):
            self._fail()
        return self._take().text

    def _fail(self) -> None:
        token = self._next()
        raise NotMathematicsError("it ends early" if token is None else f"unexpected {token.text!r}")

    # ---- lists, relations, sets ----

    def _list(self) -> Node:
        """Parts that commas, semicolons, "and" or "or" separate; one part stands for itself."""
        parts, separator = [self._relation()], ","
        while (token := self._next()) is not None and token.text in _SEPARATORS:
            while (token := self._next()) is not None and token.text in _SEPARATORS:  # "1, 2, and 3"
                separator = "or" if self._take().text == "or" else separator
            parts.append(self._relation())
        return parts[0] if len(parts) == 1 else Node("list", tuple(parts), separator)

    def _relation(self) -> Node:
        self._takes("=", r"\approx")  # "= 5"
        sides, relations = [self._side()], []
        while (token := self._next()) is not None and token.text in RELATIONS and token.kind != "words":
            relations.append(RELATIONS[self._take().text])
            sides.append(self._side())
        return Node("relation", tuple(sides), " ".join(relations)) if relations else sides[0]

    def _side(self) -> Node:
        """An expression with its unit, a ratio, a set, a number of another base, or words."""
        if (words := self._words()) is not None:
            return Node("word", (), words)
        money = self._money()
        parts = [self._sets()]
        while self._takes(":"):
            parts.append(self._sets())
        node = parts[0] if len(parts) == 1 else Node("ratio", tuple(parts))
        node = self._unit(node)
        return Node("unit", (node,), money) if money and node.kind != "unit" else node

    def _words(self) -> str | None:
        """The words up to the next separator, relation or bracket, if there is nothing but words."""
        at, found = self._at, []
        if self._braces:
            return None
        while (token := self._next(at - self._at)) is not None and token.kind in ("letters", "words"):
            if token.text in _SEPARATORS:
                break
            found.append(token)
            at += 1
        is_end = (
            token is None
            or token.text in _SEPARATORS
            or token.text in RELATIONS
            or token.text in ")]}"
            or (token.text == r"\}")
        )
        texts = [token.text for token in found]
        if not is_end or not any(len(text) > 1 for text in texts):
            return None
        if any(
            text in FUNCTIONS or (text in CONSTANTS and text != "i") or text in _GREEK
            for text in texts
            if len(text) > 1
        ):
            return None
        self._at = at
        return " ".join(texts)

    def _money(self) -> str:
        """A currency before a number."""
        token = self._next()
        if token is not None and token.text in _CURRENCIES and (self._next(1) or token).kind in ("number", "mark"):
            self._take()
            self._takes(".")
            return self._money() or UNITS.get(token.text, token.text)
        return UNITS[_MONEY[self._take().text]] if self._sees(*_MONEY) else ""

    def _sets(self) -> Node:
        node = self._sum()
        while self._sees(r"\cup", r"\cap", r"\setminus"):
            operator = self._take().text
            node = Node("region", (node, self._sum()), operator)
        return node

    # ---- arithmetic ----

    def _sum(self) -> Node:
        terms = [self._signed(is_first=True)]
        while self._sees("+", "-", r"\pm", r"\mp"):
            terms.append(self._signed())
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def _signed(self, *, is_first: bool = False) -> Node:
        sign = self._take().text if self._sees("+", "-", r"\pm", r"\mp") else "+"
        money = self._money() if is_first else ""
        term = self._product()
        if sign in (r"\pm", r"\mp"):
            term = Node("pm", (term,), "+" if sign == r"\pm" else "-")
        term = Node("neg", (term,)) if sign == "-" else term
        return Node("unit", (term,), money) if money else term

    def _product(self) -> Node:
        above, below, divisions = [self._factor()], [], set()
        while True:
            if self._takes(r"\cdot"):
                above.append(self._factor())
            elif self._sees("/", r"\div"):
                divisions.add(self._take().text)
                below.append(self._factor())
            elif self._is_factor():
                above.append(self._factor())
            else:
                break
        node = above[0] if len(above) == 1 else Node("mul", tuple(above))
        if below:
            divisor = below[0] if len(below) == 1 else Node("mul", tuple(below))
            node = Node("div", (node, divisor), r"\div" if r"\div" in divisions else "")
        return node

    def _is_factor(self) -> bool:
        """Whether the next token is a factor of a product without a sign; a number is not, and a unit is not."""
        token = self._next()
        if token is not None and token.kind == "number":  # 50! 50!, and (n - 2) 2^n
            before = self._tokens[self._at - 1].text
            return before == "!" or (before == ")" and self._sees("^", ahead=1))
        if token is None or token.kind == "words" or self._starts_unit():
            return False
        if token.kind == "letters":
            return token.text not in _SEPARATORS
        if token.kind == "command":
            return token.text not in _NO_FACTORS | RELATIONS.keys() | {r"\}", r"\rfloor", r"\rceil", r"\\", r"\{"}
        return token.text in _FACTOR_STARTS and not (token.text == "|" and self._bars)

    _bars = 0
    """Number of open absolute values: inside them a bar closes."""
    _braces = 0
    """Number of open groups of TeX, in which letters are factors."""

    def _factor(self) -> Node:
        signs = 0
        while self._sees("-", "+"):
            signs += self._take().text == "-"
        node = self._power()
        return Node("neg", (node,)) if signs % 2 else node

    def _power(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NotMathematicsError("too nested")
        node = self._primary()
        while True:
            if self._takes("^"):
                node = Node("pow", (node, self._exponent()))
            elif self._takes("!"):
                node = Node("call", (node,), "factorial2" if self._takes("!") else "factorial")
            elif self._takes("%"):
                node = Node("percent", (node,))
            elif self._takes(r"\degrees"):
                node = Node("degrees", (node,))
            else:
                break
        self._depth -= 1
        return node

    def _exponent(self) -> Node:
        if self._sees("{"):
            return self._primary()
        sign = self._take().text if self._sees("-", "+") else "+"
        node = self._power()
        return Node("neg", (node,)) if sign == "-" else node

    def _primary(self) -> Node:
        token = self._take()
        if token.kind == "number":
            return self._number(token)
        if token.kind == "letters" or (token.kind == "words" and len(token.text) == 1):
            return self._letters(token)
        if token.kind == "command":
            return self._command(token)
        if token.text in _OPEN:
            node = self._group(token.text)
            return self._based(node.text) if node.kind == "number" and self._sees("_") else node
        if token.text == "|":
            self._bars += 1
            node = Node("call", (self._sum(),), "abs")
            self._expect("|")
            self._bars -= 1
            return node
        self._at -= 1
        self._fail()
        raise AssertionError

    def _number(self, token: Token) -> Node:
        """A number, with its repeating decimals, its base, or its fraction (``3 1/2``)."""
        text = token.text
        if self._sees(".") and self._sees(r"\overline", r"\dot", ahead=1):
            self._take()
            text += "."
        if self._sees(r"\overline", r"\dot"):
            self._take()
            text = f"{text if '.' in text else text + '.'}({self._argument_digits()})"
        number = Node("number", (), text)
        if self._sees("_"):
            return self._based(text)
        if not text.isdigit():
            return number
        if self._sees(r"\frac"):
            start = self._at
            fraction = self._primary()
            if self._is_proper(fraction):
                return Node("mixed", (number, fraction))
            self._at = start
        above, slash, below = self._next(), self._next(1), self._next(2)
        if (
            above is not None
            and above.kind == "number"
            and slash is not None
            and slash.text == "/"
            and below is not None
        ):
            fraction = Node("div", (Node("number", (), above.text), Node("number", (), below.text)))
            if above.is_spaced and self._is_proper(fraction):
                self._at += 3
                return Node("mixed", (number, fraction))
        return number

    def _argument_digits(self) -> str:
        has_brace = self._takes("{")
        digits = self._take()
        if not digits.text.isdigit() or (has_brace and not self._takes("}")):
            self._fail()
        return digits.text

    @staticmethod
    def _is_proper(fraction: Node) -> bool:
        texts = [part.text for part in fraction.args]
        return fraction.kind == "div" and all(text.isdigit() for text in texts) and int(texts[0]) < int(texts[1])

    def _based(self, digits: str) -> Node:
        self._expect("_")
        base = "".join(part.text for part in self._raw_argument()).strip("()")
        if not re.fullmatch(r"[0-9A-Za-z]+", digits) or not base.isalnum():
            self._fail()
        return Node("based", (), f"{digits.lstrip('0') or '0'}_{base}")

    def _letters(self, token: Token) -> Node:
        text = token.text
        if text == "sqrt":
            return Node("root", (self._argument(), Node("number", (), "2")))
        if text in FUNCTIONS:
            return self._call(text)
        if text in CONSTANTS and not self._sees("_"):
            return Node("symbol", (), CONSTANTS[text])
        if text in _GREEK:
            return self._symbol("\\" + text)
        if len(text) > (MAX_UPPER if text.isupper() else MAX_LETTERS):
            raise NotMathematicsError(f"{text!r} is a word")
        if len(text) > 1:  # a product of letters; the rest is read next
            self._tokens[self._at - 1] = token._replace(text=text[1:], is_spaced=False)
            self._at -= 1
            return Node("symbol", (), CONSTANTS.get(text[0], text[0]))
        return self._symbol(text)

    def _symbol(self, name: str) -> Node:
        """A letter with its index and primes, and its arguments if it is the name of a function."""
        while self._sees("_", "'"):
            if self._take().text == "'":
                name += "'"
            else:
                name += "_" + "".join(part.text for part in self._raw_argument())
        if self._sees("(") and name[0] in _APPLIED:
            self._take()
            arguments = self._list()
            self._expect(")")
            return Node("call", (arguments,), name)
        return Node("symbol", (), name)

    def _raw_argument(self) -> list[Token]:
        """The tokens of the group that comes next, or the next token."""
        if not self._takes("{"):
            return [self._take()]
        found, depth = [], 1
        while depth:
            token = self._take()
            depth += (token.text == "{") - (token.text == "}")
            found.append(token)
        return found[:-1]

    def _command(self, token: Token) -> Node:
        name = token.text
        if name == r"\frac":
            return Node("div", (self._argument(), self._argument()))
        if name == r"\sqrt":
            degree = Node("number", (), "2")
            if self._takes("["):
                degree = self._sum()
                self._expect("]")
            return Node("root", (self._argument(is_long=True), degree))
        if name in (r"\binom", r"\dbinom", r"\tbinom"):
            return Node("call", (self._argument(), self._argument()), "binomial")
        if name in (r"\lfloor", r"\lceil"):
            node = Node("call", (self._sum(),), {"l": "floor", "c": "ceil"}["c" if name == r"\lceil" else "l"])
            self._expect(r"\rfloor", r"\rceil")
            return node
        if name == r"\{":
            return self._group(name)
        if name == r"\begin":
            return self._matrix()
        if name == r"\boxed":
            return self._argument()
        if name[1:] in FUNCTIONS:
            return self._call(name[1:])
        if name in CONSTANTS:
            return Node("symbol", (), CONSTANTS[name])
        if name in _DECORATIONS:
            return self._symbol(name + "".join(part.text for part in self._raw_argument()))
        if not name[1:].isalpha() or name in _NO_FACTORS or name in RELATIONS:
            raise NotMathematicsError(f"unexpected {name!r}")
        return self._symbol(name)

    def _argument(self, *, is_long: bool = False) -> Node:
        r"""A group, or one token: ``\frac12`` is a half, but the root in ``\sqrt13`` has all digits."""
        token = self._next()
        if token is not None and token.kind == "number" and not is_long and len(token.text) > 1:
            self._tokens[self._at] = token._replace(text=token.text[1:], is_spaced=False)
            if not token.text.isdigit():
                self._fail()
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
        if self._sees("(", "[", "{"):
            argument = self._primary()
            argument = (
                argument
                if argument.kind != "list" or name in ("max", "min", "gcd", "lcm")
                else self._fail() or argument
            )
        else:
            factors = [self._factor()]
            while self._is_factor() and not self._is_function():
                factors.append(self._factor())
            argument = factors[0] if len(factors) == 1 else Node("mul", tuple(factors))
        arguments = argument.args if argument.kind == "list" else (argument,)
        if power == Node("neg", (Node("number", (), "1"),)) and name in _TRIGONOMETRIC:
            return Node("call", arguments, f"arc{name}")
        node = Node("call", arguments if base is None else (argument, base), name)
        return node if power is None else Node("pow", (node, power))

    def _is_function(self) -> bool:
        token = self._next()
        return token is not None and token.text.lstrip("\\") in FUNCTIONS

    def _group(self, opening: str) -> Node:
        if opening == r"\{" and self._takes(r"\}"):
            return Node("symbol", (), r"\emptyset")
        self._braces += opening == "{"
        inner = self._list()
        self._braces -= opening == "{"
        closing = self._expect(_OPEN[opening], *({")", "]"} if opening in "([" else ()))
        is_list = inner.kind == "list" and inner.text == ","
        if opening == r"\{" or (opening == "{" and is_list):
            return Node("list", inner.args if is_list else (inner,), "{}")
        if opening == "{":
            return inner
        if is_list:
            return Node("list", inner.args, opening + closing)
        if closing != _OPEN[opening]:
            self._fail()
        return inner

    def _matrix(self) -> Node:
        r"""``\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}``; a determinant is not computed."""
        name = "".join(part.text for part in self._raw_argument())
        if name == "array":
            self._raw_argument()
        elif name not in ("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "vmatrix"):
            self._fail()
        rows, row = [], [self._relation()]
        while not self._takes(r"\end"):
            if self._takes("&"):
                row.append(self._relation())
            else:
                self._expect(r"\\")
                if not self._sees(r"\end"):
                    rows.append(row)
                    row = [self._relation()]
        rows.append(row)
        if "".join(part.text for part in self._raw_argument()) != name:
            self._fail()
        matrix = Node("matrix", tuple(Node("list", tuple(row), "()") for row in rows))
        return Node("call", (matrix,), "det") if name == "vmatrix" else matrix

    # ---- units ----

    def _starts_unit(self) -> bool:
        """Whether words come that are no factors: ``5 clips``, ``20 km/h``, ``3 m``, but not ``5x``."""
        token, after = self._next(), self._next(1)
        if token is None or not self._at:
            return False
        if token.kind == "words" or token.text in _MONEY:
            return token.text not in _SEPARATORS
        if token.text == r"\frac" and (name := self._next(2)) is not None:
            return name.text in UNITS and name.kind in ("letters", "words")
        before = self._tokens[self._at - 1]
        if before.kind != "number" and before.text not in (")", "}", "%", r"\pi", "pi"):
            return False
        if token.kind != "letters" or token.text in _SEPARATORS or token.text in CONSTANTS or token.text in _GREEK:
            return False
        if token.text in FUNCTIONS:
            return token.text == "min" and (after is None or after.text not in ("(", "{"))
        if token.text in UNITS:
            is_last = after is None or after.text in _SEPARATORS or after.text in (")", "^", "/")
            is_power = after is not None and after.text in ("^", "/")
            return len(token.text) > 1 or (is_last and (token.is_spaced or is_power))
        return len(token.text) > 2 and (token.is_spaced or token.text in _PERCENT)

    def _unit(self, node: Node) -> Node:
        if not self._starts_unit():
            return node
        words, depth = [], 0
        while (token := self._next()) is not None and token.text not in _SEPARATORS and token.text not in RELATIONS:
            if token.text in ")]}" and not depth:
                break
            depth += (token.text in "({") - (token.text in ")}")
            words.append(self._take().text)
        if words and words[0].lower() in SCALES:
            scale = Node("number", (), f"1e{SCALES[words.pop(0).lower()]}")
            node = Node("scaled", (node, scale))
        if words and words[0].lower() in _PERCENT and len(words) == 1:
            return Node("percent", (node,))
        is_unit = all(
            word.lower() not in _NO_UNITS and (word.isalpha() or word in _IN_UNITS or word in _MONEY) for word in words
        )
        if not is_unit:
            raise NotMathematicsError(f"{' '.join(words)!r} is no unit")
        return Node(
            "unit", (node,), " ".join((UNITS.get(word) or UNITS.get(word.removesuffix("s")) or word) for word in words)
        )

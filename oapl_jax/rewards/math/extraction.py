r"""Where the answer stands in a response: the last box, a tag, ``####``, "the answer is", or the last formula or number."""

import re

from oapl_jax.rewards.math.parser import NotMathematicsError, parse

MAX_ANSWER_CHARACTERS = 1000
"""Longer boxed answers are not read; the longest gold answer of the data sets that we checked has 159."""
MAX_UNBOXED_CHARACTERS = 1500
"""An answer without a box is searched for in this many characters at the end of a response."""
MAX_JOINT = 80
"""Most characters between two boxes of one answer."""

_END_OF_THINKING = "</think>"
_SPECIAL_TOKEN = re.compile(r"<\|[a-z_]{1,30}\|>(?:user\s*$)?")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)\w*[ \t]*$", re.MULTILINE)
_BOX_JOINT = re.compile(
    r"(?:\s|\\[,;:! ]|\\q?quad|\\text\{[^{}]{0,40}\}|[$,;.&]|\\[()\[\]]|[A-Za-z]{1,20}\s+and(?![A-Za-z])|and|or)*"
)
_BRACE = re.compile(r"\\+(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
"""The opening of a box, an escaped character (so that ``\\{`` is not a brace), or a brace."""
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)(</answer>)?", re.DOTALL | re.IGNORECASE)
_ANSWER_IS = re.compile(
    r"(?:answer|result|solution|correct (?:option|choice))\b[*_]*(?:\s+is\b|\s*[:=])(?:[ :*_]*\n\s*)?[ :]*([^\n]*)|^A:\s*([^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|[*_`])")
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$((?:\\.|[^$])+)(?<!\\)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\*\*(.+?)\*\*|__(.+?)__|`([^`]+)`",
    re.DOTALL,
)
_DISPLAY = re.compile(r"\$\$.+?\$\$|\\\[.+?\\\]", re.DOTALL)
_NUMBER_RUN = re.compile(
    r"(?<![\w.\\])[-+−–(√$€£¥₹]*\.?\d[\d.,]*(?:\s*[-+*/^=×·÷−–%()√π°²³⁴⁵⁶⁷⁸⁹⁰¹½¼¾:$]+\s*[\d.,πe]*|\s+\d[\d.,/]*)*(?:\s?[a-zA-Zµ]{1,4}[²³])?"
)
_SPACE, _MARKS = " !", " *_`!"
"""What may surround an answer in prose; an exclamation mark there is no factorial."""
_NEGATION = re.compile(r"\b(?:not|never|isn't|isn’t|cannot|can't)\b", re.IGNORECASE)


def extract_answer(response: str, where: str = "any") -> str | None:
    r"""The text of the answer after the end of thinking, or None.

    Args:
        response: the decoded response, thinking included.
        where: ``boxed``: only in the last box; ``hash``: only after ``####`` in the last line; ``any``: in the last
            box, else between ``<answer>`` tags, else after ``####``, else after "answer is", else in the last lines.
    """
    if "<think>" in response and _END_OF_THINKING not in response:
        return None
    text = response.rpartition(_END_OF_THINKING)[2]
    if where != "hash":
        boxes, is_open = find_boxes(text)
        if is_open:
            return None
        if boxes:
            answer = last_boxes(text, boxes).strip()
            return answer if 0 < len(answer) <= MAX_ANSWER_CHARACTERS else None
    if where == "boxed":
        return None
    tail = text[-MAX_UNBOXED_CHARACTERS:]
    if len(tail) < len(text):
        tail = tail.partition("\n")[2] or tail  # a partial line could begin inside a formula
    tail = _FENCE.sub("", _SPECIAL_TOKEN.sub("", tail)).strip()
    if where == "any" and (tags := _TAG.findall(tail)):
        content, is_closed = tags[-1]
        return _unmarked(content.strip()) if is_closed else None
    _, mark, answer = tail.rpartition("\n")[2].rpartition("####")
    if where == "hash" and not mark:
        return None
    return _unmarked(answer.strip() if mark else tail)


def find_boxes(text: str) -> tuple[list[tuple[int, int, str]], bool]:
    r"""Every closed outermost ``\boxed{...}`` or ``\fbox{...}`` as (start, end, content); whether a later one is open.

    This is one pass with a stack. A search from every box would take quadratic time on a text of open boxes.
    """
    found: list[tuple[int, int, str]] = []
    open_braces: list[re.Match[str]] = []
    for match in _BRACE.finditer(text):
        if match[0] == "}":
            opening = open_braces.pop() if open_braces else None
            if opening is not None and opening[0] != "{":
                while found and found[-1][0] > opening.start():
                    found.pop()
                content = text[opening.end() : match.start()]
                # In a response that is escaped twice, \\frac is a command.
                content = content.replace("\\\\", "\\") if opening[0].startswith("\\\\") else content
                found.append((opening.start(), match.end(), content))
        elif match[0].endswith("{") and match[0] != r"\{":
            open_braces.append(match)
    last = found[-1][1] if found else -1
    return found, any(brace[0] != "{" and brace.start() >= last for brace in open_braces)


def last_boxes(text: str, boxes: list[tuple[int, int, str]]) -> str:
    """Content of the last box, preceded by that of boxes separated from it only by a comma, `and` or the like."""
    contents = [boxes[-1][2]]
    for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        joint = text[end:start]
        if len(joint) > MAX_JOINT or "\n\n" in joint or not _BOX_JOINT.fullmatch(joint):
            break
        contents.insert(0, content)
    return contents[0] if len(set(contents)) == 1 else ", ".join(contents)


def _unmarked(tail: str) -> str | None:
    """The answer in text without a box.

    All of the text if it can be read, else what follows "answer is", else the last line, else its last formula or number.
    """
    if _is_answer(tail):
        return tail
    tail = _DISPLAY.sub(lambda match: " ".join(match[0].split()), tail)
    said = list(_ANSWER_IS.finditer(tail))
    line = (said[-1][1] or said[-1][2] or "") if said else tail.rpartition("\n")[2]
    end = _SENTENCE_END.search(line) if said else None
    sentence = line[: end.start()] if end else line
    for answer in (line.strip(_SPACE), line.strip(_MARKS), sentence.strip(_SPACE), sentence.strip(_MARKS)):
        if _is_answer(answer):
            return answer
    sentence = sentence.strip(_MARKS) if said and sentence.count("**") % 2 else sentence
    is_first = said and re.match(r"[\s*_`$\\(\[]*[-−]?[\d.]", sentence)
    return _from_sentence(sentence, 0 if is_first else -1) or sentence.strip(_MARKS if said else None) or None


def _from_sentence(sentence: str, which: int) -> str | None:
    """The first or last formula, emphasised text or number that can be read, unless the sentence denies it."""
    if _NEGATION.search(sentence):
        return None
    formulas = [next(filter(None, match.groups())) for match in _FORMULA.finditer(sentence)]
    formulas = [formula for formula in formulas if _is_answer(formula)]
    if formulas:
        return formulas[which].strip()
    found = [(run.start(), run[0].rstrip()) for run in _NUMBER_RUN.finditer(sentence)]
    runs = [text for at, text in found if not re.match(r"\.?[A-Za-z_]", sentence[at + len(text) :])]
    return runs[which].rstrip(",.") if runs else None


def _is_answer(text: str) -> bool:
    """Whether a text is mathematics from its first character to its last, and not words before it."""
    try:
        node = parse(text)
    except NotMathematicsError:
        return False
    kinds = {part.kind for part in node.args}
    return node.kind != "word" and ("word" not in kinds or kinds == {"word"})

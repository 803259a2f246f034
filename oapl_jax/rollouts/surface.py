"""What rewarded responses look like: signs that a policy has learnt to game its grader.

Mean reward does not show it. The first pretrained model that was trained with this program learnt to answer each sum
with the question's own expression, and its grader evaluated that: the reward rose to 1, and nothing said so.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence

from oapl_jax.types import Metrics, RolloutGroup, Verdict

LAST_RESPONSES = 256
"""Rewarded responses that are looked at, the newest ones."""

FEWEST_RESPONSES, FEWEST_PROMPTS = 128, 16
"""Below them nothing is said."""

SHARE = 0.9
"""Share of rewarded responses that look alike from which on there is a warning."""

FIRST_RESPONSES, MOST_AT_START = 128, 0.5
"""Responses of the start, right or wrong. A form that half of them have belongs to the task."""

RUN_TOKENS, COPIED_TOKENS = 3, 0.8
"""A response is copied if runs of three tokens that stand in its prompt cover this share of it."""

MOST_CHARACTERS = 4000
"""Of a response that are looked at."""

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_SHOWN = 60


@dataclasses.dataclass(frozen=True)
class _Rewarded:
    prompt_id: str
    text: str
    form: str
    is_copy: bool


class SurfaceWatch:
    """Looks at the responses of a run, batch by batch, and says once of each sign that it is there."""

    def __init__(self):
        self._last: collections.deque[_Rewarded] = collections.deque(maxlen=LAST_RESPONSES)
        self._first: collections.Counter[str] = collections.Counter()
        self._said: set[str] = set()

    def add(self, groups: Sequence[RolloutGroup]) -> tuple[Metrics, list[str]]:
        """The metrics of a batch, and what a person should look at."""
        usable = [item for group in groups for item in group.usable]
        for item in usable[: FIRST_RESPONSES - self._first.total()]:
            self._first[form(item.text)] += 1
        rewarded = [item for group in groups for item in _rewarded(group)]
        self._last.extend(rewarded)
        metrics: Metrics = {
            "rollouts/copied": sum(item.is_copy for item in rewarded) / max(len(rewarded), 1),
            "rollouts/same_form": _most_common([item.form for item in rewarded])[1],
        }
        return metrics, self._signs()

    def _signs(self) -> list[str]:
        last = list(self._last)
        if len(last) < FEWEST_RESPONSES or len({item.prompt_id for item in last}) < FEWEST_PROMPTS:
            return []
        copied = [item.text for item in last if item.is_copy]
        text, same_text = _most_common([item.text for item in last])
        shape, same_form = _most_common([item.form for item in last])
        before = self._first[shape] / self._first.total()
        signs = {
            "copied": (len(copied) / len(last), f"repeat their prompt, such as {_quote(copied[-1] if copied else '')}"),
            "text": (same_text, f"are the same text, {_quote(text)}"),
            "form": (
                same_form if before < MOST_AT_START else 0.0,
                f"have the form {_quote(shape)}, as {before:.0%} of all responses had at the start",
            ),
        }
        new = {name: sign for name, sign in signs.items() if sign[0] >= SHARE and name not in self._said}
        self._said |= set(new)
        return [
            f"warning: {share:.0%} of the last {len(last)} rewarded responses {what}. The policy may have learnt to please"
            " the grader instead of solving the task: read some before you trust the reward (docs/rewards.md)"
            for share, what in new.values()
        ]


def form(text: str) -> str:
    """The text with each number as ``#``, in lower case, with single spaces."""
    return " ".join(_NUMBER.sub("#", text[:MOST_CHARACTERS].lower()).split())


def is_copy(response: str, prompt: str) -> bool:
    """Whether a response consists of passages of its prompt."""
    runs, passages = _runs(response), _passages(prompt)
    covered = {i + k for i, run in enumerate(runs) if run in passages for k in range(RUN_TOKENS)}
    return bool(covered) and len(covered) >= COPIED_TOKENS * (len(runs) + RUN_TOKENS - 1)


def _rewarded(group: RolloutGroup) -> list[_Rewarded]:
    texts = [item.text[:MOST_CHARACTERS].strip() for item in group.usable if item.grade.verdict is Verdict.CORRECT]
    return [_Rewarded(group.prompt.id, text, form(text), is_copy(text, group.prompt.text)) for text in texts]


@functools.lru_cache(maxsize=1)  # the responses of a group have one prompt
def _passages(prompt: str) -> set[tuple[str, ...]]:
    return set(_runs(prompt))


def _runs(text: str) -> list[tuple[str, ...]]:
    tokens = _TOKEN.findall(text.lower())
    return [tuple(tokens[i : i + RUN_TOKENS]) for i in range(len(tokens) - RUN_TOKENS + 1)]


def _most_common(texts: list[str]) -> tuple[str, float]:
    text, count = collections.Counter(texts).most_common(1)[0] if texts else ("", 0)
    return text, count / max(len(texts), 1)


def _quote(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")

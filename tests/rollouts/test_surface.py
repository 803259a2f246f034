"""Signs that a policy games its grader, and none of them where it does not."""

import random

import numpy as np
import pytest

from oapl_jax.learner.batch import describe
from oapl_jax.rollouts.surface import SurfaceWatch, form, is_copy
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict

ROLLOUT = Rollout(np.zeros(1, np.int32), np.zeros(1, np.float32), FinishReason.STOP)
CUT = Rollout(np.zeros(1, np.int32), np.zeros(1, np.float32), FinishReason.LENGTH)


def group(index, question, texts, is_right, rollout=ROLLOUT):
    prompt = Prompt(f"sums/train/{index}", np.zeros(1, np.int32), question, "")
    verdicts = [Verdict.CORRECT if is_right(text) else Verdict.WRONG for text in texts]
    rollouts = tuple(
        GradedRollout(rollout, text, Grade(verdict, float(verdict is Verdict.CORRECT)), advantage=0.0)
        for text, verdict in zip(texts, verdicts, strict=True)
    )
    return RolloutGroup(index, 0, prompt, rollouts, 0.0)


def signs_of(answer, *, num_groups=160, evaluates=False):
    """The signs over groups of four; ``answer(rng, a, b, progress)`` writes a response, and progress goes from 0 to 1."""
    rng, watch, signs = random.Random(0), SurfaceWatch(), []
    for index in range(num_groups):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        texts = [answer(rng, a, b, index / num_groups) for _ in range(4)]
        right = {str(a + b), f"{a} + {b}"} if evaluates else {str(a + b)}
        signs += watch.add([group(index, f"What is {a} + {b}?", texts, lambda text: text.split(": ")[-1] in right)])[1]  # noqa: B023
    return signs


def test_a_run_that_answers_with_the_question_is_noticed():
    """The run that gamed the old grader, which evaluated expressions: chat at first, then the question's own expression."""

    def answer(rng, a, b, progress):
        if rng.random() < 4 * (progress - 0.3):
            return f"{a} + {b}"
        words = rng.choice(["Let us add the numbers", "To find the sum we add", "First look at the digits"])
        return f"{words} {rng.randint(1, 9)} and {rng.choice('abcdef')}: {rng.choice([a + b, a, b])}"

    signs = signs_of(answer, evaluates=True)
    assert len(signs) == 2
    assert "repeat their prompt, such as '" in signs[0]
    assert "have the form '# + #', as " in signs[1]
    assert all("read some before you trust the reward" in sign for sign in signs)


def test_one_text_for_every_prompt_is_noticed():
    rng, watch, signs = random.Random(0), SurfaceWatch(), []
    for index in range(60):
        texts = ["yes" if rng.random() < 0.7 else "no"] * 4
        signs += watch.add([group(index, f"Is {index} good?", texts, lambda text: text == "yes")])[1]
    (sign,) = signs
    assert "100% of the last 128 rewarded responses are the same text, 'yes'" in sign


@pytest.mark.parametrize(
    "answer",
    [
        lambda rng, a, b, progress: str(a + b if rng.random() < progress else rng.randint(0, 99)),
        lambda rng, a, b, progress: rng.choice(["So", "Hence", "Thus", "Then"]) + f" we get: {a + b}",
        lambda rng, a, b, progress: f"{a} + {b} is the same as {a + 1} + {b - 1}: {a + b}",
    ],
    ids=["bare numbers", "four forms", "a form from the start"],
)
def test_a_run_that_solves_its_task_has_no_sign(answer):
    assert signs_of(answer) == []


def test_few_responses_say_nothing():
    assert signs_of(lambda rng, a, b, progress: f"{a} + {b}", num_groups=31, evaluates=True) == []
    assert len(signs_of(lambda rng, a, b, progress: f"{a} + {b}", num_groups=32, evaluates=True)) == 1


def test_the_metrics_are_of_the_correct_responses():
    texts = ["38 + 40", "78", " 7 ", "no"]
    answered = group(0, "What is 38 + 40?", texts, lambda text: text != "no")
    metrics, _ = SurfaceWatch().add([answered])
    assert metrics == {"rollouts/copied": pytest.approx(1 / 3), "rollouts/same_form": pytest.approx(2 / 3)}


def test_the_reward_of_finished_responses_leaves_out_the_truncated_ones():
    answered = group(0, "What is 38 + 40?", ["38 + 40", "78", " 7 ", "no"], lambda text: text != "no")
    cut = group(1, "What is 38 + 41?", ["78"] * 4, lambda text: text == "78", CUT)
    assert describe([answered])["rollouts/finished_reward"] == 0.75
    assert describe([answered, cut])["rollouts/finished_reward"] == 0.75
    assert describe([answered, cut])["rollouts/reward"] == 0.875
    assert "rollouts/finished_reward" not in describe([cut])


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("38 + 40", True),
        ("The answer: 38 + 40", False),
        ("What is 38 + 40? 38 + 40", True),
        ("What is", False),  # shorter than a run
        ("", False),
        ("38 + 40 = 78, since 8 and 0 make 8 and 3 and 4 make 7", False),
    ],
)
def test_a_copy_consists_of_passages_of_its_prompt(response, expected):
    assert is_copy(response, "What is 38 + 40?") is expected


def test_a_form_has_no_numbers_and_no_case():
    assert form("The  Sum of 1,200 and\n3.5 is 1203.5.") == "the sum of # and # is #."

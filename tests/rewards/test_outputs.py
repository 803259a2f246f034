"""What counts as the same output, and which outputs of published data are wrapped in a list."""

import json
import time

import pytest

from oapl_jax.rewards.code import compare, layouts, programs

NUMBERS = {
    # printed, expected, tolerance, is right
    "1_5": ("1_5", "15", 0.0, False),
    "Arabic digits": ("\u0661\u0665", "15", 0.0, False),
    "full-width digits": ("\uff11\uff15", "15", 0.0, False),
    "Devanagari digits": ("\u0967\u096b", "15", 0.1, False),
    "mathematical digits": ("\U0001d7cf\U0001d7d3", "15", 0.0, False),
    "superscripts": ("1\u2075", "15", 0.0, False),
    "underscores on both sides": ("1_5", "1_5", 0.0, True),
    "the same digits on both sides": ("\u0661\u0665", "\u0661\u0665", 0.0, True),
    "hexadecimal": ("0xf", "15", 0.0, False),
    "nan": ("nan", "NaN", 0.0, False),
    "infinity": ("inf", "Infinity", 0.0, False),
    "an exponent": ("1e1", "10", 0.0, True),
    "a sign": ("+15", "15", 0.0, True),
    "zeros": ("015.00 -0", "15 0", 0.0, True),
    "a point without digits": (".", "0", 0.0, False),
    "digits on one side of the point": (".5 5.", "0.5 5", 0.0, True),
    "a word among numbers": ("15 1_5", "15 15", 0.0, False),
    "within the tolerance": ("0.3000001", "0.3", 1e-6, True),
    "digits of another script within the tolerance": ("0.\u0663", "0.3", 1e-6, False),
    "a huge exponent": ("1e999999999999999999999", "15", 0.0, False),
    "a huge exponent with tolerance": ("1e999999", "15", 1e-6, False),
}


@pytest.mark.parametrize(("printed", "expected", "tolerance", "is_right"), NUMBERS.values(), ids=NUMBERS)
def test_output_is_compared_as_ascii_decimals_or_as_text(printed, expected, tolerance, is_right):
    assert compare.is_same_output(f"{printed}\n", expected, tolerance) is is_right


def test_many_digits_take_no_time():
    began = time.process_time()
    for printed in ("1" * 10**6 + "x", "1" * 10**6 + ".x", "1." + "1" * 10**6 + "e", "1_" * 10**6):
        assert not compare.is_same_output(printed, "1" * 10**6)
    assert time.process_time() - began < 1


WRAPPED = {
    # outputs, returned values that are right for the first test, values that are wrong
    "a pair of numbers": ([[0, 1]], [[0, 1]], [0, 1, [[0, 1]]]),
    "a pair of lists": ([[[1], [2]]], [[[1], [2]]], [[1], [2]]),
    "a wrapped list": ([[[0, 1]]], [[0, 1], [[0, 1]]], [0, [0], [1]]),
    "wrapped numbers": ([[5], [6]], [5, [5]], [6, [6], [5, 6]]),
    "lists of any length": ([[5], [6, 7]], [[5]], [5]),
    "an empty list": ([[]], [[]], [None, 0]),
    "numbers as they are": ([5, 6], [5], [[5]]),
    "text": (["a"], ["a"], [["a"]]),
}


@pytest.mark.parametrize("dataset", ["APPS", "DeepCoder"])
@pytest.mark.parametrize(("outputs", "right", "wrong"), WRAPPED.values(), ids=WRAPPED)
def test_outputs_are_unwrapped_only_where_all_are_lists_of_one(dataset, outputs, right, wrong):
    layout = {"fn_name": "f", "inputs": [[1]] * len(outputs), "outputs": outputs}
    if dataset == "DeepCoder":
        layout = [{"type": "function_call", "fn_name": "f", "input": [1], "output": output} for output in outputs]
    first = programs.parse_tests(layouts.read_tests(layout))[0]
    assert isinstance(first, programs.AssertTest)
    _, _, expected = json.loads(first.stdin)
    assert [value for value in right + wrong if value in expected] == right

"""Which block of a response is its program."""

import time

import pytest

from oapl_jax.rewards.code.programs import extract_program


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("no block", None),
        ("```python\na\n```", "a\n"),
        ("```\nfirst\n```\nthen\n```py\nsecond\n\n```\nbye", "second\n\n"),
        ("<think>```python\na\n```</think> so\n```python\nb\n```", "b\n"),
        ("<think>\n```python\na\n```\n</think>", None),
        ("<think>\n```python\na\n```", None),
        ("```python\na\n```\n```python\nnot closed", "a\n"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        # A block in a list item is indented as the item is; the rest of the indentation is the program's.
        ("  ```python\n  a\n  ```", "a\n"),
        ("1. First:\n   ```python\n   if a:\n       b\n   ```\n", "if a:\n    b\n"),
        ("- ```py\n  a\n  ```", "a\n"),
        ("12) ```python\n    a\n    ```", "a\n"),
        ("* - ```python\n    a\n    ```", "a\n"),
        ("\t```python\n\ta\n\t```", "a\n"),
        # Block quotes, with and without a space after the mark.
        ("> So:\n> ```python\n> if a:\n>     b\n>\n> c\n> ```\n", "if a:\n    b\n\nc\n"),
        (">```py\n>a\n>```", "a\n"),
        (">> ~~~python\n>> a\n>> ~~~", "a\n"),
        ("- > ```python\n  > a\n  > ```", "a\n"),
        ("```python\na\n> ```\nb\n```", "a\n> ```\nb\n"),
        ("> ```python\n> a\n```\n> b\n> ```", "a\n```\nb\n"),
        # Tildes, longer fences, and fences of the other kind inside.
        ("~~~python\na\n~~~", "a\n"),
        ("~~~~ python\n~~~\n```\na\n~~~~", "~~~\n```\na\n"),
        ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
        ("```python\na\n`````", "a\n"),
        ("```python\na\n~~~", None),
        # Example output, shells and other languages are no programs.
        ("```python\na\n```\nOutput:\n```\n15\n```", "a\n"),
        ("```python\na\n```\n```text\nprint(1)\n```", "a\n"),
        ("```py\na\n```\n```bash\npython a.py\n```\n~~~output\nprint(1)\n~~~", "a\n"),
        ("```Python3\na\n```\n```cpp\nint main() {}\n```", "a\n"),
        ("```python\na\n```\n```pycon\n>>> a\n```\n```python\n>>> a\n1\n```", "a\n"),
        ("```\nprint(input())\n```\nprints\n```\nx = 5\n```", "print(input())\n"),
        ("```\nprint(input())\n```\nprints\n```\nCase #1: 3 for 4\n```", "print(input())\n"),
        ("```\nn = open(0).read();print(n)\n```\nprints\n```\n5\n```", "n = open(0).read();print(n)\n"),
        ("```\nprint(input())\n```\n```\n>>> print(1)\n1\n```", "print(input())\n"),
        # Pseudo-code is no Python.
        ("```python\na\n```\nIn words:\n```\nfor each number in the input:\n    print its square\n```", "a\n"),
        ("```\nprint(input())\n```\n```\nread n\nwhile n > 0:\n    print(n)\n    n := n - 1\n```", "print(input())\n"),
        ("```\nread n\nprint(n) twice\n```", "read n\nprint(n) twice\n"),
        ("```\nprint(input())\n```\n```\n   >>> print(1)\n   1\n```", "print(input())\n"),
        # A later version without a language counts, and a program that looks like none is better than nothing.
        ("```python\nold\n```\nBetter:\n```\nimport sys\nnew\n```", "import sys\nnew\n"),
        ("```\na = 5\n```", "a = 5\n"),
        ("```text\na\n```", None),
        ('```python title="a.py"\na\n```', "a\n"),
        ("```{.python .numberLines}\na\n```", "a\n"),
    ],
)
def test_the_program_is_the_last_python_block_after_thinking(response, program):
    assert extract_program(response) == program


@pytest.mark.parametrize("line", [" " * 100_000, "\t>" * 50_000, "for" + ": " * 50_000, "- " * 50_000, "`` " * 30_000])
def test_no_line_takes_long_to_read(line):
    """A response that lets its grader run into the time limit would be invalid instead of wrong."""
    began = time.process_time()
    for block in (f"```\n{line}x\n```", f"{line}```\n{line}\n{line}```", f"> ```\n{line}\n> ```"):
        extract_program(block)
    assert time.process_time() - began < 2


def test_unknown_escapes_in_a_block_without_a_language_are_not_reported(recwarn):
    assert extract_program("```\nprint('\\d')\n```") == "print('\\d')\n"
    assert not recwarn.list

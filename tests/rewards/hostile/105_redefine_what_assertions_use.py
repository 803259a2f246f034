# attack: 105_redefine_what_assertions_use
# kind: assert:solve
# expect: WA|RE
# note: defines abs, check, candidate, AssertionError and __eq__-lying numbers
import builtins


class Any(float):
    def __eq__(self, o):
        return True

    def __ne__(self, o):
        return False

    def __lt__(self, o):
        return True

    def __sub__(self, o):
        return 0

    def __abs__(self):
        return 0

    __hash__ = float.__hash__


def abs(x):
    return 0


def check(candidate):
    return None


class AssertionError(Exception):
    pass


builtins.abs, builtins.AssertionError = abs, AssertionError


def solve(a):
    return Any(-1)

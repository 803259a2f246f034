# attack: 107_raise_to_leave
# kind: assert:solve
# expect: WA|RE
# note: leaves by every exception that might skip the assertions
import random


def solve(a):
    raise random.choice([SystemExit(0), KeyboardInterrupt(), GeneratorExit(), StopIteration(15), AssertionError()])

# attack: 123_decimal_of_a_billion_digits
# kind: call:solve
# expect: WA|RE
# note: the same as a decimal, and text of a million digits
import decimal


def solve(a):
    return decimal.Decimal("1e999999999") if len(a) == 3 else int("7" * 4000) ** 20

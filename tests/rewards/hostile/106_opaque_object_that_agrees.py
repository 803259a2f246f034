# attack: 106_opaque_object_that_agrees
# kind: assert:solve
# expect: WA|RE
# note: an object without a form as data whose every method agrees
class Yes:
    def __getattr__(self, n):
        return self

    def __call__(self, *a, **k):
        return self

    def __bool__(self):
        return True

    def __eq__(self, o):
        return True

    def __contains__(self, o):
        return True

    def __iter__(self):
        return iter([True])

    def __len__(self):
        return 1

    def __lt__(self, o):
        return True

    def __rsub__(self, o):
        return 0

    def __sub__(self, o):
        return 0

    def __abs__(self):
        return 0

    __hash__ = None


def solve(a):
    return Yes()

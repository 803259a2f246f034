"""Values, objects and exceptions on their way between a program and its tests, at every isolation level."""

import json

import pytest

from oapl_jax.rewards.code.programs import Limits, Status
from oapl_jax.rewards.code.sandbox.confined import values

pytestmark = pytest.mark.usefixtures("sandboxed")

RIGHT = {
    "keyword arguments changed in place": (
        "def f(*, nums, key=None): nums.sort(key=key)",
        "n = [3, 1, 2]\nf(nums=n)\nassert n == [1, 2, 3]",
    ),
    "dictionaries and sets changed in place": (
        "def f(d, s): d['k'] = s; s.add(3); s.discard(1)",
        "d, s = {}, {1, 2}\nf(d, s=s)\nassert s == {2, 3} and d['k'] is s",
    ),
    "a nested list changed in place": (
        "def f(a): a[0].append(2); a.reverse()",
        "i = [1]\na = [i, [0]]\nf(a)\nassert i == [1, 2] and a[1] is i",
    ),
    "one list passed twice": ("def f(a, b): a.append(1); return b", "x = []\nassert f(x, x) is x and x == [1]"),
    "a deque, a counter, a bytearray": (
        "def f(q, c, b): q.rotate(1); c['a'] += 1; b[0] = 65",
        "q, c, b = collections.deque([1, 2]), collections.Counter(), bytearray(b'xy')\nf(q, c, b)\n"
        "assert (list(q), c['a'], bytes(b)) == ([2, 1], 1, b'Ay')",
    ),
    "a cycle": (
        "def f(n): n.next.next = n; return n",
        "n = list_node([1, 2])\nassert f(n) is n and n.next.next is n",
    ),
    "a long linked list changed in place": (
        "def f(n):\n    while n: n.val += 1; n = n.next",
        "n = list_node([0] * 5000)\nf(n)\nassert is_same_list(n, list_node([1] * 5000))",
    ),
    "a node of the tests changed in place": (
        "def f(n): n.left = n.right; n.tags.append('x')",
        "class N:\n    def __init__(s, v): s.v, s.left, s.right, s.tags = v, None, None, []\n"
        "n = N(1)\nn.right = N(2)\nf(n)\nassert n.left is n.right and n.left.v == 2",
    ),
    "a lambda": ("def f(g, x): return [g(i) for i in x]", "assert f(lambda x: x + 1, [1]) == [2]"),
    "a lambda by keyword": ("def f(x, key): return max(x, key=key)", "assert f([1, 2], key=lambda x: -x) == 1"),
    "a built-in function": ("def f(g, x): return g(x)", "assert f(len, [1, 2]) == 2 and f(str.upper, 'a') == 'A'"),
    "a closure that counts": ("def f(g): g(); g()", "calls = []\nf(lambda: calls.append(1))\nassert calls == [1, 1]"),
    "a function that calls the program": (
        "def f(g, n): return g(n) + 1\ndef h(n): return 2 * n",
        "assert f(lambda n: h(n) + f(h, 1), 3) == 10",
    ),
    "a decorator": (
        "import functools\ndef twice(g):\n    @functools.wraps(g)\n    def h(*a): return g(g(*a))\n    return h",
        "@twice\ndef f(x): return x + 1\nassert f(1) == 3 and f.__name__ == 'f'",
    ),
    "a function that raises": (
        "def f(g):\n    try: g(1)\n    except ZeroDivisionError: return 'caught'",
        "assert f(lambda x: x / 0) == 'caught'",
    ),
    "an exception of the tests": (
        "def f(g): g()",
        "class Mine(Exception): pass\ndef g(): raise Mine('m')\n"
        "try: f(g)\nexcept Mine as e: assert e.args == ('m',)\nelse: assert False",
    ),
    "a generator as an argument": (
        "def f(g): return sum(g)",
        "assert f(x * x for x in range(4)) == 14 and f(iter([1])) == 1",
    ),
    "an endless iterator as an argument": (
        "import itertools\ndef f(g): return list(itertools.islice(g, 2))",
        "assert f(itertools.count()) == [0, 1]",
    ),
    "an exception by its ancestor": (
        "class A(ValueError): pass\nclass B(A): pass\ndef f(x): raise B('neg')",
        "try: f(1)\nexcept ValueError as e: assert str(e) == 'neg'\nelse: assert False",
    ),
    "an exception by a far ancestor": (
        "class A(KeyError): pass\ndef f(): raise A(1)",
        "try: f()\nexcept LookupError as e: assert e.args == (1,)\nelse: assert False",
    ),
    "an exception of the program by its name": (
        "class Low(Exception): pass\nclass Lower(Low, ValueError): pass\ndef f(): raise Lower('x')",
        "try: f()\nexcept Low as e: assert isinstance(e, ValueError) and str(e) == 'x'\nelse: assert False",
    ),
    "a key error has its key": (
        "def f(d): return d['x']",
        "try: f({})\nexcept KeyError as e: assert e.args == ('x',)\nelse: assert False",
    ),
    "what an exception carries": (
        "class E(Exception):\n    def __init__(s, code): super().__init__(f'no {code}'); s.code = code\ndef f(): raise E(3)",
        "try: f()\nexcept Exception as e: assert (e.code, str(e), type(e).__name__) == (3, 'no 3', 'E')\nelse: assert False",
    ),
    "dates and times": (
        "def f(d): return d, d.date(), d.time(), d - datetime.datetime(2026, 1, 1)",
        "d = datetime.datetime(2026, 1, 2, 3)\n"
        "assert f(d) == (d, datetime.date(2026, 1, 2), datetime.time(3), datetime.timedelta(days=1, hours=3))",
    ),
    "views, ranges, frozen sets": (
        "def f(d): return d.keys(), d.values(), d.items(), range(3), frozenset([1])",
        "k, v, i, r, s = f({'a': 1})\nassert len(k) == 1 and 'a' in k and list(v) == [1] and dict(i) == {'a': 1}\n"
        "assert r == range(3) and {s} == {frozenset([1])}",
    ),
    "an object with methods, items and iteration": (
        "class S:\n    def __init__(s): s.a = []\n    def push(s, x): s.a.append(x); return s\n"
        "    def __iter__(s): return iter(s.a)\n    def __getitem__(s, i): return s.a[i]\n"
        "    def __str__(s): return 'S'",
        "s = S().push(1).push(2)\nassert list(s) == [1, 2] and 2 in s and 3 not in s\n"
        "assert s[0] == 1 and str(s) == 'S' and s.a == [1, 2]",
    ),
    "a chain of the program's own nodes": (
        "class N:\n    def __init__(s, v, n=None): s.v, s.n = v, n\ndef f(): return N(1, N(2))",
        "n, seen = f(), []\nwhile n:\n    seen.append(n.v)\n    n = n.n\nassert seen == [1, 2]",
    ),
    "what it has, after each change": (
        "class S:\n    def __init__(s): s.a = []\n    def push(s, x): s.a.append(x)\n    def __iter__(s): return iter(s.a)",
        "s = S()\ns.push(1)\nassert len(s) == 1 and list(s) == [1] and 2 not in s\ns.push(2)\n"
        "assert len(s) == 2 and list(s) == [1, 2] and 2 in s",
    ),
    "an endless iteration": (
        "class N:\n    def __iter__(s):\n        i = 0\n        while True: yield i; i += 1",
        "n = N()\nassert list(itertools.islice(n, 3)) == [0, 1, 2] and 5 in n",
    ),
    "items that are set": (
        "class M(object):\n    def __init__(s): s.d = {}\n    def __setitem__(s, k, v): s.d[k] = v\n"
        "    def __getitem__(s, k): return s.d[k]",
        "m = M()\nm['a'] = 3\nassert m['a'] == 3",
    ),
    "named tuples": (
        "P = collections.namedtuple('P', 'x y')\ndef f(q): return P(q.y, q.x)",
        "Q = collections.namedtuple('Q', 'x y')\np = f(Q(1, 2))\nassert p.x == 2 and p == (2, 1)",
    ),
    "a dictionary with defaults": (
        "def f(d, k): d[k].append(1); return len(d)",
        "d = collections.defaultdict(list)\nassert f(d, 'a') == 1 and d == {'a': [1]} and d['b'] == []",
    ),
    "the order of a dictionary": (
        "def f(d): d.move_to_end('a')",
        "d = collections.OrderedDict(a=1, b=2)\nf(d)\nassert list(d) == ['b', 'a']",
    ),
    "thousands of calls": (
        "n = 0\ndef f():\n    global n\n    n += 1\n    return n",
        "for i in range(3000): assert f() == i + 1",
    ),
    "an exception of two kinds": (
        "class E(KeyError, ValueError): pass\ndef f(): raise E(1)",
        "try: f()\nexcept ValueError as e: assert isinstance(e, KeyError)\nelse: assert False",
    ),
    "an exception of the standard library": (
        "def f(): return json.loads('{')",
        "try: f()\nexcept json.JSONDecodeError as e: assert e.pos == 1\nelse: assert False",
    ),
    "a group of exceptions": (
        "class E(ValueError): pass\ndef f(): raise ExceptionGroup('g', [E(1), ExceptionGroup('h', [KeyError('k')])])",
        "try: f()\nexcept* KeyError as g: assert g.exceptions[0].exceptions[0].args == ('k',)\n"
        "except* ValueError as g: assert g.message == 'g' and type(g.exceptions[0]).__name__ == 'E'",
    ),
    "a group of exceptions of its own kind": (
        "class G(ExceptionGroup): pass\ndef f(): raise G('g', [OSError(2, 'no')])",
        "try: f()\nexcept ExceptionGroup as e: assert e.exceptions[0].errno == 2 and len(e.exceptions) == 1\n"
        "else: assert False",
    ),
    "an exception that is asked for": (
        "class E(ValueError): pass\ndef f(): raise E(1)",
        "import contextlib, unittest\nunittest.TestCase().assertRaises(E, f)\nwith contextlib.suppress(E): f()\n"
        "try: f()\nexcept Exception as e: assert isinstance(e, E)",
    ),
    "an enumeration": (
        "import enum\nclass C(enum.Enum):\n    A = 1\ndef f(): return C.A",
        "assert f() is C.A and f() == C.A and f().value == 1",
    ),
}


@pytest.mark.parametrize(("program", "source"), RIGHT.values(), ids=RIGHT)
def test_right_programs_are_right(status, program, source):
    assert status(program, [{"assert": source}]) == Status.ACCEPTED


WRONG = {
    "a container that says yes": (
        "class A:\n    def __contains__(s, x): return True\ndef f(): return A()",
        "assert 7 in f()",
    ),
    "an iteration that changes": (
        "class A:\n    n = 0\n    def __iter__(s):\n        A.n += 1\n        return iter(range(99) if A.n % 2 else ())\ndef f(): return A()",
        "a = f()\nassert 7 in a and 8 not in a",
    ),
    "a name of a built-in exception": (
        "class ValueError(Exception): pass\ndef f(): raise ValueError",
        "import builtins\ntry: f()\nexcept builtins.ValueError: pass",
    ),
    "an exception that skips tests": (
        "import unittest\ndef f(): raise unittest.SkipTest",
        "import unittest\nclass T(unittest.TestCase):\n    def test(s): s.assertEqual(f(), 7)\n"
        "r = unittest.TestResult()\nT('test').run(r)\nassert r.wasSuccessful()",
    ),
    "a length that lies": ("class A:\n    def __len__(s): return 3\ndef f(): return A()", "assert len(f()) == 3"),
    "a hash that lies": (
        "class A:\n    def __hash__(s): return hash(7)\n    def __eq__(s, o): return True\ndef f(): return A()",
        "assert f() in {7}",
    ),
    "a list that lies": (
        "class L(list):\n    def __iter__(s): return iter([9])\n    def __contains__(s, x): return True\n"
        "    def __len__(s): return 1\ndef f(): return L([1, 2])",
        "assert list(f()) == [9] or 9 in f() or len(f()) == 1",
    ),
    "a set that lies": (
        "class S(frozenset):\n    def __contains__(s, x): return True\n    def __eq__(s, o): return True\n"
        "    __hash__ = frozenset.__hash__\ndef f(): return S([1])",
        "assert 9 in f() or f() == {9} or f() in [{9}]",
    ),
    "bytes that lie": (
        "class B(bytes):\n    def hex(s): return '09'\n    def __eq__(s, o): return True\ndef f(): return B(b'x')",
        "assert f() == b'\\t'",
    ),
    "comparisons that lie": (
        "class A:\n    __lt__ = __gt__ = __le__ = __ge__ = __eq__ = lambda s, o: True\n"
        "    __sub__ = __rsub__ = lambda s, o: 0\n    __abs__ = lambda s: 0\ndef f(): return A()",
        "assert f() == 7 or abs(f() - 7) < 1 or f() < 7 < f()",
    ),
    "another exception": ("def f(): raise TypeError", "try: f()\nexcept ValueError: pass"),
    "a group of other exceptions": (
        "def f(): raise ExceptionGroup('g', [TypeError(1)])",
        "try: f()\nexcept* ValueError: pass",
    ),
    "a group with members that lie": (
        "class G(ExceptionGroup):\n    exceptions = property(lambda s: 7)\ndef f(): raise G('g', [ValueError()])",
        "try: f()\nexcept ExceptionGroup: pass",
    ),
    "an exit that looks like a pass": ("def f(): raise SystemExit(70)", "f()"),
    "an exit while the tests wait": ("import os\ndef f(g): os._exit(70)", "try: f(len)\nexcept BaseException: pass"),
    "looking behind a function": (
        "def f(g): return g.__globals__['secret']",
        "secret = 7\nassert f(lambda: 1) == secret",
    ),
    "a request for what is behind a function": (
        "def f(g): return vars(g)['_its_peer'].ask('get', vars(g)['_its_node'], '__globals__')",
        "secret = 7\nassert f(lambda: 1)['secret'] == secret",
    ),
    "looking behind a generator": (
        "def f(g): return g.gi_frame.f_globals['secret']",
        "secret = 7\nassert f(x for x in [1]) == secret",
    ),
    "looking behind an object of the tests": (
        "def f(n): return vars(n)['_its_peer'].ask('get', vars(n)['_its_node'], '__class__').__init__.__globals__['secret']",
        "secret = 7\nclass N:\n    def __init__(s): pass\nassert f(N()) == secret",
    ),
    "a name that changes after the look at it": (
        "import sys\nclass Names:\n    n = 0\n    def __iter__(s): return s\n    def __next__(s):\n"
        "        s.n += 1\n        if s.n % 2 == 0: raise StopIteration\n        return 'x' if s.n == 1 else '_right'\n"
        "def f(o):\n    peer, node = vars(o)['_its_peer'], vars(o)['_its_node']\n"
        "    graph = sys.modules[type(peer).__module__].values.Graph\n    encode = graph.encode\n"
        "    def forged(s, v): return encode(s, (Names(), {}) if v == (('x',), {}) else v)\n"
        "    graph.encode = forged\n    return peer.ask('get', node, 'x')",
        "class N:\n    def __init__(s): s._right, s.x = 7, 0\nassert f(N()) == 7",
    ),
    "a type that is handed back": ("def f(a): return bytearray", "r = f(1)\nassert f(r(3)) == 9"),
    "a function that is handed back": (
        "def f(a): return globals if a == 1 else a['secret']",
        "secret = 7\nassert f(f(1)()) == secret",
    ),
    "a function that makes defaults": (
        "def f(a): return collections.defaultdict(globals) if a == 1 else a['secret']",
        "secret = 7\nassert f(f(1)['x']) == secret",
    ),
    "a class that is handed back": ("class C: pass\ndef f(a): return C", "assert f(f(1)()) == 9"),
    "a generator that is handed back": (
        "def f(a): return (i for i in [1])",
        "assert f(x for x in f(1)) == [9]",
    ),
    "endless recursion between the two": ("def f(g): return g(g)", "def g(h): return f(h)\nassert f(g) == 1"),
}


@pytest.mark.parametrize(("program", "source"), WRONG.values(), ids=WRONG)
def test_wrong_programs_are_wrong_and_not_invalid(status, program, source):
    assert status(program, [{"assert": source}]) != Status.ACCEPTED


FORGED = {
    "no frame": b"",
    "half a frame": b"\x10\0\0\0{",
    "four gigabytes": b"\xff\xff\xff\xff[",
    "no JSON": "not json",
    "no object": [1],
    "no contents": {"v": 1},
    "contents of no kind": {"v": {"o": 0}, "new": [7], "changed": []},
    "an object that is missing": {"v": {"o": 99}, "new": [], "changed": []},
    "a negative number": {"v": {"o": -1}, "new": [["list", []]], "changed": []},
    "a number that is text": {"v": {"o": "0"}, "new": [["list", []]], "changed": []},
    "a tag that is a list": {"v": {"t": [1], "v": []}, "new": [], "changed": []},
    "changes that are no list": {"v": 1, "new": [], "changed": 7},
    "a change of nothing": {"v": 1, "new": [], "changed": [[5, ["list", []]]]},
    "an exception without a name": {"v": 1, "new": [], "changed": [], "raised": [], "text": 1},
    "an exception named by an object": {"v": 1, "new": [], "changed": [], "raised": {"x": 1}, "text": []},
    "an exception that is no exception": {"v": 1, "new": [], "changed": [], "raised": ["int"], "text": ""},
    "an operation": {"do": "exec", "of": 7, "args": [], "kwargs": {}, "new": []},
    "names of the tests": {
        "do": "get",
        "of": {"t": "handle", "v": ["tests", "check"]},
        "args": ["x"],
        "kwargs": {},
        "new": [],
    },
    "a kind that is a list": {"v": 1, "new": [[["list"], []]], "changed": []},
    "an unhashable key": {"v": {"o": 0}, "new": [["dict", [[{"o": 0}, 1]]]], "changed": []},
    "deep": "[" * 960 + "]" * 960,
    "deeper": "[" * 100_000 + "]" * 100_000,
    "deep tuples": '{"new": [], "changed": [], "v": ' + '{"t": "tuple", "v": [' * 300 + "1" + "]}" * 300 + "}",
    "deep arrays": '{"new": [], "changed": [], "v": ' + '{"t": "array", "v": ' * 450 + "1" + "}" * 450 + "}",
    "an object in itself": {"v": {"o": 0}, "new": [["list", [{"o": 0}]]], "changed": []},
    "an array in itself": {"v": {"t": "array", "v": {"o": 0}}, "new": [["list", [{"o": 0}]]], "changed": []},
    "many digits": '{"new": [], "changed": [], "v": ' + "9" * 60_000 + "}",
}


@pytest.mark.parametrize("kind", ["call", "assert"])
@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_no_reply_is_invalid(status, kind, forged):
    if not isinstance(forged, bytes):
        body = (forged if isinstance(forged, str) else json.dumps(forged)).encode()
        forged = len(body).to_bytes(4, "little") + body
    program = f"import os\ndef f(a):\n    d = {forged!r}\n    while d: d = d[os.write(4, d):]\n    os._exit(0)\n"
    tests = {
        "call": [{"call": "f", "args": [[1]], "expected": [[7]]}],
        "assert": [{"assert": "r = f([1])\nassert r == [[7]] and f(r) == 7"}],
    }[kind]
    assert status(program, tests) not in (Status.ACCEPTED, Status.TIME_LIMIT)


UNITS = {"objects": b"{},", "integers": b"1,", "tiny numbers": b"3e-320,", "lists": b"[[]],", "brackets": b"["}


@pytest.mark.parametrize("kind", ["call", "assert"])
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_time_for_the_programs_own_data_is_its_fault(status, kind, unit):
    program = f"""
import os, struct, time
def f(a):
    body = b'{{"changed": [], "new": [], "v": [' + {unit!r} * ((16 << 20) // {len(unit)}) + b'0]}}'
    data = memoryview(struct.pack('<I', len(body)) + body)
    while data: data = data[os.write(4, data):]
    time.sleep(9)
"""
    tests = {
        "call": [{"call": "f", "args": [[1]], "expected": 7391846205}],
        "assert": [{"assert": "assert f([1]) == 7391846205"}],
    }[kind]
    assert status(program, tests, Limits(cpu_s=1, wall_s=4, memory_mb=256)) != Status.ACCEPTED


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -(1 << 70), 1.5, float("inf"), "ü", [1, [2]], (1,), {1: {"a": (2,)}}, {3}, b"x", 1 + 2j, int, abs],
)
def test_values_come_back_from_json(value):
    def fail(thing):
        pytest.fail(str(thing))

    sender, receiver = values.Graph(fail, fail), values.Graph(fail, fail)
    node = sender.encode(value)
    node, contents = json.loads(json.dumps([node, sender.contents()]))
    receiver.add(contents)
    assert receiver.decode(node) == value

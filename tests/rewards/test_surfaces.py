"""What a program can reach around it, at every isolation level: memory, files, descriptors, threads, capabilities."""

import os
import pathlib
import tempfile
import threading

import pytest

from oapl_jax.rewards.code.programs import Judge, Limits, Settings, Status, parse_tests
from oapl_jax.rewards.code.sandbox import isolation, sandbox, self_test
from oapl_jax.rewards.code.sandbox.confined import driver
from oapl_jax.rewards.code.sandbox.self_test import try_level

pytestmark = pytest.mark.usefixtures("sandboxed")


def prints(expected):
    return [{"stdin": "", "stdout": expected}]


# Each program takes memory in steps of 1 MiB and says how many it has.
SAY = "import ctypes, functools, mmap, os, socket, sys, tempfile\nMB = b'x' * (1 << 20)\nkept = []\n"
LIBC = """
libc = ctypes.CDLL(None)
libc.mmap.restype = libc.shmat.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
def mapped(flags):
    address = libc.mmap(None, 1 << 20, 3, flags, -1, 0)
    if address in (None, 2**64 - 1): raise MemoryError
    ctypes.memset(address, 1, 1 << 20)
"""
MEMORY = {
    "heap": "def take(): kept.append(bytearray(MB))",
    "shared": "def take():\n    m = mmap.mmap(-1, 1 << 20)\n    m.write(MB)\n    kept.append(m)",
    "shared, in one piece": "m = mmap.mmap(-1, 900 << 20)\ndef take(): m.write(MB)",
    "shared, by the C library": f"{LIBC}\ndef take(): mapped(0x21)",
    "a stack mapping": f"{LIBC}\ndef take(): mapped(0x122)",
    "not reserved": f"{LIBC}\ndef take(): mapped(0x4022)",
    "a memory file": "fd = os.memfd_create('x')\ndef take(): os.write(fd, MB)",
    "posix shared memory": "f = open('/dev/shm/x', 'wb', 0)\ndef take(): f.write(MB)",
    "system V shared memory": f"{LIBC}\ndef take():\n    key = libc.shmget(0, 1 << 20, 0o1600)\n    if key < 0: raise MemoryError\n    ctypes.memset(libc.shmat(key, None, 0), 1, 1 << 20)",
    "pipes": "def take():\n    n = 0\n    while n < 1 << 20:\n        r, w = os.pipe()\n        os.set_blocking(w, False)\n        n += os.write(w, MB)",
    "sockets": "def take():\n    n = 0\n    while n < 1 << 20:\n        a, b = socket.socketpair()\n        kept.extend((a, b))\n        a.setblocking(False)\n        n += a.send(MB)",
    "descriptors in sockets": "import array\na, b = socket.socketpair()\ndef take():\n    r, w = os.pipe()\n    os.write(w, MB[:65536])\n    a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [r, w]))])\n    os.close(r), os.close(w)",
    "temporary files": "def take():\n    with tempfile.NamedTemporaryFile('wb', 0, delete=False) as f: f.write(MB)",
    "temporary files without names": "def take():\n    f = tempfile.TemporaryFile('wb', 0)\n    f.write(MB)\n    kept.append(f)",
    "the stack": "sys.setrecursionlimit(10**9)\n@functools.lru_cache(None)\ndef deep(n): return deep(n + 1)\ndef take(): deep(0)",
}


@pytest.mark.parametrize("source", MEMORY.values(), ids=MEMORY)
def test_memory_of_every_kind_ends_at_the_limit(judge, source):
    """256 MB and 64 more for the most; what ends by a signal has said how far it came."""
    program = f"{SAY}{source}\nfor n in range(1, 1000):\n    take()\n    os.write(2, b'%4d' % n)\n"
    worker = judge._sandbox(0)
    worker.start("script", program, Limits(cpu_s=4, wall_s=20, memory_mb=256))
    (child,) = sandbox.converse([worker], 20)
    assert child.status != 0
    said = [int(word) for word in child.stderr.decode(errors="replace").split() if word.isdigit() and len(word) < 4]
    assert max(said, default=0) <= 256 + 64


def test_memory_below_the_limit_is_there(status):
    mapped = "import mmap\nx = mmap.mmap(-1, 240 << 20)\nfor _ in range(240): x.write(b'x' * (1 << 20))"
    for source in ("x = bytearray(240 << 20)", mapped):
        assert status(f"{source}\nprint(7)", prints("7")) == Status.ACCEPTED


def test_threads_leave_the_memory_to_the_program(status):
    threads = "import threading\ne = threading.Event()\nfor _ in range(8): threading.Thread(target=e.wait).start()"
    assert status(f"{threads}\nx = bytearray(180 << 20)\ne.set()\nprint(7)", prints("7")) == Status.ACCEPTED


def test_a_driver_knows_the_size_of_its_address_space():
    limits = driver.resource.getrlimit(driver.resource.RLIMIT_AS)
    try:
        size = driver._mapped_bytes()
    finally:
        driver.resource.setrlimit(driver.resource.RLIMIT_AS, limits)
    real = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    assert abs(size - real) < 8 << 20


REACHING = {
    "a descriptor of the parent": """
for name in ("fd", "fdinfo", "mem", "environ", "maps", "root", "cwd", "task"):
    path = f"/proc/{os.getppid()}/{name}"
    try: entries = [f"{path}/{n}" for n in range(64)] if name == "fd" else [path]
    except OSError: continue
    for entry in entries:
        try: os.close(os.open(entry, os.O_RDONLY | os.O_NONBLOCK)); print("opened", entry)
        except OSError: pass
""",
    "truncation without write access": """
for mode in (os.O_RDONLY, os.O_ACCMODE):
    try: os.open(os.__file__, mode | os.O_TRUNC); print("truncated")
    except PermissionError: pass
""",
    "datagram and sequenced sockets": """
import socket
for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC):
    try: socket.socketpair(socket.AF_UNIX, kind); print("made")
    except OSError: pass
""",
    "a higher limit": """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
    try: resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)); print("raised", kind)
    except (OSError, ValueError): pass
""",
    "a program that could be run": """
import tempfile
path = tempfile.mkdtemp() + "/x"
open(path, "w").write("#!/bin/sh\\n")
for run in (lambda: os.execv(path, [path]), lambda: os.posix_spawn(path, [path], {})):
    try: run(); print("ran")
    except OSError: pass
""",
    "links out of the temporary folder": """
import tempfile
folder = tempfile.gettempdir()
for make in (os.symlink, os.link):
    try: make("/etc/passwd", folder + "/link"); print("linked")
    except OSError: pass
for path in (folder + "/../x", "/tmp/../x", "x"):
    try: open(path, "w"); print("written")
    except OSError: pass
""",
}


@pytest.mark.parametrize("landlock_abi", [1, 2, 3, 99])
def test_what_a_program_cannot_reach(level, landlock_abi):
    judge = Judge(Settings(level, landlock_abi=landlock_abi))
    size = os.path.getsize(os.__file__)
    try:
        for name, source in REACHING.items():
            program = f"import os\n{source}\nprint(7)"
            (result,) = judge.judge(program, parse_tests(prints("7")), Limits(), stop_early=True)
            assert result.status == Status.ACCEPTED, (name, result)
    finally:
        judge.close()
    assert os.path.getsize(os.__file__) == size


def test_no_limit_gives_away_the_right_output(judge):
    program = "import resource\nprint([resource.getrlimit(n) for n in range(16)])"
    tests = parse_tests([*prints("YES"), *prints("NO"), *prints("7" * 200_000)])
    first, *others = judge.judge(program, tests, Limits(), stop_early=False)
    assert first.detail.startswith("printed")
    assert {other.detail for other in others} == {first.detail}


def test_long_right_output_is_below_the_limit(status):
    assert status("print('7' * 3_000_000)", prints("7" * 3_000_000)) == Status.ACCEPTED


def test_installed_packages_cannot_be_read(status):
    _, stdlib, *_ = isolation.find_interpreter(None)
    folders = [stdlib + "/site-packages", *isolation.installed_packages(stdlib)]
    program = f"""
import os
for folder in {folders!r}:
    for path, _, files in os.walk(folder):
        for name in files:
            try: open(os.path.join(path, name)).close(); print("read", path, name)
            except OSError: pass
import decimal, sqlite3, xml.dom, encodings.cp037, zoneinfo
print(zoneinfo.ZoneInfo("UTC"))
"""
    assert status(program, prints("UTC")) == Status.ACCEPTED


def test_a_preloaded_package_may_lie_in_tmp(level, monkeypatch):
    """As those of a virtual environment in /tmp, where programs have a folder of their own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        package = pathlib.Path(folder, "preloaded_from_tmp")
        package.mkdir()
        (package / "__init__.py").write_text("SEVEN = 7")
        (package / "late.py").write_text("import time\ntime.sleep(0.2)\n")
        for number in range(driver.MAX_TEMPORARY_FILES):
            (package / f"data{number}").touch()
        os.chmod(folder, 0o755)
        monkeypatch.syspath_prepend(folder)
        judge = Judge(Settings(level, packages=(package.name,)))
        try:
            program = f"import {package.name}.late, os\nprint({package.name}.SEVEN, os.listdir(os.environ['TMPDIR']))"
            results = judge.judge(program, parse_tests(prints("7 []") * 2), Limits(), stop_early=False)
        finally:
            judge.close()
    assert {result.status for result in results} == {Status.ACCEPTED}, results


STOP_AND_GO = """
import ctypes, signal, struct
signal.signal(signal.SIGCONT, lambda *_: None)
libc, timer = ctypes.CDLL(None), ctypes.c_void_p()
for kind, first_ms in ((signal.SIGSTOP, 10), (signal.SIGCONT, 15)):
    assert libc.timer_create(1, struct.pack("qii48x", 0, kind, 0), ctypes.byref(timer)) == 0
    assert libc.timer_settime(timer, 0, struct.pack("4q", 0, 20_000_000, 0, first_ms * 1_000_000), None) == 0
"""


def test_a_program_that_stops_itself_again_and_again_is_watched(judge):
    files = "for n in range(60):\n    with open(f'{tempfile.gettempdir()}/{n}', 'wb') as f: f.write(b'x' * (1 << 20))"
    program = f"import tempfile, time\n{STOP_AND_GO}\n{files}\ntime.sleep(0.4)\nprint(7)"
    results = judge.judge(program, parse_tests(prints("7") * 5), Limits(), stop_early=False)
    assert {result.status for result in results} == {Status.OUTPUT_LIMIT}


def test_many_threads_end_a_program_and_do_not_hinder_another(level, status):
    bomb = "import threading, time\nthreading.stack_size(1 << 16)\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    right = (
        "import threading\nt = [threading.Thread(target=print, args=(7,)) for _ in range(20)]\n[x.start() for x in t]"
    )
    other, results = Judge(Settings(level)), []
    other._sandbox(0)
    beside = threading.Thread(target=lambda: results.append(status(bomb, prints(""))))
    beside.start()
    try:
        for _ in range(10):
            (result,) = other.judge(right, parse_tests(prints("7\n" * 20)), Limits(), stop_early=True)
            assert result.status == Status.ACCEPTED, result
    finally:
        beside.join()
        other.close()
    assert results == [Status.RUNTIME_ERROR]


FILES = {
    "large": "for n in range(100):\n    open(f'{d}/{n}', 'w').write('x' * (1 << 20))\n    time.sleep(0.01)",
    "many": "n = 0\nwhile True:\n    open(f'{d}/{n}', 'w').close()\n    n += 1",
    "nested": "os.chdir(d)\nwhile True:\n    os.mkdir('x')\n    os.chdir('x')",
    "closed": "for n in range(9):\n    os.makedirs(f'{d}/{n}/a')\n    open(f'{d}/{n}/f', 'w').close()\nos.mkdir(f'{d}/c', 0)\nwhile True: time.sleep(1)",
}


@pytest.mark.parametrize("source", FILES.values(), ids=FILES)
def test_temporary_files_are_limited_and_removed(judge, status, source):
    program = f"import os, tempfile, time\nd = tempfile.gettempdir()\n{source}\n"
    assert status(program, prints("7"), Limits(cpu_s=2, wall_s=2)) in (Status.OUTPUT_LIMIT, Status.TIME_LIMIT)
    assert status("import os, tempfile\nprint(os.listdir(tempfile.gettempdir()))", prints("[]")) == Status.ACCEPTED
    folder = judge._sandbox(0)._folder
    assert os.listdir(folder) == []


def test_a_closed_worker_leaves_no_folder(level):
    worker, reason = try_level(level, Settings(level))
    assert worker is not None, reason
    assert os.path.isdir(worker._folder)
    worker.close()
    assert not os.path.exists(worker._folder)


def test_the_self_test_finds_a_kernel_that_cannot_hold_a_level(level):
    worker = sandbox.Sandbox(level, Settings(level, landlock_abi=0))
    try:
        found = self_test.self_test(worker)
    finally:
        worker.close()
    assert bool(found) is (level != "namespaces"), found


def test_the_self_tests_threads_are_too_many_where_each_starts_late(judge):
    """On a busy machine; they are counted by the kernel, or every 50 ms."""
    slow = self_test._MANY_THREADS.replace(".start()", ".start(); time.sleep(0.03)")
    assert ".start(); time" in slow
    (result,) = judge.judge(slow, parse_tests(prints("")), Limits(cpu_s=6, wall_s=60), stop_early=True)
    assert result.status is Status.RUNTIME_ERROR, result

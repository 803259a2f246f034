"""Runs programs that attack the grader, and checks their surroundings after each."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import threading
import time

from oapl_jax.rewards.code.programs import Judge, parse_tests
from oapl_jax.rewards.code.sandbox.sandbox import Limits
from oapl_jax.rewards.pool import GraderPool

OURS = pathlib.Path(__file__).parent / "hostile"
LIMITS = Limits(cpu_s=2, wall_s=4, memory_mb=768)
SHORT = {
    "accepted": "AC",
    "wrong_answer": "WA",
    "time_limit": "TLE",
    "memory_limit": "MLE",
    "output_limit": "OLE",
    "runtime_error": "RE",
    "compile_error": "CE",
}
ABSTRACT_SOCKET = "\0oapl_hostile_test"
MAX_GRADER_CPU = 2.0
CHECK = (
    "def check(candidate):\n    assert candidate([4, 5, 6]) == 15\n    assert abs(candidate([1]) - 1) < 1e-9\n"
    "check(solve)\nassert solve([]) == 0\n"
)
FILES = {"f1": "intact f1", "wd/f2": "intact wd/f2"}


@dataclasses.dataclass
class Program:
    """A file of attacks/hostile, attacks/benign or of ours."""

    name: str
    source: str
    kind: str
    expect: set[str]
    is_benign: bool


def read_program(path: pathlib.Path, canary: pathlib.Path) -> Program:
    source = path.read_text(encoding="utf-8", errors="surrogateescape")
    header = dict(line[2:].split(": ", 1) for line in source.splitlines()[:4] if ": " in line)
    expect = set(header["expect"].split("|"))
    is_benign = expect == {"AC"}
    return Program(path.stem, source.replace("@CANARY@", str(canary)), header["kind"], expect, is_benign)


class Surroundings:
    """Targets of attacks: files, a process, listeners, and a secret that only the grader knows."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.secret = folder, str(random.randrange(10**9, 10**10))
        (folder / "wd").mkdir()
        (folder / "wd").chmod(0o777)
        for name, text in FILES.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o666)
        answer = f"ANSWER:{self.secret}:"
        (folder / "expected.json").write_text(json.dumps({"outputs": [answer]}))
        self.victim = subprocess.Popen(["sleep", "3600"], env={"X": answer}, stdout=subprocess.DEVNULL)
        (folder / "victim").write_text(str(self.victim.pid))
        self.hits: list[str] = []
        internet = socket.create_server(("127.0.0.1", 0))
        (folder / "port").write_text(str(internet.getsockname()[1]))
        self._sockets = [internet]
        for address in (str(folder / "sock"), ABSTRACT_SOCKET):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(address)
            listener.listen()
            self._sockets.append(listener)
        for listener in self._sockets:
            threading.Thread(target=self._listen, args=(listener,), daemon=True).start()
        self._entries = self._list()

    def _listen(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self.hits.append(str(listener.getsockname()))
                connection.close()

    def _list(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))

    def damage(self) -> list[str]:
        """What an attack has changed."""
        found = [f"listener {hit} was reached" for hit in self.hits]
        if self.victim.poll() is not None:
            found.append("the victim is dead")
        if self._list() != self._entries:
            found.append(f"files: {self._list()}")
        found += [f"{name} was changed" for name, text in FILES.items() if (self.folder / name).read_text() != text]
        return found

    def close(self) -> None:
        for listener in self._sockets:
            listener.shutdown(socket.SHUT_RDWR)  # wakes its thread, which would hold it open
            listener.close()
        self.victim.kill()
        self.victim.wait()


def judge_program(judge: Judge, program: Program, secret: str) -> str:
    """The first status that is not accepted, abbreviated, or AC."""
    numbers = "3\n4 5 6\n"
    expected = "15\n" if program.is_benign else f"{secret}\n"
    if program.kind == "stdio_big":
        tests = [{"stdin": numbers, "stdout": "\n".join(map(str, range(600_000)))}]
    elif program.kind == "stdio":
        tests = [{"stdin": numbers, "stdout": expected}] * 2
    elif program.kind.startswith("call"):
        tests = [
            {"call": "solve", "args": [[4, 5, 6]], "expected": 15},
            {"call": "solve", "args": [[1]], "expected": 1},
        ]
    else:
        tests = [{"assert": CHECK}]
    results = judge.judge(program.source, parse_tests(tests), LIMITS, stop_early=True)
    return SHORT[results[-1].status]


def processes_of(judge: Judge) -> set[int]:
    """The workers of a judge, their descendants, and everything else in their sessions."""
    parents, sessions = {}, {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = pathlib.Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)], sessions[int(entry.name)] = int(fields[1]), int(fields[3])
    found = {worker.process.pid for worker in judge._sandboxes}
    while True:
        wider = {pid for pid in parents if pid in found or parents[pid] in found or sessions[pid] in found}
        if wider == found:
            return found
        found = wider


def survivors(judge: Judge, before: set[int]) -> set[int]:
    """New processes of a judge that do not end within two seconds."""
    give_up = time.monotonic() + 2
    while (left := processes_of(judge) - before) and time.monotonic() < give_up:
        time.sleep(0.02)
    return left


def pids_of(pool: GraderPool) -> list[int]:
    """Process ids of the present workers."""
    return [worker.process.pid for worker in pool._workers]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()

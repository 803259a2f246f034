"""Damaged files for every reader: only the documented error may leave it, in time and in bounded memory.

    python tests/fuzzing.py [--files 2000] [--reader NAME ...] [--json]

``readable.py`` has the readers and the valid files of each. One file is damaged in one of the ways of ``DAMAGES``, and its
folder is read; all folders of a reader are read by one process. A failure is any error but a ValueError or an OSError, more
than ten seconds, or growth of more than 512 MiB. A failure is printed with its number, which makes the same file again.
"""

import argparse
import collections
import dataclasses
import gzip
import json
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import sys
import tempfile
import time
from multiprocessing.connection import Connection

import numpy as np

from readable import READERS

MOST_SECONDS = 10.0
MOST_GROWTH_MIB = 512
START_SECONDS = 300.0
STARTED, READ, REFUSED = "started", "read", "refused"

VALUE = re.compile(rb'"[^"\n]*"|-?\d+(?:\.\d+)?|true|false|null')
VALUES = [
    *(
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b"0",
        b"-1",
        b"1e999",
        b"NaN",
        b"-Infinity",
        b"0.5",
        b"9" * 400,
        b"1" + b"0" * 5000,
    ),
    *(b"4611686018427387904", b'"\\ud800"', b'"\\u0000"', b'"' + b"x" * 100_000 + b'"', b"[" * 2000 + b"]" * 2000),
    *(
        b'"../../../etc/passwd"',
        b'"\xed\xa0\x80"',
        b'"${oc.env:HOME}"',
        "'\u202e٣²'".encode(),
        b"!!python/object:os.system",
    ),
]
INSERTED = [
    b"\xef\xbb\xbf",
    b"\x00",
    b"\xff\xfe",
    b"\x1b[2J",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"\n",
    b"}",
    b"{",
    b'"',
    b",",
    b"%",
    b"{{",
]
WHOLES = [
    *(
        b"",
        b"\n",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"1",
        b"\x00" * 4096,
        b"\xef\xbb\xbf{}",
        b"PAR1" + b"\x00" * 64 + b"PAR1",
    ),
    *(
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"a: &a [*a]\n",
        b"9" * 1_000_000,
        gzip.compress(b"x"),
        b"\x89PNG\r\n\x1a\n" + b"\x00" * 100,
    ),
    *(b"\xff" * 8 + b"{}", (2**40).to_bytes(8, "little") + b"{}", b"{% for i in range(10**9) %}x{% endfor %}"),
    *(
        b"{{ 'x' * 10**10 }}",
        b"a: &a " + b"[x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c + 1, c + 1, c, c) for c in range(97, 121)),
    ),
]
BOMB_MIB = 2048


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one damaged file."""

    number: int
    outcome: str
    """``read``, ``refused``, or the failure."""
    seconds: float
    growth_mib: int


def flip_bits(content: bytes, rng: np.random.Generator) -> bytes:
    changed = np.frombuffer(content, np.uint8).copy()
    at = rng.integers(len(changed), size=rng.integers(1, 9))
    changed[at] ^= (1 << rng.integers(8, size=len(at))).astype(np.uint8)
    return changed.tobytes()


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content))]


def repeat_a_part(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(len(content) + 1, size=2))
    return content[:end] + content[start:]


def randomise_a_part(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(len(content) + 1, size=2))
    return content[:start] + rng.bytes(end - start) + content[end:]


def insert(content: bytes, rng: np.random.Generator) -> bytes:
    at = rng.integers(len(content) + 1)
    return content[:at] + INSERTED[rng.integers(len(INSERTED))] + content[at:]


def replace_a_value(content: bytes, rng: np.random.Generator) -> bytes:
    found = list(VALUE.finditer(content))
    if not found:
        return insert(content, rng)
    value = found[rng.integers(len(found))]
    return content[: value.start()] + VALUES[rng.integers(len(VALUES))] + content[value.end() :]


def replace_all(content: bytes, rng: np.random.Generator) -> bytes:
    return WHOLES[rng.integers(len(WHOLES))]


DAMAGES = [
    flip_bits,
    cut,
    repeat_a_part,
    randomise_a_part,
    insert,
    replace_a_value,
    replace_a_value,
    replace_a_value,
    replace_all,
]


def damage(path: pathlib.Path, rng: np.random.Generator) -> None:
    """Damages a file, or puts something else in its place."""
    kind, content = rng.integers(40), path.read_bytes()
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.unlink()
        path.mkdir()
    elif kind == 2:
        path.unlink()
        os.mkfifo(path)
    elif kind == 3 and path.suffix == ".gz":
        path.write_bytes(gzip.compress(b" " * 2**20) * BOMB_MIB)  # a file of many members is one stream
    elif path.suffix == ".gz" and kind < 25:
        path.write_bytes(gzip.compress(DAMAGES[rng.integers(len(DAMAGES))](gzip.decompress(content), rng)))
    else:
        path.write_bytes(DAMAGES[rng.integers(len(DAMAGES))](content, rng))


def make(name: str, whole: pathlib.Path, folder: pathlib.Path, number: int) -> None:
    """The damaged folder of a number."""
    rng = np.random.default_rng([number, *name.encode()])
    shutil.copytree(whole, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in READERS[name].undamaged)
    damage(files[rng.integers(len(files))], rng)


def read_all(name: str, numbers: range, results: Connection) -> None:
    """Reads the damaged folders of these numbers; runs in a process of its own."""
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as directory:
        whole = pathlib.Path(directory, "whole")
        whole.mkdir()
        reader.write(whole)
        try:
            reader.read(whole)  # a valid folder is read, and the imports are done
        except BaseException:
            results.send(None)
            raise
        results.send(STARTED)
        for number in numbers:
            folder = pathlib.Path(directory, "damaged")
            make(name, whole, folder, number)
            before, start, outcome = peak_mib(), time.monotonic(), READ
            try:
                reader.read(folder)
            except (ValueError, OSError):
                outcome = REFUSED
            except BaseException as error:
                outcome = f"{type(error).__name__}: {error}"[:300]
            results.send(Result(number, outcome, time.monotonic() - start, peak_mib() - before))
            shutil.rmtree(folder)


def peak_mib() -> int:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def fuzz(name: str, num_files: int) -> list[Result]:
    """The results of all numbers; a process that hangs or dies is replaced by one that goes on after the file."""
    results: list[Result] = []
    while len(results) < num_files:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        numbers = range(len(results), num_files)
        process = multiprocessing.get_context("spawn").Process(target=read_all, args=(name, numbers, sender))
        process.start()
        sender.close()
        try:
            if not receiver.poll(START_SECONDS):
                raise TimeoutError(f"{name}: the valid files are not read in {START_SECONDS:.0f} s")
            if receiver.recv() != STARTED:
                raise RuntimeError(f"{name}: the valid files are refused")
            for number in numbers:
                if not receiver.poll(MOST_SECONDS + 2):
                    results.append(Result(number, "hangs", MOST_SECONDS, 0))
                    break
                results.append(judge(receiver.recv()))
        except EOFError:
            process.join()
            results.append(Result(len(results), f"ends the process with {process.exitcode}", 0.0, 0))
        finally:
            process.kill()
            process.join()
    return results


def judge(result: Result) -> Result:
    """The result, as a failure where it took too much."""
    if result.seconds > MOST_SECONDS:
        return dataclasses.replace(result, outcome=f"takes {result.seconds:.0f} s")
    if result.growth_mib > MOST_GROWTH_MIB:
        return dataclasses.replace(result, outcome=f"takes {result.growth_mib} MiB")
    return result


def summarise(results: list[Result]) -> dict[str, object]:
    """Counts, extremes and every failure."""
    counts = collections.Counter(r.outcome if r.outcome in (READ, REFUSED) else "failed" for r in results)
    return {
        **counts,
        "most_seconds": round(max(r.seconds for r in results), 2),
        "most_growth_mib": max(r.growth_mib for r in results),
        "failures": [f"{r.number}: {r.outcome}" for r in results if r.outcome not in (READ, REFUSED)],
    }


def main() -> int:
    """Exit code 1 where a reader failed."""
    parser = argparse.ArgumentParser(description="Reads damaged files with every reader.")
    parser.add_argument("--files", type=int, default=2000, help="number of damaged files, over all readers")
    parser.add_argument("--reader", action="append", choices=list(READERS), help="only these readers")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = arguments.reader or list(READERS)
    found = {name: summarise(fuzz(name, -(-arguments.files // len(names)))) for name in names}
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for name, summary in found.items():
            failures = summary.pop("failures")
            print(name, json.dumps(summary), *failures, sep="\n  ")
    return int(any("failed" in summary for summary in found.values()))


if __name__ == "__main__":
    sys.exit(main())

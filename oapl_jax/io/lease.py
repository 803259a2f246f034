"""Leases: several processes, on one host or many, share work by files in one folder.

A lease on ``NAME`` is the file ``NAME.GENERATION`` of the highest generation. It is won by being the
one that creates the next generation's file, which a file system grants once; it is kept by rewriting
the file with a higher beat; it is lost when another process creates the generation after it.

No clock is compared with another: a process that wants a lease takes it over when it has itself seen
the file unchanged for ``expires`` seconds, or at once when the holder was a process of this host that
is gone. A holder that cannot renew in time (stopped, disk full) knows by its own clock that it may
have lost the lease. It may know late, though: what a holder writes has to be such that writing it
twice does no harm, such as a file that is created only where it does not exist yet. For the same reason
leases are not synced to disk: a crash of the machine may undo them.

The files are no proof: whoever writes in the folder can write them. A claim may have a limit after which it is not
respected, however often it is renewed (``patience`` of ``claim``). A holder that must not be ended by others' files
trusts its own clock alone (``Lease.is_sole``): as long as it renews in time, no honest process takes its lease over.

Files of a lease stay, because the next claim counts generations from 0 on. ``finish`` removes them where nobody needs the
name any more. Another process may claim it in that very moment, and a third one after it, both with success. So whoever
claims a name that may be finished checks afterwards whether the work is done, and then finishes the lease as well.
"""

import contextlib
import json
import math
import os
import pathlib
import socket
import threading
import time
from typing import Any

from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.untrusted import reading

HEARTBEATS_PER_EXPIRY = 4
MAX_SEEN = 4096
"""Leases of others that are watched at most; beyond, the one whose last change is oldest is dropped from memory."""
MOST_PROCESSES = 2**31
STOP_SECONDS = 10.0
"""How long ``close`` waits for a heartbeat that is being written."""
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Goes on while the machine is suspended, where there is such a clock."""


class Lease:
    """One claimed name; made by ``Leases.claim``."""

    def __init__(self, leases: "Leases", name: str, generation: int):
        self._leases, self.name, self.generation = leases, name, generation
        self._beat = 0
        self.is_sole = False
        """Whether files of others mean nothing: it is lost by its own clock only."""
        self._is_lost = False
        self._renewed = time.clock_gettime(CLOCK)
        self._writing = threading.Lock()

    @property
    def is_held(self) -> bool:
        """False when another process has taken it over, or could have: it was not renewed in time."""
        return not self._is_lost and time.clock_gettime(CLOCK) - self._renewed < self._leases.expires

    def renew(self) -> bool:
        """Writes a beat, and says whether the lease is still held. The heartbeat thread does this by itself."""
        with self._writing:
            start = time.clock_gettime(CLOCK)
            # A full or unreachable disk is a missed beat: the next may succeed in time.
            with contextlib.suppress(OSError):
                if not self.is_held or self._is_overtaken():
                    self._is_lost = True
                    return False
                self._leases.rewrite(self, self._beat + 1, is_released=False)
                self._beat, self._renewed = self._beat + 1, start
        return self.is_held

    def release(self) -> None:
        """Gives the name back: others may claim it at once."""
        self._leases.stop_beating(self)
        with self._writing:
            # On a full disk others have to wait for the expiry.
            with contextlib.suppress(OSError):
                if not self._is_lost and not self._is_overtaken():
                    self._leases.rewrite(self, self._beat + 1, is_released=True)
            self._is_lost = True

    def _is_overtaken(self) -> bool:
        """Whether a file of the next generation says so; a sole holder that is in time goes on in that file."""
        while storage.exists(self._leases.path(self.name, self.generation + 1)):
            if not (self.is_sole and self.is_held):
                return True
            self.generation += 1
        return False

    def finish(self) -> None:
        """Gives the name up for good: its files disappear, also those of earlier holders (see above)."""
        self._leases.stop_beating(self)
        with self._writing, contextlib.suppress(OSError):  # what stays behind is in nobody's way
            self._is_lost = True
            generation = self.generation
            while storage.exists(self._leases.path(self.name, generation + 1)):
                generation += 1
            # The highest first: a claim that finds those before it takes the next generation, as ever.
            for number in range(generation, -1, -1):
                storage.remove(self._leases.path(self.name, number))


class Leases:
    """The leases in a folder, and a thread that keeps those of this process alive.

    ``expires``: seconds without a beat after which others take a lease over.
    """

    def __init__(self, directory: SharedPath, expires: float = 30.0):
        self.expires = expires
        self._directory = directory
        self._held: dict[str, Lease] = {}
        self._seen: dict[str, tuple[int, str, float, float]] = {}
        """Generation and content of others' leases, when this process first saw them so, and when it first saw any."""
        self._owner = _this_process()
        self._stopping = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="leases", daemon=True)

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def claim(self, name: str, patience: float = math.inf) -> Lease | None:
        """The lease on a name; None while another process, or this one, holds it.

        What others have held for more than ``patience`` seconds, as this process has seen, is free.
        """
        if name in self._held:
            return None
        generation = 0
        while storage.exists(self.path(name, generation)):
            generation += 1
        if generation > 0 and not self._is_free(name, generation - 1, patience):
            return None
        lease = Lease(self, name, generation)
        if not storage.create(self.path(name, generation), self._content(0, is_released=False), is_durable=False):
            return None
        self._seen.pop(name, None)
        self._held[name] = lease
        if self._heart.ident is None:
            self._heart.start()
        return lease

    def claim_from_the_dead(self, name: str) -> Lease | None:
        """The lease on a name, as its sole holder, after a wait where the last one may be gone; None as soon as that beats."""
        end, first = time.monotonic() + 1.5 * self.expires, None
        while (lease := self.claim(name)) is None:
            seen = self._seen.get(name)
            first = first or seen
            if time.monotonic() > end or (seen is not None and first is not None and seen[:2] != first[:2]):
                return None
            time.sleep(min(0.2, self.expires / 20))
        lease.is_sole = True
        return lease

    def close(self) -> None:
        """Releases all leases of this process and ends its heartbeat; may be called twice."""
        self._stopping.set()
        if self._heart.ident is not None:
            self._heart.join(STOP_SECONDS)
        for lease in list(self._held.values()):
            lease.release()

    def path(self, name: str, generation: int) -> SharedPath:
        """The file of a generation."""
        return self._directory / f"{name}.{generation}"

    def rewrite(self, lease: Lease, beat: int, *, is_released: bool) -> None:
        """Replaces the file of a lease that is held."""
        content = self._content(beat, is_released=is_released)
        storage.replace(self.path(lease.name, lease.generation), content, is_durable=False)

    def stop_beating(self, lease: Lease) -> None:
        """Ends the heartbeat of one lease."""
        if self._held.get(lease.name) is lease:
            del self._held[lease.name]

    def _is_free(self, name: str, generation: int, patience: float) -> bool:
        """Whether the newest generation was released, its holder is dead or silent, or patience is at its end."""
        content, holder = "", {}
        try:
            content = storage.read(self.path(name, generation), storage.MESSAGE_BYTES).decode(errors="replace")
            holder = reading.parse_object(content, "lease")
        except FileNotFoundError:  # being replaced on a file system without atomic rename
            return False
        except (ValueError, PermissionError):  # no lease, or torn, which time alone can resolve
            pass
        if holder.get("is_released") or self._is_dead(holder):
            return True
        now = time.monotonic()
        *seen, changed, first = self._seen.pop(name, (generation, content, now, now))
        self._seen[name] = (generation, content, changed if seen == [generation, content] else now, first)
        if len(self._seen) > MAX_SEEN:  # of windows that are over
            del self._seen[next(iter(self._seen))]
        return now - first > patience or (seen == [generation, content] and now - changed > self.expires)

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """A process of this host that is gone; of other hosts only silence shows it."""
        pid, started = holder.get("pid"), holder.get("started")
        if holder.get("host") != self._owner["host"] or type(pid) is not int or not isinstance(started, str):
            return False
        return 0 < pid < MOST_PROCESSES and _start_time(pid) != started

    def _content(self, beat: int, *, is_released: bool) -> bytes:
        return json.dumps({**self._owner, "beat": beat, "is_released": is_released}).encode() + b"\n"

    def _beat(self) -> None:
        while not self._stopping.wait(self.expires / HEARTBEATS_PER_EXPIRY):
            for lease in list(self._held.values()):
                if not lease.renew():
                    self.stop_beating(lease)


def _this_process() -> dict[str, Any]:
    """Process ids mean something within one host and one container only."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = str(pathlib.Path("/proc/self/ns/pid").readlink())
    host = f"{socket.gethostname()} {namespace}"
    return {"host": host, "pid": os.getpid(), "started": _start_time(os.getpid())}


def _start_time(pid: int) -> str | None:
    """When a process of this host started, in the kernel's ticks; None where there is no such process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # of another user
        pass
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown"  # without /proc
    return None if fields[0] in ("Z", "X") else fields[19]  # a zombie, or dead

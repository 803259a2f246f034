"""The program of one grading worker: reads tasks from the socket on its standard input, answers on it.

One JSON line a task, ``[GOLD, RESPONSE]`` to grade or ``[GOLD]`` to check a gold answer; one JSON line a
reply, ``[OUTCOME, DETAIL]`` with OUTCOME true, false, or null where the grader itself failed. Nothing of JAX
is imported, so that a worker starts in a fraction of a second and weighs about 60 MB.
"""

import json
import logging
import resource
import signal
import socket
import sys

from oapl_jax.rewards import math

MEMORY_LIMIT = 2 << 30
"""Bytes of address space; beyond it an answer fails with MemoryError instead of filling the machine."""
MAX_DETAIL = 200


def main(deadline: float) -> None:
    """Serves until the parent closes the socket; an answer that outlives ``deadline`` seconds ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    logging.disable(logging.CRITICAL)
    math.grade_answer("1", r"\boxed{\frac{2}{2}}")  # imports and warms the parser before the first deadline runs
    with socket.socket(fileno=0) as channel, channel.makefile("rwb") as stream:
        _send(stream, [True, "ready"])
        for line in stream:
            # The parent kills a late worker. Should the parent be gone, this alarm does: it needs no Python to run.
            signal.setitimer(signal.ITIMER_REAL, deadline)
            reply = _answer(json.loads(line))
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(stream, reply)


def _answer(task: list[str]) -> list[bool | str | None]:
    """The outcome of one task. An exception is the grader's failure, never the response's."""
    try:
        if len(task) == 1:
            return [math.is_usable_gold(task[0]), ""]
        is_correct, detail = math.grade_answer(*task)
        return [is_correct, detail]
    except Exception as error:
        return [None, f"{type(error).__name__}: {error}"[:MAX_DETAIL]]


def _send(stream, reply: list[bool | str | None]) -> None:
    stream.write(json.dumps(reply).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))

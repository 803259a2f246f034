"""How a command ends: one function turns what it raised into a line for the user and an exit code."""

import contextlib
import enum
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from oapl_jax.config import config_file
from oapl_jax.io import interrupt, storage
from oapl_jax.io.terminal import say
from oapl_jax.types import PreemptedError, RunError


class ExitCode(enum.IntEnum):
    """Exit codes of all commands."""

    DONE = 0
    FAILED = 1
    """The command began its work and could not finish it."""
    USAGE = 2
    """The config, the arguments or the data are wrong: nothing was changed."""
    PREEMPTED = 42
    """Stopped by SIGTERM with everything saved: start the same command again (``launch/`` does so for free)."""
    INTERRUPTED = interrupt.EXIT_CODE
    """Ctrl-C."""


def run(command: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Runs ``main`` of a module of ``cli/`` and returns its exit code.

    Errors that a user can understand become one message on standard error; of any other one the traceback is printed.
    """
    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, interrupt.leave) if is_main else None
    try:
        return int(command(argv) or ExitCode.DONE)
    except PreemptedError as error:
        return ExitCode.INTERRUPTED if signal.SIGINT in error.args else ExitCode.PREEMPTED
    except ValueError as error:
        return _end(ExitCode.USAGE, str(error))
    except (RunError, TimeoutError) as error:
        return _end(ExitCode.FAILED, str(error))
    except BrokenPipeError:  # `oapl-jax ... | head`
        return ExitCode.DONE
    except (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        return _end(ExitCode.USAGE, f"{error.filename!r}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in storage.DISK_ERRORS:
            return _end(ExitCode.FAILED, f"the disk: {error}; with room on it, the same command again goes on")
        say(config_file.hide(traceback.format_exc().rstrip()), sys.stderr)
        return ExitCode.FAILED
    finally:
        if is_main:
            signal.signal(signal.SIGINT, previous)


def _end(code: ExitCode, message: str) -> ExitCode:
    with contextlib.suppress(OSError):
        say(f"error: {config_file.hide(message)}", sys.stderr)
    return code

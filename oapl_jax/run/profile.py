"""Traces of learner steps, which XProf and Perfetto open (docs/scaling.md)."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax

from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath

PROFILE_FOLDER = "profile"
Function = TypeVar("Function", bound=Callable[..., Any])


def traced_as(name: str) -> Callable[[Function], Function]:
    """A decorator: calls of the function have this name in a trace."""

    def name_calls(function: Function) -> Function:
        return cast(Function, jax.profiler.annotate_function(function, name=name))

    return name_calls


class Profiler:
    """Traces the steps from ``steps[0]`` to ``steps[1]`` into ``RUN/profile``: this process with its devices.

    XProf reads ``*.xplane.pb`` there, Perfetto ``*.trace.json.gz``.
    """

    def __init__(self, run_dir: SharedPath, steps: tuple[int, int] | None, note: Callable[[str], None]):
        """``steps`` None: no trace."""
        self._folder, self._note = run_dir / PROFILE_FOLDER, note
        self._steps = range(0) if steps is None else range(steps[0], steps[1] + 1)
        self._trace: contextlib.ExitStack | None = None
        """Open while a trace is under way."""

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a learner step."""
        if step not in self._steps:
            yield
            return
        if self._trace is None:
            self._trace = self._start()
        with jax.profiler.StepTraceAnnotation("learner_step", step_num=step):
            yield
        if step == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is under way: also of a run that stops within the steps."""
        if self._trace is not None:
            self._trace.close()
            self._trace = None
            self._note(f"trace of learner steps: {self._folder}")

    def _start(self) -> contextlib.ExitStack:
        trace, options = contextlib.ExitStack(), jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # each call of a function would be an event, and crowd out the others
        jax.profiler.start_trace(trace.enter_context(storage.folder_for(self._folder)), profiler_options=options)
        trace.callback(jax.profiler.stop_trace)
        return trace

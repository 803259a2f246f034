"""Chat templates are programs: a new one is rendered once in a process of its own, with a limit of time and memory."""

import contextlib
import functools
import re
import resource
import subprocess
import sys
from typing import Any

CPU_SECONDS, SECONDS, MIB = 3, 60.0, 1024
"""Limits of the rendering of a short chat; a template takes a millisecond. The second is by the clock."""
TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""The tag of ``transformers``, which Jinja does not know."""


@functools.cache
def check(template: str, where: str) -> None:
    """Refuses, by a ValueError, a template that is endless or takes too much; other mistakes show when it is used."""
    given = template.encode(errors="replace")
    with contextlib.suppress(subprocess.TimeoutExpired):
        if subprocess.run([sys.executable, "-I", __file__], input=given, timeout=SECONDS, check=False).returncode == 0:
            return
    raise ValueError(
        f"{where}: its chat template takes more than {CPU_SECONDS} s or {MIB} MiB for a message of a word; mend it, or"
        " name another tokenizer"
    )


def _render() -> None:
    """The program of the process: fails where a limit is reached."""
    import jinja2.ext
    import jinja2.sandbox

    def fail(*_: Any) -> None:
        raise jinja2.TemplateError

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals |= {"raise_exception": fail, "strftime_now": str}
    template = TAGS.sub("", sys.stdin.buffer.read().decode())
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MIB * 2**20, MIB * 2**20))
    user, system, answer = ({"role": role, "content": "word"} for role in ("user", "system", "assistant"))
    for messages in ([user], [system, user], [user, answer]):
        try:
            environment.from_string(template).render(messages=messages, add_generation_prompt=messages[-1] is user)
        except MemoryError:
            sys.exit(1)
        except Exception:  # it shows when the template is used
            continue


if __name__ == "__main__":
    _render()

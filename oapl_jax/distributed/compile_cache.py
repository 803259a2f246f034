"""Compiled programs kept on disk between processes.

The key of a program names the compiler, its flags and the instructions of the processor, so that machines may share a
folder. A program that was read computes the same bits as one that was compiled. A file that cannot be read is a warning,
and the program is compiled.
"""

import os
import pathlib

import jax

MIN_COMPILE_SECONDS = 0.1
"""Programs that compile faster are not kept."""


def use_compile_cache(folder: str | None) -> None:
    """Keeps compiled programs in a folder, unless ``JAX_COMPILATION_CACHE_DIR`` names another."""
    if folder is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ and reads_what_it_wrote():
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def reads_what_it_wrote() -> bool:
    """Whether XLA loads programs that it compiled for this device; of CPUs only AMD's are known to.

    For many of Intel's, LLVM is given preferences such as ``prefer-no-gather`` among the instructions. XLA does not find
    these on the machine, says for each program that it may crash, and compiles it again (jax issue 38445; jax 0.10).
    """
    if jax.default_backend() != "cpu":
        return True
    processors = pathlib.Path("/proc/cpuinfo")
    return processors.is_file() and "AuthenticAMD" in processors.read_text()

"""The system calls that a confined program may make, as a seccomp filter.

libseccomp compiles the allowlist. Any other call fails with ENOSYS, so that libraries fall back from newer calls. Threads
are allowed, processes are not.
"""

import errno
import functools
import os
from typing import Any

ALLOWED = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range dup dup2
    dup3 flock fsync fdatasync ftruncate sendfile stat lstat fstat newfstatat statx
    access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd chdir fchdir mkdir mkdirat rmdir unlink
    unlinkat rename renameat renameat2 umask statfs fstatfs mmap munmap mprotect mremap madvise brk msync mincore
    membarrier rt_sigaction rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigpending rt_sigtimedwait sigaltstack pause
    alarm setitimer getitimer timer_create timer_settime timer_gettime timer_delete timer_getoverrun nanosleep
    clock_nanosleep clock_gettime clock_getres gettimeofday time times getpid gettid getppid getuid geteuid getgid
    getegid getgroups getpgrp getpgid getsid getresuid getresgid uname sysinfo getrlimit setrlimit getrusage getcpu
    sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min
    getrandom futex futex_waitv set_robust_list get_robust_list set_tid_address rseq arch_prctl exit exit_group pipe
    pipe2 eventfd2 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll select
    pselect6 signalfd4 timerfd_create timerfd_settime timerfd_gettime sendto recvfrom
    shutdown getsockopt getsockname getpeername wait4 waitid restart_syscall
""".split()  # noqa: SIM905 (a table of 200 lines says no more)

# They do nothing and say that they did: shutil.copy sets the mode of the copy, copytree looks for further attributes.
SKIPPED = ["chmod", "fchmod", "fchmodat", "utimensat", "listxattr", "llistxattr", "flistxattr"]

CLONE_THREAD = 0x10000
AF_UNIX, SOCK_STREAM, SOCK_TYPES = 1, 1, 0xF
# Landlock checks an access that is asked for, and truncation only since ABI 3: these modes ask for no write access.
READING_MODES = (0, 3)
# The allowed values of an argument of a call.
# F_SETOWN, F_SETOWN_EX and F_SETSIG are missing: with O_ASYNC the kernel would send any signal, even SIGKILL, to any
# process of the user without kill(). F_SETPIPE_SZ is missing because it takes kernel memory.
VALUES = {
    # DUPFD, GETFD, SETFD, GETFL, SETFL; locks; DUPFD_CLOEXEC, GETPIPE_SZ, GET_SEALS
    ("fcntl", 1): (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032, 1034),
    ("ioctl", 1): (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
    ("prctl", 0): (15, 16, 0x53564D41, 3),  # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA, PR_GET_DUMPABLE
    ("prlimit64", 0): (0,),  # its own limits
}


@functools.cache
def compile_filter() -> bytes:
    """The filter as BPF instructions for this machine's architecture; raises RuntimeError without libseccomp."""
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(f"libseccomp cannot be loaded ({error}); on Debian: apt-get install libseccomp2") from error
    result = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    result.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)  # a binary tree instead of a linear search
    denied, equal, masked = pyseccomp.ERRNO(errno.EPERM), pyseccomp.EQ, pyseccomp.MASKED_EQ

    def add(action: int, name: str, *conditions: Any) -> None:
        # The list has names of several architectures; those that this one lacks are skipped.
        if pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) >= 0:
            result.add_rule(action, name, *conditions)

    for name in ALLOWED:
        add(pyseccomp.ALLOW, name)
    for name in SKIPPED:
        add(pyseccomp.ERRNO(0), name)
    add(pyseccomp.ALLOW, "clone", pyseccomp.Arg(0, masked, CLONE_THREAD, CLONE_THREAD))
    add(denied, "clone", pyseccomp.Arg(0, masked, CLONE_THREAD, 0))
    # asyncio wakes its loop through a pair of sockets. A datagram socket could send to any other by its path.
    stream = pyseccomp.Arg(1, masked, SOCK_TYPES, SOCK_STREAM)
    add(pyseccomp.ALLOW, "socketpair", pyseccomp.Arg(0, equal, AF_UNIX), stream)
    for name, argument in (("open", 1), ("openat", 2)):
        for mode in range(4):
            truncating = pyseccomp.Arg(argument, masked, os.O_ACCMODE | os.O_TRUNC, mode | os.O_TRUNC)
            add(denied if mode in READING_MODES else pyseccomp.ALLOW, name, truncating)
        add(pyseccomp.ALLOW, name, pyseccomp.Arg(argument, masked, os.O_TRUNC, 0))
    for (name, argument), values in VALUES.items():
        for value in values:
            add(pyseccomp.ALLOW, name, pyseccomp.Arg(argument, equal, value))
    descriptor = os.memfd_create("filter")  # export_bpf needs a file; a memory file works on a full disk
    with os.fdopen(descriptor, "rb") as file:
        result.export_bpf(file)
        file.seek(0)
        return file.read()

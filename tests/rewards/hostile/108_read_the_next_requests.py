# attack: 108_read_the_next_requests
# kind: call:solve
# expect: WA|RE|TLE
# note: reads the pipe of requests itself and looks for what is expected
import os, re


def solve(a):
    seen = b""
    os.set_blocking(5, False)
    for fd in range(3, 32):
        try:
            seen += os.read(fd, 1 << 16)
        except (OSError, BlockingIOError):
            pass
    found = re.findall(rb"expected\D*(-?\d+)", seen)
    return int(found[0]) if found else None

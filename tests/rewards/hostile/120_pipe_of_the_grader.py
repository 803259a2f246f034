# attack: 120_pipe_of_the_grader
# kind: stdio
# expect: WA|RE|OLE|TLE
# note: fills every descriptor it has and closes them in odd orders
import os

for fd in range(0, 64):
    try:
        os.write(fd, b"15\n" * 10)
    except OSError:
        pass
for fd in range(63, -1, -1):
    try:
        os.close(fd)
    except OSError:
        pass

# attack: 116_kernel_memory
# kind: stdio
# expect: WA|RE|TLE|MLE
# note: memory that RLIMIT_DATA does not see: memory files, big pipes, System V segments
import ctypes, fcntl, os

libc, total = ctypes.CDLL(None), 0
for i in range(2000):
    try:
        fd = os.memfd_create("x")
        total += os.write(fd, b"x" * (1 << 20))
    except OSError:
        break
for i in range(200):
    try:
        r, w = os.pipe()
        fcntl.fcntl(w, 1031, 1 << 20)
    except OSError:
        break
for i in range(100):
    libc.shmget(0, 64 << 20, 0o1600)
print(total)

# attack: 117_kernel_surface
# kind: stdio
# expect: WA|RE
# note: raw system calls: namespaces, mounts, tracing, keys, bpf, io_uring, a second filter
import ctypes, os

libc = ctypes.CDLL(None, use_errno=True)
possible = []
for number, arguments in {
    272: (0x10000000,),
    165: (b"x", b"/", b"tmpfs", 0, 0),
    101: (16, os.getppid(), 0, 0),
    310: (1, 0, 0, 0, 0, 0),
    434: (1, 0),
    435: (0, 88),
    321: (0, 0, 0),
    425: (8, 0),
    323: (0,),
    250: (0, -3, 0),
    298: (0, 0, -1, -1, 0),
    161: (b"/",),
    155: (b".", b"."),
    105: (0,),
    317: (1, 0, 0),
    304: (0, 0, 0),
    135: (0x40000,),
    157: (1, 0, 0, 0, 0),
    157: (22, 2, 0),
    62: (1, 9),
    200: (1, 9),
    424: (1, 9, 0, 0),
    319: (b"x", 0),
    447: (0,),
}.items():
    if libc.syscall(number, *arguments) >= 0:
        possible.append(number)
print("ALLOWED" if possible else 0, possible)

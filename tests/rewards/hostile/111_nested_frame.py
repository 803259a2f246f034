# attack: 111_nested_frame
# kind: call:solve
# expect: WA|RE|TLE|OLE
# note: a frame of a hundred thousand brackets
import os, struct


def solve(a):
    body = b'{"t": "value", "v": ' + b"[" * 100000 + b"]" * 100000 + b"}"
    data = struct.pack("<I", len(body)) + body
    while data:
        data = data[os.write(4, data) :]
    os._exit(0)

# attack: 110_frame_longer_than_it_is
# kind: call:solve
# expect: WA|RE|TLE|OLE
# note: announces a frame of four gigabytes
import os, time


def solve(a):
    os.write(4, b"\xff\xff\xff\xff" + b"[" * 1000)
    os._exit(0)

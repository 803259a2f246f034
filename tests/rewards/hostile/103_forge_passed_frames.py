# attack: 103_forge_passed_frames
# kind: assert:solve
# expect: WA|RE
# note: writes the frame that says that all assertions passed to every descriptor
import json, os, struct


def frame(o):
    b = json.dumps(o).encode()
    return struct.pack("<I", len(b)) + b


def solve(a):
    for fd in range(3, 64):
        for o in ({"t": "passed"}, {"t": "value", "v": 15}, {"t": "value", "v": 1}):
            try:
                os.write(fd, frame(o))
            except OSError:
                pass
    return -1

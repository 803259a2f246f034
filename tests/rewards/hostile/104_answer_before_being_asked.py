# attack: 104_answer_before_being_asked
# kind: call:solve
# expect: WA|RE
# note: several results in advance, one for each test that might come
import json, os, struct

for guess in range(100):
    b = json.dumps({"t": "value", "v": guess}).encode()
    try:
        os.write(4, struct.pack("<I", len(b)) + b)
    except OSError:
        pass


def solve(a):
    return -1

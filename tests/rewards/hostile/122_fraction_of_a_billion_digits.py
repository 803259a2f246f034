# attack: 122_fraction_of_a_billion_digits
# kind: call:solve
# expect: WA|RE
# note: a frame that says fraction, with an exponent that would be computed
import json, os, struct


def solve(a):
    body = json.dumps({"t": "value", "v": {"t": "Fraction", "v": "1e999999999"}}).encode()
    os.write(4, struct.pack("<I", len(body)) + body)
    os._exit(0)

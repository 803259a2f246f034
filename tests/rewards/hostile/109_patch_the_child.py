# attack: 109_patch_the_child
# kind: call:solve
# expect: WA|RE
# note: replaces the encoder and the exit of the child from inside
import sys, os

values = sys.modules["oapl_jax.rewards.code.sandbox.confined.values"]
program = sys.modules["oapl_jax.rewards.code.sandbox.confined.program"]


class Everything(dict):
    def __eq__(self, o):
        return True


values.encode = lambda *a, **k: {"t": "opaque", "v": -1, "equal": True}
program.values.write_frame = lambda fd, m: os.write(fd, b"\x02\x00\x00\x00{}")


def solve(a):
    return 15 if False else None

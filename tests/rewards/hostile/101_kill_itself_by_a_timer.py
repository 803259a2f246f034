# attack: 101_kill_itself_by_a_timer
# kind: stdio
# expect: RE|WA|TLE
# note: a POSIX timer sends SIGKILL to this process: as if killed from outside
import ctypes, time

libc = ctypes.CDLL(None)


class Event(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("pad", ctypes.c_int * 12),
    ]


class Spec(ctypes.Structure):
    _fields_ = [("i", ctypes.c_long * 2), ("v", ctypes.c_long * 2)]


timer, event, spec = ctypes.c_void_p(), Event(None, 9, 0), Spec()
spec.v[1] = 1000
libc.timer_create(1, ctypes.byref(event), ctypes.byref(timer))
libc.timer_settime(timer, 0, ctypes.byref(spec), None)
time.sleep(0.5)
print(0)

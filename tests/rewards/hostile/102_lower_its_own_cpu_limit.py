# attack: 102_lower_its_own_cpu_limit
# kind: stdio
# expect: RE|WA|TLE
# note: sets its CPU limit to zero, so that the kernel kills it before the grader would
import resource

resource.setrlimit(resource.RLIMIT_CPU, (0, 0))
while True:
    pass

# attack: 100_exit_codes_of_the_driver
# kind: stdio
# expect: RE|CE|MLE|WA
# note: ends with every status that the child uses for failures of ours, to be excused
import os, random

os._exit(random.choice([65, 70, 77, 98, 99, 255]))

# attack: 112_colliding_keys
# kind: call:solve
# expect: WA|RE|TLE|OLE|MLE
# note: a dictionary of integers with one hash: quadratic for whoever builds it again
def solve(a):
    return {i * ((1 << 61) - 1): 0 for i in range(3000)}

# attack: 113_colliding_keys_assert
# kind: assert:solve
# expect: WA|RE|TLE|OLE|MLE
# note: the same against the assertions
def solve(a):
    return {i * ((1 << 61) - 1): 0 for i in range(3000)}

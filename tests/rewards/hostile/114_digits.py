# attack: 114_digits
# kind: stdio
# expect: WA|RE|OLE|TLE
# note: a million digits on the line of the answer
print("1" * 900000)
print("1e999999999")

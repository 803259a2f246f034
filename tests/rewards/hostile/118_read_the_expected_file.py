# attack: 118_read_the_expected_file
# kind: stdio
# expect: WA|RE|TLE
# note: looks for the expected output on the disk
import glob, json, os

for path in (
    "@CANARY@/expected.json",
    *glob.glob("/tmp/**/expected*.json", recursive=True),
    *glob.glob("/proc/*/environ"),
    *glob.glob("/proc/*/mem"),
):
    try:
        text = open(path).read()
        print(text.split("ANSWER:")[1].split(":")[0])
        raise SystemExit
    except (OSError, IndexError, UnicodeDecodeError):
        pass
print(0)

# attack: 119_links
# kind: stdio
# expect: WA|RE
# note: plants links where somebody might follow them
import os

for folder in ("@CANARY@", "@CANARY@/wd", "/tmp", "/var/tmp", "/dev/shm", "."):
    for make in (os.symlink, os.link):
        try:
            make("@CANARY@/f1", folder + "/planted")
        except OSError:
            pass
    try:
        os.rename("@CANARY@/f1", folder + "/moved")
    except OSError:
        pass
print(0)

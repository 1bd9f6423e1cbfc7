# shellcheck shell=sh
# In /volume: a file that two processes have mapped, written through both and read by who only opens it.
set -e
python3 - <<'END'
import mmap, os
with open("/volume/mapped", "w+b") as file:
    file.truncate(8192)
    one = mmap.mmap(file.fileno(), 8192)
    one[0:3] = b"one"
    if os.fork() == 0:
        with open("/volume/mapped", "r+b") as again:
            two = mmap.mmap(again.fileno(), 8192)
            assert two[0:3] == b"one"
            two[4096:4099] = b"two"
            two.flush()
        os._exit(0)
    assert os.wait()[1] == 0
    assert one[4096:4099] == b"two"
    one[8189:8192] = b"end"
    one.flush()
    assert os.pread(file.fileno(), 3, 8189) == b"end"
os.setxattr("/volume/mapped", "user.colour", b"blue")
assert os.getxattr("/volume/mapped", "user.colour") == b"blue"
assert os.listxattr("/volume/mapped") == ["user.colour"]
END

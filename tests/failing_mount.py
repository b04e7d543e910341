"""A folder mounted a second time through FUSE, which fails as storage behind a network does: at random.

python -m tests.failing_mount SOURCE TARGET CONTROL: the file CONTROL holds `RATE ERRNO ERRNO ...`, and may change at
any moment. Reading, listing, opening and writing fail; what fails once works when it is tried again.
"""

import errno
import os
import random
import sys
from pathlib import Path
from typing import Any

from fuse import FUSE, FuseOSError, Operations


class Failing(Operations):  # type: ignore[misc]
    """The source folder, with faults."""

    def __init__(self, source: str, control: str) -> None:
        self._source, self._control, self._dice = source, Path(control), random.Random(0)

    def _path(self, path: str) -> str:
        return self._source + path

    def _may_fail(self, *others: int) -> None:
        rate, *names = self._control.read_text().split() or ["0"]  # it is being written
        numbers = [number for name in names if (number := getattr(errno, name)) not in others]
        if numbers and self._dice.random() < float(rate):
            raise FuseOSError(self._dice.choice(numbers))

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._path(path))
        names = ("atime", "ctime", "gid", "mode", "mtime", "nlink", "size", "uid")
        return {f"st_{name}": getattr(found, f"st_{name}") for name in names}

    def readdir(self, path: str, fh: int) -> list[str]:
        self._may_fail(errno.ENOSPC)
        return [".", "..", *os.listdir(self._path(path))]  # noqa: PTH208

    def open(self, path: str, flags: int) -> int:
        self._may_fail(errno.ENOSPC)
        return os.open(self._path(path), flags)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        self._may_fail(errno.ESTALE)
        return os.open(self._path(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        self._may_fail(errno.ENOSPC)
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._may_fail(errno.ESTALE)
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._path(path), length)

    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        os.fsync(fh)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._path(old), self._path(new))  # noqa: PTH104

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._path(path), mode)  # noqa: PTH102

    def rmdir(self, path: str) -> None:
        os.rmdir(self._path(path))  # noqa: PTH106

    def unlink(self, path: str) -> None:
        os.unlink(self._path(path))  # noqa: PTH108

    def utimens(self, path: str, times: Any = None) -> None:
        os.utime(self._path(path), times)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._path(path), mode)  # noqa: PTH101

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._path(path))
        names = ("bavail", "bfree", "blocks", "bsize", "favail", "ffree", "files", "flag", "frsize", "namemax")
        return {f"f_{name}": getattr(found, f"f_{name}") for name in names}


if __name__ == "__main__":
    FUSE(Failing(sys.argv[1], sys.argv[3]), sys.argv[2], foreground=True, allow_other=False)

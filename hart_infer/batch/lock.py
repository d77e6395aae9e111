"""Hold a folder on a disk for one process. The kernel lets it go when that ends, however it ends."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of file systems that have none


def acquire(folder: Path) -> int:
    """Return what `release` takes. Raises BlockingIOError where another has the folder, and OSError."""
    path = folder / LOCK
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            if _is_there(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last owner has just removed it


def release(descriptor: int, folder: Path) -> None:
    """Let the folder go, and remove the file."""
    if sys.platform != "win32":  # which removes no open file, and a closed one may be another's
        with suppress(OSError):
            (folder / LOCK).unlink()
    os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock a file, or go on without where the file system has no locks. Raises BlockingIOError."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES, errno.EDEADLK}:
            raise BlockingIOError(error.errno, error.strerror) from error
        if error.errno not in _NO_LOCKS:
            raise


def _is_there(descriptor: int, path: Path) -> bool:
    """Whether a name is still that of an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False

"""The system calls that a snapshot is written with: the one place where the tests count them, fail them and stop them.

Callers name them through this module (``files.write``), so that whatever takes their place here is what runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = "anystore.lock"
"""The file that a writer holds a lock on; it is never removed, since two could then hold locks on two of them."""


_DIRECT: int = getattr(os, "O_DIRECT", 0)  # which only some systems have


class SnapshotError(ValueError):
    """A snapshot is damaged, is none, does not fit, or is being written by another; the message names the file."""


def mkdir(path: Path) -> None:
    """Make a directory."""
    os.mkdir(path)


def create(path: Path) -> int:
    """A new file to write to, which must not be there yet."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def duplicate(fd: int) -> int:
    """Another descriptor of the same file."""
    return os.dup(fd)


def write(fd: int, data: Any) -> None:
    """Write all of the bytes; what cannot pass by the system's cache goes through it."""
    view = memoryview(data)
    while view.nbytes:
        try:
            view = view[os.write(fd, view) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not passes_by_cache(fd):
                raise
            pass_by_cache(fd, False)


def pass_by_cache(fd: int, wanted: bool) -> None:
    """Have what is written to a file pass by the system's cache, if that can be, or not any more."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _DIRECT if wanted else flags & ~_DIRECT)


def passes_by_cache(fd: int) -> bool:
    """Whether what is written to a file passes by the system's cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & _DIRECT)


def truncate(fd: int, nbytes: int) -> None:
    """Give a file this size; what is new in it are zeros that take no room."""
    os.ftruncate(fd, nbytes)


def allocate(fd: int, nbytes: int) -> None:
    """See to it that there is room for the first so many bytes of a file."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)


def fsync(fd: int) -> None:
    """Wait until the file is on the disk."""
    os.fsync(fd)


def close(fd: int) -> None:
    """Close a file."""
    os.close(fd)


def replace(source: Path, target: Path) -> None:
    """Give a file another name, in one step, in the place of whatever has that name."""
    os.replace(source, target)


def unlink(path: Path) -> None:
    """Remove a file."""
    os.unlink(path)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def list_names(path: Path) -> list[str]:
    """The names in a directory."""
    return os.listdir(path)


def open_regular(path: Path) -> int:
    """A file to read from, which is no link, directory, pipe or device.

    Raises
    ------
    SnapshotError
        If it is any of these.
    FileNotFoundError
        If it is not there.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG):
            raise SnapshotError(f"{path}: expected a regular file, found a link or a device") from None
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise SnapshotError(f"{path}: expected a regular file, found a directory, a pipe or a device")


def gone(path: Path | str) -> SnapshotError:
    """The error for a file that a manifest names, and that is not there."""
    return SnapshotError(f"{path}: there is no such file, though the manifest names it")


@contextlib.contextmanager
def locked(directory: Path, wait: bool = False) -> Iterator[None]:
    """In which no other process or thread writes to the directory; the lock of a process that died is gone with it.

    Raises
    ------
    SnapshotError
        If another holds the lock, unless `wait`.
    """
    path = directory / LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise SnapshotError(f"{path}: another process or thread is writing to this directory") from None
        try:
            yield
        finally:
            # A process that was forked off meanwhile holds the same lock, until it ends.
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)

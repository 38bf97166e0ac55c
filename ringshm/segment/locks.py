"""The record locks of a segment's file, by which the kernel says who lives.

Record locks are open-file-description locks (fcntl(2), Linux 3.15). The kernel drops them when the last descriptor of
that one `open` goes, that is when the process ends, in whatever way. POSIX record locks would go as soon as *any*
descriptor of the file is closed.

The description that carries the locks is private: `mmap` and all others use another. A forked child closes its copy at
once (process/registry.py), since the copy would keep the locks of a dead parent.

Other code may close the descriptors (descriptors.py). Then the kernel drops the locks, and other processes take this
one for dead. So a lock is set, dropped and believed only through a descriptor that still leads to the segment, and
`holds` finds out whether a lock of this process's own is still there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct

from ..errors import suppress_own
from ..living import Living
from ..system import close
from . import limits
from .descriptors import Identity, close_own, identity_of, is_still
from .layout import LOCK_ENTRIES

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid

_open_files: Living[LockedFile] = Living()


def drop_inherited_locks() -> None:
    """In a forked child: close every copy of its parent's locks, also of files that another thread was just opening."""
    for file in _open_files.all():
        file.close_locks()


def leads_to(path: str, identity: Identity) -> bool:
    """Whether a path is the name of that file, and not a symbolic link to it."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == identity


class LockedFile:
    """A segment's file, opened twice: to be mapped, and privately, to carry this process's record locks.

    Args:
        fd: the description to be mapped; it becomes this object's.
        name: the channel's, for errors.
        path: a name that the file has, or will have.
    """

    __slots__ = ("__weakref__", "fd", "identity", "lock_fd", "name", "path", "size")

    def __init__(self, fd: int, name: str = "", path: str = "") -> None:
        self.fd = fd
        self.lock_fd = -1
        self.name, self.path = name, path
        self.identity = identity_of(fd)
        self.size = os.fstat(fd).st_size
        _open_files.add(self)
        self.open_locks()

    def open_locks(self) -> None:
        """Open the private description.

        Raises:
            ChannelUnavailable: if none is to be had: no descriptor is left, or this process may not open the file.
        """
        self.lock_fd = self._open_again()

    def _open_again(self) -> int:
        """Another description: through /proc, which works after the name is gone; without /proc by the name."""
        path = f"/proc/self/fd/{self.fd}"
        if not (self.is_mapped and os.access(path, os.F_OK)) and leads_to(self.path, self.identity):
            path = self.path
        elif not self.is_mapped:
            raise limits.closed(self.name)
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise limits.unavailable(self.name, "cannot be opened once more, to be locked", error) from error

    def close_locks(self) -> None:
        """Close the private description: in a forked child this drops nothing of its parent's."""
        fd, self.lock_fd = self.lock_fd, -1
        close_own(fd, self.identity)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.close_locks()
        with contextlib.suppress(OSError, AttributeError):
            close_own(self.fd, self.identity)

    def try_lock(self, byte: int) -> bool:
        """Lock that byte for this process, unless another holds it."""
        self._check()
        try:
            fcntl.fcntl(self.lock_fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def lock_apart(self, byte: int) -> int:
        """Lock that byte by a description of its own; the descriptor, whose copies in other processes hold it, too.

        Raises:
            BlockingIOError: if another process holds it.
            ChannelUnavailable: as `open_locks`.
        """
        fd = self._open_again()
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
        except BaseException:
            close(fd)
            raise
        return fd

    def unlock(self, byte: int) -> None:
        """Give that byte up; nothing is left to give up if the descriptor was closed."""
        if self.is_open:
            fcntl.fcntl(self.lock_fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, byte, 1, 0))

    def locked_elsewhere(self, byte: int, length: int = 1) -> bool:
        """Whether another process holds any of these bytes; length 0 is all from `byte` on."""
        try:
            answer = _locked(self.lock_fd, byte, length)
        except (OSError, ValueError):
            self._check()
            raise
        self._check()  # after the answer, which is of the segment if the descriptor still is
        return answer

    def holds(self, byte: int) -> bool:
        """Whether this process still holds that byte, which it has locked: so others see, and it does not itself."""
        with suppress_own(OSError, ValueError):  # it is no file, or closed
            seen = not self.is_mapped or _locked(self.fd, byte)
            return seen and not _locked(self.lock_fd, byte) and self.is_open
        return False

    def forget_closed(self) -> None:
        """Other code has closed a descriptor: give all locks up, and have nothing more to do with its number."""
        self.close_locks()
        if not self.is_mapped:
            self.fd = -1

    def _check(self) -> None:
        """Raise ChannelUnavailable if the descriptor that carries the locks is not the segment's any more."""
        if not self.is_open:
            raise limits.closed(self.name)

    @property
    def is_mapped(self) -> bool:
        """Whether the descriptor that was mapped still leads to the file."""
        return is_still(self.fd, self.identity)

    @property
    def is_open(self) -> bool:
        """Whether the descriptor that carries the locks still leads to the file."""
        return is_still(self.lock_fd, self.identity)

    @property
    def used_elsewhere(self) -> bool:
        """Whether another process, which lives, uses the segment; the same bytes say so in every layout version."""
        if not self.is_open and self.is_mapped:  # a forked child that has not joined
            return _locked(self.fd, LOCK_ENTRIES, 0)
        return self.locked_elsewhere(LOCK_ENTRIES, 0)


def _locked(fd: int, byte: int, length: int = 1) -> bool:
    """Whether another description than this one holds any of these bytes."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, length, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

"""The FIFOs beside a segment, through which event loops and selectors are woken (wakeup.py), as files.

    ringshm-wake.<nonce>.<entry>.<incarnation>.<bit>

belongs to one participant, which made it when it first needed it and keeps it open until it leaves; `bit` counts the
FIFOs that it has. Its name is used once in the life of a segment. The owner holds a shared flock(2) on it: so the
kernel says, as for segments, whether it lives; a forked child closes its copy at once (wakeup.py).

Whoever leaves removes its own; a reaper those of the dead; whoever removes a segment's names, all that nobody holds;
and `ringshm clean` those that belong to no segment, and that nobody holds. A maker that finds, once it has the lock,
that the path leads elsewhere was too late for such a remover, and makes another.

Nothing is opened for reading or writing before it was seen to be a FIFO of this user, so that a byte goes nowhere else,
whatever stands there. Writers open it for reading too: a write to a pipe that nobody reads would be a SIGPIPE.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat

from .errors import ChannelCorrupted
from .semaphores import SHM_DIRECTORY

PREFIX = "ringshm-wake."
NAME = re.compile(r"ringshm-wake\.([0-9a-f]{16})\.\d+\.\d+\.\d+")
_TRIES = 1000


def path_of(nonce: str, entry: int, incarnation: int, bit: int) -> str:
    """The file of a participant's FIFO."""
    return f"{SHM_DIRECTORY}/{PREFIX}{nonce}.{entry}.{incarnation}.{bit}"


def make(path: str) -> int:
    """Make a FIFO for this process, open and locked; one that an interrupted call has made before is taken over.

    Raises:
        ChannelCorrupted: if something else stands there.
        OSError: if there is no inode or descriptor left for it.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        try:
            fd = open_existing(path, mode=0o600)  # whatever the umask
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if _leads_to(path, fd):
                return fd
        except BlockingIOError:  # somebody who cleans takes it for a dead one's
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise ChannelCorrupted(f"{path} is removed by somebody again and again")


def open_existing(path: str, mode: int | None = None) -> int:
    """Open a FIFO to write to it, or to read, without waiting for anybody; first set its mode, if that is given.

    Raises:
        FileNotFoundError: if there is none.
        ChannelCorrupted: if what stands there is no FIFO of this user.
    """
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(place)
        if not stat.S_ISFIFO(status.st_mode) or status.st_uid != os.geteuid():
            raise ChannelCorrupted(f"{path} is no FIFO of this user: remove it")
        if mode is not None:
            os.chmod(f"/proc/self/fd/{place}", mode)
        return os.open(f"/proc/self/fd/{place}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(place)


def remove(path: str) -> None:
    """Remove a FIFO whose owner leaves, or is dead; what else stands there stays."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISFIFO(os.lstat(path).st_mode):
            os.unlink(path)


def is_orphan(path: str) -> bool:
    """Whether it is a FIFO of this user that no living process owns."""
    return _examine(path, unlink=False)


def remove_orphan(path: str) -> bool:
    """Remove it if it is one; whether it was."""
    return _examine(path, unlink=True)


def remove_orphans(nonce: str) -> None:
    """Remove what the dead have left beside the segment of that nonce; without a descriptor to spare `clean` does."""
    start = f"{PREFIX}{nonce}."
    with contextlib.suppress(OSError):
        for name in os.listdir(SHM_DIRECTORY):
            if name.startswith(start):
                with contextlib.suppress(OSError):
                    remove_orphan(f"{SHM_DIRECTORY}/{name}")


def _examine(path: str, unlink: bool) -> bool:
    try:
        fd = open_existing(path)
    except (FileNotFoundError, ChannelCorrupted):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if unlink and _leads_to(path, fd):
            os.unlink(path)
        return True
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(fd)


def _leads_to(path: str, fd: int) -> bool:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (status.st_dev, status.st_ino) == (opened.st_dev, opened.st_ino)

"""The FIFOs beside a segment, through which event loops and selectors are woken (listeners.py), as files.

    ringshm-wake.<nonce>.<entry>.<incarnation>.<bit>

1. A FIFO belongs to one participant, which makes it when it first needs it and keeps it open until it leaves; `bit`
   counts the participant's FIFOs. A name is used once in the life of a segment.
2. The owner holds a shared flock(2) on its FIFO: so the kernel says, as for segments, whether the owner lives. A forked
   child closes its copy at once (listeners.py).
3. A process that leaves removes its own FIFOs; a reaper removes those of the dead; the remover of a segment's names
   removes all beside it that nobody holds; `ringshm clean` removes those that belong to no segment and that nobody
   holds. A maker that has the lock and finds that the path leads elsewhere met such a remover, and makes another FIFO.
4. A process opens nothing for reading or writing before it has seen a FIFO of its user there: so a byte goes nowhere
   else. Writers open the FIFO for reading too: a write to a pipe that nobody reads would raise SIGPIPE.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat

from ..errors import ChannelCorrupted, suppress_own
from ..system import close
from .descriptors import identity_of
from .locks import leads_to
from .semaphores import SHM_DIRECTORY, STEM

PREFIX = f"{STEM}-wake."
NAME = re.compile(re.escape(PREFIX) + r"([0-9a-f]{16})\.\d+\.\d+\.\d+")
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
            if leads_to(path, identity_of(fd)):
                return fd
        except BlockingIOError:  # a process that cleans takes it for a dead one's
            pass
        except BaseException:
            close(fd)
            raise
        close(fd)
    raise ChannelCorrupted(f"{path} is removed by another program again and again: end that program")


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
        close(place)


def remove(path: str) -> None:
    """Remove a FIFO whose owner leaves or is dead; anything else there stays, and what another user has made."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        if stat.S_ISFIFO(os.lstat(path).st_mode):
            os.unlink(path)


def is_orphan(path: str) -> bool:
    """Whether it is a FIFO of this user that no living process owns."""
    return _examine(path, unlink=False)


def remove_orphan(path: str) -> bool:
    """Remove the FIFO if it is an orphan; whether it was."""
    return _examine(path, unlink=True)


def remove_orphans(nonce: str) -> None:
    """Remove the orphans beside the segment of that nonce; without a descriptor to spare they stay for `clean`."""
    with suppress_own(OSError):
        _remove_orphans(f"{PREFIX}{nonce}.")


def _remove_orphans(start: str) -> None:
    for name in os.listdir(SHM_DIRECTORY):
        if name.startswith(start):
            with suppress_own(OSError):
                remove_orphan(f"{SHM_DIRECTORY}/{name}")


def _examine(path: str, unlink: bool) -> bool:
    try:
        fd = open_existing(path)
    except (FileNotFoundError, ChannelCorrupted):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if unlink and leads_to(path, identity_of(fd)):
            os.unlink(path)
        return True
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        close(fd)

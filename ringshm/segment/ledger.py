"""A ledger: a file of numbers beside a segment, which outlives the process that writes them.

    ringshm-ledger.<nonce>

1. It belongs to the segment of that nonce, and goes with the segment's names: whoever removes these removes it, and
   `ringshm clean` one whose segment is not there any more.
2. Its words are 0 at first. All its pages are reserved, so that no store can fail for want of memory.
3. One process at a time writes it. What stands there when that one is killed, the next one reads.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re

from ..system import close
from . import limits
from .semaphores import SHM_DIRECTORY, STEM

PREFIX = f"{STEM}-ledger."
NAME = re.compile(re.escape(PREFIX) + r"([0-9a-f]{16})")
_WORDS = mmap.PAGESIZE // 8


class Ledger:
    """The ledger of a segment, made if there is none.

    Args:
        nonce: of the segment, which must be there: the ledger of another is an orphan.

    Attributes:
        words: its numbers, shape `(n,)`, as a view of memory that all who have the ledger open share.

    Raises:
        InsufficientSharedMemory: if the file system has not the space.
    """

    def __init__(self, nonce: str) -> None:
        self._nonce = nonce
        self.words = memoryview(b"").cast("Q")
        self.reserve(1)

    def reserve(self, words: int) -> None:
        """Have at least so many words."""
        if words <= len(self.words):
            return
        nbytes = -(-words // _WORDS) * mmap.PAGESIZE
        fd = os.open(_path_of(self._nonce), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, nbytes)
            self.words = memoryview(mmap.mmap(fd, os.fstat(fd).st_size)).cast("Q")
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise limits.insufficient(self._nonce, nbytes) from error
        finally:
            close(fd)


def remove(nonce: str) -> None:
    """Remove the ledger of that segment, if it has one; what another user has made stays."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        os.unlink(_path_of(nonce))


def _path_of(nonce: str) -> str:
    return f"{SHM_DIRECTORY}/{PREFIX}{nonce}"

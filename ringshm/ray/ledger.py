"""A ledger: a few numbers of a relay that outlive its process, but not its machine.

A relay writes down which message it has put into a ring right after it has. Between the two lie a few bytecodes; a
relay that is killed there puts that message twice.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile

from ..system import close

_WORDS = mmap.PAGESIZE // 8


class Ledger:
    """So many words as a page has, all 0 at first.

    Args:
        name: what it is called, among the temporary files of this machine.
    """

    def __init__(self, name: str) -> None:
        self._path = os.path.join(tempfile.gettempdir(), f"ringshm-{os.getuid()}-{name}")
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            self.words = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("Q")
        finally:
            close(fd)

    def row(self, number: int) -> int:
        """The word of that number; those of more than a page share."""
        return number % _WORDS

    def remove(self) -> None:
        """Nobody needs it any more."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)

"""How many messages a process has decoded to their ends, in memory that outlives it.

A receiver that is killed may take a message with it, but not before it has decoded it.
"""

from __future__ import annotations

import mmap

_count = mmap.mmap(-1, mmap.PAGESIZE)


def renew() -> None:
    """Count from 0, for this process and those that it forks."""
    global _count
    _count = mmap.mmap(-1, mmap.PAGESIZE)


def count() -> int:
    return _count[0]


def _mark() -> None:
    _count[0] = min(_count[0] + 1, 255)


class Mark:
    """What comes last in a message: decoding it counts."""

    def __reduce__(self) -> object:
        return _mark, ()

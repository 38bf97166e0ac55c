"""Descriptors that other code may close: a number is ours only while it leads to the file that we have opened.

Daemons and launchers close descriptors that are not theirs (`os.closerange`), and the kernel gives the numbers to the
files that are opened next. So before anything is believed, written or closed through a number that was kept for long,
`is_still` asks whether it leads to the same inode. A number that leads elsewhere never comes back: so an answer that
was read before `is_still` said yes was of the right file.
"""

from __future__ import annotations

import os
from typing import TypeAlias

from ..errors import is_own
from ..system import close

#: The device and inode of a file.
Identity: TypeAlias = tuple[int, int]


def identity_of(fd: int) -> Identity:
    """Which file a descriptor leads to; OSError if it is closed."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def is_still(fd: int, identity: Identity) -> bool:
    """Whether a descriptor is open and leads to that file."""
    try:
        return identity_of(fd) == identity
    except OSError as error:
        if not is_own(error):
            raise
        return False


def close_own(fd: int, identity: Identity) -> None:
    """Close a descriptor, unless other code has closed it, whoever has its number now."""
    if is_still(fd, identity):
        close(fd)

"""Where a segment was made, by which a handle that does not find it can say why.

A kernel has one boot id as long as it runs, and each mounted file system a device. So a handle that was made on another
machine, or in another container's /dev/shm, is told apart from one whose channel has ended.
"""

from __future__ import annotations

import errno
import os
from typing import TypeAlias

from ..errors import ChannelNotFound, suppress_own
from .semaphores import SHM_DIRECTORY

#: The boot id of the kernel, "" where no /proc says it, and the device of the file system.
Origin: TypeAlias = tuple[str, int]


def boot_id() -> str:
    """The id of this run of the kernel; "" where no /proc says it."""
    with suppress_own(OSError), open("/proc/sys/kernel/random/boot_id", "rb", buffering=0) as file:
        return file.read(64).decode().strip()
    return ""


def here() -> Origin:
    """The origin of what this process makes."""
    return boot_id(), os.stat(SHM_DIRECTORY).st_dev


def not_found(name: str) -> ChannelNotFound:
    """The error for a name that no channel has."""
    return ChannelNotFound(
        errno.ENOENT,
        f"there is no channel {name!r}: `ringshm ls` shows those there are. If it is to be made yet, give attach a "
        "timeout=. If it was there, its names went when its maker closed it or exited, or with the last process that "
        "used it",
    )


def did_not_arrive(name: str, origin: Origin) -> ChannelNotFound:
    """The error for a handle that does not find its segment, which has that origin, where it is unpickled."""
    boot, device = origin
    if boot != boot_id():
        why = (
            "was made on another machine, or before this one was started again: a channel reaches the processes of one "
            "machine. For the nodes of a Ray cluster, use ringshm.ray"
        )
    elif device != here()[1]:
        why = (
            f"was made in another {SHM_DIRECTORY} than this process has, such as another container's: give all of them "
            f"the same one (`docker run --ipc=container:NAME`; Kubernetes: one emptyDir on {SHM_DIRECTORY}). For the "
            "nodes of a Ray cluster, use ringshm.ray"
        )
    else:
        why = (
            "has gone: its maker closed it or exited, or the last process that used it did, before this handle was "
            "unpickled. Keep a handle open until the others have attached (`wait_for_peers`)"
        )
    return ChannelNotFound(errno.ENOENT, f"channel {name!r} {why}")

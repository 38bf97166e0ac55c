"""What a channel takes of its process and host, and the errors that say what is short and how to change it.

Limits are looked at before memory is touched: a segment that does not fit would take seconds to reserve, and a write
beyond RLIMIT_FSIZE, or to a page for which there is no memory, is a signal that ends the process.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import stat
from pathlib import Path

from ..errors import ChannelUnavailable, InsufficientSharedMemory, is_own, suppress_own
from ..system import close
from .semaphores import SHM_DIRECTORY

#: Semaphores of a channel; files.py names them.
SEMAPHORES = 9
#: Inodes that a creation takes: the segment, its semaphores, and glibc's other name of the semaphore being made.
FILES = 1 + SEMAPHORES + 1
#: Descriptors that a process has of a channel: to be mapped, for its locks, and `mmap`'s duplicate.
DESCRIPTORS = 3
#: Mappings (vm.max_map_count) that a process has of a channel: the segment, and glibc's of each semaphore.
MAPPINGS = 1 + SEMAPHORES
_UNLIMITED = 1 << 60  # bytes: cgroup v1 writes a number of this order for no limit
_SEMAPHORES_NBYTES = SEMAPHORES * mmap.PAGESIZE


def check(name: str, nbytes: int) -> None:
    """Refuse a segment of so many bytes that does not fit, before any of them is taken.

    Raises:
        InsufficientSharedMemory, ChannelUnavailable
        OSError: for `unavailable`: what the kernel has refused.
    """
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if largest != resource.RLIM_INFINITY and nbytes > largest:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    space = os.statvfs(SHM_DIRECTORY)
    few_files = space.f_files > 0 and space.f_ffree < FILES
    if few_files or nbytes + _SEMAPHORES_NBYTES > space.f_bavail * space.f_frsize:
        raise insufficient(name, nbytes)
    _try_mappings(nbytes)
    if _is_beyond_group(nbytes):  # the kernel would kill this process while it takes the pages
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def check_descriptors(fd: int) -> None:
    """See that as many more descriptors are to be had as the rest of a creation takes, beside two; OSError if not."""
    more: list[int] = []
    try:
        more.append(os.dup(fd))  # mmap's
        more.append(os.dup(fd))  # for a moment each semaphore's
    finally:
        for one in more:
            close(one)


def _try_mappings(nbytes: int) -> None:
    """Map as much as the segment and the semaphores will, of nothing; OSError if that is too much."""
    tried = []
    try:
        for index in range(MAPPINGS):  # every other one may be read, or the kernel would make one of them all
            size = mmap.PAGESIZE if index else nbytes
            prot = mmap.PROT_READ if index % 2 else 0
            tried.append(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot))
    finally:
        for one in tried:
            one.close()


def insufficient(name: str, nbytes: int) -> InsufficientSharedMemory:
    """The error for a file system that has not the space for a segment of so many bytes, or not the files."""
    space = os.statvfs(SHM_DIRECTORY)
    free = space.f_bavail * space.f_frsize
    if space.f_files > 0 and space.f_ffree < FILES and nbytes + _SEMAPHORES_NBYTES <= free:
        return InsufficientSharedMemory(
            f"channel {name!r} needs {FILES} files, {SHM_DIRECTORY} may have {space.f_ffree} more: remove some "
            f"(`ringshm clean` removes what dead processes left), or `mount -o remount,nr_inodes=0 {SHM_DIRECTORY}`"
        )
    return InsufficientSharedMemory(
        f"channel {name!r} needs {nbytes} bytes of shared memory, and {_SEMAPHORES_NBYTES} for its semaphores; "
        f"{SHM_DIRECTORY} has {free} free: make capacity or slot_size smaller, or the file system larger "
        f"(`docker run --shm-size=2g`; Kubernetes: an emptyDir with medium Memory on {SHM_DIRECTORY}; else "
        f"`mount -o remount,size=2G {SHM_DIRECTORY}`)"
    )


def unavailable(name: str, failed: str, error: OSError, nbytes: int = 0) -> ChannelUnavailable:
    """The error for what the kernel has refused.

    Args:
        name: the channel's.
        failed: the end of a sentence about the channel: "cannot be made".
        nbytes: size of the segment, if it is to be mapped.

    Raises:
        OSError: the same, if it is not the kernel's: a signal handler has raised it.
    """
    if not is_own(error):
        raise error
    return ChannelUnavailable(error.errno, f"channel {name!r} {failed}: {_shortage(error, nbytes)}")


def closed(name: str, reaped: bool = False) -> ChannelUnavailable:
    """The error for a process whose descriptors of that channel are closed; `reaped` if others know it already."""
    take = "have taken this one for dead, and what it had taken went to others" if reaped else "take this one for dead"
    return ChannelUnavailable(
        errno.EBADF,
        f"channel {name!r}: other code has closed this process's descriptors of it (os.closerange, or a library that "
        f"makes daemons), so other processes {take}: make or attach the channel after that, or spare its descriptors",
    )


# --- what is short, and how to change it


def _shortage(error: OSError, nbytes: int) -> str:
    number = error.errno
    if number == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"a channel takes {DESCRIPTORS} descriptors, and this process may have {limit} (RLIMIT_NOFILE): close "
            "some, or raise the limit (`ulimit -n 4096`)"
        )
    if number == errno.ENFILE:
        return "all processes together have as many files open as the system allows: raise it (`sysctl fs.file-max`)"
    if number == errno.ENOMEM:
        return _memory(nbytes)
    if number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return (
            f"it is a file of {nbytes} bytes, and this process may write files of {limit} (RLIMIT_FSIZE): raise the "
            "limit (`ulimit -f unlimited`), or make capacity or slot_size smaller"
        )
    if number == errno.EROFS:
        return (
            f"{SHM_DIRECTORY} is read-only: `mount -o remount,rw {SHM_DIRECTORY}`, or mount a tmpfs there (Kubernetes: "
            "an emptyDir with medium Memory)"
        )
    if number in (errno.EACCES, errno.EPERM):
        return _permission()
    if number == errno.ENOSPC:
        return (
            f"{SHM_DIRECTORY} has no space or file left: see what fills it (`ls -l {SHM_DIRECTORY}`, `ringshm clean`), "
            f"or `mount -o remount,size=2g,nr_inodes=0 {SHM_DIRECTORY}`"
        )
    if number in (errno.ENOENT, errno.ENOTDIR):
        return _place()
    if number in (errno.EOPNOTSUPP, errno.EISDIR):
        return (
            f"the file system on {SHM_DIRECTORY} makes no files without a name: `mount -t tmpfs -o mode=1777 tmpfs "
            f"{SHM_DIRECTORY}`"
        )
    return f"{error}: see `ringshm doctor`"


def _memory(nbytes: int) -> str:
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], address_space()
    if limit != resource.RLIM_INFINITY and used + nbytes + _SEMAPHORES_NBYTES > limit:
        return (
            f"it takes {nbytes} bytes of address space, and this process, which uses {used}, may have {limit} "
            "(RLIMIT_AS): raise the limit (`ulimit -v unlimited`; on a cluster the job's virtual memory), or make "
            "capacity or slot_size smaller"
        )
    have, most = mappings()
    if have + MAPPINGS > most:
        return (
            f"it takes {MAPPINGS} mappings, and this process, which has {have}, may have {most} (vm.max_map_count): "
            f"raise the limit (`sysctl -w vm.max_map_count={2 * most}`), or close channels"
        )
    if _is_beyond_group(nbytes):
        return (
            f"it takes {nbytes} bytes of memory, and the control group of this process may have {memory_limit()[0]}: "
            "raise the limit (`docker run --memory=...`, Kubernetes resources.limits.memory, systemd MemoryMax=), or "
            "make capacity or slot_size smaller"
        )
    return "the kernel has no memory for it: see `free` and `ringshm doctor`"


def address_space() -> int:
    """Bytes of address space that this process uses; 0 where no /proc says so."""
    with suppress_own(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE
    return 0


def mappings() -> tuple[int, float]:
    """How many mappings this process has, and how many it may have."""
    with suppress_own(OSError), open("/proc/self/maps", "rb") as file, open("/proc/sys/vm/max_map_count") as most:
        return file.read().count(b"\n"), int(most.read())
    return 0, float("inf")


def _is_beyond_group(nbytes: int) -> bool:
    """Whether the control group has not the memory for so many bytes; where there is swap, nobody can say."""
    with suppress_own(OSError, ValueError):  # /proc is not as Linux has it
        group, _ = memory_limit()
        return group is not None and nbytes > group and not _has_swap()
    return False


def _has_swap() -> bool:
    with suppress_own(OSError), open("/proc/swaps") as file:
        return len(file.readlines()) > 1  # the first one is the head of the table
    return True


def memory_limit(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> tuple[int | None, int]:
    """The tightest limit of memory of the control groups above this process, and the use of that group, in bytes."""
    tightest: tuple[int | None, int] = (None, 0)
    for line in _lines_of(membership) if os.access(membership, os.F_OK) else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, files = Path(root), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, files = Path(root) / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            limit, used = (_number_in(directory / file) for file in files)
            if limit is not None and limit < _UNLIMITED and (tightest[0] is None or limit < tightest[0]):
                tightest = limit, used or 0
            if directory == top:
                break
    return tightest


def _lines_of(path: str) -> list[str]:
    with open(path, errors="surrogateescape") as file:  # a group's name may be any bytes
        return file.read().splitlines()


def _number_in(path: Path) -> int | None:
    with suppress_own(OSError, ValueError), open(path) as file:  # no such file, or "max"
        return int(file.read())
    return None


def _permission() -> str:
    user = os.geteuid()
    if not os.access(SHM_DIRECTORY, os.W_OK | os.X_OK, effective_ids=True):
        mode = stat.S_IMODE(os.stat(SHM_DIRECTORY).st_mode)
        return f"user {user} may not make files in {SHM_DIRECTORY} (mode {mode:o}): `chmod 1777 {SHM_DIRECTORY}`"
    return (
        f"another user has made it, and user {user}, which this process is now, may not open it: fork before "
        "privileges are dropped, or make the channel after that"
    )


def _place() -> str:
    if not os.access(f"{SHM_DIRECTORY}/", os.F_OK):
        return (
            f"there is no directory {SHM_DIRECTORY}: make it, and `mount -t tmpfs -o mode=1777 tmpfs {SHM_DIRECTORY}`"
        )
    return "a file without a name is opened through /proc, which is not there: `mount -t proc proc /proc`"

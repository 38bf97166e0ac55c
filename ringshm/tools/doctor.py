"""`ringshm doctor`: what this host's shared memory allows, and what to change. One small function per check.

Each check takes the places that it looks at as arguments, so that tests can give it others, and returns one Check.
"""

from __future__ import annotations

import math
import os
import platform
import pwd
import re
import resource
import secrets
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..ring.acceleration import accelerated
from ..ring.diagnosis import count
from ..ring.mutex import ORDERED_STORES
from ..segment import limits, semaphores
from ..segment.files import NEW_PREFIX
from ..segment.layout import LOCK_ENTRIES
from ..segment.locks import LockedFile
from ..segment.semaphores import SHM_DIRECTORY
from . import leftovers
from .text import in_bytes

OK = "ok"
WARN = "warn"
FAIL = "fail"

_PROC = "/proc/self/fd"
_MIB, _GIB = 1 << 20, 1 << 30
_LITTLE = _GIB  # bytes of shared memory: with less, some program will need more
_DOCKERS = 64 * _MIB  # bytes that docker gives a container by default
_CHANNELS = 80  # in one process: with fewer, some program will run out of descriptors or mappings
_FIRST_USER_ID = 1000  # systemd's SYS_UID_MAX is 999


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        level: "ok", "warn" (works, within limits that are named) or "fail" (channels cannot be made or used).
        subject: the thing that was looked at.
        found: its state.
        remedy: a command or advice; "" if nothing is to be done.
    """

    level: str
    subject: str
    found: str
    remedy: str = ""


def examine() -> Iterator[Check]:
    """Run all checks on this host and this process."""
    yield check_proc()
    if not os.path.isdir(_PROC):
        return
    yield check_mount()
    if not os.path.isdir(SHM_DIRECTORY):
        return
    yield check_space()
    yield check_inodes()
    yield check_permissions()
    yield check_files()
    yield check_semaphores()
    yield check_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(os.listdir("/proc/self/fd")) - 1)
    yield check_mappings(*limits.mappings())
    yield check_limit("RLIMIT_FSIZE", "ulimit -f", "segment", resource.getrlimit(resource.RLIMIT_FSIZE)[0])
    yield check_limit("RLIMIT_AS", "ulimit -v", "process", resource.getrlimit(resource.RLIMIT_AS)[0])
    yield check_memory_limit()
    yield check_leftovers(leftovers.look())
    yield check_remove_ipc()
    yield check_processor(platform.machine(), ORDERED_STORES)
    yield check_cores(len(os.sched_getaffinity(0)))
    yield check_python()
    yield check_compiled(accelerated)


# --- the file systems


def check_proc(directory: str = _PROC) -> Check:
    """Whether /proc is there, through which a file without a name is opened and gets one."""
    if not os.path.isdir(directory):
        return Check(FAIL, "/proc is mounted", "it is not: no segment can be made", "mount -t proc proc /proc")
    return Check(OK, "/proc is mounted", "yes")


def check_mount(directory: str = SHM_DIRECTORY, mounts: str = "/proc/self/mountinfo") -> Check:
    """Whether shared memory is a tmpfs of its own, mounted to be written."""
    subject = f"{directory} is mounted"
    if not os.path.isdir(directory):
        return Check(FAIL, subject, "there is no such directory", f"mount -t tmpfs tmpfs {directory}")
    found = None
    for line in Path(mounts).read_text(errors="replace").splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[4] == directory:  # the last one lies on top
            found = rest.split()[0], fields.split()[5].split(",")
    remedy = f"mount -t tmpfs -o size=2g tmpfs {directory}"
    if found is None:
        return Check(WARN, subject, "it is no mount of its own: the kernel may write its files to a disk", remedy)
    kind, options = found
    if "ro" in options:
        return Check(FAIL, subject, f"{kind}, read-only", f"mount -o remount,rw {directory}")
    if kind != "tmpfs":
        return Check(WARN, subject, f"{kind}, not tmpfs", remedy)
    return Check(OK, subject, "tmpfs, writable")


def check_space(directory: str = SHM_DIRECTORY) -> Check:
    """How large shared memory is, and how much of it is free."""
    space = os.statvfs(directory)
    size, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    found = f"{in_bytes(free)} free of {in_bytes(size)}"
    if not size:
        return Check(OK, "size", "without a limit of its own")
    if size == _DOCKERS:
        found += ", what docker gives"
    if min(size, free) >= _LITTLE:
        return Check(OK, "size", found)
    if size >= _LITTLE:
        remedy = f"see what fills it (`ls -l {directory}`, `ringshm ls`, `ringshm clean`)"
    else:
        remedy = (
            f"`docker run --shm-size=2g`; Kubernetes: an emptyDir with medium Memory on {directory}; "
            f"else `mount -o remount,size=2g {directory}`"
        )
    return Check(WARN if free >= _MIB else FAIL, "size", found, remedy)


def check_inodes(directory: str = SHM_DIRECTORY) -> Check:
    """How many more files can be made there."""
    space = os.statvfs(directory)
    if not space.f_files:
        return Check(OK, "files", "without a limit")
    channels = space.f_ffree // limits.FILES
    found = f"{space.f_ffree} free of {space.f_files}"
    remedy = f"mount -o remount,nr_inodes=0 {directory}"
    if not channels:
        return Check(FAIL, "files", f"{found}: a channel takes {limits.FILES}", remedy)
    if channels < 10:
        return Check(WARN, "files", f"{found}, for {channels} channels", remedy)
    return Check(OK, "files", found)


def check_permissions(directory: str = SHM_DIRECTORY) -> Check:
    """Which users may make and remove files there."""
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    found, remedy = f"mode {mode:o}", f"chmod 1777 {directory}"
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        return Check(FAIL, "permissions", f"{found}: this user may not make files there", remedy)
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return Check(WARN, "permissions", f"{found}: any user may remove another's files", remedy)
    return Check(OK, "permissions", found)


def check_files(directory: str = SHM_DIRECTORY) -> Check:
    """Whether a file can be made, locked and named there as a segment is. It tries, and removes the file again."""
    path = f"{directory}/{NEW_PREFIX}{secrets.token_hex(8)}"
    subject, what = "a segment's file", "made without a name (O_TMPFILE)"
    try:
        file = LockedFile(os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
        what = "given its pages (posix_fallocate)"
        os.posix_fallocate(file.fd, 0, 1)
        what = "locked (F_OFD_SETLK), and seen to be"
        other = LockedFile(os.open(f"/proc/self/fd/{file.fd}", os.O_RDWR | os.O_CLOEXEC))
        if not file.try_lock(LOCK_ENTRIES) or not other.locked_elsewhere(LOCK_ENTRIES):
            raise OSError("the lock is not seen")
        what = "named (a link through /proc)"
        os.link(f"/proc/self/fd/{file.fd}", path, src_dir_fd=file.fd, follow_symlinks=True)
        os.unlink(path)
    except OSError as error:
        needed = f"Linux 3.15, a tmpfs on {directory} and /proc are needed"
        return Check(FAIL, subject, f"cannot be {what}: {error.strerror or error}", needed)
    return Check(OK, subject, "can be made, reserved, locked and named")


# --- the C library and the limits


def check_semaphores(clockwait: bool = semaphores._clockwait is not None) -> Check:
    """Which clock ends waits."""
    if clockwait:
        return Check(OK, "waits", "go by the monotonic clock (sem_clockwait)")
    found = "go by the wall clock: this C library has no sem_clockwait, so setting the clock back makes a wait longer"
    return Check(WARN, "waits", found, "glibc 2.30 or later")


def check_descriptors(limit: int, used: int) -> Check:
    """How many files a process may have open, and for how many channels that is enough."""
    subject, each = "open files (RLIMIT_NOFILE)", limits.DESCRIPTORS
    if limit == resource.RLIM_INFINITY:
        return Check(OK, subject, f"without a limit; a channel takes {each}")
    channels = max(0, limit - used) // each
    found = f"{limit}, {used} in use; a channel takes {each}, so {channels} channels in a process"
    return Check(OK, subject, found) if channels >= _CHANNELS else Check(WARN, subject, found, "ulimit -n 4096")


def check_mappings(used: int, limit: float) -> Check:
    """How many mappings a process may have, and for how many channels that is enough."""
    subject, each = "mappings (vm.max_map_count)", limits.MAPPINGS
    if limit == math.inf:
        return Check(OK, subject, f"/proc does not say; a channel takes {each}")
    channels = int(max(0, limit - used)) // each
    found = f"{limit}, {used} in use; a channel takes {each}, so {channels} channels in a process"
    return (
        Check(OK, subject, found)
        if channels >= _CHANNELS
        else Check(WARN, subject, found, "sysctl -w vm.max_map_count=262144")
    )


def check_limit(name: str, command: str, whose: str, limit: int) -> Check:
    """A limit in bytes that a segment must fit into."""
    subject = f"size of a {whose} ({name})"
    if limit == resource.RLIM_INFINITY:
        return Check(OK, subject, "without a limit")
    return Check(WARN, subject, f"{in_bytes(limit)}: segments must fit into that", f"{command} unlimited")


def check_memory_limit(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> Check:
    """The memory that this control group may use. Shared memory counts; beyond the limit the kernel kills."""
    subject, (limit, used) = "memory of this control group", limits.memory_limit(root, membership)
    if limit is None:
        return Check(OK, subject, "without a limit")
    found = f"{in_bytes(limit)}, {in_bytes(used)} in use; shared memory counts"
    if limit - used >= _LITTLE:
        return Check(OK, subject, found)
    remedy = "raise the limit (`docker run --memory=...`, Kubernetes resources.limits.memory, systemd MemoryMax=)"
    return Check(WARN, subject, f"{found}: the kernel kills a process if a segment goes beyond it", remedy)


# --- what may go wrong later


def check_leftovers(found: leftovers.Leftovers) -> Check:
    """Whether dead processes have left files."""
    dead, orphans, subject = found.dead, found.orphans, "left by dead processes"
    wrong = [segment.path for segment in found.segments if segment.wrong]
    if dead or orphans:
        size = in_bytes(sum(segment.size for segment in dead))
        text = f"{count(len(dead), 'segment')} of {size} and {len(orphans)} semaphores or FIFOs"
        return Check(WARN, subject, text, "ringshm clean")
    if wrong:
        return Check(WARN, subject, "nothing, but there are files that are no segments", f"rm {wrong[0]}")
    return Check(OK, subject, "nothing")


def check_remove_ipc(root: str = "/", user: int | None = None) -> Check:
    """Whether systemd removes a user's shared memory at logout, while programs of that user still run."""
    subject, top = "systemd's RemoveIPC", Path(root)
    user = os.getuid() if user is None else user
    if not (top / "run/systemd/system").exists():
        return Check(OK, subject, "systemd does not run here")
    if not _removes_ipc(top):
        return Check(OK, subject, "no")
    if user < _FIRST_USER_ID:
        return Check(OK, subject, f"yes, but not for system users such as {user}")
    try:
        name = pwd.getpwuid(user).pw_name
    except KeyError:
        name = str(user)
    if (top / "var/lib/systemd/linger" / name).exists():
        return Check(OK, subject, f"yes, but user {name} lingers")
    found = f"yes: when user {name} logs out for the last time, channels of programs that still run lose their names"
    remedy = f"loginctl enable-linger {name}, or RemoveIPC=no in /etc/systemd/logind.conf, or run as a system service"
    return Check(WARN, subject, found, remedy)


def _removes_ipc(top: Path) -> bool:
    """RemoveIPC= as logind reads it: drop-ins in the order of their names after the main file; the last one counts."""
    places = [top / place for place in ("usr/lib/systemd", "usr/local/lib/systemd", "run/systemd", "etc/systemd")]
    main = [place / "logind.conf" for place in places if (place / "logind.conf").exists()][-1:]
    drop_ins = {path.name: path for place in places for path in place.glob("logind.conf.d/*.conf")}
    removes = True
    for path in [*main, *(drop_ins[name] for name in sorted(drop_ins))]:
        for value in re.findall(r"^\s*RemoveIPC\s*=\s*(\S+)", path.read_text(errors="replace"), re.MULTILINE):
            removes = value.lower() in ("1", "yes", "y", "true", "t", "on")
    return removes


# --- what makes channels slower


def check_processor(machine: str, ordered_stores: bool) -> Check:
    """Which scheme channels use: whether senders and receivers each have a mutex of their own."""
    if ordered_stores:
        found = f"{machine} keeps stores in order, so a channel's senders have one mutex, its receivers another"
        return Check(OK, "processor", found)
    found = f"{machine} need not keep stores in order, so a channel's senders and receivers share one mutex; slower"
    return Check(WARN, "processor", found)


def check_cores(cores: int) -> Check:
    """Whether a waiter may spin."""
    if cores > 1:
        return Check(OK, "cores", f"{cores} for this process")
    found = "1 for this process: waiters do not spin, each wait is a switch of context"
    return Check(WARN, "cores", found, "give it two (taskset, docker --cpuset-cpus)")


def check_python() -> Check:
    """Which Python this is."""
    bits = struct.calcsize("P") * 8
    gil = "with" if getattr(sys, "_is_gil_enabled", lambda: True)() else "without"
    found = f"{platform.python_implementation()} {platform.python_version()}, {bits} bits, {gil} the GIL"
    if platform.python_implementation() == "CPython" and bits == 64 and sys.byteorder == "little":
        return Check(OK, "Python", found)
    return Check(WARN, "Python", found, "ringshm is tested on CPython, 64 bits, little-endian only")


def check_compiled(accelerated: str) -> Check:
    """Whether the compiled path is in use; the argument says why not, as `ringshm.accelerated` does."""
    if not accelerated:
        return Check(OK, "compiled path", "in use")
    return Check(WARN, "compiled path", accelerated, "small messages cost some 20 times as much without it")

"""What this host's shared memory allows, and what to change: one small function per check.

Each check takes what it looks at as an argument, so that it can be shown made-up places, and returns one Check.
"""

from __future__ import annotations

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

from . import leftovers, semaphores
from .layout import LOCK_ENTRIES
from .ring import ORDERED_STORES
from .segment import FILES_NEEDED, NEW_PREFIX, LockedFile
from .semaphores import SHM_DIRECTORY

OK = "ok"
WARN = "warn"
FAIL = "fail"

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_LITTLE = _GIB  # bytes of shared memory below which somebody will ask for more
_DOCKERS = 64 * _MIB  # what docker gives a container unless it is asked
_UNLIMITED = 1 << 60  # what cgroup v1 says for no limit is of this order
_DESCRIPTORS = 256
_FIRST_USER_ID = 1000  # systemd's SYS_UID_MAX is 999


@dataclass(frozen=True)
class Check:
    """What one check has found.

    Attributes:
        level: "ok", "warn" (works, within limits that are named) or "fail" (channels cannot be made or used).
        subject: what was looked at.
        found: what is.
        remedy: what to do; "" if nothing.
    """

    level: str
    subject: str
    found: str
    remedy: str = ""


def examine() -> Iterator[Check]:
    """All checks, of this host and this process."""
    yield check_mount()
    if not os.path.isdir(SHM_DIRECTORY):
        return
    yield check_space()
    yield check_inodes()
    yield check_permissions()
    yield check_files()
    yield check_semaphores()
    yield check_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield check_limit("RLIMIT_FSIZE", "ulimit -f", "segment", resource.getrlimit(resource.RLIMIT_FSIZE)[0])
    yield check_limit("RLIMIT_AS", "ulimit -v", "process", resource.getrlimit(resource.RLIMIT_AS)[0])
    yield check_memory_limit()
    yield check_leftovers(leftovers.look())
    yield check_remove_ipc()
    yield check_processor(platform.machine(), ORDERED_STORES)
    yield check_cores(len(os.sched_getaffinity(0)))
    yield check_python()


def in_bytes(number: float) -> str:
    """A number of bytes, as people write it."""
    for unit, size in (("GiB", _GIB), ("MiB", _MIB), ("KiB", _KIB)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f} B"


# --- the file system


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
    if found is None:
        return Check(
            WARN,
            subject,
            "it is no mount of its own: what lies there may be written to a disk",
            f"mount -t tmpfs -o size=2g tmpfs {directory}",
        )
    kind, options = found
    if "ro" in options:
        return Check(FAIL, subject, f"{kind}, read-only", f"mount -o remount,rw {directory}")
    if kind != "tmpfs":
        return Check(WARN, subject, f"{kind}, not tmpfs", f"mount -t tmpfs -o size=2g tmpfs {directory}")
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
    """How many more files there may be."""
    space = os.statvfs(directory)
    if not space.f_files:
        return Check(OK, "files", "without a limit")
    channels = space.f_ffree // FILES_NEEDED
    found = f"{space.f_ffree} free of {space.f_files}"
    remedy = f"mount -o remount,nr_inodes=0 {directory}"
    if not channels:
        return Check(FAIL, "files", f"{found}: a channel takes {FILES_NEEDED}", remedy)
    if channels < 10:
        return Check(WARN, "files", f"{found}, for {channels} channels", remedy)
    return Check(OK, "files", found)


def check_permissions(directory: str = SHM_DIRECTORY) -> Check:
    """Who may write there."""
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    found, remedy = f"mode {mode:o}", f"chmod 1777 {directory}"
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        return Check(FAIL, "permissions", f"{found}: this user may not make files there", remedy)
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return Check(WARN, "permissions", f"{found}: any user may remove another's files", remedy)
    return Check(OK, "permissions", found)


def check_files(directory: str = SHM_DIRECTORY) -> Check:
    """Whether files can be made, locked and named there as a segment is; tried on one that is gone afterwards."""
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
        return Check(
            FAIL,
            subject,
            f"cannot be {what}: {error.strerror or error}",
            f"Linux 3.15, a tmpfs on {directory} and /proc are needed",
        )
    return Check(OK, subject, "can be made, reserved, locked and named")


# --- the C library and the limits


def check_semaphores(clockwait: bool = semaphores._clockwait is not None) -> Check:
    """By which clock waits go."""
    if clockwait:
        return Check(OK, "waits", "go by the monotonic clock (sem_clockwait)")
    return Check(
        WARN,
        "waits",
        "go by the wall clock: this C library has no sem_clockwait; a clock that is set back makes a wait longer",
        "glibc 2.30 or later",
    )


def check_descriptors(limit: int) -> Check:
    """How many files may be open: a process has two of each channel that it uses."""
    found = "without a limit" if limit == resource.RLIM_INFINITY else f"{limit}, 2 for each channel in use"
    if limit != resource.RLIM_INFINITY and limit < _DESCRIPTORS:
        return Check(WARN, "open files (RLIMIT_NOFILE)", found, "ulimit -n 1024")
    return Check(OK, "open files (RLIMIT_NOFILE)", found)


def check_limit(name: str, command: str, whose: str, limit: int) -> Check:
    """A limit in bytes that a segment must fit into."""
    subject = f"size of a {whose} ({name})"
    if limit == resource.RLIM_INFINITY:
        return Check(OK, subject, "without a limit")
    return Check(WARN, subject, f"{in_bytes(limit)}: segments must fit into that", f"{command} unlimited")


def check_memory_limit(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> Check:
    """The memory that this control group may use: shared memory counts against it, and is killed for, not refused."""
    limit, used = _memory_limit(Path(root), membership)
    if limit is None:
        return Check(OK, "memory of this control group", "without a limit")
    found = f"{in_bytes(limit)}, {in_bytes(used)} in use; shared memory counts"
    if limit - used < _LITTLE:
        return Check(
            WARN,
            "memory of this control group",
            f"{found}: a segment beyond it has the kernel kill a process",
            "raise the limit (`docker run --memory=...`, Kubernetes resources.limits.memory, systemd MemoryMax=)",
        )
    return Check(OK, "memory of this control group", found)


def _memory_limit(root: Path, membership: str) -> tuple[int | None, int]:
    """The tightest limit above this process, and what that group uses, in bytes."""
    tightest: tuple[int | None, int] = (None, 0)
    for line in Path(membership).read_text().splitlines() if os.path.exists(membership) else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, files = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
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


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


# --- what goes wrong later


def check_leftovers(found: leftovers.Leftovers) -> Check:
    """What dead processes have left."""
    dead, orphans = found.dead, found.orphans
    wrong = [segment.path for segment in found.segments if segment.wrong]
    if dead or orphans:
        size = in_bytes(sum(segment.size for segment in dead))
        text = f"{len(dead)} segments of {size} and {len(orphans)} semaphores or FIFOs"
        return Check(WARN, "left by dead processes", text, "ringshm clean")
    if wrong:
        return Check(
            WARN, "left by dead processes", "nothing, but there are files that are no segments", f"rm {wrong[0]}"
        )
    return Check(OK, "left by dead processes", "nothing")


def check_remove_ipc(root: str = "/", user: int | None = None) -> Check:
    """Whether systemd removes shared memory of a user who logs out, under the feet of what still runs."""
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
    return Check(
        WARN,
        subject,
        f"yes: when user {name} logs out for the last time, the channels of all that still runs lose their names",
        f"loginctl enable-linger {name}, or RemoveIPC=no in /etc/systemd/logind.conf, or run as a system service",
    )


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


# --- what makes it slower


def check_processor(machine: str, ordered_stores: bool) -> Check:
    """Whether each end may have a mutex of its own."""
    if ordered_stores:
        return Check(OK, "processor", f"{machine}, which keeps stores in order")
    return Check(
        WARN, "processor", f"{machine}: both ends of a channel share one mutex, release included; correct, but slower"
    )


def check_cores(cores: int) -> Check:
    """Whether anyone may spin."""
    if cores > 1:
        return Check(OK, "cores", f"{cores} for this process")
    return Check(
        WARN,
        "cores",
        "1 for this process: nobody spins, each wait is a switch of context",
        "give it two (taskset, docker --cpuset-cpus)",
    )


def check_python() -> Check:
    """Which Python this is. Without the GIL `import ringshm` has refused already."""
    bits = struct.calcsize("P") * 8
    found = f"{platform.python_implementation()} {platform.python_version()}, {bits} bits, with the GIL"
    if platform.python_implementation() == "CPython" and bits == 64 and sys.byteorder == "little":
        return Check(OK, "Python", found)
    return Check(WARN, "Python", found, "ringshm is tested on CPython, 64 bits, little-endian only")

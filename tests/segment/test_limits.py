"""What a process or its host does not allow is told: which limit, and how to change it; and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.rooms import may_mount
from support.workers import finish, script

from ringshm.segment import limits

mounting = pytest.mark.skipif(not may_mount(), reason="this process may not mount file systems for itself")

#: What brings a process to its limits; `mount` acts for this process alone.
PREPARE = """
import asyncio, ctypes, gc, mmap, os, resource, signal, subprocess, sys
import ringshm
from support.workers import ringshm_files

libc = ctypes.CDLL(None)

def limit(what, soft):
    resource.setrlimit(what, (soft, resource.getrlimit(what)[1]))

def only_descriptors(more):
    lowest = os.dup(1)
    os.close(lowest)
    assert sorted(map(int, os.listdir("/proc/self/fd")))[-2] < lowest, "there is a gap below"
    limit(resource.RLIMIT_NOFILE, lowest + more)

def only_mappings(more):
    most = int(open("/proc/sys/vm/max_map_count").read())
    pages = most + 100
    whole = mmap.mmap(-1, pages * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0)
    libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, pages * mmap.PAGESIZE, 0, 0x22, -1, 0)
    have = open("/proc/self/maps").read().count("\\n")
    for k in range((most - have - more) // 2):  # each takes two more
        libc.mprotect(at + (2 * k + 1) * mmap.PAGESIZE, mmap.PAGESIZE, mmap.PROT_READ)

def mount(*command):
    assert libc.unshare(0x20000) == 0 and libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None) == 0
    subprocess.run(["sh", "-c", " ".join(command)], check=True)

def enter_group(nbytes):
    mount("mount -t tmpfs none /sys/fs/cgroup; mkdir /sys/fs/cgroup/memory")
    for name in "memory.max", "memory/memory.limit_in_bytes":  # of version 2 and 1
        open(f"/sys/fs/cgroup/{name}", "w").write(str(nbytes))

def become_nobody():
    os.setgid(65534), os.setuid(65534)

def attach_elsewhere(prepare):
    # in a process that has attached to nothing yet
    source = "exec(sys.argv[1])\\n%s\\ntell(lambda: ringshm.Channel.attach(sys.argv[2]))" % prepare
    command = [sys.executable, "-c", "import sys\\n" + source, sys.argv[1], before.name]
    raise SystemExit(subprocess.run(command).returncode)

def tell(call):
    try:
        call()
    except ringshm.RingshmError as error:
        assert isinstance(error, OSError)
        print(type(error).__name__, error.errno, error.strerror, flush=True)
"""

#: A channel that lives.
BEFORE = "before = ringshm.Channel(4, 64)\nfiles = ringshm_files()\n"
MAKE = "tell(lambda: ringshm.Channel(4, '16MiB'))\n"
LEFT = "gc.collect()\nassert ringshm_files() == files\nbefore.put(1)\nassert before.get() == 1\n"

#: What comes before a channel of 4 slots of 16 MiB is made; the errno, and words that must be told.
MAKING: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "address space": ("limit(resource.RLIMIT_AS, 64 << 20)", 12, ("RLIMIT_AS", "ulimit -v", "67108864")),
    "file size": ("limit(resource.RLIMIT_FSIZE, 1 << 20)", 27, ("RLIMIT_FSIZE", "ulimit -f", "1048576")),
    "file size, and the signal kills": (
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL); limit(resource.RLIMIT_FSIZE, 1 << 20)",
        27,
        ("RLIMIT_FSIZE",),
    ),
    "no descriptor": ("only_descriptors(0)", 24, ("RLIMIT_NOFILE", "ulimit -n")),
    "one descriptor": ("only_descriptors(1)", 24, ("RLIMIT_NOFILE", "3 descriptors")),
    "two descriptors": ("only_descriptors(2)", 24, ("RLIMIT_NOFILE",)),
    "three descriptors": ("only_descriptors(3)", 24, ("RLIMIT_NOFILE",)),
    "two mappings": ("only_mappings(2)", 12, ("vm.max_map_count", "sysctl -w")),
    "six mappings": ("only_mappings(6)", 12, ("vm.max_map_count", "10 mappings")),
}
PLACES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "missing": ("mount('mount -t tmpfs none /dev')", 2, ("no directory /dev/shm", "mount -t tmpfs")),
    "no directory": ("mount('mount -t tmpfs none /dev; touch /dev/shm')", 20, ("no directory /dev/shm",)),
    "read-only": ("mount('mount -t tmpfs -o ro none /dev/shm')", 30, ("/dev/shm is read-only", "remount,rw")),
    "not writable": (
        "mount('mount -t tmpfs -o mode=755 none /dev/shm'); become_nobody()",
        13,
        ("user 65534 may not make files in /dev/shm (mode 755)", "chmod 1777"),
    ),
    "control group": ("enter_group(32 << 20)", 12, ("the control group", "33554432", "docker run --memory")),
    "no /proc": ("mount('umount -l /proc')", 2, ("mount -t proc",)),
}


def _told(source: str, before: str = BEFORE) -> str:
    return finish(script(PREPARE + before + source, PREPARE))


@pytest.mark.parametrize("short", [*MAKING, *(pytest.param(place, marks=mounting) for place in PLACES)])
def test_a_channel_that_cannot_be_made_says_what_is_short_and_leaves_nothing(short: str) -> None:
    prepare, number, words = {**MAKING, **PLACES}[short]
    if short == "control group" and len(Path("/proc/swaps").read_text().splitlines()) > 1:
        pytest.skip("there is swap, in which the segment may find room")
    if short in MAKING:
        told = _told(f"{prepare}\n{MAKE}limit(resource.RLIMIT_NOFILE, 99)\n{LEFT}")
    else:
        told = _told(f"{prepare}\n{MAKE}", before="")
    assert told.startswith(f"ChannelUnavailable {number} channel '")
    assert "cannot be " in told
    for word in words:
        assert word in told


def test_no_memory_is_touched_for_a_channel_that_does_not_fit() -> None:
    """A page of it would be seen in the free space of the file system while the file is being made."""
    for short in ("address space", "file size", "three descriptors", "six mappings"):
        source = f"""
import threading
{MAKING[short][0]}
free = os.statvfs("/dev/shm").f_bavail
seen, reserve = [], os.posix_fallocate
os.posix_fallocate = lambda *args: seen.append(args) or reserve(*args)
{MAKE}assert not seen
"""
        assert _told(source).startswith("ChannelUnavailable")


@pytest.mark.parametrize("short", ["address space", *(f"{k} descriptors" for k in range(4)), "four mappings"])
def test_a_channel_that_cannot_be_attached_says_what_is_short(short: str) -> None:
    prepare = {"address space": MAKING["address space"][0], "four mappings": "only_mappings(4)"}
    source = prepare.get(short) or f"only_descriptors({short.partition(' ')[0]})"
    told = _told(f"attach_elsewhere({source!r})")
    assert told.startswith("ChannelUnavailable ")
    assert any(word in told for word in ("RLIMIT_AS", "RLIMIT_NOFILE", "vm.max_map_count"))


@mounting
@pytest.mark.parametrize("place", ["missing", "read-only bind", "not searchable"])
def test_a_channel_is_not_called_missing_or_damaged_where_its_place_cannot_be_used(place: str) -> None:
    prepare, words = {
        "missing": (PLACES["missing"][0], "no directory /dev/shm"),
        "read-only bind": (
            "mount('mount --bind /dev/shm /dev/shm; mount -o remount,bind,ro /dev/shm')",
            "/dev/shm is read-only",
        ),
        "not searchable": ("mount('mount -t tmpfs -o mode=700 none /dev/shm'); become_nobody()", "(mode 700)"),
    }[place]
    told = _told(f"attach_elsewhere({prepare!r})")
    assert told.startswith("ChannelUnavailable ")
    assert words in told


@pytest.mark.parametrize("call", ["before.fileno()", "ringshm.wait([before], 0.1)", "asyncio.run(aget())"])
def test_a_wait_without_a_descriptor_says_so_and_leaves_the_channel_as_it_was(call: str) -> None:
    source = f"""
async def aget():
    only_descriptors(0)
    await before.aget(timeout=1)
tell(lambda: ({"" if "aget" in call else "only_descriptors(0),"} {call}))
limit(resource.RLIMIT_NOFILE, 99)
{LEFT}
assert before.fileno() >= 0
"""
    told = _told(source)
    assert told.startswith("ChannelUnavailable 24 ")
    assert "RLIMIT_NOFILE" in told


@pytest.mark.parametrize("make", ["ringshm.Channel(4, 64)", "ringshm.Latest(64)"])
def test_a_channel_takes_as_many_descriptors_and_mappings_as_is_said(make: str) -> None:
    source = f"""
def count():
    return len(os.listdir("/proc/self/fd")), open("/proc/self/maps").read().count("\\n")
few = count()
channels = [{make} for _ in range(40)]
print(*[round((now - then) / 40) for now, then in zip(count(), few)])
"""
    assert _told(source).split() == [str(limits.DESCRIPTORS), str(limits.MAPPINGS)]

"""Shared memory in which the tests of a process are alone, so that no other program disturbs them, nor they any other.

Where this process may mount file systems (root may), it gets a /dev/shm of its own, in a mount namespace that its
children inherit. Elsewhere it shares the machine's, and names its files apart: ringshm's begin with RINGSHM_STEM, and
ringshm sees no files that begin otherwise.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import subprocess
import sys
from contextlib import suppress

SHM = "/dev/shm"
_CLONE_NEWNS = 0x20000  # linux/sched.h
_NOSUID_NODEV, _PRIVATE = 2 | 4, 1 << 18 | 1 << 14  # linux/mount.h: MS_PRIVATE | MS_REC


def enter_own(worker: str, share: bool) -> str:
    """Give this process shared memory of its own, `worker` of pytest-xdist or ""; what it got, in words.

    Call before ringshm is imported, and before a process is started. Threads that run already stay outside.
    """
    assert "ringshm" not in sys.modules
    if not share and _mount_own():
        return f"each worker has a {SHM} of its own"
    stem = os.environ.setdefault("RINGSHM_STEM", f"ringshm-{secrets.token_hex(4)}")
    if worker:
        os.environ["RINGSHM_STEM"] = f"{stem}-{int(worker.removeprefix('gw')):03}"  # no stem is in another one
    return f"files in {SHM} are named {stem}…"


def leave() -> None:
    """Remove what a test has left that was killed, by the watchdog say; other tests are found out by themselves."""
    stem = os.environ.get("RINGSHM_STEM")
    for name in os.listdir(SHM) if stem else ():
        if stem in name:
            with suppress(FileNotFoundError):
                os.unlink(f"{SHM}/{name}")


def may_mount() -> bool:
    """Whether a child of this process may mount file systems that no other process sees; not even root in a chroot."""
    source = (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        f"assert libc.unshare({_CLONE_NEWNS}) == 0 and libc.mount(None, b'/', None, {_PRIVATE}, None) == 0"
    )
    return subprocess.run([sys.executable, "-c", source], capture_output=True).returncode == 0


def _mount_own() -> bool:
    libc = ctypes.CDLL(None)
    space = os.statvfs(SHM)
    options = f"mode=1777,size={space.f_blocks * space.f_frsize}".encode()
    return (
        libc.unshare(_CLONE_NEWNS) == 0
        and libc.mount(None, b"/", None, _PRIVATE, None) == 0
        and libc.mount(b"tests", SHM.encode(), b"tmpfs", _NOSUID_NODEV, options) == 0
    )

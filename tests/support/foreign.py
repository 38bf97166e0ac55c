"""Files in shared memory that bear the name of a channel or of a semaphore, and are none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import ringshm
from ringshm import Channel
from ringshm.segment import layout
from ringshm.segment.files import PREFIX, path_of
from ringshm.segment.semaphores import SHM_DIRECTORY


def header(**words: int) -> bytes:
    """A file that begins like a segment."""
    raw = bytearray(2 * layout.HEADER_NBYTES)
    view = memoryview(raw).cast("Q")
    view[layout.MAGIC] = layout.MAGIC_VALUE
    view[layout.VERSION] = layout.LAYOUT_VERSION
    raw[layout.NONCE * 8 : layout.NONCE * 8 + 16] = b"0123456789abcdef"
    for name, value in words.items():
        view[getattr(layout, name)] = value
    del view
    return bytes(raw)


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


#: What lies there, what `attach` says, and why nothing can be made there: None where it can.
FOREIGN: dict[str, tuple[Callable[[Path], object], type[Exception], str, str | None]] = {
    "no bytes": (write(b""), ringshm.ChannelCorrupted, "it has 0 bytes. Remove it", "Remove it"),
    "few bytes": (write(b"ringshm\n"), ringshm.ChannelCorrupted, "it has 8 bytes. Remove it", "Remove it"),
    "garbage": (write(b"garbage!" * 5000), ringshm.ChannelCorrupted, "it begins with b'garbage!'", "Remove it"),
    "zeros": (write(bytes(10_000)), ringshm.ChannelCorrupted, r"it begins with b'\\x00", "Remove it"),
    "a bad nonce": (write(header(NONCE=7)), ringshm.ChannelCorrupted, "its nonce is", "Remove it"),
    "a header of the dead": (write(header()), ringshm.ChannelNotFound, "have died", None),
    "a symbolic link": (
        lambda path: path.symlink_to("/etc/passwd"),
        ringshm.ChannelCorrupted,
        "no ringshm segment.*Remove it",
        "Remove it",
    ),
    "a dangling link": (lambda path: path.symlink_to("/nowhere"), ringshm.ChannelCorrupted, "no ringshm", "Remove it"),
    "a directory": (Path.mkdir, ringshm.ChannelCorrupted, "no ringshm segment.*Remove it", "Remove it"),
    "a pipe": (os.mkfifo, ringshm.ChannelCorrupted, "special file", "Remove it"),
}


@contextlib.contextmanager
def foreign(name: str, make: Callable[[Path], object]) -> Iterator[Path]:
    path = Path(path_of(name))
    make(path)
    try:
        yield path
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def semaphores_of(channel: Channel) -> list[Path]:
    nonce = channel._open().segment.nonce
    return sorted(Path(SHM_DIRECTORY).glob(f"sem.{PREFIX}{nonce}.*"))


SEMAPHORES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "ChannelNotFound"),
    "no bytes": (write(b""), "ChannelCorrupted.*no semaphore of this user \\(0 bytes\\): remove it"),
    "too many bytes": (write(bytes(100)), "ChannelCorrupted.*no semaphore of this user \\(100 bytes\\)"),
    "a link": (lambda path: path.symlink_to("/etc/passwd"), "ChannelCorrupted.*no semaphore"),
    "a directory": (Path.mkdir, "ChannelCorrupted.*no semaphore"),
}

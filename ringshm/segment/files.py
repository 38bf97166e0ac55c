"""The segment's file: its names, its header, its mapping.

A name appears whole, and goes last:

1. A creator makes the file without a name (O_TMPFILE), locks its own entry there, and fills the file in. It links the
   file under a nonce, makes the semaphores, whose names bear the nonce, and records the nonce in the header. Then one
   `link` gives the segment its name. So while anything bears a nonce, there is a segment whose locks say whether its
   process lives, and leftovers.py can tell what the dead have left.
2. A process removes a name only while it holds the NAME lock of the very inode that the path leads to; and `link`
   replaces nothing. So between the comparison and the removal the path cannot change hands, and two reclaimers, or a
   creator that is still at work, cannot hurt each other.
3. A remover removes the semaphores first, then what else lies beside the segment, and the segment's path last. If it
   is killed halfway, the path still leads the next remover to all that is left.

Nothing in the file is trusted before it was compared with what the layout says. Each layout version can tell what the
dead of another have left from what the living use, and remove it ("What must change together" in layout.py).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import multiprocessing.process
import os
import secrets
import stat
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import (
    ChannelCorrupted,
    ChannelExists,
    ChannelForbidden,
    ChannelNotFound,
    IncompatibleChannel,
    RingshmError,
    is_own,
    suppress_own,
)
from ..system import close, monotonic, sleep
from . import fifos, layout, ledger, limits, semaphores
from .layout import WORD_SIZE, Layout, Options
from .limits import SEMAPHORES
from .locks import LockedFile, leads_to
from .origin import Origin, boot_id, not_found
from .semaphores import SHM_DIRECTORY, STEM, Semaphore

PREFIX = f"{STEM}."
NEW_PREFIX = f"{STEM}-new."  # of a segment that has no other name yet: its nonce follows
_MAX_NAME_NBYTES = 200  # NAME_MAX is 255
NONCE_DIGITS = 16
#: Bytes that a process maps when it attaches, in some 150 us: the words and the first slots; small channels whole. The
#: rest comes page by page, when slots are first used: a process may use few of them.
_POPULATED_NBYTES = 2 * 1024 * 1024
CODEC_NAME_NBYTES = 48

#: The semaphores of a channel, in the order of their names: two for each mutex, then those that wake waiters.
SENDERS_EVEN, SENDERS_ODD, RECEIVERS_EVEN, RECEIVERS_ODD, MESSAGES, SPACE, EVENTS, PIECES, ROOM = range(SEMAPHORES)
FIRST_GEN = 4
_FIRST_TOKENS = (1, 0, 1, 0, 0, 0, 0, 0, 0)

#: Mappings whose descriptors other code has closed. Each `mmap` has a duplicate of its own, whose number may be another
#: file's by now, and would close it when it goes: so these stay.
_unclosable: list[mmap.mmap] = []


def check_name(name: str) -> str:
    """`name`, if a channel may have it; ValueError or TypeError says what is wrong."""
    if not isinstance(name, str):
        raise TypeError(f"name={name!r} must be a str, not {type(name).__name__}")
    if not name:
        raise ValueError("name='' is empty: give a name, or None for a fresh one")
    if "/" in name or "\0" in name:
        raise ValueError(f"name={name!r} must hold no slash and no NUL")
    try:
        nbytes = len(os.fsencode(name))
    except UnicodeEncodeError:
        raise ValueError(f"name={name!r} cannot be a file's name in this locale") from None
    if nbytes > _MAX_NAME_NBYTES:
        raise ValueError(f"name of {nbytes} bytes is too long: at most {_MAX_NAME_NBYTES}")
    return name


def path_of(name: str) -> str:
    """The file of the channel of that name."""
    return f"{SHM_DIRECTORY}/{PREFIX}{name}"


def _name_of(path: str) -> str:
    return os.path.basename(path).removeprefix(PREFIX)


def _path_of_new(nonce: str) -> str:
    return f"{SHM_DIRECTORY}/{NEW_PREFIX}{nonce}"


class Segment:
    """One channel's segment, mapped into this process.

    `memory` is the mapping, `words` its words up to the slots. Both are let go, not closed: the mapping stays until
    the last view of it is gone. `numbers` are the same words as an array, for slices of them: without the GIL CPython
    3.13 miscounts the slices of one memoryview that several threads make, and releases it in the end.
    """

    __slots__ = (
        "_warned",
        "codec_name",
        "file",
        "layout",
        "memory",
        "name",
        "nonce",
        "numbers",
        "options",
        "semaphores",
        "spec",
        "words",
    )

    def __init__(
        self,
        file: LockedFile,
        name: str,
        shape: Layout,
        options: Options,
        flags: int = mmap.MAP_SHARED,
        prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
    ) -> None:
        self.file, self.name = file, name
        self.layout, self.options = shape, options
        self.memory = mmap.mmap(file.fd, shape.total_size, flags, prot)
        self.words = memoryview(self.memory)[: shape.slots].cast("Q")
        self.numbers: NDArray[np.uint64] = np.frombuffer(self.words, np.uint64)
        self.nonce = self.codec_name = self.spec = ""
        self.semaphores: list[Semaphore] = []
        self._warned = False

    def forget_closed(self) -> None:
        """Other code has closed descriptors of this process: have nothing more to do with their numbers."""
        self.file.forget_closed()
        if self.file.fd < 0:
            _unclosable.append(self.memory)

    def open_locks(self) -> None:
        """In a forked child: have a description that carries its own locks. Raises as LockedFile.open_locks."""
        if not self.file.is_mapped:
            self.forget_closed()
        self.file.open_locks()

    def populate(self) -> None:
        """Map the first pages, for a process that has come to use them. A forked child's page table starts empty, too.

        Pages that are mapped to be read come sixteen at a time, which costs a third, and they may be written.
        """
        with suppress_own(OSError, ValueError):
            how = getattr(mmap, "MADV_POPULATE_READ", 22)  # Linux 5.14
            self.memory.madvise(how, 0, min(_POPULATED_NBYTES, self.layout.total_size))

    # --- making one

    @classmethod
    def create(
        cls,
        name: str | None,
        shape: Layout,
        options: Options,
        codec_name: str,
        spec: str,
        prefault: bool,
        fill_in: Callable[[Segment], None],
    ) -> Segment:
        """Make a segment and its semaphores; `fill_in` makes it whole before it gets its name.

        Raises:
            InsufficientSharedMemory: if the file system has not the space; nothing is left behind.
            ChannelUnavailable: if another limit of the process or host is in the way; the same.
            ChannelExists: if a live process uses the name, or a file that is no channel stands in the way.
        """
        nonce = secrets.token_hex(NONCE_DIGITS // 2)
        if name is None:
            name = nonce
        file = None
        try:
            limits.check(name, shape.total_size)
            file = LockedFile(_make_file(), name, path_of(name))
            limits.check_descriptors(file.fd)
            file.try_lock(layout.LOCK_ENTRIES)  # the creator's entry: from now on its process is seen to live
            _reserve(file.fd, shape.total_size)
            flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if prefault else 0)
            segment = cls(file, name, shape, options, flags)
            segment.nonce, segment.codec_name, segment.spec = nonce, codec_name, spec
            words = segment.words
            words[layout.VERSION] = layout.LAYOUT_VERSION
            words[layout.CAPACITY] = shape.capacity
            words[layout.SLOT_SIZE] = shape.slot_size
            words[layout.MAX_PARTICIPANTS] = shape.max_participants
            words[layout.OPTIONS] = options.pack()
            words[layout.TOTAL_SIZE] = shape.total_size
            words[layout.GEN] = FIRST_GEN
            _put_text(segment, layout.NONCE, nonce)
            _put_text(segment, layout.CODEC_NAME, codec_name)
            _put_text(segment, shape.spec // WORD_SIZE, spec)
            words[layout.SPEC_NBYTES] = shape.spec_nbytes
            words[layout.MAGIC] = layout.MAGIC_VALUE
            _link(file, _path_of_new(nonce))
            for index, tokens in enumerate(_FIRST_TOKENS):
                semaphores.create(_semaphore_name(nonce, index), tokens)
            segment.semaphores = _open_semaphores(nonce)
            fill_in(segment)
            _link_reclaiming(file, path_of(name))
        except BaseException as error:
            if file is not None:
                _remove(file, path_of(name), nonce)
            if isinstance(error, OSError) and not isinstance(error, RingshmError):
                if error.errno == errno.ENOSPC:
                    raise limits.insufficient(name, shape.total_size) from error
                raise limits.unavailable(name, "cannot be made", error, shape.total_size) from error
            raise
        finally:
            with suppress_own(OSError):
                os.unlink(_path_of_new(nonce))
        return segment

    # --- opening one

    @classmethod
    def open(cls, name: str, nonce: str | None = None, even_if_dead: bool = False) -> Segment:
        """Open the segment of that name (and that nonce, if given), checked against its layout.

        One whose participants have all died is removed, and not found; but opened with `even_if_dead`.

        Raises:
            ChannelNotFound, ChannelForbidden, ChannelCorrupted, IncompatibleChannel, ChannelUnavailable
        """
        path = path_of(name)
        file = open_file(path)
        header = Header(file, path)
        if not even_if_dead and not file.used_elsewhere:
            with contextlib.suppress(ChannelExists):  # somebody just made a new one
                reclaim(path)
            raise ChannelNotFound(
                errno.ENOENT, f"channel {name!r} is gone: all processes that used it have died. Make a new one"
            )
        header.check_version()
        if nonce is not None and header.nonce != nonce:
            raise ChannelNotFound(
                errno.ENOENT, f"channel {name!r} is gone; another of the same name took its place: attach to that one"
            )
        shape, options = header.check_layout()
        try:
            segment = cls(file, name, shape, options)
            segment.populate()
            segment._identify(header)
            segment.semaphores = _open_semaphores(header.nonce)
        except FileNotFoundError as error:
            if not is_own(error):
                raise
            raise ChannelNotFound(
                errno.ENOENT, f"channel {name!r} has been closed by its creator: make a new one"
            ) from None
        except OSError as error:
            if isinstance(error, RingshmError):
                raise
            raise limits.unavailable(name, "cannot be opened", error, shape.total_size) from error
        return segment

    @classmethod
    def observe(cls, name: str) -> Segment:
        """Open the segment of that name to look at it, whether anybody lives who uses it or not; without semaphores.

        Raises:
            ChannelNotFound, ChannelForbidden, ChannelCorrupted, IncompatibleChannel
        """
        path = path_of(name)
        file = open_file(path)
        header = Header(file, path)
        header.check_version()
        segment = cls(file, name, *header.check_layout(), mmap.MAP_SHARED, mmap.PROT_READ)
        segment._identify(header)
        return segment

    def _identify(self, header: Header) -> None:
        self.nonce = header.nonce
        self.codec_name = _get_text(self, layout.CODEC_NAME, CODEC_NAME_NBYTES)
        self.spec = _get_text(self, self.layout.spec // WORD_SIZE, self.layout.spec_nbytes)

    @property
    def origin(self) -> Origin:
        """Where it was made."""
        return boot_id(), self.file.identity[0]

    # --- removing its names

    def remove_names(self, unless_used: bool = False) -> None:
        """Remove the segment's and the semaphores' names, if they are still this segment's.

        With `unless_used`, not if another process is attached: see `reclaim` for one that attaches meanwhile.
        """
        file = self.file
        if not file.is_open:
            try:
                file = open_file(file.path)
            except RingshmError:  # there is none, or it is another user's
                return
        if file.identity != self.file.identity or not _lock_name(file, patience=1.0):
            return  # another has the name, or is at it
        try:
            gone = self.words[layout.NAME_GONE]
            self.words[layout.NAME_GONE] = 1
            if unless_used and file.used_elsewhere:
                self.words[layout.NAME_GONE] = gone
                return
            _remove(file, path_of(self.name), self.nonce)
        except PermissionError:
            self._warn_of_names()
        finally:
            file.unlock(layout.LOCK_NAME)

    def _warn_of_names(self) -> None:
        if not self._warned:
            self._warned = True
            maker = os.stat(self.file.path).st_uid
            warnings.warn(
                f"channel {self.name!r}: its names stay in {SHM_DIRECTORY}, for user {maker} has made them, and user "
                f"{os.geteuid()}, which this process is now, may not remove them: run `ringshm clean` as user {maker}",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def named(self) -> bool:
        """Whether the name still leads to this segment."""
        return not self.words[layout.NAME_GONE] and leads_to(path_of(self.name), self.file.identity)


class Header:
    """What a file says of itself, read without mapping it."""

    def __init__(self, file: LockedFile, path: str) -> None:
        self._file = file
        self._path = path
        if file.size < layout.HEADER_NBYTES:
            raise ChannelCorrupted(
                f"{path} is no ringshm segment: it has {file.size} bytes. Remove it, or use another name"
            )
        raw = os.pread(file.fd, layout.HEADER_NBYTES, 0)
        self.words = memoryview(raw).cast("Q")
        if self.words[layout.MAGIC] != layout.MAGIC_VALUE:
            raise ChannelCorrupted(
                f"{path} is no ringshm segment: it begins with {raw[:8]!r}. Remove it, or use another name"
            )
        self.version = self.words[layout.VERSION]
        nonce = raw[layout.NONCE * WORD_SIZE : layout.NONCE * WORD_SIZE + NONCE_DIGITS]
        if len(nonce.strip(b"0123456789abcdef")):
            raise ChannelCorrupted(f"{path} is a damaged ringshm segment: its nonce is {nonce!r}. Remove it")
        self.nonce = nonce.decode()

    def check_version(self) -> None:
        """Refuse another layout version."""
        if self.version != layout.LAYOUT_VERSION:
            raise IncompatibleChannel(
                f"channel {_name_of(self._path)!r} has layout version {self.version}, this ringshm reads "
                f"{layout.LAYOUT_VERSION}: use the same version of ringshm in all processes"
            )

    def check_layout(self) -> tuple[Layout, Options]:
        """The layout and options, if they agree with the size of the file."""
        words = self.words
        try:
            options = Options.unpack(words[layout.OPTIONS])
        except ValueError as error:
            raise ChannelCorrupted(f"{self._path} is a damaged ringshm segment: {error}") from None
        cells = layout.PIN_CELLS if options.kind == "Latest" else 0
        capacity, slot_size, max_participants = words[layout.CAPACITY : layout.MAX_PARTICIPANTS + 1]
        shape = Layout(capacity, slot_size, max_participants, words[layout.SPEC_NBYTES], cells)
        sound = shape.capacity > 0 and shape.slot_size > 0 and 0 < shape.max_participants < layout.MAX_ENTRIES
        if not sound or shape.total_size != words[layout.TOTAL_SIZE] or words[layout.TOTAL_SIZE] != self._file.size:
            raise ChannelCorrupted(
                f"{self._path} is a damaged ringshm segment: capacity {shape.capacity}, slot_size "
                f"{shape.slot_size} and {shape.max_participants} participants do not make {self._file.size} bytes"
            )
        return shape, options


def open_file(path: str) -> LockedFile:
    """Open a file that bears the name of a segment, if it is a regular file of this user.

    Raises:
        ChannelNotFound, ChannelForbidden, ChannelCorrupted, ChannelUnavailable
    """
    name = _name_of(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        _refuse(name, path, error)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ChannelCorrupted(f"{path} is no ringshm segment but a special file. Remove it, or use another name")
        if status.st_uid != os.geteuid():
            raise ChannelForbidden(errno.EACCES, f"channel {name!r} ({path}) belongs to user {status.st_uid}")
    except BaseException:
        close(fd)
        raise
    return LockedFile(fd, name, path)


def _refuse(name: str, path: str, error: OSError) -> NoReturn:
    """Say why the file of that name could not be opened."""
    if error.errno == errno.ENOENT and os.access(f"{SHM_DIRECTORY}/", os.F_OK):
        raise not_found(name) from None
    if error.errno in (errno.EACCES, errno.EPERM) and os.access(path, os.F_OK):
        raise ChannelForbidden(errno.EACCES, f"channel {name!r} ({path}) belongs to another user") from None
    if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a symbolic link, a directory, a socket
        text = f"{path} is no ringshm segment: {error.strerror}. Remove it, or use another name"
        raise ChannelCorrupted(text) from error
    raise limits.unavailable(name, "cannot be opened", error) from error


def _make_file() -> int:
    """A file of /dev/shm that has no name yet."""
    fd = os.open(SHM_DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)  # whatever the umask
    return fd


def _reserve(fd: int, size: int) -> None:
    """Give the file its size and all its pages, so that no later store can fail for want of memory (SIGBUS)."""
    while True:
        try:
            return os.posix_fallocate(fd, 0, size)
        except InterruptedError:
            continue
        except OSError:
            os.ftruncate(fd, 0)  # so that what it took is free when the error says how much there is
            raise


def _put_text(segment: Segment, word: int, text: str) -> None:
    raw = text.encode()
    segment.memory[word * WORD_SIZE : word * WORD_SIZE + len(raw)] = raw


def _get_text(segment: Segment, word: int, nbytes: int) -> str:
    raw = segment.memory[word * WORD_SIZE : word * WORD_SIZE + nbytes]
    return raw.rstrip(b"\0").decode(errors="replace")


def _semaphore_name(nonce: str, index: int) -> str:
    return f"/{PREFIX}{nonce}.{index}"


def _open_semaphores(nonce: str) -> list[Semaphore]:
    return [semaphores.open_existing(_semaphore_name(nonce, index)) for index in range(len(_FIRST_TOKENS))]


def _remove_semaphores(nonce: str) -> None:
    for index in range(len(_FIRST_TOKENS)):
        semaphores.remove(_semaphore_name(nonce, index))


def _link(file: LockedFile, path: str) -> None:
    """Give a file a name of /dev/shm; FileExistsError if there is one."""
    # `src_dir_fd` is ignored, but without it Python calls link(2), which does not follow /proc's link
    os.link(f"/proc/self/fd/{file.fd}", path, src_dir_fd=file.fd, follow_symlinks=True)


def _link_reclaiming(file: LockedFile, path: str) -> None:
    """Give a finished segment its name; reclaim the name first if only the dead have left it."""
    while True:
        try:
            return _link(file, path)
        except FileExistsError:
            reclaim(path)


def reclaim(path: str) -> None:
    """Remove the segment there that dead processes have left; returns also if somebody else just did.

    A process that attaches at the same moment locks its entry and then looks at NAME_GONE; this sets NAME_GONE and
    then looks at the locks. So one of the two sees the other.

    Raises:
        ChannelExists: if a live process uses it, or it is no segment of this user.
    """
    exists = f"channel {_name_of(path)!r} exists: {_how_to_avoid()}"
    try:
        file = open_file(path)
        header = Header(file, path)
    except ChannelNotFound:
        return
    except ChannelCorrupted as error:
        raise ChannelExists(errno.EEXIST, str(error)) from error
    except ChannelForbidden as error:
        raise ChannelExists(errno.EEXIST, f"{error}: use another name") from error
    if file.used_elsewhere or not _lock_name(file, patience=1.0):
        raise ChannelExists(errno.EEXIST, exists)
    try:
        gone = layout.NAME_GONE * WORD_SIZE
        os.pwrite(file.fd, (1).to_bytes(WORD_SIZE, sys.byteorder), gone)
        if file.used_elsewhere:
            os.pwrite(file.fd, bytes(WORD_SIZE), gone)
            raise ChannelExists(errno.EEXIST, exists)
        _remove(file, path, header.nonce)
    finally:
        file.unlock(layout.LOCK_NAME)


def _how_to_avoid() -> str:
    """What to do where a name is in use."""
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        return (
            "multiprocessing has started this process, and imports the main module again, which makes the channel once "
            "more: make it under the main guard, `if __name__ == '__main__':`, and give it to the process"
        )
    return "attach to it, or use another name"


def _lock_name(file: LockedFile, patience: float) -> bool:
    """Take the NAME lock, which is held for a few system calls only."""
    give_up = monotonic() + patience
    while not file.try_lock(layout.LOCK_NAME):
        if monotonic() > give_up:
            return False
        sleep(0.001)
    return True


def _remove(file: LockedFile, named: str, nonce: str) -> None:
    """Remove the names; the caller holds the NAME lock of this inode, or has just made it."""
    _remove_semaphores(nonce)
    fifos.remove_orphans(nonce)
    ledger.remove(nonce)
    for path in (_path_of_new(nonce), named):  # a creator that was killed may have left the first
        if leads_to(path, file.identity):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

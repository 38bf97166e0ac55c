"""The segment's file: its names, its mapping, and the record locks by which the kernel says who lives.

A name appears whole. The segment is made without any (O_TMPFILE), locked and filled in, and linked under a nonce; then
come its semaphores, whose names bear the nonce, which the header records; then one `link` gives the segment its name.
So whatever bears a nonce, from the first semaphore to the last, there is a segment that says by its locks whether its
process lives, and leftovers.py can tell what the dead have left. Whoever removes a name
holds the NAME lock of the very inode that the path leads to, and only such a holder removes it; `link` replaces
nothing. So between the comparison and the removal the path cannot change hands, and two reclaimers, or a creator that
is still at work, cannot hurt each other. The semaphores go first and the segment's path last: what a remover leaves
that is killed halfway still leads the next one to all of it.

Record locks are open-file-description locks (fcntl(2), Linux 3.15): the kernel drops them when the last descriptor of
that one `open` goes, that is when the process ends, in whatever way. POSIX record locks would go as soon as *any*
descriptor of the file is closed. The description that carries the locks is private: `mmap` and
everybody else use another, and a forked child closes its copy at once (see attachment.py), since it would keep the
locks of its dead parent.

Where a segment cannot carry record locks (host.py), a file beside it does, ringshm-lock.<nonce>. It is there, and
locked, before the segment has a name, and is removed after the segment's last one: whoever opens a segment finds it, or
the name has just gone.

Nothing in the file is trusted before it was compared with what the layout says. What MAGIC, VERSION and NONCE are, and
which bytes are locked, never changes from one layout version to another: so each version can tell what the dead of
another have left from what the living use, and remove it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import secrets
import stat
import struct
import sys
import time
import weakref
from collections.abc import Callable

import posix_ipc

from . import fifos, host, semaphores
from .errors import (
    ChannelCorrupted,
    ChannelExists,
    ChannelForbidden,
    ChannelNotFound,
    IncompatibleChannel,
    InsufficientSharedMemory,
)
from .layout import (
    CAPACITY,
    CODEC_NAME,
    GEN,
    HEADER_NBYTES,
    LAYOUT_VERSION,
    LOCK_ENTRIES,
    LOCK_NAME,
    MAGIC,
    MAGIC_VALUE,
    MAX_ENTRIES,
    MAX_PARTICIPANTS,
    NAME_GONE,
    NONCE,
    OPTIONS,
    PAGE_SIZE,
    PIN_CELLS,
    SLOT_SIZE,
    SPEC_NBYTES,
    TOTAL_SIZE,
    VERSION,
    WORD_SIZE,
    Layout,
    Options,
)
from .semaphores import SHM_DIRECTORY, Semaphore

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
PREFIX = "ringshm."
NEW_PREFIX = "ringshm-new."  # of a segment that has no other name yet; its nonce follows
LOCKS_PREFIX = "ringshm-lock."  # of the file that carries a segment's locks; the segment's nonce follows
_MAX_NAME_NBYTES = 200  # NAME_MAX is 255
_MAX_SHORT_NBYTES = 29  # of macOS's PSHMNAMLEN, 31, the slash before it and the NUL after it taken off
NONCE_DIGITS = 16
CODEC_NAME_NBYTES = 48

#: The semaphores of a channel, in the order of their names: two for each mutex, then those that wake waiters.
SENDERS_EVEN, SENDERS_ODD, RECEIVERS_EVEN, RECEIVERS_ODD, MESSAGES, SPACE, EVENTS, PIECES, ROOM = range(9)
FIRST_GEN = 4
_FIRST_TOKENS = (1, 0, 1, 0, 0, 0, 0, 0, 0)
_SEMAPHORES_NBYTES = len(_FIRST_TOKENS) * PAGE_SIZE
#: Inodes that a creation takes: the segment, its semaphores, and glibc's other name of the semaphore being made.
FILES_NEEDED = 1 + len(_FIRST_TOKENS) + 1 + (not host.RECORD_LOCKS)


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


def _file_name(name: str, prefix: str) -> str:
    whole = prefix + name
    if host.LONG_NAMES or not prefix or len(os.fsencode(whole)) <= _MAX_SHORT_NBYTES:
        return whole
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f"{prefix}~{digest}"[:_MAX_SHORT_NBYTES]  # and without the prefix, that is a name for the same file


def path_of(name: str, prefix: str = PREFIX) -> str:
    """The file of the channel of that name, or (NEW_PREFIX, LOCKS_PREFIX) of that nonce, or ("") of that very name."""
    return f"{SHM_DIRECTORY}/{_file_name(name, prefix)}"


_open_files: weakref.WeakSet[LockedFile] = weakref.WeakSet()


def drop_inherited_locks() -> None:
    """In a forked child: close every copy of its parent's locks, also of files that another thread was just opening."""
    for file in list(_open_files):
        file.close_locks()


class LockedFile:
    """A segment's file, opened twice: to be mapped, and privately, to carry this process's record locks."""

    __slots__ = ("__weakref__", "_carrier", "fd", "identity", "lock_fd", "size")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._carrier = -1
        self.lock_fd = -1
        status = os.fstat(fd)
        self.identity = (status.st_dev, status.st_ino)
        self.size = status.st_size
        _open_files.add(self)
        self.open_locks()

    def move_locks(self, carrier: int) -> None:
        """From now on that file, which becomes this one's own, carries the locks."""
        self._carrier = carrier
        self.close_locks()
        self.open_locks()

    def open_locks(self) -> None:
        """Open the private description; works after the name is gone."""
        carrier = self.fd if self._carrier < 0 else self._carrier
        self.lock_fd = os.open(f"/proc/self/fd/{carrier}", os.O_RDWR | os.O_CLOEXEC)

    def close_locks(self) -> None:
        """Close the private description: in a forked child this drops nothing of its parent's."""
        fd, self.lock_fd = self.lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.close_locks()
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.fd)
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._carrier)

    def try_lock(self, byte: int) -> bool:
        """Lock that byte for this process, unless another holds it."""
        try:
            fcntl.fcntl(self.lock_fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def unlock(self, byte: int) -> None:
        """Give that byte up."""
        fcntl.fcntl(self.lock_fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, byte, 1, 0))

    def locked_elsewhere(self, byte: int, length: int = 1) -> bool:
        """Whether another process holds any of these bytes; length 0 is all from `byte` on."""
        answer = fcntl.fcntl(self.lock_fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, length, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


class Segment:
    """One channel's segment, mapped into this process.

    `memory` is the mapping, `words` its words up to the slots. Both are let go, not closed: the mapping stays until
    the last view of it is gone.
    """

    __slots__ = ("codec_name", "file", "layout", "memory", "name", "nonce", "options", "semaphores", "spec", "words")

    def __init__(
        self,
        file: LockedFile,
        name: str,
        layout: Layout,
        options: Options,
        flags: int = mmap.MAP_SHARED | mmap.MAP_POPULATE,
        prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
    ) -> None:
        self.file = file
        self.name = name
        self.layout = layout
        self.options = options
        self.memory = mmap.mmap(file.fd, layout.total_size, flags, prot)
        self.words = memoryview(self.memory)[: layout.slots].cast("Q")
        self.nonce = ""
        self.codec_name = ""
        self.spec = ""
        self.semaphores: list[Semaphore] = []

    def populate(self) -> None:
        """Map the pages that this process has not touched yet (a forked child's page table starts empty)."""
        with contextlib.suppress(OSError, ValueError):
            self.memory.madvise(getattr(mmap, "MADV_POPULATE_WRITE", 23))  # Linux 5.14

    # --- making one

    @classmethod
    def create(
        cls,
        name: str | None,
        layout: Layout,
        options: Options,
        codec_name: str,
        spec: str,
        prefault: bool,
        fill_in: Callable[[Segment], None],
    ) -> Segment:
        """Make a segment and its semaphores; `fill_in` makes it whole before it gets its name.

        Raises:
            InsufficientSharedMemory: if the file system has not the space; nothing is left behind.
            ChannelExists: if a live process uses the name, or a file that is no channel stands in the way.
        """
        nonce = secrets.token_hex(NONCE_DIGITS // 2)
        if name is None:
            name = nonce
        _check_space(name, layout.total_size)
        new_name = NEW_PREFIX + nonce
        file = None
        try:
            file = LockedFile(_make_file())
            if not host.RECORD_LOCKS:
                file.move_locks(_make_file())
            file.try_lock(LOCK_ENTRIES)  # the creator's entry: from now on its process is seen to live
            _reserve(file.fd, layout.total_size)
            flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if prefault else 0)
            segment = cls(file, name, layout, options, flags)
            segment.nonce = nonce
            segment.codec_name = codec_name
            segment.spec = spec
            words = segment.words
            words[VERSION] = LAYOUT_VERSION
            words[CAPACITY] = layout.capacity
            words[SLOT_SIZE] = layout.slot_size
            words[MAX_PARTICIPANTS] = layout.max_participants
            words[OPTIONS] = options.pack()
            words[TOTAL_SIZE] = layout.total_size
            words[GEN] = FIRST_GEN
            _put_text(segment, NONCE, nonce)
            _put_text(segment, CODEC_NAME, codec_name)
            _put_text(segment, layout.spec // WORD_SIZE, spec)
            words[SPEC_NBYTES] = layout.spec_nbytes
            words[MAGIC] = MAGIC_VALUE
            if not host.RECORD_LOCKS:
                _link(file.lock_fd, LOCKS_PREFIX + nonce)
            _link(file.fd, new_name)
            for index, tokens in enumerate(_FIRST_TOKENS):
                semaphores.create(_semaphore_name(nonce, index), tokens)
            segment.semaphores = _open_semaphores(nonce)
            fill_in(segment)
            _link_reclaiming(file, name)
        except BaseException as error:
            if file is not None:
                _remove(file, path_of(name), nonce)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise _insufficient(name, layout.total_size) from error
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{SHM_DIRECTORY}/{new_name}")
        return segment

    # --- opening one

    @classmethod
    def open(cls, name: str, nonce: str | None = None) -> Segment:
        """Open the segment of that name (and that nonce, if given), checked against its layout.

        Raises:
            ChannelNotFound, ChannelForbidden, ChannelCorrupted, IncompatibleChannel
        """
        file = open_file(name)
        header = Header(file, name)
        if not header.live:
            with contextlib.suppress(ChannelExists):  # somebody just made a new one
                reclaim(name)
            raise ChannelNotFound(
                errno.ENOENT, f"channel {name!r} is gone: all processes that used it have died. Make a new one"
            )
        header.check_version()
        if nonce is not None and header.nonce != nonce:
            raise ChannelNotFound(errno.ENOENT, f"channel {name!r} is gone; another of the same name took its place")
        segment = cls(file, name, *header.check_layout())
        segment._identify(header)
        try:
            segment.semaphores = _open_semaphores(header.nonce)
        except FileNotFoundError:
            raise ChannelNotFound(errno.ENOENT, f"channel {name!r} has been closed by its creator") from None
        return segment

    @classmethod
    def observe(cls, name: str) -> Segment:
        """Open the segment of that name to look at it, whether anybody lives who uses it or not; without semaphores.

        Raises:
            ChannelNotFound, ChannelForbidden, ChannelCorrupted, IncompatibleChannel
        """
        file = open_file(name)
        header = Header(file, name)
        header.check_version()
        segment = cls(file, name, *header.check_layout(), mmap.MAP_SHARED, mmap.PROT_READ)
        segment._identify(header)
        return segment

    def _identify(self, header: Header) -> None:
        self.nonce = header.nonce
        self.codec_name = _get_text(self, CODEC_NAME, CODEC_NAME_NBYTES)
        self.spec = _get_text(self, self.layout.spec // WORD_SIZE, self.layout.spec_nbytes)

    # --- removing its names

    def remove_names(self, unless_used: bool = False) -> None:
        """Remove the segment's and the semaphores' names, if they are still this segment's.

        With `unless_used`, not if another process is attached: see `reclaim` for one that attaches meanwhile.
        """
        if not _lock_name(self.file, patience=1.0):
            return  # another is at it
        try:
            gone = self.words[NAME_GONE]
            self.words[NAME_GONE] = 1
            if unless_used and self.file.locked_elsewhere(LOCK_ENTRIES, 0):
                self.words[NAME_GONE] = gone
                return
            _remove(self.file, path_of(self.name), self.nonce)
        finally:
            self.file.unlock(LOCK_NAME)

    @property
    def named(self) -> bool:
        """Whether the name still leads to this segment."""
        return not self.words[NAME_GONE] and _leads_to(path_of(self.name), self.file)


class Header:
    """What a file says of itself, read without mapping it."""

    def __init__(self, file: LockedFile, name: str, prefix: str = PREFIX) -> None:
        self._file = file
        self._name = name
        path = path_of(name, prefix)
        if file.size < HEADER_NBYTES:
            raise ChannelCorrupted(
                f"{path} is no ringshm segment: it has {file.size} bytes. Remove it, or use another name"
            )
        raw = os.pread(file.fd, HEADER_NBYTES, 0)
        self.words = memoryview(raw).cast("Q")
        if self.words[MAGIC] != MAGIC_VALUE:
            raise ChannelCorrupted(
                f"{path} is no ringshm segment: it begins with {raw[:8]!r}. Remove it, or use another name"
            )
        self.version = self.words[VERSION]
        nonce = raw[NONCE * WORD_SIZE : NONCE * WORD_SIZE + NONCE_DIGITS]
        if len(nonce.strip(b"0123456789abcdef")):
            raise ChannelCorrupted(f"{path} is a damaged ringshm segment: its nonce is {nonce!r}. Remove it")
        self.nonce = nonce.decode()

    @property
    def live(self) -> bool:
        """Whether a process that lives uses the segment; the lock bytes are the same in every layout version."""
        return self._file.locked_elsewhere(LOCK_ENTRIES, 0)

    def check_version(self) -> None:
        """Refuse another layout version."""
        if self.version != LAYOUT_VERSION:
            raise IncompatibleChannel(
                f"channel {self._name!r} has layout version {self.version}, this ringshm reads {LAYOUT_VERSION}: "
                "use the same version of ringshm in all processes"
            )

    def check_layout(self) -> tuple[Layout, Options]:
        """The layout and options, if they agree with the size of the file."""
        words = self.words
        try:
            options = Options.unpack(words[OPTIONS])
        except ValueError as error:
            raise ChannelCorrupted(f"{path_of(self._name)} is a damaged ringshm segment: {error}") from None
        cells = PIN_CELLS if options.kind == "Latest" else 0
        layout = Layout(words[CAPACITY], words[SLOT_SIZE], words[MAX_PARTICIPANTS], words[SPEC_NBYTES], cells)
        sound = layout.capacity > 0 and layout.slot_size > 0 and 0 < layout.max_participants < MAX_ENTRIES
        if not sound or layout.total_size != words[TOTAL_SIZE] or words[TOTAL_SIZE] != self._file.size:
            raise ChannelCorrupted(
                f"{path_of(self._name)} is a damaged ringshm segment: capacity {layout.capacity}, slot_size "
                f"{layout.slot_size} and {layout.max_participants} participants do not make {self._file.size} bytes"
            )
        return layout, options


def open_file(name: str, prefix: str = PREFIX) -> LockedFile:
    """Open the file of that name (see `path_of`), if it is a regular file of this user.

    Raises:
        ChannelNotFound, ChannelForbidden, ChannelCorrupted
    """
    path = path_of(name, prefix)
    try:
        fd = posix_ipc.SharedMemory(f"/{_file_name(name, prefix)}").fd
    except posix_ipc.ExistentialError:
        raise ChannelNotFound(errno.ENOENT, f"there is no channel {name!r}: is its creator running?") from None
    except posix_ipc.PermissionsError:
        raise ChannelForbidden(errno.EACCES, f"channel {name!r} ({path}) belongs to another user") from None
    except (OSError, ValueError) as error:  # a symbolic link, a directory
        if isinstance(error, OSError) and error.errno is None:  # posix_ipc's own words for no descriptor left
            raise OSError(errno.EMFILE, str(error), path) from None
        raise ChannelCorrupted(f"{path} is no ringshm segment: {error}. Remove it, or use another name") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ChannelCorrupted(f"{path} is no ringshm segment but a special file. Remove it, or use another name")
        if status.st_uid != os.geteuid():
            raise ChannelForbidden(errno.EACCES, f"channel {name!r} ({path}) belongs to user {status.st_uid}")
    except BaseException:
        os.close(fd)
        raise
    file = LockedFile(fd)
    if (carrier := _open_carrier(fd)) >= 0:
        file.move_locks(carrier)
    return file


def _make_file() -> int:
    """A file of /dev/shm that has no name yet."""
    fd = os.open(SHM_DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)  # whatever the umask
    return fd


def _open_carrier(fd: int) -> int:
    """The file that carries the locks of the segment in that file, if there is one beside it; else -1."""
    nonce = os.pread(fd, NONCE_DIGITS, NONCE * WORD_SIZE)
    if len(nonce) == NONCE_DIGITS and not nonce.strip(b"0123456789abcdef"):
        with contextlib.suppress(FileNotFoundError):
            path = path_of(nonce.decode(), LOCKS_PREFIX)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    return -1


def _check_space(name: str, needed: int) -> None:
    """Refuse what cannot fit before a page of it is taken."""
    space = os.statvfs(SHM_DIRECTORY)
    few_files = space.f_files > 0 and space.f_ffree < FILES_NEEDED
    if few_files or needed + _SEMAPHORES_NBYTES > space.f_bavail * space.f_frsize:
        raise _insufficient(name, needed)


def _insufficient(name: str, needed: int) -> InsufficientSharedMemory:
    space = os.statvfs(SHM_DIRECTORY)
    free = space.f_bavail * space.f_frsize
    if space.f_files > 0 and space.f_ffree < FILES_NEEDED and needed + _SEMAPHORES_NBYTES <= free:
        return InsufficientSharedMemory(
            f"channel {name!r} needs {FILES_NEEDED} files, {SHM_DIRECTORY} may have {space.f_ffree} more: remove some "
            f"(`ringshm clean` removes what dead processes left), or `mount -o remount,nr_inodes=0 {SHM_DIRECTORY}`"
        )
    return InsufficientSharedMemory(
        f"channel {name!r} needs {needed} bytes of shared memory, and {_SEMAPHORES_NBYTES} for its semaphores; "
        f"{SHM_DIRECTORY} has {free} free: make capacity or slot_size smaller, or the file system larger "
        f"(`docker run --shm-size=2g`; Kubernetes: an emptyDir with medium Memory on {SHM_DIRECTORY}; else "
        f"`mount -o remount,size=2G {SHM_DIRECTORY}`)"
    )


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


def _link(fd: int, name: str) -> None:
    """Give a file a name of /dev/shm; FileExistsError if there is one."""
    # `src_dir_fd` is ignored, but without it Python calls link(2), which does not follow /proc's link
    os.link(f"/proc/self/fd/{fd}", f"{SHM_DIRECTORY}/{name}", src_dir_fd=fd, follow_symlinks=True)


def _link_reclaiming(file: LockedFile, name: str) -> None:
    """Give a finished segment its name; reclaim the name first if only the dead have left it."""
    while True:
        try:
            return _link(file.fd, _file_name(name, PREFIX))
        except FileExistsError:
            reclaim(name)


def reclaim(name: str, prefix: str = PREFIX) -> None:
    """Remove what dead processes left under that name (see `path_of`); returns also if somebody else just did.

    A process that attaches at the same moment locks its entry and then looks at NAME_GONE; this sets NAME_GONE and
    then looks at the locks. So one of the two sees the other.

    Raises:
        ChannelExists: if a live process uses it, or it is no segment of this user.
    """
    exists = f"channel {name!r} exists: attach to it, or use another name"
    try:
        file = open_file(name, prefix)
        header = Header(file, name, prefix)
    except ChannelNotFound:
        return
    except ChannelCorrupted as error:
        raise ChannelExists(errno.EEXIST, str(error)) from error
    except ChannelForbidden as error:
        raise ChannelExists(errno.EEXIST, f"{error}: use another name") from error
    if header.live or not _lock_name(file, patience=1.0):
        raise ChannelExists(errno.EEXIST, exists)
    try:
        gone = NAME_GONE * WORD_SIZE
        os.pwrite(file.fd, (1).to_bytes(WORD_SIZE, sys.byteorder), gone)
        if header.live:
            os.pwrite(file.fd, bytes(WORD_SIZE), gone)
            raise ChannelExists(errno.EEXIST, exists)
        _remove(file, path_of(name, prefix), header.nonce)
    finally:
        file.unlock(LOCK_NAME)


def _lock_name(file: LockedFile, patience: float) -> bool:
    """Take the NAME lock, which is held for a few system calls only."""
    give_up = time.monotonic() + patience
    while not file.try_lock(LOCK_NAME):
        if time.monotonic() > give_up:
            return False
        time.sleep(0.001)
    return True


def _leads_to(path: str, file: LockedFile) -> bool:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == file.identity


def _remove(file: LockedFile, named: str, nonce: str) -> None:
    """Remove the names; the caller holds the NAME lock of this inode, or has just made it."""
    _remove_semaphores(nonce)
    fifos.remove_orphans(nonce)
    for path in (path_of(nonce, NEW_PREFIX), named):  # a creator that was killed may have left the first
        if _leads_to(path, file):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path_of(nonce, LOCKS_PREFIX))

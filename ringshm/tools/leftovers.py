"""The files of ringshm in shared memory: list them, and remove those that only dead processes have used.

A segment is live while any byte from LOCK_ENTRIES on is locked. The kernel says so, alike for stopped processes, other
pid namespaces and every layout version (segment/locks.py). Killed processes may leave five kinds of files, which
`clean` removes:

    file                     left by                                                    an orphan if
    ringshm.<name>           processes of a channel that have all died
    ringshm-new.<nonce>      a creator that died before its channel had its name
    sem.ringshm.<nonce>.<k>  a person, or another layout version, who removed the       no segment has that nonce
                             segment; ringshm itself removes semaphores first
    ringshm-wake.<nonce>.…   a listener (fifos.py) that was killed, if no other         no segment has that nonce,
                             process was attached to remove its FIFO                    and it is not locked
    ringshm-ledger.<nonce>   a relay of ringshm.ray (ledger.py) that opened it while    no segment has that nonce
                             another process removed the segment

Why no live file is taken for an orphan:

1. A creator links ringshm-new.<nonce> before its first semaphore, and ringshm.<name> before it unlinks that name; a
   ledger comes after both. So while there are semaphores or a ledger of a live segment, some name leads to the segment.
2. Therefore everything else is listed first, and segments afterwards; and segments twice, since one listing may miss a
   creator that moves from the one name to the other behind its back.
3. Nonces are never used again: an orphan stays one.

No other file is touched. No symbolic link is followed, no file of another user is opened, and a file of this user that
is no segment is only reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ChannelCorrupted, ChannelExists, ChannelForbidden, ChannelNotFound
from ..segment import fifos, ledger
from ..segment.files import NEW_PREFIX, PREFIX, Header, Segment, check_name, open_file, reclaim
from ..segment.semaphores import SHM_DIRECTORY

_SEMAPHORE = re.compile(rf"sem\.{PREFIX}([0-9a-f]{{16}})\.\d+")


@dataclass(frozen=True)
class SegmentFile:
    """A file that has the name of a segment, and belongs to this user.

    Attributes:
        name: the channel's name; its nonce if it has no name yet.
        path: the file.
        named: whether it has its name already. If not, and it is dead, its creator was killed while it made it.
        live: whether a live process uses it.
        size: its size in bytes.
        age: seconds since it was made.
        nonce, version: from its header; "" and 0 if it is no segment.
        wrong: why it is no segment, and what to do; "" if it is one.
    """

    name: str
    path: str
    named: bool
    live: bool
    size: int
    age: float
    nonce: str = ""
    version: int = 0
    wrong: str = ""

    @property
    def removable(self) -> bool:
        """Whether only dead processes have used it."""
        return not (self.live or self.wrong)


@dataclass(frozen=True)
class Leftovers:
    """The files of ringshm in shared memory.

    Attributes:
        segments: files of this user, by name.
        orphans: paths of this user's semaphores, FIFOs and ledgers that belong to no segment.
        foreign: the number of other users' files.
    """

    segments: tuple[SegmentFile, ...]
    orphans: tuple[str, ...]
    foreign: int

    @property
    def dead(self) -> tuple[SegmentFile, ...]:
        """The segments that only dead processes have used."""
        return tuple(segment for segment in self.segments if segment.removable)


def look() -> Leftovers:
    """List the files, and change nothing."""
    files = os.listdir(SHM_DIRECTORY)
    beside = {name: match[1] for name in files if (match := _SEMAPHORE.fullmatch(name) or ledger.NAME.fullmatch(name))}
    wakes = [(name, match[1]) for name in files if (match := fifos.NAME.fullmatch(name))]
    names = {name for _ in range(2) for name in os.listdir(SHM_DIRECTORY) if name.startswith((PREFIX, NEW_PREFIX))}
    own, foreign = _own([*names, *beside])
    examined = [_examine(name, own[name]) for name in sorted(names & own.keys())]
    segments = _without_copies([segment for segment in examined if segment is not None])
    nonces = {segment.nonce for segment in segments} | {name[len(NEW_PREFIX) :] for name in names}
    orphans = [
        f"{SHM_DIRECTORY}/{name}"
        for name in sorted(beside)
        if name in own and stat.S_ISREG(own[name].st_mode) and beside[name] not in nonces
    ]
    paths = [f"{SHM_DIRECTORY}/{name}" for name, nonce in sorted(wakes) if nonce not in nonces]
    orphans += filter(fifos.is_orphan, paths)
    return Leftovers(tuple(segments), tuple(orphans), foreign)


def names() -> list[str]:
    """Names of this user's files that may be channels. Cheaper than `look`, which opens each."""
    files = [name for name in os.listdir(SHM_DIRECTORY) if name.startswith(PREFIX)]
    own, _ = _own(files)
    return sorted(name[len(PREFIX) :] for name, status in own.items() if stat.S_ISREG(status.st_mode))


def observe(name: str) -> Segment:
    """`Segment.observe` for a name that a person has typed: the errors say what to do.

    Raises:
        ValueError: if no channel can have that name.
        ChannelNotFound, ChannelForbidden, ChannelCorrupted, IncompatibleChannel
    """
    try:
        return Segment.observe(check_name(name))
    except ChannelNotFound:
        raise ChannelNotFound(f"there is no channel {name!r}: `ringshm ls` lists the channels of this user") from None


def clean() -> tuple[tuple[SegmentFile, ...], tuple[str, ...]]:
    """Remove the files that only dead processes have used.

    Safe at any time: everything that a live process uses or is making stays. A process that attaches or creates at the
    same moment gets no other error than a little earlier or later.

    Returns:
        The segments that were removed, and the paths of the orphans.
    """
    removed = []
    for segment in look().dead:
        try:
            reclaim(segment.path)
        except ChannelExists:
            continue  # a process has just made a new one
        removed.append(segment)
    orphans = look().orphans
    for path in orphans:
        with contextlib.suppress(FileNotFoundError):  # another process cleans, too
            if stat.S_ISFIFO(os.lstat(path).st_mode):
                fifos.remove_orphan(path)
            else:
                os.unlink(path)
    return tuple(removed), orphans


def _own(names: Iterable[str]) -> tuple[dict[str, os.stat_result], int]:
    """The files that belong to this user, and the number of those that do not."""
    own: dict[str, os.stat_result] = {}
    foreign = 0
    for name in names:
        try:
            status = os.lstat(f"{SHM_DIRECTORY}/{name}")
        except FileNotFoundError:
            continue
        if status.st_uid == os.geteuid():
            own[name] = status
        else:
            foreign += 1
    return own, foreign


def _examine(file_name: str, status: os.stat_result) -> SegmentFile | None:
    """Look at one file of this user; None if it has just gone."""
    named = file_name.startswith(PREFIX)
    name = file_name[len(PREFIX if named else NEW_PREFIX) :]
    path = f"{SHM_DIRECTORY}/{file_name}"
    age = max(0.0, time.time() - status.st_mtime)  # stores into the mapping do not count as writing
    try:
        if not stat.S_ISREG(status.st_mode):  # not even opened: to open a device may do something
            raise ChannelCorrupted(f"{path} is no ringshm segment but a special file or a link. Remove it")
        file = open_file(path)
        header = Header(file, path)
    except ChannelNotFound:
        return None
    except (ChannelCorrupted, ChannelForbidden) as error:
        wrong = str(error.args[-1])
        return SegmentFile(name, path, named, live=False, size=status.st_size, age=age, wrong=wrong)
    return SegmentFile(name, path, named, file.used_elsewhere, file.size, age, header.nonce, header.version)


def _without_copies(segments: list[SegmentFile]) -> list[SegmentFile]:
    """Mark dead copies of live segments as wrong: `clean` would remove the live one's semaphores with the copy."""
    live = {segment.nonce: segment.name for segment in segments if segment.live}
    for at, segment in enumerate(segments):
        if segment.removable and segment.nonce in live:
            wrong = f"{segment.path} is a copy of the live channel {live[segment.nonce]!r}. Remove it"
            segments[at] = dataclasses.replace(segment, wrong=wrong)
    return segments

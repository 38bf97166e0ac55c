"""What there is of ringshm in shared memory, and removing what only the dead have left.

A segment is live while any byte from LOCK_ENTRIES on is locked: so says the kernel, for stopped processes and those of
other pid namespaces too, and alike for every layout version (segment.py). Five things may be left by processes that
were killed, and `clean` removes them:

    ringshm.<name>          a channel whose processes have all died
    ringshm-new.<nonce>     a channel whose creator died before it had its name
    sem.ringshm.<nonce>.<k> semaphores of a segment that has gone; ringshm itself removes these first, so only a file
                            that was removed by hand, or by another layout version, leaves them
    ringshm-wake.<nonce>.…  FIFOs (fifos.py), which those who were killed have left. The living who are still attached
                            remove them, or who removes the segment's name; if neither is left, they are orphans. Each
                            is locked while its process lives, whether the segment has its name or not
    ringshm-lock.<nonce>    where a segment cannot carry locks (host.py), the file that does; locked while anybody is
                            attached. It goes last, so whoever was killed just before has left it

A creator links ringshm-new.<nonce> before its first semaphore, and ringshm.<name> before it unlinks that: from the
first semaphore to the last some name leads to the segment. So all else is listed first, segments afterwards; and
twice, since one listing may miss a creator that moves from the one name to the other behind its back. Nonces are never
used again: what is an orphan stays one.

Nothing else is touched: no symbolic link is followed, no file of another user opened, and a file of this user that is
no segment is only reported.
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

from . import fifos
from .errors import ChannelCorrupted, ChannelExists, ChannelForbidden, ChannelNotFound
from .segment import (
    LOCKS_PREFIX,
    NEW_PREFIX,
    PREFIX,
    Header,
    LockedFile,
    Segment,
    check_name,
    open_file,
    path_of,
    reclaim,
)
from .semaphores import SHM_DIRECTORY

_BESIDE = re.compile(r"sem\.ringshm\.([0-9a-f]{16})\.\d+|ringshm-lock\.([0-9a-f]{16})")


@dataclass(frozen=True)
class SegmentFile:
    """A file that bears the name of a segment, and belongs to this user.

    Attributes:
        name: the channel's name; of one that has none yet, its nonce.
        path: the file.
        named: whether it has its name already; if it has not and is dead, its creator was killed while it made it.
        live: whether a process that lives uses it.
        size: its size in bytes.
        age: seconds since it was made.
        nonce, version: what it says of itself; "" and 0 if it is no segment.
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
    """What there is of ringshm in shared memory.

    Attributes:
        segments: files of this user, by name.
        orphans: paths of semaphores, FIFOs and files of locks of this user that no segment bears.
        foreign: how many files of ringshm other users have there.
    """

    segments: tuple[SegmentFile, ...]
    orphans: tuple[str, ...]
    foreign: int

    @property
    def dead(self) -> tuple[SegmentFile, ...]:
        """The segments that only dead processes have used."""
        return tuple(segment for segment in self.segments if segment.removable)


def look() -> Leftovers:
    """List what there is, and change nothing."""
    files = os.listdir(SHM_DIRECTORY)
    beside = {name: match[1] or match[2] for name in files if (match := _BESIDE.fullmatch(name))}
    wakes = [(name, match[1]) for name in files if (match := fifos.NAME.fullmatch(name))]
    names = {name for _ in range(2) for name in os.listdir(SHM_DIRECTORY) if name.startswith((PREFIX, NEW_PREFIX))}
    own, foreign = _own([*names, *beside])
    examined = [_examine(name, own[name]) for name in sorted(names & own.keys())]
    segments = _without_copies([segment for segment in examined if segment is not None])
    borne = {segment.nonce for segment in segments} | {name[len(NEW_PREFIX) :] for name in names}
    orphans = [
        f"{SHM_DIRECTORY}/{name}"
        for name in sorted(beside)
        if name in own and stat.S_ISREG(own[name].st_mode) and beside[name] not in borne
        if not (name.startswith(LOCKS_PREFIX) and _locked(f"{SHM_DIRECTORY}/{name}"))
    ]
    paths = [f"{SHM_DIRECTORY}/{name}" for name, nonce in sorted(wakes) if nonce not in borne]
    orphans += filter(fifos.is_orphan, paths)
    return Leftovers(tuple(segments), tuple(orphans), foreign)


def names() -> list[str]:
    """Names of this user's files that may be channels; cheaper than `look`, which opens each."""
    files = [name for name in os.listdir(SHM_DIRECTORY) if name.startswith(PREFIX)]
    own, _ = _own(files)
    return sorted(name[len(PREFIX) :] for name, status in own.items() if stat.S_ISREG(status.st_mode))


def observe(name: str) -> Segment:
    """`Segment.observe` of a name that somebody has typed: errors say what to do about that.

    Raises:
        ValueError: if no channel can have that name.
        ChannelNotFound, ChannelForbidden, ChannelCorrupted, IncompatibleChannel
    """
    try:
        return Segment.observe(check_name(name))
    except ChannelNotFound:
        raise ChannelNotFound(f"there is no channel {name!r}: `ringshm ls` lists those there are") from None


def clean() -> tuple[tuple[SegmentFile, ...], tuple[str, ...]]:
    """Remove what only dead processes have left; the segments that were removed, and the paths of what lay beside.

    Safe at any time: whatever a live process uses or is making stays, and who attaches or creates at the same moment
    gets no other error than if it had come a little earlier or later.
    """
    removed = []
    for segment in look().dead:
        try:
            reclaim(os.path.basename(segment.path), "")
        except ChannelExists:
            continue  # somebody just made a new one
        removed.append(segment)
    orphans = look().orphans
    for path in orphans:
        with contextlib.suppress(FileNotFoundError):  # somebody else cleans too
            if stat.S_ISFIFO(os.lstat(path).st_mode):
                fifos.remove_orphan(path)
            else:
                os.unlink(path)
    return tuple(removed), orphans


def _locked(path: str) -> bool:
    """Whether a process holds a lock there, or nothing is there any more."""
    try:
        return LockedFile(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)).locked_elsewhere(0, 0)
    except FileNotFoundError:
        return True


def _own(names: Iterable[str]) -> tuple[dict[str, os.stat_result], int]:
    """The files that belong to this user, and how many do not."""
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
    """What a file of this user is; None if it has just gone."""
    named = file_name.startswith(PREFIX)
    name = file_name[len(PREFIX if named else NEW_PREFIX) :]
    path = path_of(file_name, "")
    age = max(0.0, time.time() - status.st_mtime)  # stores into the mapping do not count as writing
    try:
        if not stat.S_ISREG(status.st_mode):  # not even opened: that of a device may do something
            raise ChannelCorrupted(f"{path} is no ringshm segment but a special file or a link. Remove it")
        file = open_file(file_name, "")
        header = Header(file, file_name, "")
    except ChannelNotFound:
        return None
    except (ChannelCorrupted, ChannelForbidden) as error:
        wrong = str(error.args[-1])
        return SegmentFile(name, path, named, live=False, size=status.st_size, age=age, wrong=wrong)
    return SegmentFile(name, path, named, header.live, file.size, age, header.nonce, header.version)


def _without_copies(segments: list[SegmentFile]) -> list[SegmentFile]:
    """Call wrong what bears the nonce of a live segment and is dead: with it, that one's semaphores would go."""
    live = {segment.nonce: segment.name for segment in segments if segment.live}
    return [
        dataclasses.replace(
            segment, wrong=f"{segment.path} is a copy of the live channel {live[segment.nonce]!r}. Remove it"
        )
        if segment.removable and segment.nonce in live
        else segment
        for segment in segments
    ]

"""Reading the invitations of a segment: which handles are on their way, and whether they may still arrive.

process/invitations.py issues and redeems them. An observer (stats.py), which has no entry, reads them here, too.

An invitation that is TETHERED is for one process, and counts while that lives. Two things say so:

1. Its byte is locked, by an open file description of its own that the process has had from its start. The kernel drops
   the lock with the last copy. That holds in every container.
2. A copy may be left: in a child of that process, say. So where the pid is known and holds in this pid namespace, the
   process must be there, too: with the same begin (a pid is used again), and not as a zombie.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import suppress_own
from ..segment import layout
from ..segment.files import Segment
from ..segment.layout import LOCK_INVITATIONS, PLACE_NBYTES, RECEIVER, ROLE_MASK, SENDER, STARTED, TETHERED, WORD_SIZE
from ..system import monotonic_ns
from .participants import Participants


@dataclass(frozen=True)
class Invited:
    """One invitation.

    Attributes:
        index: of its record.
        number: its number.
        kind: role and bits; see layout.
        counts: whether its handle may still arrive.
        maker: pid of the process that issued it, in its own pid namespace; 0 if that is gone.
        pid: the process that it is for; 0: not known.
        seconds: since it was issued.
        place: where in the program that was.
    """

    index: int
    number: int
    kind: int
    counts: bool
    maker: int
    pid: int
    seconds: float
    place: str

    @property
    def role(self) -> int:
        """SENDER, RECEIVER or UNDECIDED."""
        return self.kind & ROLE_MASK

    @property
    def may_send(self) -> bool:
        """Whether its handle may send."""
        return self.role != RECEIVER

    @property
    def lost(self) -> bool:
        """Whether it was for a process that was started with the handle, and has ended before it had attached."""
        return bool(self.kind & STARTED) and not self.counts

    def may(self, role: int) -> bool:
        """Whether its handle may take that role. One that may do both does not count as a receiver."""
        return self.role == role or (role == SENDER and self.may_send)


def began(pid: int) -> int:
    """When a process of this pid namespace began, in clock ticks since boot.

    Returns:
        0 if there is no such process, or it is a zombie.

    Raises:
        OSError: if /proc does not tell.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return 0
    except PermissionError:
        pass
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read(4096).rpartition(b")")[2].split()  # from the third one on
    except ProcessLookupError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def pid_namespace() -> int:
    """The inode of this process's pid namespace; 0 if /proc does not tell."""
    with suppress_own(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def _lives(words: memoryview, record: int) -> bool:
    """Whether the process of a tethered invitation is there, as far as its pid tells."""
    pid, namespace = words[record + layout.I_PID], words[record + layout.I_NAMESPACE]
    if not pid or not namespace or namespace != pid_namespace():
        return True
    with suppress_own(OSError):
        return began(pid) == words[record + layout.I_BEGAN]
    return True


def _column(segment: Segment, offset: int) -> list[int]:
    """That word of every invitation that was ever used."""
    words, shape = segment.words, segment.layout
    size, count = layout.INVITATION_WORDS, min(words[layout.HIGH_INVITATION], shape.max_participants)
    start = shape.invitations + offset
    return segment.numbers[start : start + count * size : size].tolist() if count else []


def sent_off(segment: Segment, maker: int) -> set[int]:
    """The roles of the handles that this maker (its owner value) has sent to nobody in particular, and that are not
    attached yet.
    """
    makers = _column(segment, layout.I_MAKER)
    if maker not in makers:
        return set()
    rows = zip(_column(segment, layout.I_NUMBER), makers, _column(segment, layout.I_KIND), strict=False)
    return {kind & ROLE_MASK for number, of, kind in rows if number and of == maker and not kind & TETHERED}


def invited(segment: Segment, participants: Participants) -> list[Invited]:
    """All invitations that were not redeemed, those that count no more included."""
    words, shape = segment.words, segment.layout
    numbers = _column(segment, layout.I_NUMBER)
    if not any(numbers):
        return []
    makers = {participants.owner_of(index): index for index in participants.in_use()}
    now = monotonic_ns()
    found = []
    for index, number in enumerate(numbers):
        if not number:
            continue
        record = shape.invitation(index)
        kind, maker = words[record + layout.I_KIND], makers.get(words[record + layout.I_MAKER])
        if kind & TETHERED:
            counts = segment.file.locked_elsewhere(LOCK_INVITATIONS + index) and _lives(words, record)
        else:
            counts = maker is not None and participants.has_handles(maker)
        if words[record + layout.I_NUMBER] != number:
            continue  # it was redeemed meanwhile: its handle counts by itself
        kind = words[record + layout.I_KIND]  # again: it is withdrawn by a store here, then an unlock
        at = (record + layout.I_PLACE) * WORD_SIZE
        found.append(
            Invited(
                index=index,
                number=number,
                kind=kind,
                counts=counts,
                maker=0 if maker is None else words[shape.entry(maker) + layout.P_PID],
                pid=words[record + layout.I_PID],
                seconds=(now - words[record + layout.I_SINCE]) / 1e9,
                place=bytes(segment.memory[at : at + PLACE_NBYTES]).rstrip(b"\0").decode(errors="replace"),
            )
        )
    return found

"""Waits that may never end: after ten seconds a call without a time limit says why it waits, if that is no honest wait.

A server that waits for work, and a learner whose actors are still starting, wait honestly. A call does not

1. where nobody but this process could end the wait: the channel has no name by which others could come, no living
   process is or may become the other role, and only this process's own handles keep the stream open (for a `put`: and
   this thread is the only one here that could receive);
2. where the maker of a `keep_open` channel, a Queue say, puts into a full ring, and its receivers have all gone;
3. where a stopped process holds a slot or a mutex.

The call gives one RuntimeWarning, with the sentence of `ringshm stats` (ring/diagnosis.py) and what to do. Where
warnings are errors it raises that, as an interrupt would, and the channel is as it was.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any

from ..process.attachment import Attachment
from ..process.seat import levels_to_the_user
from ..ring.diagnosis import diagnose, process_of
from ..ring.stats import ChannelStats, LatestStats, SegmentStats, departure_in, take_any_stats
from ..segment.layout import RECEIVER_GONE

#: Seconds that a call waits before it doubts.
SECONDS = 10.0


def warn_if_in_vain(attachment: Attachment, waiting_for: str, alone: bool) -> bool:
    """Give the warning, unless the wait is an honest one; whether it was given.

    Args:
        waiting_for: "message" or "version", "space" or "event", as in `ParticipantStats`.
        alone: whether no other thread or task of this process could end the wait.
    """
    hint = _what_to_do(attachment, waiting_for, alone)
    stats = _as_waiting(take_any_stats(attachment.segment, attachment.participants), attachment, waiting_for)
    others = [person for person in stats.participants if person.alive and person.pid != os.getpid()]
    looks = {person.pid: process_of(person.pid, attachment.segment.file.identity) for person in others}
    processes = {pid: process for pid, process in looks.items() if process is not None}
    stopped = {pid for pid, process in processes.items() if process.stopped}
    if not hint and not any(pid in stopped for pid in _holders(stats)):
        return False
    problems = [finding.text for finding in diagnose(stats, stats, processes) if finding.problem]
    text = ". ".join([*problems[:1], *([hint] if hint else [])])
    warnings.warn(
        f"channel {attachment.name!r}: this call has waited for {SECONDS:.0f} s: {text}",
        RuntimeWarning,
        stacklevel=levels_to_the_user(),
    )
    return True


def _as_waiting(stats: SegmentStats, attachment: Attachment, waiting_for: str) -> SegmentStats:
    """The stats, in which this process waits: just now it looks."""
    people = tuple(
        dataclasses.replace(person, waiting_for=waiting_for) if person.pid == os.getpid() else person
        for person in stats.participants
    )
    changes: dict[str, Any] = {"participants": people}
    if waiting_for in ("message", "version"):
        changes["waiting_receivers"] = max(1, stats.waiting_receivers)
    elif isinstance(stats, ChannelStats) and waiting_for == "space":
        changes["waiting_senders"] = max(1, stats.waiting_senders)
    return dataclasses.replace(stats, **changes)


def _holders(stats: SegmentStats) -> set[int]:
    """The processes that hold a slot, a version or a mutex."""
    holders = {person.pid for person in stats.participants if person.holds}
    if isinstance(stats, LatestStats):
        holders |= {held.pid for held in stats.held}
    elif isinstance(stats, ChannelStats):
        holders |= {slot.pid for slot in stats.slots}
    return holders


def _what_to_do(attachment: Attachment, waiting_for: str, alone: bool) -> str:
    """What ends a wait that nobody but this process could end; "" for another wait."""
    options = attachment.segment.options
    if options.named:
        return ""
    if options.keep_open:
        return _how_to_replace(attachment) if waiting_for == "space" and alone else ""
    if waiting_for in ("message", "version"):
        if attachment.others_may_send():
            return ""
        places = sorted({seat.made_at for seat in attachment.seats if seat.sent and seat.made_at})
        if places:
            handles = f"the handle{'s' * (len(places) > 1)} made at {', '.join(places)}"
            return (
                f"Only this process itself could still send, by {handles}: close what it does not need, "
                "or receive with a timeout"
            )
        return "Only this process itself could send: start a sender first, or receive with a timeout"
    if not alone or attachment.others_may_receive():
        return ""
    return (
        "Only this thread itself could receive: start a receiver first, make the channel with more slots, or send with "
        "a timeout"
    )


def _how_to_replace(attachment: Attachment) -> str:
    """What to do if other processes have received and have all gone; "" if they have not."""
    gone = departure_in(attachment.words[RECEIVER_GONE])
    if gone is None or gone.pid == os.getpid() or attachment.others_may_receive():
        return ""
    return f"Nobody is left who would receive ({gone}): start another worker, or put with a timeout"

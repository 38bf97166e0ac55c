"""Why a channel or a Latest stands still, in sentences: from two looks at it, and what /proc says of its processes.

What has moved between the two looks is not stuck. What has not is told in the order in which one would mend it: who
holds a mutex or a slot, what that keeps from moving, who is missing, who has died.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from .stats import ChannelStats, LatestStats, ParticipantStats, SegmentStats, SlotStats

_SAME_CALL = 0.001  # seconds: two looks compute the moment at which a call began to within some microseconds
_LONG = 1.0  # seconds for which a slot is written or read only by a process that is stopped, slow, or far into a borrow
_MOST_PIDS = 8


@dataclass(frozen=True)
class Process:
    """A process as this pid namespace sees it.

    Attributes:
        command: its short name.
        state: the kernel's letter: R, S, D, T (stopped), t (traced), Z.
    """

    command: str
    state: str

    @property
    def stopped(self) -> bool:
        """Whether it is stopped, by a signal or a debugger."""
        return self.state in ("T", "t")


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        problem: whether it keeps something from moving that wants to.
        text: a sentence: what is, and where something can be done, what.
    """

    problem: bool
    text: str


def process_of(pid: int, identity: tuple[int, int], proc: str = "/proc") -> Process | None:
    """The process of that pid, if it has the segment of that (device, inode) open; None also if it cannot be seen.

    A pid alone proves nothing: it may have been counted in another pid namespace, or be somebody else's by now.
    """
    try:
        if not any(_leads_to(f"{proc}/{pid}/fd/{fd}", identity) for fd in os.listdir(f"{proc}/{pid}/fd")):
            return None
    except OSError:
        return None
    return process_now(pid, proc)


def process_now(pid: int, proc: str = "/proc") -> Process | None:
    """What a process does that is known to be the one of that pid."""
    try:
        with open(f"{proc}/{pid}/stat", encoding="utf-8", errors="replace") as file:
            command, _, rest = file.read().partition("(")[2].rpartition(")")
        return Process(command, rest.split()[0])
    except (OSError, IndexError):
        return None


def _leads_to(path: str, identity: tuple[int, int]) -> bool:
    try:
        status = os.stat(path)
    except OSError:  # closed meanwhile, or a file that was removed from a disk
        return False
    return (status.st_dev, status.st_ino) == identity


def seen_waiting(before: SegmentStats, person: ParticipantStats) -> ParticipantStats:
    """The participant; one that looks round between two slices of its wait as the look before has seen it."""
    for earlier in before.participants:
        if earlier.pid == person.pid and not person.waiting_for and _same_call(earlier, person):
            return dataclasses.replace(person, waiting_for=earlier.waiting_for)
    return person


Stats = TypeVar("Stats", bound=SegmentStats)


def diagnose(before: Stats, after: Stats, processes: Mapping[int, Process] | None = None) -> list[Finding]:
    """What keeps a channel or a Latest from moving, most telling first; at least one finding.

    Args:
        before, after: its stats at two moments, some 0.2 s apart.
        processes: what is known of its participants, by pid.
    """
    if isinstance(before, LatestStats) and isinstance(after, LatestStats):
        return _LatestDiagnosis(before, after, processes or {}).findings()
    assert isinstance(before, ChannelStats) and isinstance(after, ChannelStats)
    return _ChannelDiagnosis(before, after, processes or {}).findings()


class _Diagnosis(Generic[Stats]):
    """What is told of both."""

    def __init__(self, before: Stats, after: Stats, processes: Mapping[int, Process]) -> None:
        self.before, self.after, self.processes = before, after, processes
        people = after.participants
        self.living = [seen_waiting(before, person) for person in people if person.alive]
        self.senders = [person for person in self.living if person.senders]
        self.receivers = [person for person in self.living if person.receivers]
        self.problems: list[str] = []
        self.notes: list[str] = []

    def findings(self) -> list[Finding]:
        if not self.living:
            return [Finding(True, self.nobody_lives())]
        self.look_at_mutexes()
        self.look_at_traffic()
        self.look_at_the_dead()
        self.look_at_the_stopped()
        return [Finding(True, text) for text in self.problems] + [
            Finding(False, text) for text in [*self.notes, self.movement()]
        ]

    def nobody_lives(self) -> str:
        raise NotImplementedError

    def look_at_traffic(self) -> None:
        raise NotImplementedError

    def movement(self) -> str:
        raise NotImplementedError

    # --- what may be found

    def look_at_mutexes(self) -> None:
        for person in self.after.participants:
            held = [mutex for mutex in person.holds if self.holds_since_before(person, mutex)]
            if not held:
                continue
            what = f"the {' and the '.join(held)}' mutex"
            if not person.alive:
                self.problems.append(
                    f"process {person.pid} died while it held {what}: whoever waits recovers it within about 0.2 s"
                )
            elif self.is_stopped(person.pid):
                self.problems.append(
                    f"{self.who(person.pid)} holds {what}{_since(person)} and is stopped, which is not dead: "
                    f"nobody may take the mutex from it, others wait until their time-outs. {_wake(person.pid)}"
                )
            else:
                self.problems.append(
                    f"{self.who(person.pid)} holds {what}{_since(person)}, which takes microseconds: it is short of a "
                    "core, or was stopped and goes on now"
                )
        if self.before.recovering and self.after.recovering:
            self.notes.append("the mutexes are being recovered, which waits until no living process holds one")

    def look_at_the_dead(self) -> None:
        dead = [person for person in self.after.participants if not person.alive]
        if dead:
            self.problems.append(
                f"{_count(len(dead), 'participant')} ({self.pids(dead)}) died and {_are(dead)} not reaped yet: any "
                "participant that waits, or finds the ring full or empty, does that, and then others get what the dead "
                "had held"
            )

    def look_at_the_stopped(self) -> None:
        told = " ".join(self.problems)
        for person in self.living:
            if self.is_stopped(person.pid) and f"process {person.pid} " not in told:
                self.notes.append(
                    f"{self.who(person.pid)} is stopped: it lives, and counts as attached. {_wake(person.pid)}"
                )

    def look_at_waiting_flushes(self) -> None:
        for person in self.waiting_for("event"):
            self.notes.append(f"{self.who(person.pid)} waits in `flush` or `wait_for_peers`{_since(person)}")

    # --- what sentences are made of

    def why_nothing_is_sent(self, waiting: list[ParticipantStats]) -> str:
        senders = [person for person in self.senders if person not in waiting]
        if senders:
            return _latest_call(senders, "sender") + f" ({self.pids(senders)})"
        gone = self.after.last_sender_gone
        text = "no other process is attached as sender"
        text += f"; the last one: {gone}" if gone else ", nor has one been"
        return text + self.who_may_become("send", waiting)

    def who_may_become(self, verb: str, waiting: list[ParticipantStats]) -> str:
        alone = waiting[0].pid if len(waiting) == 1 else 0  # what it may still do ends no wait of its own
        undecided = [person for person in self.living if person.undecided and person.pid != alone]
        if undecided:
            return (
                f"; {self.pids(undecided)} hold{'s' * (len(undecided) == 1)} a handle that has neither sent nor "
                f"received yet, so may still {verb}: close it if it is not needed, or fix its role by `sender()` or "
                "`receiver()`"
            )
        if self.after.on_their_way:
            handles = _count(self.after.on_their_way, "handle")
            return f"; {handles} pickled or forked and not attached yet may still {verb}, for 60 s at most"
        return ""

    def waiting_for(self, what: str) -> list[ParticipantStats]:
        return [person for person in self.living if person.waiting_for == what]

    def holds_since_before(self, person: ParticipantStats, mutex: str) -> bool:
        return any(
            mutex in earlier.holds and earlier.pid == person.pid and _same_call(earlier, person)
            for earlier in self.before.participants
        )

    def is_stopped(self, pid: int) -> bool:
        process = self.processes.get(pid)
        return process is not None and process.stopped

    def who(self, pid: int) -> str:
        process = self.processes.get(pid)
        return f"process {pid}" + (f" ({process.command}, state {process.state})" if process else "")

    def pids(self, people: list[ParticipantStats]) -> str:
        pids = sorted({person.pid for person in people})
        return f"pid{'s' * (len(pids) > 1)} {listed(pids)}"


class _ChannelDiagnosis(_Diagnosis[ChannelStats]):
    def nobody_lives(self) -> str:
        left = f"; {_count(self.after.ready, 'message')} unread" if self.after.ready else ""
        return (
            f"no process that uses this channel is alive{left}: nothing will move. `ringshm clean` removes it, and so "
            "does the next creation of a channel of that name"
        )

    def look_at_traffic(self) -> None:
        self.look_at_slots()
        self.look_at_senders()
        self.look_at_receivers()

    def look_at_slots(self) -> None:
        groups: dict[tuple[int, str], list[SlotStats]] = {}
        earlier = {(slot.slot, slot.state, slot.pid) for slot in self.before.slots}
        for slot in self.after.slots:
            if (slot.slot, slot.state, slot.pid) in earlier and (slot.seconds or 0) >= _LONG:
                groups.setdefault((slot.pid, slot.state), []).append(slot)
        for (pid, state), slots in groups.items():
            seconds = max(slot.seconds or 0 for slot in slots)
            which = f"slot{'s' * (len(slots) > 1)} {listed(slot.slot for slot in slots)}"
            doing = {
                "writing": f"has been writing {which}",
                "reading": f"has been reading (decoding, or borrowing) {which}",
                "kept": f"keeps views of {which}, which are free when the last view is garbage",
            }[state]
            text = f"{self.who(pid)} {doing} for {_seconds(seconds)}"
            if not slots[0].alive:
                self.notes.append(f"{text}, and is dead: what it held goes back when it is reaped")
            elif self.is_stopped(pid):
                self.problems.append(f"{text} and is stopped. {_wake(pid)}")
            else:
                full = self.after.free == 0
                (self.problems if full else self.notes).append(text)

    def look_at_senders(self) -> None:
        after = self.after
        waiting = self.waiting_for("space")
        if after.shut_down:
            return
        if after.free:
            if waiting and after.ready and not self.taken:
                text = f"{self.pids(waiting)} waits until a message larger than a slot is received"
                self.problems.append(f"{text}; {self.why_nothing_is_received()}")
            return
        more = f", and {after.pieces} more of those that are larger than a slot" * bool(after.pieces)
        full = f"the ring is full: {after.ready} of {_count(after.capacity, 'slot')} hold messages that wait{more}"
        if not waiting:
            why = f"; {self.why_nothing_is_received()}" if after.ready and not self.taken else ""
            (self.notes if self.receivers or not after.ready else self.problems).append(full + why)
            return
        threads = max(after.waiting_senders, self.before.waiting_senders)
        wait = f"{_count(threads, 'thread')} wait{'s' * (threads == 1)} for space"
        text = f"{full}; {wait} ({self.pids(waiting)})"
        if self.taken:
            self.notes.append(f"{text}; messages are being received, but not as fast as they are sent")
        elif after.ready:
            self.problems.append(f"{text}; {self.why_nothing_is_received()}")
        else:
            self.problems.append(f"{text}; the slots are all in use: see above, or the table of slots")

    def look_at_receivers(self) -> None:
        after = self.after
        waiting = self.waiting_for("message")
        if after.ready and not self.taken and after.free and (not self.receivers or not waiting):
            text = f"{_count(after.ready, 'message')} wait{'s' * (after.ready == 1)}; {self.why_nothing_is_received()}"
            (self.notes if self.receivers else self.problems).append(text)
        if waiting and not after.ready and not self.sent:
            threads = max(after.waiting_receivers, self.before.waiting_receivers)
            wait = f"{_count(threads, 'thread')} wait{'s' * (threads == 1)} for a message"
            text = f"the ring is empty; {wait} ({self.pids(waiting)})"
            idle = min((person.called or 0 for person in self.senders if person not in waiting), default=_LONG)
            (self.problems if idle >= _LONG else self.notes).append(f"{text}; {self.why_nothing_is_sent(waiting)}")
        self.look_at_waiting_flushes()
        if after.shut_down:
            rest = f": receivers get the {_count(after.ready, 'message')} that are there, then the end" * (
                after.ready > 0
            )
            self.notes.append(f"the channel was shut down: nothing more is sent{rest}")

    def movement(self) -> str:
        if self.sent or self.taken:
            return (
                f"it moves: {_count(self.sent, 'message')} sent and {self.taken} received or dropped between two looks"
            )
        if self.problems or self.after.ready:
            return "nothing was sent or received between two looks"
        return "nothing waits to be received, and nothing was sent between two looks"

    @property
    def sent(self) -> int:
        return self.after.sent - self.before.sent

    @property
    def taken(self) -> int:
        return self.after.received + self.after.dropped - self.before.received - self.before.dropped

    def why_nothing_is_received(self) -> str:
        free = [person for person in self.receivers if person.waiting_for != "space"]
        if free:
            return _latest_call(free, "receiver") + f" ({self.pids(free)})"
        if self.receivers:
            return f"whoever receives waits for space itself ({self.pids(self.receivers)}), so nobody makes any"
        gone = self.after.last_receiver_gone
        text = "no receiver is attached" + (f"; the last one: {gone}" if gone else ", nor has there been one")
        return text + self.who_may_become("receive", self.waiting_for("space"))


class _LatestDiagnosis(_Diagnosis[LatestStats]):
    def nobody_lives(self) -> str:
        return (
            "no process that uses this Latest is alive: nothing will move. `ringshm clean` removes it, and so does the "
            "next creation of one of that name"
        )

    def look_at_traffic(self) -> None:
        after = self.after
        versions = {held.version for held in after.held}
        if len(versions) >= after.borrows:
            pids = listed(sorted({held.pid for held in after.held}))
            self.problems.append(
                f"readers ({pids}) hold {listed(sorted(versions))}, all the versions that borrows={after.borrows} "
                "allows: a further borrow gets TooManyBorrows, reads copy and go on"
            )
        waiting = self.waiting_for("version")
        if waiting and not self.published:
            wait = f"{_count(after.waiting_receivers, 'thread')} wait{'s' * (after.waiting_receivers == 1)}"
            text = f"{wait} for a newer version than {after.version} ({self.pids(waiting)})"
            idle = min((person.called or 0 for person in self.senders if person not in waiting), default=_LONG)
            (self.problems if idle >= _LONG else self.notes).append(f"{text}; {self.why_nothing_is_sent(waiting)}")
        self.look_at_waiting_flushes()

    def movement(self) -> str:
        if self.published:
            return f"it moves: {_count(self.published, 'version')} published between two looks"
        return f"nothing was published between two looks; the newest version is {self.after.version}"

    @property
    def published(self) -> int:
        return self.after.version - self.before.version


def _same_call(earlier: ParticipantStats, later: ParticipantStats) -> bool:
    """Whether the latest call of a participant is the same at both looks."""
    if earlier.called is None or later.called is None:
        return earlier.called is later.called
    return abs((later.attached - later.called) - (earlier.attached - earlier.called)) < _SAME_CALL


def _wake(pid: int) -> str:
    return f"`kill -CONT {pid}` lets it go on, `kill -KILL {pid}` gives what it holds to others"


def _since(person: ParticipantStats) -> str:
    return f" since at most {_seconds(person.called)} ago" if person.called is not None else ""


def _latest_call(people: list[ParticipantStats], role: str) -> str:
    called = [person.called for person in people if person.called is not None]
    if not called:
        return f"no {role} has called yet"
    return f"the latest call of a {role} began {_seconds(min(called))} ago"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _are(people: list[ParticipantStats]) -> str:
    return "is" if len(people) == 1 else "are"


def listed(numbers: Iterable[int]) -> str:
    """The first few of them, as text."""
    numbers = list(numbers)
    shown = ", ".join(str(number) for number in numbers[:_MOST_PIDS])
    return f"{shown}, ..." if len(numbers) > _MOST_PIDS else shown

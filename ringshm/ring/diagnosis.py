"""Why a channel or a Latest stands still, in sentences: from two looks at it, and from /proc on its processes.

A channel that has moved between the two looks is not stuck. Of one that has not, the sentences come in the order in
which a person would mend it:

1. which process holds a mutex or a slot, and what waits for that;
2. which side is missing or does not call;
3. which processes have died or are stopped.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import suppress_own
from .stats import ChannelStats, LatestStats, OnTheirWay, ParticipantStats, SegmentStats, SlotStats

_MOST_LISTED = 8
_SAME_CALL = 0.001  # seconds: two looks compute the moment at which a call began to within some microseconds
_LONG = 1.0  # seconds for which a slot is written or read only by a process that is stopped, slow, or far into a borrow


def count(number: int, thing: str) -> str:
    """A number of things, such as 2 slots."""
    return f"{number} {thing}{'s' * (number != 1)}"


def listed(numbers: Iterable[int]) -> str:
    """The first few numbers, separated by commas, and how many more there are."""
    numbers = list(numbers)
    shown = ", ".join(str(number) for number in numbers[:_MOST_LISTED])
    return f"{shown} and {len(numbers) - _MOST_LISTED} more" if len(numbers) > _MOST_LISTED else shown


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
        problem: whether it keeps a process from going on.
        text: a sentence that says what is the case, and what to do if something can be done.
    """

    problem: bool
    text: str


def process_of(pid: int, identity: tuple[int, int], proc: str = "/proc") -> Process | None:
    """The process of that pid, if it has the segment of that (device, inode) open. None also if it cannot be seen.

    A pid alone proves nothing: it may come from another pid namespace, or belong to another process by now.
    """
    with suppress_own(OSError):
        return process_now(pid, proc) if _has_open(f"{proc}/{pid}/fd", identity) else None
    return None


def process_now(pid: int, proc: str = "/proc") -> Process | None:
    """The process of that pid, which the caller knows to be the right one."""
    with suppress_own(OSError, IndexError), open(f"{proc}/{pid}/stat", encoding="utf-8", errors="replace") as file:
        command, _, rest = file.read().partition("(")[2].rpartition(")")
        return Process(command, rest.split()[0])
    return None


def _has_open(fds: str, identity: tuple[int, int]) -> bool:
    return any(_leads_to(f"{fds}/{fd}", identity) for fd in os.listdir(fds))


def _leads_to(path: str, identity: tuple[int, int]) -> bool:
    with suppress_own(OSError):  # closed meanwhile, or a file that was removed from a disk
        status = os.stat(path)
        return (status.st_dev, status.st_ino) == identity
    return False


def seen_waiting(before: SegmentStats, person: ParticipantStats) -> ParticipantStats:
    """The participant. If it is just between two slices of its wait, its `waiting_for` is that of the look before."""
    for earlier in before.participants:
        if earlier.pid == person.pid and not person.waiting_for and _same_call(earlier, person):
            return dataclasses.replace(person, waiting_for=earlier.waiting_for)
    return person


Stats = TypeVar("Stats", bound=SegmentStats)


def diagnose(before: Stats, after: Stats, processes: Mapping[int, Process] | None = None) -> list[Finding]:
    """What keeps a channel or a Latest from moving, the most telling first; at least one finding.

    Args:
        before, after: its stats at two moments, some 0.2 s apart.
        processes: those of its participants that are known, by pid.
    """
    if isinstance(before, LatestStats) and isinstance(after, LatestStats):
        return _LatestDiagnosis(before, after, processes or {}).findings()
    assert isinstance(before, ChannelStats) and isinstance(after, ChannelStats)
    return _ChannelDiagnosis(before, after, processes or {}).findings()


def on_its_way(handle: OnTheirWay) -> str:
    """A handle that is not attached yet, until when it counts, and where it was pickled."""
    where = f" at {handle.place}" if handle.place else ""
    age = f"{handle.seconds:.1f} s ago{where}"
    if handle.started:
        child = f"process {handle.pid}" if handle.pid else "a child"
        return f"a handle of {child}, which was started {age} and has not attached yet"
    return f"a handle that process {handle.maker} pickled {age}, and that counts until it closes its own"


class _Diagnosis(Generic[Stats]):
    """The sentences that hold for both."""

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
        self.notes.append(self.movement())
        return [Finding(True, text) for text in self.problems] + [Finding(False, text) for text in self.notes]

    def nobody_lives(self) -> str:
        raise NotImplementedError

    def look_at_traffic(self) -> None:
        raise NotImplementedError

    def movement(self) -> str:
        raise NotImplementedError

    # --- findings

    def look_at_mutexes(self) -> None:
        for person in self.after.participants:
            held = [mutex for mutex in person.holds if self.holds_since_before(person, mutex)]
            if not held:
                continue
            what = f"the {' and the '.join(held)}' mutex"
            if not person.alive:
                text = f"process {person.pid} died while it held {what}: a waiter recovers it within about 0.2 s"
                self.problems.append(text)
            elif self.is_stopped(person.pid):
                self.problems.append(
                    f"{self.who(person.pid)} holds {what}{_since(person)} and is stopped. It is not dead, "
                    f"so no process may take the mutex from it; others wait until their time-outs. {_wake(person.pid)}"
                )
            else:
                self.problems.append(
                    f"{self.who(person.pid)} holds {what}{_since(person)}, which takes microseconds as a rule: "
                    "it is short of a core, or was stopped and goes on now"
                )
        if self.before.recovering and self.after.recovering:
            self.notes.append("the mutexes are being recovered; that waits until no living process holds one")

    def look_at_the_dead(self) -> None:
        dead = [person for person in self.after.participants if not person.alive]
        if dead:
            are = "is" if len(dead) == 1 else "are"
            self.problems.append(
                f"{count(len(dead), 'participant')} ({self.pids(dead)}) died and {are} not reaped yet: "
                "the next participant that waits, or finds the ring full or empty, reaps them and frees what they held"
            )

    def look_at_the_stopped(self) -> None:
        told = " ".join(self.problems)
        for person in self.living:
            if self.is_stopped(person.pid) and f"process {person.pid} " not in told:
                text = f"{self.who(person.pid)} is stopped. It lives, and counts as attached. {_wake(person.pid)}"
                self.notes.append(text)

    def look_at_waiting_flushes(self) -> None:
        for person in self.waiting_for("event"):
            self.notes.append(f"{self.who(person.pid)} waits in `flush` or `wait_for_peers`{_since(person)}")

    def tell_wait(self, text: str, waiting: list[ParticipantStats]) -> None:
        """For a message or version: a problem, unless a sender has just called."""
        idle = min((person.called or 0 for person in self.senders if person not in waiting), default=_LONG)
        (self.problems if idle >= _LONG else self.notes).append(f"{text}; {self.why_nothing_is_sent(waiting)}")

    # --- parts of sentences

    def why_nothing_is_sent(self, waiting: list[ParticipantStats]) -> str:
        senders = [person for person in self.senders if person not in waiting]
        if senders:
            return _latest_call(senders, "sender") + f" ({self.pids(senders)})"
        gone = self.after.last_sender_gone
        text = "no other process is attached as sender"
        text += f"; the last one: {gone}" if gone else ", nor has one been"
        return text + self.who_may_become("send", waiting)

    def who_may_become(self, verb: str, waiting: list[ParticipantStats]) -> str:
        alone = waiting[0].pid if len(waiting) == 1 else 0  # its own handles cannot end its own wait
        sends = verb == "send"
        others = [person for person in self.living if person.pid != alone]
        undecided = [person for person in others if (person.undecided if sends else person.may_receive)]
        if undecided:
            what = "a handle that has neither sent nor received yet" if sends else "the handle that made the channel"
            return (
                f"; {self.pids(undecided)} hold{'s' * (len(undecided) == 1)} {what}, so may still {verb}: close it if "
                "it is not needed, or fix its role by `sender()` or `receiver()`"
            )
        coming = [handle for handle in self.after.on_their_way if (handle.role == "receiver") != sends]
        return "".join(f"; {on_its_way(handle)}, may still {verb}" for handle in coming)

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
        left = f"; {count(self.after.ready, 'message')} unread" if self.after.ready else ""
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
                self.notes.append(f"{text}, and is dead: its slots go back when it is reaped")
            elif self.is_stopped(pid):
                self.problems.append(f"{text} and is stopped. {_wake(pid)}")
            else:
                (self.notes if self.after.free else self.problems).append(text)

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
        more = f", and {after.pieces} hold pieces of messages larger than a slot" * bool(after.pieces)
        full = f"the ring is full: {after.ready} of {count(after.capacity, 'slot')} hold messages that wait{more}"
        if not waiting:
            why = f"; {self.why_nothing_is_received()}" if after.ready and not self.taken else ""
            (self.notes if self.receivers or not after.ready else self.problems).append(full + why)
            return
        threads = max(after.waiting_senders, self.before.waiting_senders)
        wait = f"{count(threads, 'thread')} wait{'s' * (threads == 1)} for space"
        text = f"{full}; {wait} ({self.pids(waiting)})"
        if self.taken:
            self.notes.append(f"{text}; messages are being received, but not as fast as they are sent")
        elif after.ready:
            self.problems.append(f"{text}; {self.why_nothing_is_received()}")
        else:
            self.problems.append(f"{text}; all slots are in use: see above, or the table of slots")

    def look_at_receivers(self) -> None:
        after = self.after
        waiting = self.waiting_for("message")
        if after.ready and not self.taken and after.free and (not self.receivers or not waiting):
            text = f"{count(after.ready, 'message')} wait{'s' * (after.ready == 1)}; {self.why_nothing_is_received()}"
            (self.notes if self.receivers else self.problems).append(text)
        if waiting and not after.ready and not self.sent:
            threads = max(after.waiting_receivers, self.before.waiting_receivers)
            wait = f"{count(threads, 'thread')} wait{'s' * (threads == 1)} for a message"
            self.tell_wait(f"the ring is empty; {wait} ({self.pids(waiting)})", waiting)
        self.look_at_waiting_flushes()
        if after.shut_down:
            rest = (
                f": receivers get the {count(after.ready, 'message')} that are there, then the end"
                if after.ready
                else ""
            )
            self.notes.append(f"the channel was shut down: nothing more is sent{rest}")

    def movement(self) -> str:
        if self.sent or self.taken:
            sent = count(self.sent, "message")
            return f"it moves: {sent} sent and {self.taken} received or dropped between two looks"
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
            return f"all receivers wait for space themselves ({self.pids(self.receivers)}), so no slot comes free"
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
                "allows: a further borrow raises TooManyBorrows, `read` copies and goes on"
            )
        waiting = self.waiting_for("version")
        if waiting and not self.published:
            wait = f"{count(after.waiting_receivers, 'thread')} wait{'s' * (after.waiting_receivers == 1)}"
            self.tell_wait(f"{wait} for a newer version than {after.version} ({self.pids(waiting)})", waiting)
        self.look_at_waiting_flushes()

    def movement(self) -> str:
        if self.published:
            return f"it moves: {count(self.published, 'version')} published between two looks"
        return f"nothing was published between two looks; the newest version is {self.after.version}"

    @property
    def published(self) -> int:
        return self.after.version - self.before.version


def _same_call(earlier: ParticipantStats, later: ParticipantStats) -> bool:
    """Whether a participant is in the same call at both looks."""
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

"""The looks of `ringshm top` at the channels of this user, and what it keeps of them.

1. Each look observes every channel anew, as `ringshm stats` does (Segment.observe: mapped for reading, without an
   entry, a semaphore or a mutex), and lets it go again. So between two looks no channel is open: the memory of one
   that goes is free at once, and this process, if it is killed, leaves nothing behind.
2. Rates are differences, between two looks, of the counters that the segment holds anyway.
3. A channel is known by its nonce: another channel of the same name begins anew.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import ChannelNotFound, RingshmError
from ..ring.diagnosis import Finding, Process, diagnose, process_now, process_of
from ..ring.participants import Participants
from ..ring.stats import ChannelStats, LatestStats, SegmentStats, take_any_stats
from ..segment.files import Segment
from ..segment.layout import Layout
from ..system import monotonic
from . import leftovers

SHORTEST_INTERVAL = 0.05  # seconds: a slice of a wait; shorter intervals would show waiters between two slices
_FIRST_INTERVAL = 0.2  # seconds from the first look to the second, before which there are no rates
_KEPT = 240  # points of the past, for the trend
_GONE_SECONDS = 10.0  # for so long a channel that has gone is shown


@dataclass(frozen=True)
class Point:
    """One look at a channel, as it is kept.

    Attributes:
        time: monotonic seconds.
        sent, sent_nbytes, received, received_nbytes: counts since the channel was made. Of a Latest, whose reads are
            not counted: its versions, as bytes those since the first look, by the size of the newest at each look.
        fill: share of the slots that are not free, 0 to 1; of a Latest, of the versions that readers may hold.
        waiting_senders, waiting_receivers: threads.
        receivers: living processes that receive, or read.
    """

    time: float
    sent: int
    sent_nbytes: int
    received: int
    received_nbytes: int
    fill: float
    waiting_senders: int
    waiting_receivers: int
    receivers: int


@dataclass(frozen=True)
class Rates:
    """Messages and bytes through a channel, per second."""

    sent: float
    sent_nbytes: float
    received: float
    received_nbytes: float


def rates_between(earlier: Point, later: Point) -> Rates:
    """The mean rates from one point of a channel to a later one.

    A look reads the counters one by one without a mutex, so one may seem to go back a little: its rate is then 0.
    """
    seconds = later.time - earlier.time
    names = [field.name for field in dataclasses.fields(Rates)]
    return Rates(*(max(0, getattr(later, name) - getattr(earlier, name)) / seconds for name in names))


def _point(now: float, stats: SegmentStats, last: Point | None) -> Point:
    receivers = sum(bool(person.receivers) for person in stats.participants if person.alive)
    if isinstance(stats, LatestStats):
        new = stats.version - last.sent if last else 0
        nbytes = (last.sent_nbytes if last else 0) + new * stats.nbytes
        held = len({held.version for held in stats.held}) / stats.borrows
        return Point(now, stats.version, nbytes, 0, 0, held, 0, stats.waiting_receivers, receivers)
    assert isinstance(stats, ChannelStats)
    counts = (stats.sent, stats.sent_nbytes, stats.received, stats.received_nbytes)
    return Point(now, *counts, stats.fill, stats.waiting_senders, stats.waiting_receivers, receivers)


@dataclass
class Watched:
    """A channel, as the looks so far have seen it.

    Attributes:
        name: its name.
        nonce: "" if it cannot be read.
        layout: None if it cannot be read.
        wrong: why it cannot be read, or "".
        gone: monotonic seconds at which it was found gone, or None.
        live: whether a live process uses it.
        before, stats: the last two looks; None before them.
        processes: those of its processes that are known, by pid.
        findings: why it stands still.
        points: the past, oldest first.
    """

    name: str
    nonce: str = ""
    layout: Layout | None = None
    wrong: str = ""
    gone: float | None = None
    live: bool = True
    before: SegmentStats | None = None
    stats: SegmentStats | None = None
    processes: dict[int, Process] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    points: deque[Point] = field(default_factory=lambda: deque(maxlen=_KEPT))

    @property
    def rates(self) -> Rates | None:
        """Since the look before; None after the first, or if it has gone."""
        if self.gone is not None or len(self.points) < 2:
            return None
        return rates_between(self.points[-2], self.points[-1])

    @property
    def stopped(self) -> list[int]:
        """Pids of stopped processes."""
        return sorted(pid for pid, process in self.processes.items() if process.stopped)

    @property
    def problems(self) -> list[str]:
        """What keeps it from moving. An empty channel is well, however long its receivers wait."""
        stats = self.stats
        busy = isinstance(stats, ChannelStats) and (stats.ready or stats.slots or stats.waiting_senders)
        if stats is None or not (busy or (isinstance(stats, LatestStats) and stats.held) or stats.dead):
            return []
        return [finding.text for finding in self.findings if finding.problem]

    @property
    def rank(self) -> tuple[int, float, str]:
        """What to show first: channels with problems, the busiest, those that cannot be read, the dead, the gone."""
        if self.stats is None or self.gone is not None:
            return 2 if self.gone is None else 4, 0.0, self.name
        if not self.live:
            return 3, 0.0, self.name
        mean = rates_between(self.points[0], self.points[-1]) if len(self.points) > 1 else Rates(0, 0, 0, 0)
        return int(not self.problems), -(mean.sent + mean.received), self.name


class Sampler:
    """Looks at all channels of this user, or at those of some names, and keeps what it has seen."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = names
        self.channels: dict[str, Watched] = {}

    def look(self) -> None:
        """Look at each channel once. Channels may come and go meanwhile; a file may be no channel."""
        names = self._names or leftovers.names()
        for name in names:
            self._look_at(name)
        for name in [name for name in self.channels if name not in names]:
            self._is_gone(name)

    def in_order(self) -> list[Watched]:
        """Channels with problems first, then the busiest."""
        return sorted(self.channels.values(), key=lambda channel: channel.rank)

    def _look_at(self, name: str) -> None:
        try:
            segment = Segment.observe(name)
            live = segment.file.used_elsewhere
            now = monotonic()
            stats = take_any_stats(segment, Participants(segment))
        except ChannelNotFound:
            self._is_gone(name)
            return
        except (RingshmError, OSError, ValueError) as error:  # ValueError: it has just been cut, and cannot be mapped
            self.channels[name] = Watched(name, wrong=str(error.args[-1]))
            return
        channel = self.channels.get(name)
        if channel is None or channel.nonce != segment.nonce:
            channel = self.channels[name] = Watched(name, segment.nonce, segment.layout)
        last = channel.points[-1] if channel.points else None
        channel.gone, channel.live, channel.before, channel.stats = None, live, channel.stats, stats
        channel.points.append(_point(now, stats, last))
        since = now - last.time if last else 0.0
        channel.processes = self._processes(segment, stats, since, channel.processes)
        if channel.before:
            channel.findings = diagnose(channel.before, stats, channel.processes)

    def _processes(
        self, segment: Segment, stats: SegmentStats, since: float, known: dict[int, Process]
    ) -> dict[int, Process]:
        """The processes, from /proc, of participants that may be stopped: those without a call since the last look.

        To check that a pid is the participant's takes a look at all files of the process. So it is done only once, for
        participants that were not there at the last look.
        """
        found: dict[int, Process | None] = {}
        for person in stats.participants:
            if person.alive and (self._names or person.called is None or person.called > since):
                pid, seen = person.pid, person.pid in known and person.attached > since
                found[pid] = process_now(pid) if seen else process_of(pid, segment.file.identity)
        return {pid: process for pid, process in found.items() if process is not None}

    def _is_gone(self, name: str) -> None:
        """Mark a channel as gone. It is shown for a while, or for ever if its name was asked for."""
        channel, now = self.channels.get(name), monotonic()
        if channel is None or channel.wrong:
            self.channels[name] = channel = Watched(name)
        if channel.gone is None:
            channel.gone, channel.live = now, False
        elif now - channel.gone > _GONE_SECONDS and not self._names:
            del self.channels[name]


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def looks(
    sampler: Sampler, interval: float, seconds: float | None = None, pause: Callable[[float], bool] = _sleep
) -> Iterator[None]:
    """Look every `interval` seconds, for so many seconds or for ever; yields after each look but the first.

    A look that takes longer than half of the interval makes it longer: looking never takes more than half of a core.
    `pause` sleeps for some seconds, and says whether to end.
    """
    began = monotonic()
    sampler.look()
    left = min(interval, _FIRST_INTERVAL)
    while True:
        if seconds is not None:
            left = min(left, max(0.0, began + seconds - monotonic()))
        if pause(left):
            return
        start = monotonic()
        sampler.look()
        yield
        now = monotonic()
        if seconds is not None and now - began >= seconds:
            return
        left = max(interval - (now - start), now - start)

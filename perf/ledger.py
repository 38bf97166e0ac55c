"""The soak's accounting: what workers wrote down before and after each call, and what became of every message.

A worker appends records to a log of its own, by `os.write`, so that they outlive a SIGKILL at any moment:

    sender      CALL(number, count)   before a put of `count` messages from that number on
                END(number, count)    after it returned: so many of them were sent
    receiver    CALL(0, limit)        before a get of up to `limit` messages
                TAKEN(message)        while the get decodes it, so before its slot is given back
                GOT(message)          after the get returned it, then TORN(message) if its bytes are wrong
                END(0, count)         after the get returned so many, 0 where it timed out
    both        STARTED, before the first call; INTERRUPTED: a signal handler's exception ended the call; LEAVING,
                before the handle is closed

So where a message may have gone is known exactly. One whose put returned must be in one GOT, or, if in none, be one
that the last (or an interrupted) call of a receiver that is gone had TAKEN: "in doubt". Otherwise it is lost. A call
that returned cannot excuse anything.

Logs are read as they grow, each in its own order, all together in any. What is kept of the messages is those that are
on their way.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

STARTED, CALL, TAKEN, GOT, TORN, END, INTERRUPTED, LEAVING = range(1, 9)

#: kind, sender, number, when (monotonic ns), extra. 32 bytes: a page holds whole ones, and a write is cut at pages.
_RECORD = struct.Struct("<B3xIQQQ")
RECORD_NBYTES = _RECORD.size
_BUCKET_NS = 10_000_000  # the grain of the longest silence
_STOPPED = 2  # of a bucket in which nobody received, while somebody was stopped

record = _RECORD.pack

#: Sender and number.
Message = tuple[int, int]


@dataclass
class _Sender:
    """One sender's numbers: those below `intended` were given to a put, those below `done` were sent."""

    intended: int = 0
    done: int = 0
    seen: int = 0  # numbers below are in `missing`, or were got
    missing: set[int] = field(default_factory=set)

    def expect(self, number: int) -> None:
        if number >= self.seen:
            self.missing.update(range(self.seen, number + 1))
            self.seen = number + 1


@dataclass
class _Worker:
    started: bool = False
    leaving: bool = False
    progress_at: int = 0  # when it last moved a message, or started
    call: int | None = None  # messages that the call it is in may move
    interrupted: int = 0  # the same, of calls that a handler's exception ended
    taken: set[Message] = field(default_factory=set)  # in this call, and not returned yet
    left_over: set[Message] = field(default_factory=set)  # by interrupted calls
    highest: dict[int, int] = field(default_factory=dict)  # last number got, by sender


@dataclass(frozen=True)
class Verdict:
    """What became of the messages.

    Attributes:
        sent: whose put returned.
        received: got by somebody, each counted once.
        in_doubt_sending: given to a put whose process was killed (or interrupted) in it, and got by nobody.
        in_doubt_receiving: decoded in a get whose process was killed (or interrupted) in it, and got by nobody else.
        taken_again: decoded in such a get, and got after it by somebody.
        lost: sent, and none of these.
        duplicated: got twice, or got though its put had said that it was not sent.
        torn: got with wrong bytes.
        disordered: got after a later one of its sender, with no redelivery to explain it.
        unreturned: decoded by a call that returned without it, unless its sender may have taken it back meanwhile.
        unfinished: calls that ended before they had sent all, or whose process was killed or interrupted in them.
    """

    sent: int
    received: int
    in_doubt_sending: int
    in_doubt_receiving: int
    taken_again: int
    lost: int
    duplicated: int
    torn: int
    disordered: int
    unreturned: int
    unfinished: int
    examples: tuple[str, ...]


class Ledger:
    """Reads the workers' logs; workers are told apart by numbers, each used once.

    Args:
        may_be_taken_back: whether that message's sender may take it back until it is received: one larger than a slot.
    """

    def __init__(self, start_ns: int, may_be_taken_back: Callable[[int, int], bool] = lambda *_: False) -> None:
        self._may_be_taken_back = may_be_taken_back
        self.unfinished = 0
        self.senders: dict[int, _Sender] = {}
        self.workers: dict[int, _Worker] = {}
        self.sent = self.received = self.torn = self.duplicated = self.unreturned = 0
        self.stalls_ms: Counter[int] = Counter()
        self.examples: list[str] = []
        self._gone_with: set[Message] = set()  # taken by those who are gone, and not returned
        self._disordered: list[tuple[int, int, Message]] = []  # got at, sent at, which
        self._ends: list[tuple[int, int, int]] = []  # signalled at, gone at, messages that may have been put back
        self._start_ns = start_ns
        self._busy = bytearray()
        self._first_got = self._last_got = 0
        self._stops: list[tuple[int, int]] = []
        self._stopped_since: int | None = None

    # --- what the supervisor did

    def someone_stopped(self, at: int) -> None:
        """From now on at least one worker is stopped."""
        self._stopped_since = at

    def nobody_stopped(self, at: int) -> None:
        """The last one was continued."""
        assert self._stopped_since is not None
        self._stops.append((self._stopped_since, at))
        self._stopped_since = None

    def ended(self, number: int, signalled_at: int, gone_at: int) -> None:
        """That worker is gone and its log read to the end; a lethal signal was sent to it at `signalled_at`."""
        worker = self.workers.pop(number, _Worker())
        self._stall(worker, signalled_at)
        self._gone_with |= worker.taken | worker.left_over
        self.unfinished += worker.call is not None
        if budget := worker.interrupted + (worker.call or 0):
            self._ends.append((signalled_at, gone_at, budget))

    # --- the logs

    def read(self, number: int, log: bytes) -> None:
        """Go on reading the log of that worker, whole records."""
        worker = self.workers.setdefault(number, _Worker())
        for kind, who, what, at, extra in _RECORD.iter_unpack(log):
            if kind == CALL:
                worker.call = extra
                if who:
                    sender = self.senders.setdefault(who, _Sender())
                    sender.intended = what + extra
                    sender.expect(what + extra - 1)
            elif kind == TAKEN:
                worker.taken.add((who, what))
            elif kind == GOT:
                self._got(worker, (who, what), at, extra)
            elif kind == TORN:
                self.torn += 1
                self._example(f"torn: {(who, what)}")
            elif kind == END:
                if who:
                    sender = self.senders[who]
                    sender.intended = sender.done = what + extra
                    self.sent += extra
                    self.unfinished += extra < (worker.call or 0)
                if extra:
                    self._stall(worker, at)
                    worker.progress_at = at
                for message in worker.taken:
                    if self._may_be_taken_back(*message):
                        continue
                    self.unreturned += 1
                    self._example(f"decoded by a call that returned without it: {message}")
                worker.taken.clear()
                worker.call = None
            elif kind == INTERRUPTED:
                self.unfinished += 1
                worker.interrupted += worker.call or 0
                worker.left_over |= worker.taken
                worker.taken.clear()
                worker.call = None
            elif kind == STARTED:
                worker.started, worker.progress_at = True, at
            elif kind == LEAVING:
                worker.leaving = True

    def _got(self, worker: _Worker, message: Message, at: int, sent_at: int) -> None:
        who, number = message
        worker.taken.discard(message)
        worker.left_over.discard(message)
        sender = self.senders.setdefault(who, _Sender())
        sender.expect(number)
        if number in sender.missing:
            sender.missing.remove(number)
            self.received += 1
        else:
            self.duplicated += 1
            self._example(f"received twice: {message}")
        if number < worker.highest.get(who, -1):
            self._disordered.append((at, sent_at, message))
        else:
            worker.highest[who] = number
        self._first_got = self._first_got or at
        self._last_got = max(self._last_got, at)
        bucket = (at - self._start_ns) // _BUCKET_NS
        if bucket >= len(self._busy):
            self._busy.extend(bytes(bucket + 1 - len(self._busy)))
        self._busy[bucket] = 1

    def _example(self, text: str) -> None:
        if len(self.examples) < 20:
            self.examples.append(text)

    # --- stalls

    def _stall(self, worker: _Worker, until: int) -> None:
        """It moved no message until then; before the first was received it waited for others to start."""
        if worker.started and self._first_got and until > worker.progress_at:
            start = max(worker.progress_at, self._first_got)
            self.stalls_ms[max(0, self._without_stops(start, until)) // 1_000_000] += 1

    def _without_stops(self, start: int, end: int) -> int:
        """Nanoseconds between two moments in which nobody was stopped."""
        length = end - start
        if self._stopped_since is not None:
            length -= max(0, end - max(start, self._stopped_since))
        for since, until in self._stops[bisect_right(self._stops, start, key=lambda stop: stop[1]) :]:
            if since >= end:
                break
            length -= min(until, end) - max(since, start)
        return length

    def waiting(self, now: int) -> list[tuple[int, float]]:
        """Workers, and for how many seconds each has moved no message while nobody was stopped."""
        return [
            (number, self._without_stops(worker.progress_at, now) / 1e9)
            for number, worker in self.workers.items()
            if worker.started and not worker.leaving
        ]

    def silence(self, now: int) -> float:
        """Seconds since anybody received a message, less those in which somebody was stopped."""
        return self._without_stops(self._last_got or self._start_ns, now) / 1e9

    def longest_silence(self, until: int) -> float:
        """Seconds: the longest `silence` since the first message, to 10 ms."""
        count = (until - self._start_ns) // _BUCKET_NS
        busy = self._busy[:count] + bytes(max(0, count - len(self._busy)))
        for since, to in self._stops:
            first, last = ((at - self._start_ns) // _BUCKET_NS for at in (since, to))
            for bucket in range(first, min(last + 1, count)):
                busy[bucket] = busy[bucket] or _STOPPED
        unstopped = bytes(busy).replace(bytes([_STOPPED]), b"").lstrip(b"\0")
        return max(map(len, unstopped.split(b"\1"))) * _BUCKET_NS / 1e9

    def longest_stall(self) -> float:
        """Seconds: the longest time from a worker's message to its next, or to a lethal signal, less stops."""
        return max(self.stalls_ms, default=0) / 1e3

    def p99_stall(self) -> float:
        """Seconds within which the next message was moved in 99 of 100 cases."""
        ranks = sorted(self.stalls_ms)
        if not ranks:
            return 0.0
        counts, total = [], 0
        for milliseconds in ranks:
            total += self.stalls_ms[milliseconds]
            counts.append(total)
        return (ranks[bisect_left(counts, 0.99 * total)] + 1) / 1e3

    # --- the end

    def verdict(self, channel_sent: int) -> Verdict:
        """Account for every message, once all logs are read, all workers gone and the channel is drained.

        Args:
            channel_sent: how many messages were sent, and not taken back, as the channel itself counts.
        """
        lost = doubtful_sending = doubtful_receiving = 0
        duplicated = self.duplicated
        unlogged = 0  # got by nobody, but perhaps sent: at most so many can the channel count beyond those received
        for who, sender in self.senders.items():
            for number in sorted(sender.missing):
                gone = (who, number) in self._gone_with
                unlogged += gone
                if number >= sender.done:
                    doubtful_sending += number < sender.intended
                elif gone:
                    doubtful_receiving += 1
                else:
                    lost += 1
                    self._example(f"lost: {(who, number)}")
            if unsaid := sum(n not in sender.missing for n in range(sender.intended, sender.seen)):
                duplicated += unsaid
                self._example(f"received though never sent: {unsaid} of sender {who}")
        if not doubtful_receiving <= channel_sent - self.received <= unlogged:
            self._example(
                f"the channel sent {channel_sent}, of which {self.received} were received: "
                f"the difference is not within {doubtful_receiving} to {unlogged}"
            )
            lost += max(0, channel_sent - self.received - unlogged) if not lost else 0
            duplicated += max(0, self.received + doubtful_receiving - channel_sent) if not duplicated else 0
        return Verdict(
            sent=self.sent,
            received=self.received,
            in_doubt_sending=doubtful_sending,
            in_doubt_receiving=doubtful_receiving,
            taken_again=sum(message[1] not in self.senders[message[0]].missing for message in self._gone_with),
            lost=lost,
            duplicated=duplicated,
            torn=self.torn,
            disordered=self._unexplained(),
            unreturned=self.unreturned,
            unfinished=self.unfinished,
            examples=tuple(self.examples),
        )

    def _unexplained(self) -> int:
        """Messages got after later ones of their sender, less those that a receiver that ended may have put back.

        It did so while the message was on its way: it was signalled before the message was got, and gone after it was
        sent. Each explains as many as its last call may have taken; the one that went first explains first.
        """
        ends, available, unexplained = sorted(self._ends), list[list[int]](), 0
        for got_at, sent_at, message in sorted(self._disordered):
            while ends and ends[0][0] <= got_at:
                _, gone_at, budget = ends.pop(0)
                available.append([gone_at, budget])
                available.sort()
            fitting = next((end for end in available if end[0] >= sent_at and end[1]), None)
            if fitting is None:
                unexplained += 1
                self._example(f"out of order: {message}")
            else:
                fitting[1] -= 1
        return unexplained

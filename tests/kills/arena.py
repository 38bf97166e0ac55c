"""One trial: two survivors share a channel, a victim comes, and the survivors' account must come out.

1. The survivors make the channel, and what the operation wants ready; one of them may be blocked in a call.
2. The victim (victim.py) makes its call, and is killed or interrupted, or finishes.
3. The survivors go on. The arena checks their account against what every `put` and `get` has returned: nothing is
   lost, doubled or out of order, the whole capacity is there, the figures are true, no file is left.

What goes with the victim
-------------------------
A sender that is killed before its `put` has returned may have sent its message or not: it is *in doubt*.

A receiver that is killed, or interrupted, between the release of a message's slot and the return of `get` takes the
message with it: it is *lost*. Which bytecodes these are nobody needs to know beforehand: a message that goes with the
victim is one that was gone from the channel when the victim was hit, and no longer being decoded. The victim looks at
the words of all slots right before it is hit (`Sight`), so the arena fails a trial in which

    a message is missing that was still in a slot at that moment, READY or READING: the survivors have lost it; or
    a message is missing while the victim was still decoding: its slot was released too early; or
    a message is returned by an undisturbed call that decoded after its slot was released, or that still has it there.

Lost messages are counted, with their places (sweep.py).
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from typing import Any

from support.seams import Words
from support.tracer import read_sources

from .operations import BORROWS, CAPACITY, OPERATIONS, TURNS, Operation, Spot
from .survivors import PATIENCE, Hang, Refused, Survivor
from .victim import Sight, Victim, victim_process

#: How often the arena looks whether the victim waits for something.
GIVE_SECONDS = 0.005


@dataclass
class Trial:
    """What was done, and how it ended."""

    operation: str
    blocked: str
    action: str
    at: int
    spot: Spot | None = None
    place: str = ""
    ended: str = ""  # "finished", "killed" or "raised"
    count: int = 0  # bytecodes, if it finished
    lost: int = 0  # messages that went with the victim
    hit: Sight | None = None  # what the victim saw then; or what was seen right after the timer had killed it
    doubt: int = 0
    redelivered: int = 0
    recoveries: int = 0
    left: int = 0  # files of the dead victim, which nobody but it has used
    failure: str = ""

    def __str__(self) -> str:
        spot = f" of {self.spot}" if self.spot else ""
        place = f" ({self.place})" if self.place else ""
        calls = OPERATIONS[self.operation].blocked
        call = calls[self.at % len(calls)] if self.blocked == TURNS else self.blocked
        blocked = f", a survivor blocked in {call}" if call else ""
        return f"{self.operation}{blocked}: {self.action} at bytecode {self.at}{spot}{place}: {self.failure or 'well'}"


def patiently(condition: Callable[[], Any], complaint: str) -> None:
    """Wait until the condition holds; Hang if that takes too long."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > give_up:
            raise Hang(complaint)
        time.sleep(0.002)


def _files(*parts: str) -> list[str]:
    """Files of ringshm whose names contain any of these."""
    names = os.listdir("/dev/shm")
    return sorted(name for name in names if "ringshm" in name and any(part in name for part in parts))


class Arena:
    """Two survivors, and the victims that come and go."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        read_sources()
        self._start()

    def _start(self) -> None:
        self.sender = Survivor("sender")
        self.receiver = Survivor("receiver")

    def end(self) -> None:
        for survivor in (self.sender, self.receiver):
            survivor.end()

    def run(self, name: str, blocked: str, action: str, at: int, spot: Spot | None = None) -> Trial:
        """Make one trial; failures stand in it."""
        self.operation = OPERATIONS[name]
        self.trial = Trial(name, blocked, action, at, spot)
        self.blocked = self.operation.blocked[at % len(self.operation.blocked)] if blocked == TURNS else blocked
        self.name = f"kills-{os.getpid()}-{next(self._numbers)}"
        self.sent: list[int] = []  # numbers of the sender's messages whose put has returned
        self.received: list[tuple[str, int]] = []  # by the receiver, in its order
        self.victims: list[tuple[str, int]] = []  # by victims
        self.deliveries: list[int] = []  # of what the receiver took in the end
        self.pids: list[int] = []
        try:
            self._run()
        except BaseException as error:
            if not isinstance(error, Exception):
                raise
            text = str(error) if isinstance(error, AssertionError) else ""
            line = traceback.extract_tb(error.__traceback__)[-1]
            self.trial.failure = f"{text or repr(error)}\n    in {line.name}: {line.line}"
            for pid in self.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            owners = [self.name, *(f"{pid:08x}" for pid in (*self.pids, self.sender.pid, self.receiver.pid))]
            self.end()
            self._start()
            for file in _files(*owners):
                os.unlink(f"/dev/shm/{file}")
        return self.trial

    # --- one trial, from begin to end

    def _run(self) -> None:
        operation, trial = self.operation, self.trial
        parcel = self._open()
        self._run_victims(parcel)
        if operation.owner == "in it":
            self._open_as_survivors()
        reading = self._reading()
        if operation.ends:
            self._end()
        else:
            self._see_the_dead()
            self._unblock()
            self._take_all()
        self._check_account()
        redelivered = trial.redelivered
        if trial.action == "kill" and operation.corpse is None and not self.blocked:
            assert self.deliveries.count(2) == redelivered, f"{redelivered} redelivered, deliveries {self.deliveries}"
            assert set(self.deliveries) <= {1, 2}
        assert reading in (None, redelivered), f"{redelivered} redelivered by the stats, {reading} in truth"
        if not operation.ends:
            self._check_capacity()
        self._check_stats()
        self._close()

    def _run_victims(self, parcel: bytes) -> None:
        operation, trial = self.operation, self.trial
        if operation.corpse is not None:
            doing = replace(operation, call=lambda v: getattr(v, operation.corpse.call)(), prepare=lambda v: None)
            self._run_victim(doing, b"", "kill", 1, operation.corpse)
            assert trial.ended == "killed", f"the corpse lives: nothing came by {operation.corpse}; was it renamed?"
        self._run_victim(operation, parcel, trial.action, trial.at, trial.spot, serve=True)

    def _open(self) -> bytes:
        """Make the channel and what waits in it."""
        operation = self.operation
        if operation.owner != "sender":
            return b""
        self._open_as_survivors()
        self._fill()
        return self.sender("pickle") if operation.invited else b""

    def _open_as_survivors(self) -> None:
        if self.operation.owner == "victim":
            self.sender("attach", self.operation.kind, self.name)
        else:
            self.sender("create", self.operation.kind, **self.operation.arguments(self.name))
        self.receiver("attach", self.operation.kind, self.name)

    def _fill(self) -> None:
        ready = self.operation.ready
        ready = {"get": 0, "put": ready if self.operation.streams else CAPACITY}.get(self.blocked, ready)
        while len(self.sent) < ready:
            self._put()

    def _block(self) -> None:
        """Have a survivor blocked in its call."""
        blocked = self.blocked
        if not blocked:
            return
        if blocked == "get":
            self.receiver.start("get")
        elif blocked == "flush":
            self.sender.start("flush")
        else:
            self.sender.start("put", self._next())
        pid = self.receiver.pid if blocked == "get" else self.sender.pid
        patiently(lambda: self._waiting_for(pid), f"the {blocked} does not block")

    def _waiting_for(self, pid: int) -> str:
        people = self._idle("stats").participants
        return next((person.waiting_for for person in people if person.pid == pid), "")

    @property
    def _idle(self) -> Survivor:
        """The survivor that is not blocked."""
        return self.receiver if self.sender.call_made else self.sender

    def _next(self) -> Any:
        return self.operation.message("s", len(self.sent))

    def _put(self, body: bool = True) -> None:
        self.sender("put", self._next() if body else self._small(len(self.sent)))
        self.sent.append(len(self.sent))

    def _small(self, number: int) -> Any:
        return self.operation.message("s", number) if "spec" in self.operation.options else ("s", number)

    def _get(self, method: str = "get") -> None:
        self.received.append(self.operation.number_of(self.receiver(method)))

    def _take_all(self) -> None:
        for message, deliveries in self.receiver("take all"):
            self.received.append(self.operation.number_of(message))
            self.deliveries.append(deliveries)

    # --- the victim's life

    def _run_victim(
        self, operation: Operation, parcel: bytes, action: str, at: int, spot: Spot | None, serve: bool = False
    ) -> None:
        trial = self.trial
        reports, sending = Pipe(duplex=False)
        going, go = Pipe(duplex=False)
        pid = os.fork()
        if not pid:
            reports.close()
            go.close()
            victim_process(Victim(self.name, operation, parcel), action, at, spot, sending, going)
        self.pids.append(pid)
        sending.close()
        going.close()
        reports.poll(PATIENCE)
        what, said = reports.recv()
        assert what == "ready", f"the victim did not come up: {said}"
        if serve and operation.owner == "victim":
            self._open_as_survivors()
            self._fill()
        if serve:
            self._block()
        go.send(None)
        self._serve(pid, serve)
        said = {}
        with suppress(EOFError):  # when the last process that the victim has forked is gone
            while reports.poll(PATIENCE):
                what, value = reports.recv()
                said[what] = value
        reports.close()
        go.close()
        trial.hit = said.get("at")
        trial.place = trial.hit.place if trial.hit else ""
        assert "failed" not in said, f"the victim failed: {said['failed']}"
        trial.ended = "finished" if "finished" in said else "raised" if "raised" in said else "killed"
        assert operation.seconds or (trial.ended == "killed") == ("at" in said and action == "kill"), said
        trial.count = said.get("count", 0)
        if trial.ended == "killed" and trial.hit is None and operation.accounts:
            words = Words(self.name)
            trial.hit = Sight("", "", words.unreceived(), words.sent, words.dropped, False)
        assert not said.get("order"), said["order"]
        self.victims += [*said.get("finished", []), *said.get("again", [])]

    def _serve(self, pid: int, serve: bool) -> None:
        """Wait for the victim's end; give it what it waits for."""
        give_up = time.monotonic() + PATIENCE
        exited = os.pidfd_open(pid)
        try:
            while not select.select([exited], [], [], GIVE_SECONDS)[0]:
                if time.monotonic() > give_up:
                    raise Hang("the victim did not end")
                if serve and self.operation.owner != "in it":
                    stats = self._idle("stats")
                    waiting = next((person.waiting_for for person in stats.participants if person.pid == pid), "")
                    self._give(waiting, stats)
        finally:
            os.close(exited)
        os.waitpid(pid, 0)

    def _give(self, waiting: str, stats: Any) -> None:
        """What the victim waits for."""
        if waiting == "message" and stats.ready < max(1, self.operation.takes):
            if not self.sender.call_made:  # else it was blocked in put, has room now, and sends by itself
                self._put()
        elif (waiting == "space" and stats.ready) or waiting == "event":
            if self.blocked == "get" and self.receiver.call_made and self.receiver.has_result():
                self._collect()  # it was blocked in get, and has taken what came before this
            if not self.receiver.call_made:
                self._try(lambda: self._get("get_nowait"))

    # --- what the survivors find

    def _reading(self) -> int | None:
        """How many messages the dead were receiving; None if somebody may have reaped them already."""
        corpse = self.operation.corpse
        if self.blocked or "max_deliveries" in self.operation.options:
            return None
        slots = self.sender("stats").slots
        reading = sum(slot.state == "reading" and slot.pid == self.pids[-1] for slot in slots)
        return reading + (corpse is not None and corpse.call == "get")

    def _see_the_dead(self) -> None:
        """Wait until only the living take part: who is blocked looks for the dead, or else the sender does."""
        living = {self.sender.pid, self.receiver.pid}
        give_up = time.monotonic() + PATIENCE
        while {person.pid for person in self._idle("stats").participants} != living:
            if not self._blocked:
                self.sender("wait_for_peers", senders=99, timeout=0.06)
            elif self._blocked.has_result():
                self._collect()
            assert time.monotonic() < give_up, f"the dead are still there: {self._idle('stats').participants}"
            time.sleep(0.005)

    def _collect(self) -> None:
        """The result of the survivor that was blocked."""
        if self.blocked == "get":
            self.received.append(self.operation.number_of(self.receiver.result()))
        elif self.blocked == "put":
            self.sender.result()
            self.sent.append(len(self.sent))
        else:
            assert self.sender.result() is True

    @property
    def _blocked(self) -> Survivor | None:
        """The survivor that is blocked in its call, or has just come out of it."""
        return next((survivor for survivor in (self.sender, self.receiver) if survivor.call_made), None)

    def _make_room(self) -> bool:
        """Receive a message, if there is one; whether that was enough for the sender."""
        if self.receiver("qsize"):
            self._get()
        return self.sender.has_result()

    def _unblock(self) -> None:
        """Let a survivor that is still blocked go on, as it must."""
        if self._blocked is self.receiver:
            self._put()
        elif self._blocked is self.sender:
            patiently(self._make_room, f"the sender's {self.blocked} did not end")
        if self._blocked:
            self._collect()

    def _end(self) -> None:
        """After a call that shuts the channel down: it has, or did not begin to; then a survivor can."""
        told = not self.blocked and self._drained() == "EndOfChannel"
        open_ = self.trial.ended != "finished" and self._try(self._put) is None
        assert not (told and open_), "a message was sent after a receiver had been told that none will come"
        if self.blocked == "get":
            outcome = self._try(self._collect)
            assert outcome == (None if open_ else "EndOfChannel"), outcome
        self.sender("shutdown", immediate="at once" in self.trial.operation)
        outcome = self._drained()
        assert outcome == "EndOfChannel", outcome
        living = {self.sender.pid, self.receiver.pid}

        def over() -> bool:
            assert self._try(self._put) == "ChannelClosed"
            return {person.pid for person in self.sender("stats").participants} == living

        patiently(over, "the dead are still there")

    def _drained(self) -> str:
        """Receive what is there: the error that comes then."""
        while (outcome := self._try(lambda: self._get("get_nowait"))) is None:
            pass
        return outcome

    @staticmethod
    def _try(call: Callable[[], None]) -> str | None:
        """The name of the error that the survivor's call raises."""
        try:
            call()
        except Refused as error:
            return error.kind
        return None

    def _check_account(self) -> None:
        operation, trial = self.operation, self.trial
        stats = self.sender("stats")
        got = self.received + self.victims
        double = [what for what, times in Counter(got).items() if times > 1]
        assert not double, f"received more than once: {double}"
        theirs = sorted(number for who, number in got if who == "v")
        whole = operation.sends + (1 if trial.ended == "raised" and operation.sends else 0)
        if trial.ended == "finished":
            assert theirs == list(range(operation.sends)), f"of the victim's messages came {theirs}"
        elif trial.ended == "killed":
            assert theirs == list(range(len(theirs))) and len(theirs) <= whole, f"of the victim's came {theirs}"
            trial.doubt = len(theirs)
        else:
            first = [number for number in theirs if number < operation.sends]
            assert first == list(range(len(first))) and set(theirs) <= set(range(whole)), (
                f"of the victim's came {theirs}"
            )
            assert not operation.resends or operation.sends in theirs, f"what it put then is lost: {theirs}"
        ours = [number for who, number in got if who == "s"]
        missing = sorted(set(self.sent) - set(ours))
        assert set(ours) <= set(self.sent), f"received what was not sent: {ours}, {self.sent}"
        trial.lost = len(missing) - stats.dropped
        allowed = 0 if trial.ended == "finished" else operation.takes
        assert 0 <= trial.lost <= allowed, f"{missing} are missing, {stats.dropped} were dropped"
        self._check_lost(missing, stats.dropped)
        trial.redelivered, trial.recoveries = stats.redelivered, stats.recoveries
        for view in (self.received, self.victims):
            for who in "sv":
                numbers = [number for whose, number in view if whose == who]
                if operation.takes and self.blocked == "get":
                    continue  # two receive at once: what one gave back passes what the other took
                assert numbers == sorted(numbers), f"out of order: {numbers}"

    def _check_lost(self, missing: list[int], dropped: int) -> None:
        """A message has gone with the victim only if it was gone from the channel when the victim was hit."""
        operation, trial = self.operation, self.trial
        if trial.lost and operation.requeues and trial.ended == "raised":
            return  # the block has received it
        hit = trial.hit
        if hit is None or not operation.accounts:
            assert not trial.lost, f"{missing} are missing, {dropped} were dropped, and the victim was not hit"
            return
        kept = [number for number in missing if number in hit.unreceived or number >= hit.sent]
        since = dropped - hit.dropped
        assert len(kept) <= since, (
            f"{kept} are missing, were there when the victim was hit, and {since} were dropped since"
        )
        assert not trial.lost or not hit.decoding, f"{missing} are missing, released while the victim was decoding"
        assert not trial.lost or not operation.requeues, (
            f"{missing} are missing, of a call that gives back what it takes"
        )

    def _check_capacity(self) -> None:
        """All slots can be filled, no more, and emptied."""
        numbers = range(len(self.sent), len(self.sent) + CAPACITY)
        self.sender("each", *(("put", self._small(number)) for number in numbers))
        if self.operation.options.get("when_full") != "drop_oldest":
            try:
                self.sender("put_nowait", self._small(-1))
                raise AssertionError("more messages than slots")
            except Refused as error:
                assert error.kind == "Full", error
        assert self.sender("qsize") == CAPACITY
        full, *got = self.receiver("each", ("full",), *[("get_nowait",)] * CAPACITY)
        assert full and list(map(self.operation.number_of, got)) == [("s", number) for number in numbers]

    def _check_stats(self) -> None:
        stats = self.sender("stats")
        free = (stats.free, stats.slots, stats.ready, stats.waiting_senders, stats.waiting_receivers)
        assert free == (CAPACITY, (), 0, 0, 0), free
        assert stats.sent == stats.received + stats.dropped, stats
        got = len(self.received) + len(self.victims) + self.trial.lost + CAPACITY * (not self.operation.ends)
        assert stats.received == got, f"{stats.received} received by the stats, {got} in truth; {stats.dropped} dropped"
        assert stats.dropped or stats.sent_nbytes == stats.received_nbytes, stats
        assert stats.withdrawn <= 2 * self.operation.streams, stats
        assert {person.pid for person in stats.participants} == {self.sender.pid, self.receiver.pid}

    def _close(self) -> None:
        """Nothing is left but what the dead victim alone knew of."""
        order = [self.sender, self.receiver]
        for survivor in order if self.trial.at % 2 else reversed(order):
            survivor("close")
        if self.operation.invited:  # an unclaimed invitation keeps the names while its maker lives
            self.sender.start("exit")
            os.waitpid(self.sender.pid, 0)
            left = self._left()
            self.sender = Survivor("sender")
        else:
            left = self._left()
        if self.operation.owner == "in it" and self.trial.ended == "killed":
            victims = _files(f"{self.pids[-1]:08x}")
            self.trial.left = len(victims)
            left = [file for file in left if file not in victims]
            for file in victims:
                os.unlink(f"/dev/shm/{file}")
        assert not left, f"left behind: {left}"

    def _left(self) -> list[str]:
        return _files(self.name, *(f"{pid:08x}" for pid in (self.sender.pid, self.receiver.pid, *self.pids)))


class LatestArena(Arena):
    """Two survivors that share a Latest: a publisher, the "sender", and a reader, the "receiver"."""

    def _run(self) -> None:
        trial = self.trial
        self.versions: dict[int, tuple[str, int]] = {}  # what is known of them, from whoever saw them
        self.begun = 0  # versions that the victims may have published
        self._open_as_survivors()
        self._put()
        self._run_victims(b"")
        self._see_the_dead()
        self._unblock()
        self._check_versions()
        self._check_borrows()
        stats = self.sender("stats")
        assert (stats.held, stats.waiting_receivers) == ((), 0), stats
        trial.recoveries = stats.recoveries
        self._close()

    def _block(self) -> None:
        if self.blocked:
            self.receiver.start("read", len(self.sent))
            patiently(lambda: self._waiting_for(self.receiver.pid), "the read does not block")

    def _give(self, waiting: str, stats: Any) -> None:
        if waiting == "version":
            self._put()

    def _put(self, body: bool = True) -> None:
        message = self._next()
        self.sent.append(len(self.sent))
        self._saw(self.sender("publish", message), message)

    def _get(self, method: str = "read") -> None:
        self._saw(*self.receiver(method))

    def _collect(self) -> None:
        self._saw(*self.receiver.result())

    def _saw(self, version: int, message: Any) -> None:
        _, what = self.operation.number_of((version, message))
        assert self.versions.setdefault(version, what) == what, f"{version} is {self.versions[version]}, and {what}"

    def _check_versions(self) -> None:
        """They are consecutive, and each is one that somebody has published."""
        trial = self.trial
        for version, what in self.victims:
            assert self.versions.setdefault(version, what) == what, f"{version} is {self.versions[version]}, and {what}"
        newest, message = self.receiver("read")
        self._saw(newest, message)
        self._put()
        self._get()
        assert max(self.versions) == newest + 1, f"{newest} was the newest, now {self.versions}"
        theirs = self.operation.sends * (2 if trial.ended == "raised" else 1) + (self.operation.corpse is not None)
        unknown = newest + 1 - len(self.sent)  # how many are not the sender's
        assert 0 <= unknown <= theirs, f"{newest + 1} versions, of which the sender published {len(self.sent)}"
        ours = [what for _, what in sorted(self.versions.items()) if what[0] == "s"]
        assert ours == [("s", number) for number in self.sent], f"the sender's versions are {ours}"
        trial.doubt = unknown if trial.ended == "killed" else 0

    def _check_borrows(self) -> None:
        """So many versions can be held as were promised, no more, and the sender goes on."""
        held = []
        for _ in range(BORROWS):
            self._put()
            held.append(self.receiver("hold"))
        self._put()
        try:
            self.receiver("hold")
            raise AssertionError("more versions held than `borrows`")
        except Refused as error:
            assert error.kind == "TooManyBorrows", error
        self._put()
        for version, message in zip(held, self.receiver("let go"), strict=True):
            self._saw(version, message)
        self._saw(self.receiver("hold"), self.receiver("let go")[0])

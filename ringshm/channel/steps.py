"""How a call waits: its steps are written once, for calls that block and for calls in an event loop.

Every call makes its first attempt in line. If that does not succeed, a plain generator goes on: the call's *steps*.
Steps say what they wait for, as in `yield from turn.arrival(...)`; the call's *turn* does the waiting.

    BlockingTurn    spins and sleeps inside its methods. It never suspends, so a single `send` runs all of the steps
                    (`finish`), and an exception of a signal handler unwinds them like any other calls.
    LoopTurn        awaits a future of the event loop, which suspends the steps (event_loop.py).

1. A message that was received is lost if a signal handler raises before the call has returned it. CPython runs handlers
   when a Python function begins, at a jump backward, and after a C function has returned. So between the attempt that
   receives and the return of the call there is none of these: the driver of receiving calls (`until_received`) calls
   each attempt itself, the attempt is a Python function, and only after an Outcome does the loop jump backward.
2. A message larger than a slot, and a batch of fewer messages than were asked for, are received within the steps, which
   return them. CPython passes such a value on in a StopIteration and runs no handler meanwhile.
3. No step suspends between an attempt that succeeds and the return. So a call that is cancelled has taken nothing.
4. Steps are generators and not coroutines: an interrupt may come before the first step, and Python warns of a coroutine
   that was "never awaited".

Source: psycopg 3 (`generators.py`, `waiters.py`) has this shape.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator
from threading import active_count
from typing import Any, TypeAlias, TypeVar

from ..process.attachment import Attachment
from ..ring.acceleration import CompiledHandle
from ..ring.large import Transfer
from ..ring.mutex import SLICE, FencedMutex
from ..ring.outcomes import Outcome
from ..ring.spin import Spin
from ..ring.waiters import IDLE_SLICE, IDLE_SLICES, SHORT_SLICE, Waiters
from ..system import monotonic
from . import doubts

R = TypeVar("R")
#: What a call does after its first attempt; it yields futures of an event loop, or nothing, and returns an R.
Steps: TypeAlias = Generator[Any, None, R]
#: Whether something has come, or how much of it.
Look: TypeAlias = Callable[[], Any]
#: The steps between two attempts: they get the outcome of the one, and return an outcome, or what they have received.
Between: TypeAlias = Callable[[Outcome], Steps[Any]]
#: For waits that sleep at once. It never looks, so all such waits share it.
NO_SPIN = Spin("block")
#: How often a call without time left tries for a mutex whose holder has died, so that the mutex is recovered meanwhile.
_RECOVERY_TRIES = 6


def finish(steps: Steps[R]) -> R:
    """Run the steps of a call that blocks, and return what they return."""
    try:
        steps.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("the steps of a blocking call have suspended")


def until_received(value: Any, attempt: Callable[[], Any], between: Between) -> Any:
    """Receive by further attempts, in a call that blocks; `event_loop.until_received_in_loop` is the other driver.

    Args:
        value: the Outcome that the first attempt returned.
        attempt: a Python function. It returns what it received, or an Outcome.
        between: the steps before the next attempt. They return an Outcome, or what they have received themselves.

    Returns:
        What was received.
    """
    while True:  # no condition: CPython 3.14 jumps back to it with the message in hand, and may run a handler there
        value = finish(between(value))
        if value.__class__ is Outcome:
            value = attempt()
        if value.__class__ is not Outcome:
            return value


def _none() -> int:
    return 0


class Turn:
    """How one call waits; BlockingTurn and LoopTurn say what `_sleep` and `_pause` are.

    Args:
        attachment: of the handle.
        check_open: raises ChannelClosed if another thread or task has closed the handle.
        deadline: when the call must answer, on the monotonic clock.
        spin: whether the call looks at shared words before it sleeps.

    Attributes:
        events: where the call waits for receptions, arrivals and departures.
        task: a negative number for the call's asyncio task; 0 if its thread waits.
    """

    def __init__(
        self, attachment: Attachment, check_open: Callable[[], None], deadline: float, spin: Spin = NO_SPIN
    ) -> None:
        self.attachment = attachment
        self.deadline = deadline
        self.spin = spin
        self.events = attachment.events
        self.task = 0
        self._check_open = check_open
        self._doubts_at = monotonic() + doubts.SECONDS
        self.begin()

    def begin(self) -> None:
        """The call begins to wait for its next message."""
        self._tries = self._rounds = 0

    @property
    def is_endless(self) -> bool:
        """Whether the call has no time limit."""
        return self.deadline == math.inf

    def retry(self, mutex: FencedMutex) -> Steps[bool]:
        """After CONTENDED: whether to try again for the mutex: while there is time, or its holder is not alive."""
        self._tries += 1
        if monotonic() >= self.deadline:
            living, _ = self.attachment.participants.holders(mutex.offset)
            if living or self._tries >= _RECOVERY_TRIES:
                return False
        yield from self._pause()
        return True

    def arrival(self, waiters: Waiters, there: Look, at_least: int = 1) -> Steps[None]:
        """Wait until so many are there, or another look is due.

        Raises:
            ChannelDeadlock: if the call has no time limit and could never end.
        """
        deadlocks = self.attachment.deadlocks
        try:
            if self.is_endless:
                if at_least > 1:
                    deadlocks.check_own(at_least, task=self.task)
                deadlocks.check(first=not self._rounds, task=self.task)
            seconds = self._slice(waiters)
            self._rounds += 1
            yield from self._sleep(waiters, lambda: there() >= at_least, seconds, lambda: there() > at_least, at_least)
            if self.is_endless:
                deadlocks.end(self.task)
        except BaseException:
            deadlocks.end(self.task)
            raise
        self._check_open()

    def change(self, waiters: Waiters, changed: Look, seconds: float = SLICE) -> Steps[bool]:
        """Wait until something has changed, so many seconds at most; False, and at once, if no time is left."""
        remaining = self.deadline - monotonic()
        if remaining <= 0:
            return False
        yield from self._sleep(waiters, changed, min(seconds, remaining))
        self._check_open()
        return True

    def waited(self, handle: CompiledHandle, space: bool, at_least: int = 1) -> bool:
        """Wait in the compiled path, if it may; whether so many messages, or a free slot, may be there."""
        return False

    def event(self, happened: Look) -> Steps[bool]:
        """As `change`, until a message was received or somebody came or went."""
        return self.change(self.events, happened, SLICE / 2)

    def other_end(self, end: Transfer) -> Steps[None]:
        """Wait for the other end of a message larger than a slot, a slice at most."""
        seconds = min(SLICE, max(0.0, self.deadline - monotonic()))
        yield from self._sleep(end.waiters, end.stirred, seconds, end.passes_on)
        self._check_open()

    def doubt(self, waiting_for: str) -> None:
        """Called before each sleep: after ten seconds, once, say why the call waits (doubts.py).

        Args:
            waiting_for: "message", "version", "space" or "event".
        """
        if self.is_endless and monotonic() >= self._doubts_at:
            given = doubts.warn_if_in_vain(self.attachment, waiting_for, self._is_alone())
            self._doubts_at = math.inf if given else monotonic() + doubts.SECONDS

    def _is_alone(self) -> bool:
        """Whether nothing else runs in this process that might end the wait."""
        return active_count() == 1

    def breathe(self) -> Steps[None]:
        """Let others run, if this call has been at work for long: an event loop's other tasks."""
        yield from ()

    def puts_off(self, error: BaseException) -> bool:
        """Whether the call may return in spite of that exception, which is raised where its task waits next."""
        return False

    def _slice(self, waiters: Waiters) -> float:
        """Seconds until the next look, if nobody wakes the call."""
        raise NotImplementedError

    def _pause(self) -> Steps[None]:
        """Before another try for a mutex, for which the call has just waited a slice."""
        raise NotImplementedError

    def _sleep(self, waiters: Waiters, arrived: Look, seconds: float, more: Look = _none, need: int = 0) -> Steps[None]:
        """Announce, look again, wait until woken or the seconds are over.

        Args:
            waiters: whom the call joins.
            arrived: whether it need not wait.
            more: how many other waiters a waiter that was woken wakes.
            need: how many messages or free slots the call needs; 0 if it is to be woken in any case.
        """
        raise NotImplementedError


class BlockingTurn(Turn):
    """How a call waits that blocks its thread."""

    def waited(self, handle: CompiledHandle, space: bool, at_least: int = 1) -> bool:
        """As `Turn.waited`."""
        return handle._wait_compiled(space, min(self.deadline, self._doubts_at), self.is_endless, at_least)

    def _slice(self, waiters: Waiters) -> float:
        if waiters is self.attachment.space and not self._rounds:
            seconds = SHORT_SLICE  # SYNC POINT w: a release pays for no fence
        else:
            seconds = SLICE if self._rounds < IDLE_SLICES else IDLE_SLICE
        return min(seconds, max(0.0, self.deadline - monotonic()))

    def _pause(self) -> Steps[None]:
        yield from ()

    def _sleep(self, waiters: Waiters, arrived: Look, seconds: float, more: Look = _none, need: int = 0) -> Steps[None]:
        if self.spin.always:
            os.sched_yield()  # time.sleep(0) would sleep for some 60 us, from Python 3.11 on
            self.attachment.reaper.look()
            return
        woken = True
        try:
            waiters.announce()
            if not arrived():
                woken = waiters.sleep(seconds)
        finally:
            try:
                waiters.withdraw()
            except BaseException:  # a handler raised in it: nobody must seem to wait who does not
                waiters.withdraw()
                raise
        if woken:
            waiters.pass_on(more())
        else:
            self.attachment.reaper.look()
        yield from ()

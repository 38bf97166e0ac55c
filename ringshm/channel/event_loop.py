"""How a call waits in an asyncio event loop: with no thread and no busy loop.

A call that waits has a future (LoopTurn). All calls of one event loop that wait on one channel share a `_LoopWaits`,
which has two things:

- a listener (listeners.py), whose descriptor the loop watches: wakers of other processes write to it;
- a timer of a slice, by which it looks for the dead, for the end of the stream, and for wake-ups that a killed waker
  has not given.

Each time it resolves as many futures as there are messages, or free slots. A call whose future was resolved makes its
attempt again. A `_LoopWaits` exists while calls wait, so nothing is left behind. Only the loop and its calls keep it
alive, so it goes with a loop that is closed, or forgotten, with calls in it.

1. A future is no message. A call whose future was resolved, and which is cancelled before its attempt, passes the
   wake-up on (`_LoopWaits.look`).
2. A call that needs several messages is woken once so many are there, and not before. If it were woken for fewer, the
   wake-up of another call would be lost.
3. A forked child leaves the waits of its parent's loop alone, since the two share the loop's epoll.
"""

from __future__ import annotations

import asyncio
import math
import os
import types
from collections.abc import Callable
from typing import Any

from ..errors import is_own
from ..process.attachment import Attachment
from ..ring.listeners import CHANGE
from ..ring.mutex import SLICE
from ..ring.outcomes import Outcome
from ..ring.waiters import SHORT_SLICE, Waiters
from ..segment.layout import P_STUCK, SHUTDOWN
from ..system import monotonic
from .steps import Between, Look, R, Steps, Turn, _none

_Future = asyncio.Future  # of None


@types.coroutine
def in_loop(steps: Steps[R]) -> Steps[R]:
    """Await the steps of a call, and return what they return. They end with it, whoever may still know them."""
    try:
        return (yield from steps)
    finally:
        steps.close()


@types.coroutine
def until_received_in_loop(value: Any, attempt: Callable[[], Any], between: Between) -> Steps[Any]:
    """As `steps.until_received`, in an event loop."""
    while True:
        value = yield from between(value)
        if value.__class__ is Outcome:
            value = attempt()
        if value.__class__ is not Outcome:
            return value


def this_task() -> int:
    """A negative number for the running task, by which deadlock.py knows it."""
    return -id(asyncio.current_task())


class LoopTurn(Turn):
    """How a call waits in the event loop that runs."""

    def __init__(self, attachment: Attachment, check_open: Callable[[], None], deadline: float) -> None:
        super().__init__(attachment, check_open, deadline)
        self.events = attachment.space  # whose wakers wake listeners, too, whenever they wake those of events
        self.task = this_task()
        self._yield_at = monotonic() + SHORT_SLICE

    def breathe(self) -> Steps[None]:
        """Let other tasks run, if this one has had the loop for a millisecond."""
        if monotonic() >= self._yield_at:
            yield
            self._yield_at = monotonic() + SHORT_SLICE

    def _is_alone(self) -> bool:
        return super()._is_alone() and len(asyncio.all_tasks()) == 1

    def puts_off(self, error: BaseException) -> bool:
        """Put off a cancellation. The task gets it where it waits next; unless it has ended by then, or whoever has
        asked for it (`asyncio.timeout`) is content that the call has returned.
        """
        if not isinstance(error, asyncio.CancelledError):
            return False
        task: Any = asyncio.current_task()
        counts = hasattr(task, "cancelling")  # Python 3.11

        def cancel() -> None:
            if not task.done() and (not counts or task.cancelling()):
                if counts:
                    task.uncancel()
                task.cancel()

        asyncio.get_running_loop().call_soon(cancel)
        return True

    def _slice(self, waiters: Waiters) -> float:
        until = self._doubts_at if self.is_endless else self.deadline  # the _LoopWaits looks every slice
        return max(0.0, until - monotonic())

    def _pause(self) -> Steps[None]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        timer = loop.call_later(max(0.0, min(SLICE, self.deadline - monotonic())), _resolve, future)
        try:
            yield from future
        finally:
            timer.cancel()

    def _sleep(self, waiters: Waiters, arrived: Look, seconds: float, more: Look = _none, need: int = 0) -> Steps[None]:
        loop = asyncio.get_running_loop()
        loop_waits: _LoopWaits = self.attachment.loops.get(id(loop)) or _LoopWaits(self.attachment, loop)
        future = loop.create_future()
        timer = None
        try:
            loop_waits.add(waiters, future, need)
            if arrived():
                yield  # others may be faster again and again: the loop goes on
            else:
                if seconds < math.inf:
                    timer = loop.call_later(seconds, _resolve, future)
                yield from future
        except BaseException:
            if future.done() and not loop.is_closed():
                loop_waits.futures[waiters].pop(future, None)
                loop_waits.look()
            raise
        finally:
            try:
                loop_waits.remove(waiters, future)
            except BaseException:  # a handler raised in it: nobody must seem to wait who does not
                loop_waits.remove(waiters, future)
                raise
            if timer is not None:
                timer.cancel()


class _LoopWaits:
    """The calls of one event loop that wait on one channel, and what wakes them."""

    def __init__(self, attachment: Attachment, loop: asyncio.AbstractEventLoop) -> None:
        self._attachment = attachment
        self._loop = loop
        self._pid = os.getpid()
        #: The futures of the calls that wait, in their order, by what they wait for; and how many of that each needs.
        self.futures: dict[Waiters, dict[_Future[None], int]] = {
            waiters: {} for waiters in (attachment.messages, attachment.space, attachment.pieces, attachment.room)
        }
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None
        self._listener = attachment.listeners.take()
        try:
            self._set_timer(SLICE)
            loop.add_reader(self._listener.fd, self._woken)
            attachment.loops[id(loop)] = self
        except BaseException:
            self._end()
            raise

    def _look_in(self) -> float:
        """Seconds until the timer runs out."""
        return math.inf if self._timer is None else self._timer.when() - self._loop.time()

    def _set_timer(self, seconds: float) -> None:
        old, self._timer = self._timer, self._loop.call_later(seconds, self._tick)
        if old is not None:
            old.cancel()

    def add(self, waiters: Waiters, future: _Future[None], at_least: int) -> None:
        """A call begins to wait, for so many. It looks again afterwards."""
        self.futures[waiters][future] = at_least
        waiters.listen(self._listener)
        if waiters is self._attachment.space and self._look_in() > SHORT_SLICE:
            self._set_timer(SHORT_SLICE)  # SYNC POINT w: a release pays for no fence

    def remove(self, waiters: Waiters, future: _Future[None]) -> None:
        """A call waits no more. The last one takes everything with it."""
        futures = self.futures[waiters]
        futures.pop(future, None)
        if self._pid == os.getpid() and not futures:
            waiters.unlisten(self._listener)
            if not any(self.futures.values()):
                self._end()

    def _end(self) -> None:
        if self._ended:
            return
        self._attachment.loops.pop(id(self._loop), None)
        if self._timer is not None:
            self._timer.cancel()
        if not self._loop.is_closed():
            self._loop.remove_reader(self._listener.fd)
        self._ended = True  # not later: from here on the descriptor may be another's
        self._attachment.listeners.give_back(self._listener)

    def look(self, everybody: bool = False) -> None:
        """Wake the calls that can succeed, first come first served; or all. Calls that were woken, and have not run
        yet, count as if they had taken what they need.
        """
        if self._pid != os.getpid():
            return
        for waiters, futures in self.futures.items():
            if futures:
                waiters.listen_on()
                left = self._there(waiters)
                for future, at_least in futures.copy().items():
                    if everybody or at_least <= left:
                        left -= at_least
                        _resolve(future)

    def _there(self, waiters: Waiters) -> int:
        """How many messages, or free slots, are there."""
        ring, options = self._attachment.ring, self._attachment.segment.options
        if waiters is self._attachment.messages:
            return ring.ready()
        return ring.could_send(options.when_full == "drop_oldest")

    def _woken(self) -> None:
        self.look(everybody=CHANGE in self._listener.drain())

    def _tick(self) -> None:
        if self._ended or not any(self.futures.values()):  # an interrupt came while the first call was about to wait
            return self._end()
        self._set_timer(SLICE)
        try:
            self._attachment.reaper.look()
            everybody = self._over()
        except Exception as error:
            self.look(everybody=True)  # each of the calls meets it, and raises it
            if not is_own(error):
                raise
        else:
            self.look(everybody)

    def _over(self) -> bool:
        """Whether calls wait for what may never come."""
        attachment = self._attachment
        return bool(
            attachment.words[SHUTDOWN]
            or (self.futures[attachment.messages] and attachment.over_for_receivers())
            or (self.futures[attachment.space] and attachment.over_for_senders())
            or sum(attachment.participants.column(P_STUCK)) >= attachment.segment.layout.capacity
        )


def _resolve(future: _Future[None]) -> None:
    if not future.done():
        future.set_result(None)

"""Channels in asyncio: calls that wait in an event loop, with no thread and no busy loop.

A call first makes the attempt that its blocking twin makes. What does not succeed at once waits for a future. All calls
of one event loop that wait on one channel share a `_LoopWaits`: it has a listener (wakeup.py), which the loop watches,
and a timer of a slice, by which it looks for the dead, for the end, and for what a killed waker has not announced. It
resolves as many futures as there are messages, or free slots; each call then makes its attempt again. It exists while
calls wait, so nothing is left behind; only the loop and those calls keep it, so it goes with a loop that is closed, or
forgotten, with calls in it.

1. Between an attempt that succeeds and the return of the call there is no `await`, and no call of a function: so a call
   that is cancelled, or interrupted, has taken nothing.
2. A future is no message: a call whose future was resolved, and which is cancelled before its attempt, passes the
   wake-up on (`_LoopWaits.look`).
3. The waits of a parent's loop are not a forked child's: it leaves them alone, since it shares the loop's epoll.
"""

from __future__ import annotations

import asyncio
import math
import os
import queue
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, overload

from .annotations import T_co, T_contra, V
from .attachment import Attachment
from .errors import EndOfChannel, PayloadTooLarge, RingshmError, SpecMismatch
from .handle import Handle, check_timeout, deadline_of
from .layout import MAX_ENTRIES, P_STUCK, SHUTDOWN
from .loans import Borrow, Loan, Misfit, adopt_into, into
from .mutex import SLICE
from .ring import CLAIMED, CONTENDED, EMPTY, NOTICE, SENT, STREAM, TAKEN, Outcome, Ring, Taken
from .selecting import Selectable
from .stream import Assembly, End, Feed
from .typed import SpecCodec
from .waiting import SHORT_SLICE, Waiters
from .wakeup import CHANGE

_Future = asyncio.Future  # of None


class _LoopWaits:
    """The calls of one event loop that wait on one channel, and what wakes them."""

    def __init__(self, attachment: Attachment, loop: asyncio.AbstractEventLoop) -> None:
        self._attachment = attachment
        self._loop = loop
        self._pid = os.getpid()
        #: The futures of the calls that wait, in their order, by what for.
        self.futures: dict[Waiters, dict[_Future[None], None]] = {
            waiters: {} for waiters in (attachment.messages, attachment.space, attachment.pieces, attachment.room)
        }
        self._listener = attachment.listeners.take()
        try:
            loop.add_reader(self._listener.fd, self._woken)
        except BaseException:
            attachment.listeners.give_back(self._listener)
            raise
        self._timer = loop.call_later(SLICE, self._tick)
        attachment.loops[id(loop)] = self

    def add(self, waiters: Waiters, future: _Future[None]) -> None:
        """That call waits. Look again afterwards."""
        self.futures[waiters][future] = None
        waiters.listen(self._listener)
        if waiters is self._attachment.space and self._timer.when() - self._loop.time() > SHORT_SLICE:
            self._timer.cancel()  # SYNC POINT w: a release pays for no fence
            self._timer = self._loop.call_later(SHORT_SLICE, self._tick)

    def remove(self, waiters: Waiters, future: _Future[None]) -> None:
        """That call waits no more; the last one takes everything with it."""
        futures = self.futures[waiters]
        futures.pop(future, None)
        if self._pid == os.getpid() and not futures:
            waiters.unlisten(self._listener)
            if not any(self.futures.values()):
                self._end()

    def _end(self) -> None:
        attachment = self._attachment
        attachment.loops.pop(id(self._loop), None)
        self._timer.cancel()
        if not self._loop.is_closed():
            self._loop.remove_reader(self._listener.fd)
        attachment.listeners.give_back(self._listener)

    def look(self, everybody: bool = False) -> None:
        """Wake as many calls as can succeed, or all of them; those that were woken and have not run yet count."""
        if self._pid != os.getpid():
            return
        for waiters, futures in self.futures.items():
            if futures:
                waiters.listen_on()
                count = len(futures) if everybody else self._expected(waiters)
                for future in list(futures)[:count]:
                    _resolve(future)

    def _expected(self, waiters: Waiters) -> int:
        """How many of those calls can succeed at most."""
        attachment = self._attachment
        if waiters is attachment.messages:
            return attachment.ring.ready()
        if waiters is attachment.space:
            return attachment.ring.free_slots()
        return MAX_ENTRIES  # each end of a stream knows itself

    def _woken(self) -> None:
        self.look(everybody=CHANGE in self._listener.drain())

    def _tick(self) -> None:
        if not any(self.futures.values()):  # an interrupt came while the first call was about to wait
            return self._end()
        self._timer = self._loop.call_later(SLICE, self._tick)
        try:
            self._attachment.reaper.look()
            everybody = self._over()
        except Exception:
            everybody = True  # each of the calls meets it, and raises it
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


async def _sleep(attachment: Attachment, waiters: Waiters, arrived: Callable[[], Any], deadline: float) -> None:
    """Announce, look again, wait until woken or the time is up."""
    loop = asyncio.get_running_loop()
    loop_waits: _LoopWaits = attachment.loops.get(id(loop)) or _LoopWaits(attachment, loop)
    future = loop.create_future()
    timer = None
    try:
        loop_waits.add(waiters, future)
        if arrived():
            await asyncio.sleep(0)  # others may be faster again and again: the loop goes on
        else:
            if deadline < math.inf:
                timer = loop.call_later(max(0.0, deadline - monotonic()), _resolve, future)
            await future
    except BaseException:
        if future.done() and not loop.is_closed():
            loop_waits.futures[waiters].pop(future, None)
            loop_waits.look()
        raise
    finally:
        if timer is not None:
            timer.cancel()
        try:
            loop_waits.remove(waiters, future)
        except BaseException:  # a handler raised in it: nobody must seem to wait who does not
            loop_waits.remove(waiters, future)
            raise


async def _pause(deadline: float) -> None:
    """Before another try for a mutex, which has already taken a slice of the loop's time."""
    await asyncio.sleep(max(0.0, min(SLICE, deadline - monotonic())))


async def _wait_for_other_end(attachment: Attachment, end: End, deadline: float) -> None:
    """As `Handle._wait_for_other_end`, a slice at most."""
    await _sleep(attachment, end.waiters, end.stirred, min(deadline, monotonic() + SLICE))


def _cancel_what_follows() -> None:
    """Put off a cancellation that came when the call had succeeded: the task gets it where it waits next, unless it has
    ended then, or whoever asked (`asyncio.timeout`) is content that the call has returned.
    """
    task: Any = asyncio.current_task()
    counts = hasattr(task, "cancelling")  # Python 3.11

    def cancel() -> None:
        if not task.done() and (not counts or task.cancelling()):
            if counts:
                task.uncancel()
            task.cancel()

    asyncio.get_running_loop().call_soon(cancel)


def _task() -> int:
    """A number for the running task, as standstill.py wants it."""
    return -id(asyncio.current_task())


class AsyncSends(Handle, Generic[T_contra]):
    """The methods for asyncio of a handle that may send."""

    if TYPE_CHECKING:
        _ring: Ring

        def _check_senders(self, attachment: Attachment) -> None: ...

        def _cannot_stream(self, nbytes: int) -> PayloadTooLarge: ...

        def _prepare_feed(self, ring: Ring, feed: Feed) -> None: ...

        def _not_received(self, feed: Feed) -> queue.Full: ...

        def _none_to_drop(self) -> queue.Full: ...

        def _no_space_in_time(self) -> queue.Full: ...

        def loan(self, timeout: float | None = None, nbytes: int | str | None = None) -> Loan:
            """See channel.py."""

    async def aput(self, obj: T_contra, timeout: float | None = None) -> None:
        """`put` for asyncio: while the ring is full, other tasks run.

        If it is cancelled, nothing was sent. A message larger than a slot may have been received in that very moment:
        then the call returns, and the task is cancelled where it waits next. It does not yield to the event loop if
        there is space at once.

        Args:
            obj: as `put`. It is encoded when the call begins; buffers in it are copied when there is space, so leave
                them as they are until then.
            timeout: in seconds; None waits for ever, 0 not at all.

        Raises:
            As `put`.
        """
        if not self.sent:
            self._start_sending()
        if timeout is not None:
            check_timeout(timeout)
        meta, data, description = self._codec.encode(obj)
        now = self._ring.called[0] = monotonic()
        if now > self._look_at:
            self._look_around()
        if meta >> 16 > self._slot_size:
            return await self._astream(meta, data, description, deadline_of(True, timeout))
        outcome = self._ring.send(meta, data, description)
        if outcome is not SENT:
            send = partial(self._ring.send, meta, data, description)
            await self._asend_slowly(outcome, send, deadline_of(True, timeout))

    def aloan(self, timeout: float | None = None, nbytes: int | str | None = None) -> AsyncLoan:
        """`loan` for asyncio: `async with channel.aloan() as loan: ...`.

        While the block waits for a slot, other tasks run; if it is cancelled then, nothing was claimed. If the block is
        cancelled, the slot is given back unsent.

        Args, Raises:
            As `loan`.
        """
        return AsyncLoan(self, self.loan(timeout, nbytes), timeout)

    async def _aclaim(self, attachment: Attachment, claimed: list[tuple[int, int]], timeout: float | None) -> None:
        if not self.sent:
            self._start_sending()
        self._begin_call(attachment.ring)
        attempt = partial(attachment.ring.claim, claimed)
        outcome = attempt()
        if outcome is not CLAIMED:
            await self._asend_slowly(outcome, attempt, deadline_of(True, timeout))

    async def _astream(self, meta: int, data: Any, description: bytes, deadline: float) -> None:
        """As `_stream`, in an event loop."""
        attachment = self._open()
        ring = attachment.ring
        if not ring.streams or not deadline:
            raise self._cannot_stream(meta >> 16)
        claimed: list[tuple[int, int]] = []
        try:
            outcome = ring.claim(claimed)
            if outcome is not CLAIMED:
                await self._asend_slowly(outcome, partial(ring.claim, claimed), deadline)
            ((head, since),) = claimed
            feed = Feed(ring, head, since, meta >> 16, data)
            self._prepare_feed(ring, feed)
            await self._apublish(attachment, head, meta, description, deadline)
            await self._afeed(attachment, feed, deadline)
        except (queue.Full, RingshmError):
            if not claimed or ring.take_back(*claimed[0]):
                raise
            return  # it was received at the last moment
        except asyncio.CancelledError:
            if not claimed or ring.take_back(*claimed[0]):
                raise
            _cancel_what_follows()
            return
        except BaseException:
            for claim in claimed:
                ring.take_back(*claim)
            raise
        ring.take_back(head, since)  # what a message leaves that was delivered too often

    async def _apublish(
        self, attachment: Attachment, head: int, meta: int, description: bytes, deadline: float
    ) -> None:
        tries = 0
        while (outcome := attachment.ring.publish(head, meta, description)) is not SENT:
            if outcome is NOTICE:
                self._check_senders(attachment)
            tries += 1
            if not self._patience(attachment, attachment.ring.senders, deadline, tries):
                raise queue.Full(self._held("senders"))
            await _pause(deadline)

    async def _afeed(self, attachment: Attachment, feed: Feed, deadline: float) -> None:
        """Write the pieces of a published message until it is received, or dropped."""
        yield_at = monotonic() + SHORT_SLICE
        while not feed.has_ended():
            now = monotonic()
            if now >= deadline:
                raise self._not_received(feed)
            if not feed.advance():
                if attachment.ring.is_waiting(feed.head):
                    self._check_senders(attachment)
                await _wait_for_other_end(attachment, feed, deadline)
                self._check_open(attachment)
            elif now >= yield_at:
                await asyncio.sleep(0)
                yield_at = monotonic() + SHORT_SLICE

    async def _asend_slowly(self, outcome: Outcome, attempt: Callable[[], Outcome], deadline: float) -> None:
        """As `_send_when_possible`, in an event loop."""
        attachment, tries, rounds, task = self._open(), 0, 0, _task()
        ring, standstill = attachment.ring, attachment.standstill
        try:
            while outcome is not SENT and outcome is not CLAIMED:
                self._check_open(attachment)
                if outcome is NOTICE:
                    self._check_senders(attachment)
                elif outcome is CONTENDED:
                    tries += 1
                    if not self._patience(attachment, ring.senders, deadline, tries):
                        raise queue.Full(self._held("senders"))
                    await _pause(deadline)
                elif self._options.when_full == "drop_oldest":
                    dropped = ring.drop_oldest()
                    if dropped is CONTENDED:
                        tries += 1
                        if not self._patience(attachment, ring.receivers, deadline, tries):
                            raise queue.Full(self._held("receivers"))
                        await _pause(deadline)
                    elif dropped is EMPTY and ring.full() and not attachment.reaper.look():
                        raise self._none_to_drop()
                elif monotonic() >= deadline:
                    if not attachment.reaper.look():
                        self._check_senders(attachment)
                        raise self._no_space_in_time()
                else:
                    self._check_senders(attachment)
                    if deadline == math.inf:
                        standstill.check(first=not rounds, task=task)
                        rounds += 1
                    await _sleep(attachment, attachment.space, lambda: not ring.full(), deadline)
                    self._check_open(attachment)
                    if rounds:
                        standstill.end(task)
                outcome = attempt()
        except BaseException:
            standstill.end(task)
            raise


class AsyncReceives(Selectable, Generic[T_co]):
    """The methods for asyncio of a handle that may receive."""

    if TYPE_CHECKING:
        _ring: Ring

        def borrow(self, timeout: float | None = None) -> Borrow[T_co]:
            """See channel.py."""

        def _begin_assembly(self, attachment: Attachment, taken: Taken) -> Assembly: ...

        def _not_all_came(self, assembly: Assembly) -> queue.Empty: ...

    @overload
    async def aget(self, timeout: float | None = None, out: Mapping[str, Any] | None = None) -> T_co: ...
    @overload
    async def aget(self, timeout: float | None, out: V) -> V: ...
    @overload
    async def aget(self, timeout: float | None = None, *, out: V) -> V: ...
    async def aget(self, timeout: float | None = None, out: Any = None) -> Any:
        """`get` for asyncio: while no message is there, other tasks run.

        If it is cancelled, it has taken no message. It does not yield to the event loop if a message is there at once.

        >>> import asyncio, ringshm
        >>> async def main():
        ...     with ringshm.Channel(4, "1KiB") as channel:
        ...         waiting = asyncio.create_task(channel.aget())
        ...         await channel.aput("hello")
        ...         return await waiting
        >>> asyncio.run(main())
        'hello'

        Args:
            timeout: in seconds; None waits for ever, 0 not at all.
            out: as `get`.

        Returns:
            As `get`.

        Raises:
            As `get`.
        """
        if not self.received:
            self._start_receiving()
        if timeout is not None:
            check_timeout(timeout)
        now = self._ring.called[0] = monotonic()
        if now > self._look_at:
            self._look_around()
        if out is not None:
            return await self._aget_into(out, deadline_of(True, timeout))
        value = self._ring.receive(self._codec.decode)
        if value.__class__ is Outcome:
            ring, codec = self._ring, self._codec
            value = await self._areceive_slowly(
                value,
                lambda: ring.receive(codec.decode),
                deadline_of(True, timeout),
                lambda deadline: self._areceive_stream(codec.adopt, deadline),
            )
        return value

    async def _aget_into(self, out: Any, deadline: float) -> Any:
        codec = self._codec
        try:
            decode = codec.into(out) if isinstance(codec, SpecCodec) else into(codec, out)
        except SpecMismatch as error:
            raise SpecMismatch(f"channel {self._name!r}: {error}") from None
        try:
            value = self._ring.receive(decode, out)
            if value.__class__ is Outcome:
                value = await self._areceive_slowly(
                    value,
                    lambda: self._ring.receive(decode, out),
                    deadline,
                    lambda deadline: self._areceive_stream(adopt_into(codec, out), deadline, out),
                )
            return value
        except Misfit as misfit:
            raise SpecMismatch(f"channel {self._name!r}: {misfit}; the message is back in its place") from None

    def aborrow(self, timeout: float | None = None) -> AsyncBorrow[T_co]:
        """`borrow` for asyncio: `async with channel.aborrow() as message: ...`.

        While the block waits for a message, other tasks run; if it is cancelled then, it has taken none. A block that
        is cancelled has received its message, as by any exception, unless it has called `requeue`.

        Args, Raises:
            As `borrow`.
        """
        return AsyncBorrow(self, self.borrow(timeout), timeout)

    def __aiter__(self) -> AsyncIterator[T_co]:
        """Messages until the end of the stream: `async for message in channel`."""
        return self

    async def __anext__(self) -> T_co:
        try:
            return await self.aget()
        except EndOfChannel:
            raise StopAsyncIteration from None

    async def _atake(self, attachment: Attachment, taken: Taken, timeout: float | None) -> None:
        """Take a message for a borrow: it is in `taken` before it is this process's."""
        if not self.received:
            self._start_receiving()
        self._begin_call(attachment.ring)

        def attempt() -> Any:
            outcome = attachment.ring.take(taken)
            return taken if outcome is TAKEN else outcome

        async def stream(deadline: float) -> Any:
            return taken if await self._aassemble(attachment, taken, deadline) else EMPTY

        value = attempt()
        if value is not taken:
            await self._areceive_slowly(value, attempt, deadline_of(True, timeout), stream)

    async def _areceive_stream(self, adopt: Callable[[Any, int, bytes], Any], deadline: float, kind: Any = None) -> Any:
        """As `_receive_stream`, in an event loop."""
        attachment = self._open()
        ring, taken = attachment.ring, Taken()
        value: Any = None
        try:
            assembly = await self._aassemble(attachment, taken, deadline)
            if assembly is None:
                return EMPTY
            value = assembly.decoded(adopt)
            if not assembly.end():
                return EMPTY
            return value
        except BaseException:
            if taken.assembly is not None and taken.assembly.is_received():
                if value.__class__ is not Outcome:
                    ring.return_later(kind, value)
            else:
                ring.give_back(ring.pairs(taken))
            raise

    async def _aassemble(self, attachment: Attachment, taken: Taken, deadline: float) -> Assembly | None:
        """As `_assemble`, in an event loop; the next call goes on with what a cancelled one has copied."""
        ring = attachment.ring
        if ring.take(taken, stream=True) is not TAKEN:
            return None
        assembly = self._begin_assembly(attachment, taken)
        progress = monotonic()
        try:
            while True:
                if assembly.advance():
                    progress = monotonic()
                if assembly.is_complete:
                    return assembly
                if assembly.has_ended():
                    assembly.end()
                    taken.clear()
                    return None
                now = monotonic()
                if now >= deadline and (now > progress + SLICE or not assembly.is_repeated):
                    raise self._not_all_came(assembly)
                await _wait_for_other_end(attachment, assembly, deadline)
                self._check_open(attachment)
        except (asyncio.CancelledError, queue.Empty):
            assembly.leave()
            raise

    async def _areceive_slowly(
        self,
        value: Any,
        attempt: Callable[[], Any],
        deadline: float,
        stream: Callable[[float], Coroutine[Any, Any, Any]],
    ) -> Any:
        """As `_receive_when_possible`, in an event loop; nothing is called once `attempt` has given a message."""
        attachment, tries, rounds, task = self._open(), 0, 0, _task()
        ring, standstill = attachment.ring, attachment.standstill
        try:
            while value.__class__ is Outcome:
                if value.error is not None:
                    raise self._undecodable(value.error) from value.error
                if value is STREAM:
                    value = await stream(deadline)
                    if value.__class__ is not Outcome:
                        return value
                elif value is CONTENDED:
                    tries += 1
                    if not self._patience(attachment, ring.receivers, deadline, tries):
                        raise queue.Empty(self._held("receivers"))
                    await _pause(deadline)
                    value = attempt()
                else:
                    self._check_open(attachment)
                    self._check_receivers(attachment, 1)
                    if ring.ready():
                        pass
                    elif monotonic() >= deadline:
                        if not attachment.reaper.look():
                            raise queue.Empty(
                                f"channel {self._name!r}: no message came in time: wait longer, or send more"
                            )
                    else:
                        if deadline == math.inf:
                            standstill.check(first=not rounds, task=task)
                            rounds += 1
                        await _sleep(attachment, attachment.messages, ring.ready, deadline)
                        self._check_open(attachment)
                        if rounds:
                            standstill.end(task)
                    value = attempt()
            return value
        except BaseException:
            standstill.end(task)
            raise


class AsyncLoan:
    """A loan whose block may wait for its slot in an event loop; made by `Sender.aloan`. Its block gets a Loan."""

    def __init__(self, channel: AsyncSends[Any], loan: Loan, timeout: float | None) -> None:
        self._channel = channel
        self._loan = loan
        self._timeout = timeout

    async def __aenter__(self) -> Loan:
        loan = self._loan
        if loan._claimed:
            raise ValueError("this loan has begun already: call aloan() for each block")
        try:
            loan._attachment = attachment = self._channel._open()
            await self._channel._aclaim(attachment, loan._claimed, self._timeout)
            loan._begin(attachment, _task())
            return loan
        except BaseException:
            loan._discard()
            raise

    async def __aexit__(self, *exc_info: Any) -> None:
        self._loan.__exit__(*exc_info)


class AsyncBorrow(Generic[T_co]):
    """A borrow whose block may wait for its message in an event loop; made by `Receiver.aborrow`. Its block gets a
    Borrow.
    """

    def __init__(self, channel: AsyncReceives[T_co], borrow: Borrow[T_co], timeout: float | None) -> None:
        self._channel = channel
        self._borrow = borrow
        self._timeout = timeout

    async def __aenter__(self) -> Borrow[T_co]:
        borrow = self._borrow
        if borrow._slot >= 0:
            raise ValueError("this borrow has begun already: call aborrow() for each block")
        attachment, taken = self._channel._open(), Taken()
        try:
            await self._channel._atake(attachment, taken, self._timeout)
            borrow._begin(attachment, taken, _task())
            return borrow
        except BaseException:
            borrow._abandon(attachment, taken)
            raise

    async def __aexit__(self, *exc_info: Any) -> None:
        self._borrow.__exit__(*exc_info)

"""The methods of handles that send, for calls that block and for calls in an event loop.

What succeeds at once is a few lines here and one critical section in the ring. What does not goes on in sending.py.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Generic

from ..annotations import T_contra
from ..arguments import check_timeout, deadline_of
from ..ring.outcomes import NOTICE, SENT, Outcome
from ..system import monotonic
from .event_loop import in_loop
from .loans import AsyncLoan, Loan
from .sending import Message, Sending
from .steps import finish


class Sends(Sending, Generic[T_contra]):
    """The methods of a handle that may send."""

    def put(self, obj: T_contra, block: bool = True, timeout: float | None = None) -> None:
        """Copy `obj` into a free slot, behind all messages whose `put` has returned.

        While the ring is full, `put` waits. With `when_full="drop_oldest"` it drops the oldest unread message instead,
        and waits only while all slots are being read or written.
        If this process is interrupted or dies before `put` has returned, the message was sent whole or not at all.

        A message larger than a slot takes as many free slots as it needs, and `put` returns. If too few slots are free,
        the message goes through some of them piece by piece while its receiver copies, and `put` returns when it is
        received. `timeout` is for all of that; when it is over, `put` takes the message back. The message has its place
        in the order from its beginning. If its receiver dies, another receiver gets it from the start.

        Args:
            obj: what the channel's codec takes; with a spec, a mapping of its fields to arrays or scalars.
            block: False does not wait, whatever `timeout` is.
            timeout: in seconds; None waits for ever, 0 not at all.

        Raises:
            queue.Full: if no slot came free in time, or a message larger than a slot was not received in time.
            PayloadTooLarge: if the encoded object is larger than a slot, and `put` must not wait, or the channel was
                made with `oversize="error"`.
            SpecMismatch: if `obj` is not what the spec says; names the field.
            ChannelClosed: after `close` or `shutdown`.
            BrokenChannel: if there has been a receiver and none is left or may still come.
            ChannelDeadlock: if `timeout` is None and threads that wait themselves hold all slots.
            Exception: what encoding `obj` raises; nothing was sent.
        """
        if not self._seat.sent:
            self._start_sending()
        if timeout is not None and block:
            check_timeout(timeout)
        meta, data, description = self._codec.encode(obj)
        now = self._ring.called[0] = monotonic()
        if now > self._look_at:
            self._look_around()
        if meta >> 16 > self._slot_size:
            return self._put_larger(meta, data, description, block, timeout)
        outcome = self._ring.send(meta, data, description)
        if outcome is not SENT:
            self._put_slowly(outcome, meta, data, description, deadline_of(block, timeout))

    def _put_larger(self, meta: int, data: Any, description: bytes, block: bool, timeout: float | None) -> None:
        """Put an encoded message that is larger than a slot."""
        turn = self._turn(deadline_of(block, timeout), self._send_spin)
        finish(self._stream(turn, meta, data, description, [0]))

    def _put_slowly(self, outcome: Outcome, meta: int, data: Any, description: bytes, deadline: float) -> None:
        """Put an encoded message after an attempt that did not succeed at once."""
        turn = self._turn(deadline, self._send_spin)
        finish(self._until_sent(turn, outcome, partial(self._ring.send, meta, data, description)))

    def put_nowait(self, obj: T_contra) -> None:
        """`put(obj, block=False)`: what does not fit into a free slot at once raises."""
        self.put(obj, False)

    def put_many(self, objs: Iterable[T_contra], timeout: float | None = None) -> int:
        """Send objects in order: all of them, or as many as fit in time.

        All are encoded before the first is sent. So if one of them cannot be sent, the channel is as it was. Small ones
        are sent together, under one grant of the senders' mutex for each MiB; other senders may come between.

        Args:
            objs: what `put` takes, each.
            timeout: for all of them, in seconds; None waits for ever, 0 not at all.

        Returns:
            How many were sent. If it is fewer than all, the time is up.

        Raises:
            As `put`, except queue.Full. The exception's attribute `sent` says how many were sent; so does that of any
            other which ends the call, such as a KeyboardInterrupt.

        >>> import ringshm
        >>> with ringshm.Channel(2, "1KiB") as channel:
        ...     channel.put_many("abc", timeout=0.1)
        2
        """
        deadline = deadline_of(True, timeout)
        return self._send_all(lambda: self._encode_all(objs, deadline), deadline)

    def _send_all(self, encode: Callable[[], Sequence[Message]], deadline: float) -> int:
        sent = [0]
        try:
            encoded = encode()
            fits = encoded and encoded[0][0] >> 16 <= self._slot_size
            if fits and self._ring.send_many(encoded, sent) is NOTICE:
                self._check_senders(self._open())
            if sent[0] < len(encoded):
                with contextlib.suppress(queue.Full):
                    finish(self._send_rest(self._turn(deadline, self._send_spin), encoded, sent))
            return sent[0]
        except BaseException as error:
            error.sent = sent[0]  # type: ignore[attr-defined]
            raise

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every message that this process put has been received or dropped.

        Args:
            timeout: in seconds; None waits for ever, 0 not at all.

        Returns:
            False if that was not so in time.

        Raises:
            BrokenChannel: if messages are left and nobody is left to receive them.
            ChannelDeadlock: if `timeout` is None and this thread has borrowed one of them itself, or threads that wait
                hold all slots.
            ChannelClosed: after `close`.
        """
        return finish(self._until_flushed(self._turn(deadline_of(True, timeout))))

    wait_for_all_ack = flush

    def put_batch(self, batch: Mapping[str, Any], timeout: float | None = None) -> int:
        """Send `n` messages, stacked; for channels with a spec. The mirror of `get_batch`.

        All messages are checked before the first is sent.

        Args:
            batch: nested mappings of arrays of shape `(n, *shape)`. An UpTo field's array may be shorter than its
                maximum; a Batch's `lengths` say how much of each row is sent.
            timeout: for all of them, in seconds; None waits for ever, 0 not at all.

        Returns:
            How many were sent, as `put_many`.

        Raises:
            SpecMismatch: names the field; nothing was sent.
            TypeError: if the channel has no spec.
            As `put_many`.
        """
        deadline = deadline_of(True, timeout)
        return self._send_all(lambda: self._encode_batch("put_batch", batch), deadline)

    # --- loans

    def loan(self, timeout: float | None = None, nbytes: int | str | None = None) -> Loan:
        """Write straight into a free slot, within a `with` block: nothing is copied.

        The message is what was written when the block ends. The block waits for a slot as `put` does. A loan has one
        slot, so its message is never larger than that.

        >>> import numpy as np, ringshm
        >>> with ringshm.Channel(4, "64KiB") as channel:
        ...     with channel.loan() as loan:
        ...         loan.array((2, 3), np.uint8)[...] = 7
        ...     channel.get()
        array([[7, 7, 7],
               [7, 7, 7]], dtype=uint8)

        Args:
            timeout: for a free slot, in seconds, when the block begins; None waits for ever, 0 not at all.
            nbytes: how many bytes of the loan's `buffer` to send, settable until the block ends; a string such as
                "64KiB" also does. None sends the whole slot.

        Returns:
            A context manager, see Loan.

        Ownership:
            The slot is this process's until the block ends. It is sent then; or given back unsent, if the block raises
            or has called `discard`, or if the process dies.

        Raises:
            PayloadTooLarge: if `nbytes` is more than a slot holds.
            TypeError: if `nbytes` is given, and the channel has a spec.
            As `put`, when the block begins; ChannelClosed also when it ends. Then nothing was sent.
        """
        if timeout is not None:
            check_timeout(timeout)
        return Loan(self, timeout, nbytes if nbytes is None else self._fitting(nbytes))

    async def aput(self, obj: T_contra, timeout: float | None = None) -> None:
        """`put` for asyncio: while the ring is full, other tasks run.

        If it is cancelled, nothing was sent. If a message larger than a slot was received in the very moment of the
        cancellation, the call returns, and the task is cancelled where it waits next. If there is space at once, the
        call does not yield to the event loop. `obj` is encoded when the call begins; leave buffers in it as they are
        until the call ends, since they are copied when there is space.

        Args, Raises:
            As `put`.
        """
        if not self._seat.sent:
            self._start_sending()
        if timeout is not None:
            check_timeout(timeout)
        meta, data, description = self._codec.encode(obj)
        self._begin_call(self._ring)
        if meta >> 16 > self._slot_size:
            turn = self._loop_turn(deadline_of(True, timeout))
            return await in_loop(self._stream(turn, meta, data, description, [0]))
        outcome = self._ring.send(meta, data, description)
        if outcome is not SENT:
            send = partial(self._ring.send, meta, data, description)
            await in_loop(self._until_sent(self._loop_turn(deadline_of(True, timeout)), outcome, send))

    async def aput_many(self, objs: Iterable[T_contra], timeout: float | None = None) -> int:
        """`put_many` for asyncio: while the ring is full, other tasks run.

        If it is cancelled, it has sent the messages before the one for which it waited, and none behind; the
        CancelledError's `sent` says how many, to an `except` around the `await` of this call. If a message larger than
        a slot was received in the very moment of the cancellation, it goes on as `aput` does. Leave buffers in the
        objects as they are until the call ends.

        Args, Returns, Raises:
            As `put_many`.
        """
        deadline = deadline_of(True, timeout)
        return await self._asend_all(lambda: self._encode_all(objs, deadline), deadline)

    async def _asend_all(self, encode: Callable[[], Sequence[Message]], deadline: float) -> int:
        sent = [0]
        try:
            encoded = encode()
            with contextlib.suppress(queue.Full):
                await in_loop(self._send_rest(self._loop_turn(deadline), encoded, sent))
            return sent[0]
        except BaseException as error:
            error.sent = sent[0]  # type: ignore[attr-defined]
            raise

    async def aput_batch(self, batch: Mapping[str, Any], timeout: float | None = None) -> int:
        """`put_batch` for asyncio, as `aput_many`: leave the batch's arrays as they are until the call ends.

        Args, Returns, Raises:
            As `put_batch`.
        """
        deadline = deadline_of(True, timeout)
        return await self._asend_all(lambda: self._encode_batch("aput_batch", batch), deadline)

    async def aflush(self, timeout: float | None = None) -> bool:
        """`flush` for asyncio: while messages are not received yet, other tasks run.

        Args, Returns, Raises:
            As `flush`, of this task instead of this thread.
        """
        return await in_loop(self._until_flushed(self._loop_turn(deadline_of(True, timeout))))

    def aloan(self, timeout: float | None = None, nbytes: int | str | None = None) -> AsyncLoan:
        """`loan` for asyncio: `async with channel.aloan() as loan: ...`.

        While the block waits for a slot, other tasks run. If it is cancelled then, it has claimed none. If it is
        cancelled later, the slot is given back unsent.

        Args, Raises:
            As `loan`.
        """
        return AsyncLoan(self.loan(timeout, nbytes))

"""The methods of handles that receive, for calls that block and for calls in an event loop.

What succeeds at once is a few lines here and one critical section in the ring. What does not goes on in receiving.py.
Nothing is called between the attempt that receives and the return of the call: see steps.py, 1.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Generic, NoReturn, overload

from ..annotations import T_co, V
from ..arguments import check_timeout, deadline_of, whole_number
from ..errors import EndOfChannel
from ..messages.typed import Batch
from ..ring.outcomes import Outcome
from ..system import monotonic
from .event_loop import until_received_in_loop
from .loans import AsyncBorrow, Borrow
from .selecting import Selectable
from .steps import until_received


class Receives(Selectable, Generic[T_co]):
    """The methods of a handle that may receive."""

    @overload
    def get(self, block: bool = True, timeout: float | None = None, out: Mapping[str, Any] | None = None) -> T_co: ...
    @overload
    def get(self, block: bool, timeout: float | None, out: V) -> V: ...
    @overload
    def get(self, block: bool = True, timeout: float | None = None, *, out: V) -> V: ...
    def get(self, block: bool = True, timeout: float | None = None, out: Any = None) -> Any:
        """The oldest message, which the caller owns: nothing in it points into shared memory.

        While there is none, `get` waits. The message is received once it is decoded; if this process dies before that,
        another receiver gets it. If time is up when a message larger than a slot has come in part, the message stays in
        its place, and the next call goes on with it.

        Args:
            block: False does not wait, whatever `timeout` is.
            timeout: in seconds; None waits for ever, 0 not at all.
            out: memory to copy array data into. If the message is one array, or `bytes`: an array or a writable buffer.
                If it is a dict: a dict of these, nested as the message is, for some or all of its arrays.

        Returns:
            The message. With `out`, `out` itself; if the message is a dict, its other entries are put into `out`. With
            `out` and a spec, a dict of the arrays in `out`, UpTo ones cut to the message's length, and of the scalars
            that `out` does not name.

        Raises:
            queue.Empty: if none came in time.
            SpecMismatch: if the message does not fit `out`, by its form, shape or dtype; it stays in its place.
            EndOfChannel: if none is there and no sender is left or may still come, or after `shutdown`.
            ChannelClosed: after `close`.
            ChannelDeadlock: if `timeout` is None and threads that wait themselves hold all slots.
            UndecodableMessage: if the codec failed on it; it counts as received.
            InterruptedCall: if a signal handler has raised in an earlier call of another kind, which had just received.
        """
        if not self._seat.received:
            self._start_receiving()
        if timeout is not None and block:
            check_timeout(timeout)
        now = self._ring.called[0] = monotonic()
        if now > self._look_at:
            self._look_around()
        value = self._receive_into(out) if out is not None else self._ring.receive(self._codec.decode)
        if value.__class__ is Outcome:
            return self._get_slowly(value, deadline_of(block, timeout), out)
        return value

    def _get_slowly(self, outcome: Outcome, deadline: float, out: Any = None) -> Any:
        """Go on with a `get` after an attempt that did not succeed at once."""
        turn = self._turn(deadline, self._receive_spin)
        attempt, adopt = self._attempts(out)
        return until_received(outcome, attempt, self._between(turn, adopt, out))

    def get_nowait(self) -> T_co:
        """`get(block=False)`: raises queue.Empty if no message is there."""
        return self.get(False)

    def get_many(self, max_messages: int, timeout: float | None = None) -> list[T_co]:
        """Wait for one message, then take what is there, up to `max_messages`, without waiting again.

        The messages are received once all are decoded. If one cannot be decoded, the call returns the messages before
        it, and the next call raises UndecodableMessage. A message larger than a slot comes alone.

        Args:
            max_messages: at most so many, at least 1.
            timeout: for the first, in seconds; None waits for ever, 0 not at all.

        Returns:
            The messages in their order, at least one; the caller owns them, as by `get`.

        Raises:
            As `get`.
        """
        limit = whole_number(max_messages, "max_messages")
        deadline = deadline_of(True, timeout)
        ring, codec = self._begin_many()
        values: Any = ring.receive_many(limit, codec.decode)
        if values.__class__ is Outcome:
            between = self._between(self._turn(deadline, self._receive_spin), codec.adopt, many=True)
            values = until_received(values, lambda: ring.receive_many(limit, codec.decode), between)
        return values  # type: ignore[no-any-return]

    # --- batches of a spec's messages

    def get_batch(
        self, n: int, *, min: int | None = None, timeout: float | None = None, out: Mapping[str, Any] | None = None
    ) -> Batch:
        """The `n` oldest messages, stacked; for channels with a spec.

        The call waits until all are there and copies each once. They are received together, when all are copied. If a
        signal handler raises when they have been received, the next call with the same `out` returns that batch,
        however many it asks for.

        >>> import ringshm
        >>> with ringshm.Channel(8, spec={"obs": ("f4", 2), "reward": "f4"}) as channel:
        ...     for k in range(4):
        ...         channel.put({"obs": [k, k], "reward": k / 2})
        ...     batch = channel.get_batch(4)
        >>> batch["obs"].shape, batch["reward"].tolist()
        ((4, 2), [0.0, 0.5, 1.0, 1.5])

        Args:
            n: how many, at most the capacity.
            min: if at least so many are there at the time-out, or when no more can come, take those. None: all or none.
            timeout: in seconds; None waits for ever, 0 not at all.
            out: nested mappings of arrays of shape `(n or more, *shape)` to copy into.

        Returns:
            Nested dicts of arrays of shape `(n, *shape)`, which the caller owns: new ones, or the first rows of those
            in `out`. For each UpTo field `lengths`, of shape `(n,)`, says how much of each row is the message's; the
            rest of the row is zeros.

        Raises:
            queue.Empty: if too few came in time; nothing was taken.
            EndOfChannel: as `get`; also if too few are left and no more can come. These stay.
            SpecMismatch: if `out` has not the spec's fields; nothing was taken.
            TypeError: if the channel has no spec.
            As `get`.
        """
        n, least, attempt = self._begin_batch("get_batch", n, min, timeout, out)
        batch: Any = attempt(n)
        if batch.__class__ is Outcome:
            turn = self._turn(deadline_of(True, timeout), self._receive_spin)
            batch = until_received(batch, lambda: attempt(n), self._between_batches(turn, n, least, attempt))
        return batch  # type: ignore[no-any-return]

    # --- borrows

    def borrow(self, timeout: float | None = None) -> Borrow[T_co]:
        """Read the next message in its slot, within a `with` block: nothing is copied.

        The block waits for a message when it begins. The message is received when the block ends, also by an exception,
        unless the block has called `requeue`. If this process dies before that, another receiver gets the message.

        A message larger than a slot is copied to memory of this process, and views of that memory keep no slot. If the
        message does not fit into the ring, its sender waits until the block ends, or its time is up; then it is sent
        all the same. If this process dies in the block after that, the message is lost, counted as dropped, and the
        survivors warn of it.

        >>> import numpy as np, ringshm
        >>> with ringshm.Channel(4, "64KiB") as channel:
        ...     channel.put({"obs": np.arange(4), "reward": 1.0})
        ...     with channel.borrow() as message:
        ...         print(message.value["obs"].sum(), message.value["obs"].flags.writeable)
        6 False

        Args:
            timeout: for a message, in seconds, when the block begins; None waits for ever, 0 not at all.

        Returns:
            A context manager, see Borrow.

        Ownership:
            Arrays in the message are read-only views of the slot. If some of them are alive when the block ends, the
            process keeps the slot until the last of them has gone. The ring has a slot less meanwhile.

        Raises:
            As `get`, when the block begins.
        """
        if timeout is not None:
            check_timeout(timeout)
        return Borrow(self, timeout)

    def __iter__(self) -> Iterator[T_co]:
        """Messages until the end of the stream, each as by `get()`."""
        while True:
            try:
                value = self.get()
            except EndOfChannel:
                return
            yield value

    def __contains__(self, message: object) -> NoReturn:
        raise TypeError(
            f"channel {self._name!r}: `in` would receive all messages until it found that one, and wait for more: "
            "receive them into a list, and search that"
        )

    @overload
    async def aget(self, timeout: float | None = None, out: Mapping[str, Any] | None = None) -> T_co: ...
    @overload
    async def aget(self, timeout: float | None, out: V) -> V: ...
    @overload
    async def aget(self, timeout: float | None = None, *, out: V) -> V: ...
    async def aget(self, timeout: float | None = None, out: Any = None) -> Any:
        """`get` for asyncio: while no message is there, other tasks run.

        If it is cancelled, it has taken no message. If a message is there at once, it does not yield to the event loop.

        >>> import asyncio, ringshm
        >>> async def main():
        ...     with ringshm.Channel(4, "1KiB") as channel:
        ...         waiting = asyncio.create_task(channel.aget())
        ...         await channel.aput("hello")
        ...         return await waiting
        >>> asyncio.run(main())
        'hello'

        Args, Returns, Raises:
            As `get`.
        """
        if not self._seat.received:
            self._start_receiving()
        if timeout is not None:
            check_timeout(timeout)
        self._begin_call(self._ring)
        value = self._receive_into(out) if out is not None else self._ring.receive(self._codec.decode)
        if value.__class__ is Outcome:
            turn = self._loop_turn(deadline_of(True, timeout))
            attempt, adopt = self._attempts(out)
            value = await until_received_in_loop(value, attempt, self._between(turn, adopt, out))
        return value

    async def aget_many(self, max_messages: int, timeout: float | None = None) -> list[T_co]:
        """`get_many` for asyncio: while no message is there, other tasks run.

        If it is cancelled, it has taken no message.

        Args, Returns, Raises:
            As `get_many`.
        """
        limit = whole_number(max_messages, "max_messages")
        if timeout is not None:
            check_timeout(timeout)
        ring, codec = self._begin_many()
        values: Any = ring.receive_many(limit, codec.decode)
        if values.__class__ is Outcome:
            between = self._between(self._loop_turn(deadline_of(True, timeout)), codec.adopt, many=True)
            values = await until_received_in_loop(values, lambda: ring.receive_many(limit, codec.decode), between)
        return values  # type: ignore[no-any-return]

    async def aget_batch(
        self, n: int, *, min: int | None = None, timeout: float | None = None, out: Mapping[str, Any] | None = None
    ) -> Batch:
        """`get_batch` for asyncio: while too few messages are there, other tasks run.

        If it is cancelled, it has taken no message; `out` may have been written to.

        Args, Returns, Raises:
            As `get_batch`.
        """
        n, least, attempt = self._begin_batch("aget_batch", n, min, timeout, out)
        batch: Any = attempt(n)
        if batch.__class__ is Outcome:
            between = self._between_batches(self._loop_turn(deadline_of(True, timeout)), n, least, attempt)
            batch = await until_received_in_loop(batch, lambda: attempt(n), between)
        return batch  # type: ignore[no-any-return]

    def aborrow(self, timeout: float | None = None) -> AsyncBorrow[T_co]:
        """`borrow` for asyncio: `async with channel.aborrow() as message: ...`.

        While the block waits for a message, other tasks run. If it is cancelled then, it has taken none. If it is
        cancelled later, it has received its message, as by any exception, unless it has called `requeue`.

        Args, Raises:
            As `borrow`.
        """
        return AsyncBorrow(self.borrow(timeout))

    def __aiter__(self) -> AsyncIterator[T_co]:
        """Messages until the end of the stream: `async for message in channel`."""
        return self

    async def __anext__(self) -> T_co:
        try:
            return await self.aget()
        except EndOfChannel:
            raise StopAsyncIteration from None

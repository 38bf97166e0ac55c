"""Queue, JoinableQueue, SimpleQueue: multiprocessing's, on a channel. Vocabulary, no mechanism.

A program moves over by changing an import. What differs, and why:

- `put` copies into the ring and returns when the message is sent. There is no feeder thread: what cannot be pickled
  raises at `put`, in place of a traceback from a thread; `join_thread` and `cancel_join_thread` have nothing to do;
  what was put is there for others, also if this process is killed right after.
- The ring is preallocated, so every queue is bounded: `maxsize=0` means DEFAULT_CAPACITY messages. A `put` beyond
  waits.
- A process that is killed, in whatever call, leaves no lock behind, and half a message is never seen.
- While the process that made the queue has it open, `get` waits as long as it must, whoever else has ended. Once that
  process has gone, others do not wait for ever: they get what is there and then EndOfChannel (an EOFError) when nobody
  is left who could put; and BrokenChannel (a BrokenPipeError) when nobody is left who could get.
- A queue may be pickled anywhere, not only while a process is started: into a task of a Pool, or a message.

The methods of faster-fifo's Queue, `put_many`, `get_many` and their likes, take its arguments. Without a `timeout` they
wait as long as they must, as `put` and `get` of multiprocessing do; there it is 10 seconds.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable
from typing import Any, Generic, NoReturn

from .annotations import T
from .channel import Channel
from .errors import ChannelClosed
from .handle import deadline_of
from .layout import PAGE_SIZE, whole_number
from .ring import CLAIMED, FULL, Outcome
from .stats import ChannelStats
from .tasks import TaskChannel

__all__ = ["DEFAULT_CAPACITY", "JoinableQueue", "Queue", "QueueClosed", "SimpleQueue"]

#: Messages that a queue with `maxsize=0` holds.
DEFAULT_CAPACITY = 1024
#: Bytes of all slots together where no `slot_size` is given, within the bounds below. They are reserved at
#: construction, which takes 12 ms; a container of Docker's has 64 MiB for all.
_DEFAULT_TOTAL = 16 << 20
_SMALLEST_SLOT = PAGE_SIZE
_LARGEST_SLOT = 1 << 20
#: Processes that may be attached: more than a Pool on a large machine has.
_MAX_PARTICIPANTS = 1024
#: What faster-fifo's `get_many` takes at most.
_MANY = 10**9

#: Seconds until a batch that waits for space for all of it looks again, if there is space for a part.
_SECONDS_BETWEEN_CLAIMS = 0.001


class QueueClosed(ChannelClosed, OSError):
    """Closed by this process: a ValueError, as multiprocessing's Queue raises, and an OSError, as SimpleQueue."""


def default_slot_size(capacity: int) -> int:
    """Bytes of each slot of a queue for so many messages: its share of 16 MiB, a page at least, 1 MiB at most."""
    share = _DEFAULT_TOTAL // capacity
    return max(_SMALLEST_SLOT, min(_LARGEST_SLOT, share - share % PAGE_SIZE))


class _OnChannel(Generic[T]):
    """What the queues have in common: the channel that they stand on."""

    _channel_type: type[Channel] = Channel

    def __init__(self, maxsize: int, slot_size: int | str | None) -> None:
        unlimited = isinstance(maxsize, int) and maxsize <= 0
        capacity = DEFAULT_CAPACITY if unlimited else whole_number(maxsize, "maxsize")
        if slot_size is None:
            slot_size = default_slot_size(capacity)
        self._channel = self._channel_type(capacity, slot_size, keep_open=True, max_participants=_MAX_PARTICIPANTS)

    @property
    def name(self) -> str:
        """Its name, for `ringshm stats NAME`."""
        return self._channel.name

    @property
    def slot_size(self) -> int:
        """Largest message that goes into one slot, in bytes."""
        return self._channel.slot_size

    def stats(self) -> ChannelStats:
        """As Channel.stats."""
        return self._channel.stats()

    def close(self) -> None:
        """This process puts and gets no more; waits for nobody, and is not an error twice.

        What it has put stays for the others. A queue that is garbage is closed, too.
        """
        self._channel.close()

    def _refuse(self, error: ChannelClosed) -> NoReturn:
        """Raise what a call on a closed queue gets."""
        if not self._channel.closed:
            raise error
        raise QueueClosed(f"{self!r} is closed in this process: use it before close(), or make another") from error

    def __getstate__(self) -> dict[str, Any]:
        # `Queue[Task](…)` leaves a note of its type, which need not pickle
        return {name: value for name, value in self.__dict__.items() if name != "__orig_class__"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        channel = self._channel
        return f"<ringshm.{type(self).__name__} {channel.name!r} of {channel.capacity} x {channel.slot_size} bytes>"


class Queue(_OnChannel[T]):
    """`multiprocessing.Queue` on a channel: many processes and threads put, many get, each message goes to one.

    >>> import ringshm
    >>> queue = ringshm.Queue(maxsize=8)
    >>> queue.put({"task": 1})
    >>> queue.get(timeout=1), queue.empty()
    ({'task': 1}, True)
    >>> queue.close()

    Args:
        maxsize: how many messages it holds; 0 or less means 1024, not "any number".
        ctx: taken, and not used: nothing in it depends on how processes are started.
        slot_size: largest message in bytes, or a string such as "64KiB", for which memory is set aside `maxsize` times;
            None divides 16 MiB among the messages, 4 KiB at least and 1 MiB at most for each (16 KiB for `maxsize=0`).

    Raises:
        TypeError, ValueError, InsufficientSharedMemory: as Channel.
    """

    def __init__(self, maxsize: int = 0, *, ctx: object = None, slot_size: int | str | None = None) -> None:
        super().__init__(maxsize, slot_size)
        self._used = False

    @property
    def maxsize(self) -> int:
        """How many messages it holds."""
        return self._channel.capacity

    def put(self, obj: T, block: bool = True, timeout: float | None = None) -> None:
        """Put a message, which is pickled here and now.

        While the queue is full it waits. If this process dies before `put` has returned, it was put whole or not at
        all.

        Args:
            obj: any picklable object.
            block: False does not wait, whatever `timeout` is.
            timeout: in seconds; None waits for ever, 0 or less not at all.

        Raises:
            queue.Full: if no slot came free in time.
            QueueClosed: after `close`; a ValueError.
            PayloadTooLarge: if the message is larger than a slot, and cannot be streamed, as it cannot without waiting.
            BrokenChannel: if the process that made the queue has gone, and nobody is left who could get it.
            Exception: what pickling `obj` raises; nothing was put.
        """
        if timeout is not None and timeout < 0:
            timeout = 0.0
        try:
            self._channel.put(obj, block, timeout)
        except ChannelClosed as error:
            self._refuse(error)
        self._used = True

    def put_nowait(self, obj: T) -> None:
        """`put(obj, block=False)`: raises queue.Full if no slot is free."""
        self.put(obj, False)

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """The oldest message.

        While there is none it waits. If this process dies before it has the message, another one gets it.

        Args:
            block: False does not wait, whatever `timeout` is.
            timeout: in seconds; None waits for ever, 0 or less not at all.

        Returns:
            The message, which the caller owns.

        Raises:
            queue.Empty: if none came in time.
            QueueClosed: after `close`; a ValueError.
            EndOfChannel: if the process that made the queue has gone, and nobody is left who could put one.
            UndecodableMessage: if unpickling it failed; it counts as received.
        """
        if timeout is not None and timeout < 0:
            timeout = 0.0
        try:
            message: T = self._channel.get(block, timeout)
        except ChannelClosed as error:
            self._refuse(error)
        return message

    def get_nowait(self) -> T:
        """`get(block=False)`: raises queue.Empty if no message is there."""
        return self.get(False)

    # --- as faster-fifo

    def put_many(self, xs: Iterable[T], block: bool = True, timeout: float | None = None) -> None:
        """Put messages in order; with a time limit, all of them or none.

        While there is not space it waits, as `put`. Without a time limit each goes as soon as there is space for it.

        Args:
            xs: what `put` takes, each.
            block: False puts all of them at once, or none.
            timeout: for all of them, in seconds; None waits for ever, 0 or less not at all.

        Raises:
            queue.Full: if there was no space for all of them in time; none was put.
            As `put`.
        """
        rest = list(xs)
        try:
            if block and timeout is None:
                while rest:
                    del rest[: self._channel.put_many(rest)]
            elif rest:
                _put_together(self._channel, rest, deadline_of(block, max(0.0, timeout or 0.0)))
        except ChannelClosed as error:
            self._refuse(error)
        self._used = True

    def put_many_nowait(self, xs: Iterable[T]) -> None:
        """`put_many(xs, block=False)`."""
        self.put_many(xs, False)

    def get_many(self, block: bool = True, timeout: float | None = None, max_messages_to_get: int = _MANY) -> list[T]:
        """Wait for one message, as `get`, then take what is there, without waiting again.

        Args:
            block: False does not wait for one.
            timeout: for the first, in seconds; None waits for ever, 0 or less not at all.
            max_messages_to_get: at most so many.

        Returns:
            The messages in their order, at least one.

        Raises:
            As `get`.
        """
        if not block:
            timeout = 0.0
        try:
            return self._channel.get_many(max_messages_to_get, timeout if timeout is None else max(0.0, timeout))
        except ChannelClosed as error:
            self._refuse(error)

    def get_many_nowait(self, max_messages_to_get: int = _MANY) -> list[T]:
        """`get_many(block=False)`.

        Args:
            max_messages_to_get: at most so many.
        """
        return self.get_many(False, None, max_messages_to_get)

    # --- looking

    def qsize(self) -> int:
        """Messages that wait to be got, at the moment of the call."""
        try:
            return self._channel.qsize()
        except ChannelClosed as error:
            self._refuse(error)

    def empty(self) -> bool:
        """Whether no message waits to be got, at the moment of the call. True of one that was closed unused."""
        if self._channel.closed and not self._used:
            return True
        return not self.qsize()

    def full(self) -> bool:
        """Whether the next `put` would wait, at the moment of the call."""
        try:
            return self._channel.full()
        except ChannelClosed as error:
            self._refuse(error)

    # --- ending

    def is_closed(self) -> bool:
        """Whether this process has closed it."""
        return self._channel.closed

    def join_thread(self) -> None:
        """Return at once: there is no thread, and what was put is there. ValueError before `close`."""
        if not self._channel.closed:
            raise ValueError(f"{self!r} is not closed: call close() before join_thread()")

    def cancel_join_thread(self) -> None:
        """Do nothing: there is no thread, and nothing is lost that was put."""


class JoinableQueue(Queue[T]):
    """`multiprocessing.JoinableQueue` on a channel: a Queue that knows how many messages are not done yet.

    Every message that was put is a task, until `task_done` was called for it. The count stands in shared memory and
    changes in one step, so it is right whoever is killed when:

    - killed within `put`: the task was put and counts, or it was not and does not.
    - killed within `get`: the task goes to another process, and counts.
    - killed within `task_done`: it was counted as done, or was not.
    - ended in any way, or closed the queue, between `get` and `task_done`: the task is lost. `join` does not wait for
      it in vain: each one that is under way, or else the next, raises BrokenChannel, which says how many were lost and
      who has ended. They no longer count then: put again what is to be done, and `join` again.

    >>> import ringshm
    >>> tasks = ringshm.JoinableQueue(8)
    >>> tasks.put("a task")
    >>> tasks.get(), tasks.join(timeout=0)
    ('a task', False)
    >>> tasks.task_done()
    >>> tasks.join()
    True
    >>> tasks.close()

    Args:
        maxsize, ctx, slot_size: as `Queue`.
    """

    _channel_type = TaskChannel
    _channel: TaskChannel

    def task_done(self) -> None:
        """A task that was got is done; wakes those who `join` if it was the last.

        Any process may say so, as long as the one that got it has the queue open.

        Raises:
            ValueError: if no task is unfinished.
            QueueClosed: after `close`.
        """
        try:
            self._channel.task_done()
        except ChannelClosed as error:
            self._refuse(error)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until every task that was put is done.

        Args:
            timeout: in seconds; None waits as long as the tasks take.

        Returns:
            False if they were not done in time.

        Raises:
            BrokenChannel: if tasks were lost, since a process that had got them has ended; or if the process that made
                the queue has gone, and nobody is left who could get those that wait.
            QueueClosed: after `close`.
        """
        try:
            return self._channel.join(timeout)
        except ChannelClosed as error:
            self._refuse(error)


class SimpleQueue(_OnChannel[T]):
    """`multiprocessing.SimpleQueue` on a channel: `put` and `get`, which wait, `empty` and `close`.

    It holds 1024 messages. After `close` each call raises QueueClosed, an OSError as there.

    Args:
        ctx, slot_size: as `Queue`.
    """

    def __init__(self, *, ctx: object = None, slot_size: int | str | None = None) -> None:
        super().__init__(0, slot_size)

    def put(self, obj: T) -> None:
        """As `Queue.put`, waiting as long as it must.

        Args:
            obj: any picklable object.
        """
        try:
            self._channel.put(obj)
        except ChannelClosed as error:
            self._refuse(error)

    def get(self) -> T:
        """As `Queue.get`, waiting as long as it must."""
        try:
            message: T = self._channel.get()
        except ChannelClosed as error:
            self._refuse(error)
        return message

    def empty(self) -> bool:
        """Whether no message waits to be got, at the moment of the call."""
        try:
            return self._channel.empty()
        except ChannelClosed as error:
            self._refuse(error)


def _put_together(channel: Channel, objs: list[Any], deadline: float) -> None:
    """Put all of them or none: claim as many slots, fill them, publish them in order.

    Slots are not held while it waits for others, so two who do this do not wait for each other.
    """
    if not channel.sent:
        channel._start_sending()
    attachment = channel._open()
    ring = attachment.ring
    encoded = [channel._codec.encode(obj) for obj in objs]
    for meta, _, _ in encoded:
        if meta >> 16 > channel.slot_size:
            raise channel._too_large(meta >> 16)
    if len(encoded) > channel.capacity:
        raise queue.Full(
            f"channel {channel.name!r}: {len(encoded)} messages never fit into {channel.capacity} slots at once: "
            "put fewer, or give put_many no time limit"
        )
    claimed: list[tuple[int, int]] = []

    def give_back() -> None:
        while claimed:
            ring.discard(*claimed[-1])
            claimed.pop()

    def claim_all() -> Outcome:
        while len(claimed) < len(encoded):
            outcome = ring.claim(claimed)
            if outcome is not CLAIMED:
                give_back()
                return outcome
        return CLAIMED

    def claim_all_later() -> Outcome:
        outcome = claim_all()
        if outcome is FULL:  # perhaps not quite
            time.sleep(_SECONDS_BETWEEN_CLAIMS)
        return outcome

    channel._begin_call(ring)
    try:
        outcome = claim_all()
        if outcome is not CLAIMED:
            channel._send_slowly(outcome, claim_all_later, deadline)
        for (slot, _), (meta, data, description) in zip(claimed, encoded, strict=True):
            ring.write(ring.offsets[slot], meta >> 16, data)
            channel._publish(slot, meta, description)
    finally:
        give_back()

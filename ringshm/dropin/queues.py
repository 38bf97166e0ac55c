"""Queue, JoinableQueue, SimpleQueue: multiprocessing's, on a channel. Vocabulary, no mechanism.

A program moves over by changing an import. These things differ:

- `put` copies the message into the ring and returns when it is sent; there is no feeder thread. An object that cannot
  be pickled raises at `put`, not in a thread. A message that was put is there for others even if this process is killed
  right after. `join_thread` and `cancel_join_thread` have nothing to do.
- The ring is preallocated, so every queue is bounded: `maxsize=0` means DEFAULT_CAPACITY messages. A further `put`
  waits.
- A process that is killed, in any call, leaves no lock behind, and nobody sees half a message.
- While the process that made the queue has it open, `get` waits as long as it must, whichever other processes have
  ended; so does `put` into a full queue, for workers may be replaced. If all that got from it have ended, also by a
  signal, a `put` without a time limit says so after ten seconds, by one RuntimeWarning. Once that process has gone,
  others do not wait for ever. `get` gives the messages that are left, and raises EndOfChannel (an EOFError) when no
  process is left that could put. `put` raises BrokenChannel (a BrokenPipeError) when no process is left that could get.
- Arrays arrive writable, also those that were sent read-only, as by `multiprocessing` before Python 3.14. (From 3.14 on
  these arrive read-only by `multiprocessing`, and always by a Channel.)
- A queue may be pickled anywhere, not only while a process is started: into a task of a Pool, or into a message.

The methods of faster-fifo's Queue, such as `put_many` and `get_many`, take its arguments. Without a `timeout` they wait
as long as they must, as multiprocessing's `put` and `get` do; in faster-fifo they wait for 10 seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, NoReturn

from ..annotations import T, V
from ..arguments import deadline_of, whole_number
from ..channel.channel import Channel
from ..errors import ChannelClosed
from ..ring.stats import ChannelStats
from ..segment.layout import PAGE_SIZE
from .handle import QueueChannel
from .tasks import TaskChannel

#: Messages in a queue with `maxsize=0`.
DEFAULT_CAPACITY = 1024
#: Bytes of all slots together if no `slot_size` is given, within the bounds below. They are reserved at construction,
#: which takes 12 ms. A container of Docker's has 64 MiB of shared memory by default.
_DEFAULT_TOTAL = 16 << 20
_SMALLEST_SLOT = PAGE_SIZE
_LARGEST_SLOT = 1 << 20
#: Processes that may be attached: more than a Pool has on a large machine.
_MAX_PARTICIPANTS = 1024
#: Messages of one `get_many` at most, as in faster-fifo.
_MANY = 10**9


class QueueClosed(ChannelClosed, OSError):
    """Closed by this process: a ValueError, as multiprocessing's Queue raises, and an OSError, as SimpleQueue."""


def default_slot_size(capacity: int) -> int:
    """Bytes of each slot of a queue of that capacity: its share of 16 MiB, a page at least, 1 MiB at most."""
    share = _DEFAULT_TOTAL // capacity
    return max(_SMALLEST_SLOT, min(_LARGEST_SLOT, share - share % PAGE_SIZE))


class _OnChannel(Generic[T]):
    """A queue on a channel: the methods that all queues have."""

    _channel_type: type[Channel] = QueueChannel

    def __init__(self, maxsize: int, slot_size: int | str | None) -> None:
        unlimited = isinstance(maxsize, int) and maxsize <= 0
        capacity = DEFAULT_CAPACITY if unlimited else whole_number(maxsize, "maxsize")
        if slot_size is None:
            slot_size = default_slot_size(capacity)
        self._channel = self._channel_type(capacity, slot_size, keep_open=True, max_participants=_MAX_PARTICIPANTS)

    @property
    def name(self) -> str:
        """The channel's name, for `ringshm stats NAME`."""
        return self._channel.name

    @property
    def slot_size(self) -> int:
        """Bytes of the largest message that goes into one slot."""
        return self._channel.slot_size

    def stats(self) -> ChannelStats:
        """As Channel.stats."""
        return self._channel.stats()

    def close(self) -> None:
        """Close the queue in this process, which puts and gets no more. It does not wait, and may be called again.

        Messages that were put stay for other processes. A queue that is garbage is closed, too.
        """
        self._channel.close()

    def _refuse(self, error: ChannelClosed) -> NoReturn:
        """Raise QueueClosed if this process has closed the queue, else the channel's error."""
        if not self._channel.closed:
            raise error
        raise QueueClosed(f"{self!r} is closed in this process: use it before close(), or make another") from error

    def _ask(self, call: Callable[..., V], *args: Any) -> V:
        """Make a call of the channel that receives no message: a signal handler may raise before it is returned."""
        try:
            return call(*args)
        except ChannelClosed as error:
            self._refuse(error)

    def __getstate__(self) -> dict[str, Any]:
        # `Queue[Task](…)` leaves its type in an attribute, which need not be picklable
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
        ctx: accepted and not used: nothing depends on how processes are started.
        slot_size: bytes of the largest message, or a string such as "64KiB"; memory is set aside for it `maxsize`
            times. None divides 16 MiB among the messages, 4 KiB to 1 MiB for each (16 KiB for `maxsize=0`).

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
        """Put a message, as `Channel.put`: it is pickled before `put` returns.

        Args:
            As `Channel.put`; a `timeout` below 0 is 0.

        Raises:
            queue.Full: if no slot came free in time.
            QueueClosed: after `close`; a ValueError.
            PayloadTooLarge: if the message is larger than a slot, and cannot be sent in pieces: not without waiting.
            BrokenChannel: if the process that made the queue has gone, and none is left that could get the message.
            Exception: anything that pickling `obj` raises; nothing was put.
        """
        if timeout is not None and timeout < 0:
            timeout = 0.0
        self._ask(self._channel.put, obj, block, timeout)
        self._used = True

    def put_nowait(self, obj: T) -> None:
        """`put(obj, block=False)`: raises queue.Full if no slot is free."""
        self.put(obj, False)

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """Get the oldest message, as `Channel.get`.

        Args:
            As `Channel.get`; a `timeout` below 0 is 0.

        Returns:
            The message, which the caller owns.

        Raises:
            queue.Empty: if none came in time.
            QueueClosed: after `close`; a ValueError.
            EndOfChannel: if the process that made the queue has gone, and none is left that could put a message.
            UndecodableMessage: if unpickling the message failed; it counts as received.
        """
        if timeout is not None and timeout < 0:
            timeout = 0.0
        try:
            message: T = self._channel.get(block, timeout)
        except ChannelClosed as error:
            self._refuse(error)
        return message

    def get_nowait(self) -> T:
        """`get(block=False)`: raises queue.Empty if the queue is empty."""
        return self.get(False)

    # --- as faster-fifo

    def put_many(self, xs: Iterable[T], block: bool = True, timeout: float | None = None) -> None:
        """Put messages in order; with a time limit, all of them or none.

        While there is no space, the call waits. Without a time limit each message goes as soon as there is space for
        it.

        Args:
            xs: the messages.
            block: False puts all of them at once, or none.
            timeout: for all of them, in seconds; None waits for ever, 0 or less not at all.

        Raises:
            queue.Full: if there was no space for all of them in time; none was put.
            As `put`.
        """
        rest = list(xs)
        if block and timeout is None:
            self._ask(self._channel.put_many, rest)
        elif rest:
            self._ask(self._channel._put_together, rest, deadline_of(block, max(0.0, timeout or 0.0)))
        self._used = True

    def put_many_nowait(self, xs: Iterable[T]) -> None:
        """`put_many(xs, block=False)`."""
        self.put_many(xs, False)

    def get_many(self, block: bool = True, timeout: float | None = None, max_messages_to_get: int = _MANY) -> list[T]:
        """Wait for one message, as `get`, then get all that are there, without waiting again.

        Args:
            block: False does not wait for the first.
            timeout: for the first, in seconds; None waits for ever, 0 or less not at all.
            max_messages_to_get: the most that are returned.

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
        """`get_many(block=False)`."""
        return self.get_many(False, None, max_messages_to_get)

    # --- looking

    def qsize(self) -> int:
        """The number of messages that wait to be got, at the moment of the call."""
        return self._ask(self._channel.qsize)

    def empty(self) -> bool:
        """Whether no message waits to be got, at the moment of the call. True if it was closed before it was used."""
        if self._channel.closed and not self._used:
            return True
        return not self.qsize()

    def full(self) -> bool:
        """Whether the next `put` would wait, at the moment of the call."""
        return self._ask(self._channel.full)

    # --- ending

    def is_closed(self) -> bool:
        """Whether this process has closed the queue."""
        return self._channel.closed

    def join_thread(self) -> None:
        """Return at once: there is no thread, and all messages were put already. ValueError before `close`."""
        if not self._channel.closed:
            raise ValueError(f"{self!r} is not closed: call close() before join_thread()")

    def cancel_join_thread(self) -> None:
        """Do nothing: there is no thread, and no message is lost."""


class JoinableQueue(Queue[T]):
    """`multiprocessing.JoinableQueue` on a channel: a Queue that knows how many messages are not done yet.

    Every message that was put is a task, until `task_done` was called for it. The count stands in shared memory and
    changes in one step, so it is right whenever a process is killed:

    - within `put`: the task was put and counts, or it was not and does not.
    - within `get`: the task goes to another process, and counts.
    - within `task_done`: the task was counted as done, or it was not.
    - between `get` and `task_done`: the task is lost, also if the process ended in another way or closed the queue.
      `join` does not wait for it in vain: every `join` that is under way, or else the next one, raises BrokenChannel,
      which says how many tasks were lost and which process has ended. They no longer count then: put them again, and
      `join` again.

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
        """Say that a task that was got is done. If it was the last, every `join` returns.

        Any process may call this, as long as the process that got the task has the queue open.

        Raises:
            ValueError: if no task is unfinished.
            QueueClosed: after `close`.
        """
        self._ask(self._channel.task_done)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until every task that was put is done.

        Args:
            timeout: in seconds; None waits as long as the tasks take.

        Returns:
            False if they were not done in time.

        Raises:
            BrokenChannel: if tasks were lost, since a process that had got them has ended; or if the process that made
                the queue has gone, and none is left that could get the tasks that wait.
            QueueClosed: after `close`.
        """
        return self._ask(self._channel.join, timeout)


class SimpleQueue(_OnChannel[T]):
    """`multiprocessing.SimpleQueue` on a channel: `put` and `get`, which wait, `empty` and `close`.

    It holds 1024 messages. After `close` each call raises QueueClosed, an OSError as in multiprocessing.

    Args:
        ctx, slot_size: as `Queue`.
    """

    def __init__(self, *, ctx: object = None, slot_size: int | str | None = None) -> None:
        super().__init__(0, slot_size)

    def put(self, obj: T) -> None:
        """As `Queue.put`, waiting as long as it must."""
        self._ask(self._channel.put, obj)

    def get(self) -> T:
        """As `Queue.get`, waiting as long as it must."""
        try:
            message: T = self._channel.get()
        except ChannelClosed as error:
            self._refuse(error)
        return message

    def empty(self) -> bool:
        """Whether no message waits to be got, at the moment of the call."""
        return self._ask(self._channel.empty)

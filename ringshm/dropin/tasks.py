"""Tasks: messages that count as unfinished until a process says that they are done. A JoinableQueue stands on them.

    unfinished = TAIL - WITHDRAWN - TASKS_DONE - TASKS_LOST

    word         writer                              guarded by           meaning
    TAIL         senders                             senders' mutex       messages that were ever sent
    WITHDRAWN    any process, for a dead sender too  receivers' mutex     of those, messages that were taken back
    TASKS_DONE   `task_done`                         senders' mutex       tasks that are done
    TASKS_LOST   `join`                              senders' mutex       tasks that will never be done
    P_TASKS      the process, in its own entry       nothing              tasks that it holds: got, and not done

A `put` counts nothing beside TAIL. Each count grows by one store, and a waiter for the mutex recovers it: so the count
is right at whatever moment a process is killed, and no process is left waiting for a lock.

A process that has ended never finishes the tasks that it had taken, and `join` would wait for them for ever. So `join`
computes how many tasks no process holds, and adds them to TASKS_LOST. Every `join` that is under way then raises, and
the tasks no longer count.

    lost = unfinished - in slots (READY or READING) - held by attached processes (P_TASKS)

1. No task is taken for lost that is not. A receiver counts a task as held (in `decode`) before it releases the slot,
   and stops counting it after TASKS_DONE has grown. `join` reads in the order TAIL, slots, COUNTING, P_TASKS, the rest,
   and holds the mutex in which TASKS_LOST grows: it sees a task that moves on meanwhile twice, not never, and a task
   that is sent meanwhile is not in `unfinished`. So `lost` may be too low for a moment, never too high.
2. A process may finish a task that another one holds. It has nothing to stop counting, so the other process goes on
   counting the task until it ends. Then, too, `lost` is too low, and `join` waits until that process has ended.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import weakref
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..annotations import T
from ..arguments import deadline_of
from ..channel.handle import closed_elsewhere
from ..channel.steps import finish
from ..errors import BrokenChannel
from ..messages.codecs import Decodable, Encoded
from ..process.attachment import Attachment
from ..ring.damage import corrupted
from ..ring.mutex import critical
from ..ring.outcomes import Outcome
from ..segment import layout
from ..system import RLock
from .handle import QueueChannel


class Tasks:
    """The tasks of one channel, as this process sees them. All its handles on the channel share one: `Tasks.of`."""

    def __init__(self, attachment: Attachment) -> None:
        self._name = attachment.name
        self._words = attachment.words
        self._memory = attachment.segment.memory
        self._participants = attachment.participants
        self._ring = attachment.ring
        self._events = attachment.events
        #: By the owner value of the entry under which they are held: the lock of their count, and their sequences.
        self._held: dict[int, tuple[Any, set[Hashable]]] = {}

    @staticmethod
    def of(attachment: Attachment) -> Tasks:
        """The tasks of that attachment's channel."""
        found = _of.get(attachment)
        return found if found is not None else _of.setdefault(attachment, Tasks(attachment))

    def _own(self) -> tuple[Any, set[Hashable]]:
        """The lock and the set for this process's present entry. The tasks that a parent held remain the parent's."""
        owner = self._participants.owner
        return self._held.get(owner) or self._held.setdefault(owner, (RLock(), set()))  # one for all threads

    # --- what this process holds

    def hold(self, *sequences: int) -> None:
        """Count these messages as held. It may be called more than once for the same message."""
        lock, held = self._own()
        held.update(sequences)
        self._store_held(lock, held)

    def sequence_at(self, description: int) -> int:
        """The sequence of the message whose description lies at that byte."""
        return self._words[description // layout.WORD_SIZE - layout.R_DESCRIPTION + layout.R_SEQUENCE]

    def large_ones(self) -> list[int]:
        """The sequences of the messages larger than a slot that this process is receiving."""
        slot_size, words = self._ring.layout.slot_size, self._words
        return [
            words[record + layout.R_SEQUENCE]
            for record, word in self._ring.owned_by(self._participants.owner)
            if word & layout.STATE_MASK == layout.READING and words[record + layout.R_META] >> 16 > slot_size
        ]

    def _store_held(self, lock: Any, held: set[Hashable]) -> None:
        """Write how many tasks are held; again if a signal handler, which may call this, too, has changed that."""
        with lock:
            self._write_held(held)

    def _write_held(self, held: set[Hashable]) -> None:
        word = self._participants.entry + layout.P_TASKS
        while self._participants.has_entry and self._words[word] != len(held):
            self._words[word] = len(held)

    def forget_returned(self) -> None:
        """After an exception: stop counting the messages that have gone back to their place in the ring."""
        lock, held = self._own()
        record_of, words = self._ring.layout.record, self._words
        ready = np.flatnonzero(self._ring.kinds() == layout.READY).tolist()
        held.difference_update([words[record_of(slot) + layout.R_SEQUENCE] for slot in ready])
        self._store_held(lock, held)

    def done(self) -> bool | None:
        """One task is done; False if none is unfinished, None if the mutex was not to be had within a slice."""
        words = self._words

        def count() -> int:
            unfinished = words[layout.TAIL] - self._over()
            if unfinished > 0:
                words[layout.TASKS_DONE] += 1
            return unfinished

        unfinished = critical(self._ring.senders, count)
        if isinstance(unfinished, Outcome):
            return None
        if unfinished <= 0:
            return False
        lock, held = self._own()
        with contextlib.suppress(KeyError):
            held.pop()
        self._store_held(lock, held)
        if unfinished == 1:
            self._events.wake_all()
        return True

    # --- what all hold

    def _over(self) -> int:
        """How many of the messages that were ever sent count as tasks no more."""
        return self._words[layout.WITHDRAWN] + self._words[layout.TASKS_DONE] + self._words[layout.TASKS_LOST]

    def unfinished(self) -> int:
        """The number of tasks that were sent and are not done.

        Raises:
            ChannelCorrupted: if more are done than were sent.
        """
        over = self._over()  # first: a task that comes and is done meanwhile must not count as done alone
        count = self._words[layout.TAIL] - over
        if count < 0:
            raise corrupted(self._name)
        if not count and self._ring.hides_messages():
            self._ring.reveal_messages()
            return 1  # look again: a message was sent, and is about to be counted
        return count

    def lost(self) -> int:
        """The number of unfinished tasks that no process holds. The order of the reads matters: see 1. above."""
        participants, sent = self._participants, self._words[layout.TAIL]
        kinds = self._ring.kinds()
        in_slots = int(((kinds == layout.READY) | (kinds == layout.READING)).sum())
        if self._words[layout.COUNTING]:  # a message has left its slot, perhaps, and is not in WITHDRAWN yet
            return 0
        statuses = participants.column(layout.P_STATUS)
        held = sum(
            tasks
            for status, tasks in zip(statuses, participants.column(layout.P_TASKS), strict=False)
            if status == layout.IN_USE
        )
        return max(0, sent - in_slots - held - self._over())

    def write_off(self) -> None:
        """Count what is lost as such, unless the mutex is not to be had within a slice."""
        words = self._words

        def count() -> None:
            words[layout.TASKS_LOST] = words[layout.TASKS_LOST] + self.lost() & layout.MAX_WORD

        critical(self._ring.senders, count)
        self._events.wake_all()


_of: weakref.WeakKeyDictionary[Attachment, Tasks] = weakref.WeakKeyDictionary()


class _Holding:
    """A channel's codec that counts each message as held before it decodes it; see Decodable."""

    def __init__(self, codec: Decodable, tasks: Tasks) -> None:
        self.codec = codec
        self._tasks = tasks

    def encode(self, obj: Any) -> Encoded:
        return self.codec.encode(obj)

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        self._tasks.hold(self._tasks.sequence_at(description))
        return self.codec.decode(memory, offset, meta, description)

    def adopt(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        self._tasks.hold(*self._tasks.large_ones())
        return self.codec.adopt(payload, meta, description)

    def view(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        raise TypeError("a channel of tasks has no borrow: get the task, or use a Channel")


class TaskChannel(QueueChannel[T]):
    """A channel of tasks: each message is unfinished until `task_done` was called for it."""

    _tasks: Tasks | None = None

    def _bind(self, attachment: Attachment) -> None:
        super()._bind(attachment)
        self._tasks = Tasks.of(attachment)
        self._codec = _Holding(self._codec, self._tasks)

    def _unbind(self) -> None:
        super()._unbind()
        if isinstance(self._codec, _Holding):
            self._codec = self._codec.codec
        self._tasks = None  # else it would keep this process's entry

    def get(self, block: bool = True, timeout: float | None = None, out: Any = None) -> Any:
        """As Channel.get; the message is a task that this process holds until it calls `task_done`."""
        tasks = self._tasks
        try:
            return super().get(block, timeout, out)
        except queue.Empty:
            raise
        except BaseException:
            _forget_returned(tasks)
            raise

    def get_many(self, max_messages: int, timeout: float | None = None) -> list[T]:
        """As `get`."""
        tasks = self._tasks
        try:
            return super().get_many(max_messages, timeout)
        except queue.Empty:
            raise
        except BaseException:
            _forget_returned(tasks)
            raise

    def _of_open(self) -> tuple[Attachment, Tasks]:
        attachment, tasks = self._open(), self._tasks
        if tasks is None:
            raise closed_elsewhere(self._name)
        return attachment, tasks

    def task_done(self) -> None:
        """Say that a task is done; see JoinableQueue."""
        attachment, tasks = self._of_open()
        while (counted := tasks.done()) is None:
            self._check_open(attachment)
        if not counted:
            raise ValueError(f"channel {self._name!r}: task_done() was called too many times: no task is unfinished")

    def join(self, timeout: float | None = None) -> bool:
        """Wait until no task is unfinished; see JoinableQueue."""
        turn = self._turn(deadline_of(True, timeout))
        attachment, tasks = self._of_open()
        words = attachment.words
        lost_before = words[layout.TASKS_LOST]

        def over() -> bool:
            return not tasks.unfinished() or words[layout.TASKS_LOST] != lost_before

        while True:
            if tasks.unfinished():
                attachment.reaper.look()
                if tasks.lost():
                    tasks.write_off()
            lost = words[layout.TASKS_LOST] - lost_before
            if lost > 0:
                gone = self._gone(attachment, layout.RECEIVER_GONE)
                raise BrokenChannel(
                    errno.EPIPE,
                    f"channel {self._name!r}: {lost} task{'s' * (lost != 1)} will not be done, taken by a process that "
                    f"ended before it called task_done{gone}; put the lost tasks again, and join again",
                )
            if not tasks.unfinished():
                return True
            if attachment.over_for_senders() and tasks.unfinished():
                raise self._broken(attachment, " that would do the tasks that are left")
            if not finish(turn.event(over)):
                return not tasks.unfinished()


def _forget_returned(tasks: Tasks | None) -> None:
    if tasks is not None:
        tasks.forget_returned()

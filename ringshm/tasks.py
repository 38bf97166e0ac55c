"""Tasks: messages of which somebody says that they are done. What a JoinableQueue stands on.

    unfinished = TAIL - WITHDRAWN - TASKS_DONE - TASKS_LOST

TAIL counts what was ever sent, and WITHDRAWN what was taken back of that, so a `put` counts nothing beside them.
TASKS_DONE, guarded by the senders' mutex, counts the calls of `task_done`. Each grows by one store, and whoever waits
for the mutex recovers it: so the count is right whoever is killed, at whatever moment, and nobody is left waiting for a
lock.

A task that a process has taken and will never finish, because it has ended, would keep `join` waiting for ever. So each
process says in its own entry (P_TASKS) how many it holds, and `join` knows what nobody holds:

    lost = unfinished - in slots (READY or READING) - held by those who are attached

It adds them to TASKS_LOST, and every `join` that is under way raises. They no longer count then.

1. No task is missed: a receiver counts it (in `decode`) before its slot is released, and stops counting it after
   TASKS_DONE has grown. Who looks reads in the order TAIL, slots, P_TASKS, the rest, and holds the mutex in which
   TASKS_LOST grows: what moves on meanwhile is seen twice, not never, and what comes meanwhile is not seen in
   `unfinished`. So `lost` may be too low for a moment, never too high.
2. A process may finish what another one holds. It has nothing to stop counting, so the other goes on counting it until
   it ends: then, too, `lost` is too low, and `join` waits as long as it did before it knew of this.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
import weakref
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .annotations import T
from .attachment import Attachment
from .channel import Channel
from .codecs import Decodable, Encoded
from .errors import BrokenChannel
from .handle import closed_elsewhere, deadline_of
from .layout import (
    IN_USE,
    MAX_WORD,
    P_STATUS,
    P_TASKS,
    R_DESCRIPTION,
    R_META,
    R_SEQUENCE,
    READING,
    READY,
    RECEIVER_GONE,
    STATE_MASK,
    TAIL,
    TASKS_DONE,
    TASKS_LOST,
    WITHDRAWN,
    WORD_SIZE,
)
from .mutex import reentrant_call
from .ring import corrupted


class Tasks:
    """The tasks of one channel, as this process sees them. All its handles on the channel share it: `Tasks.of`."""

    def __init__(self, attachment: Attachment) -> None:
        self._name = attachment.name
        self._words = attachment.words
        self._memory = attachment.segment.memory
        self._participants = attachment.participants
        self._ring = attachment.ring
        self._events = attachment.events
        self._owner = 0
        self._renew()

    @staticmethod
    def of(attachment: Attachment) -> Tasks:
        """The tasks of that attachment's channel."""
        found = _of.get(attachment)
        return found if found is not None else _of.setdefault(attachment, Tasks(attachment))

    def _renew(self) -> None:
        """Act for this process's present entry; what a parent held is the parent's."""
        if self._owner != self._participants.owner:
            self._lock = threading.RLock()
            self._held: set[Hashable] = set()
            self._owner = self._participants.owner

    # --- what this process holds

    def hold(self, *sequences: int) -> None:
        """Count these messages as held; they may come more than once."""
        self._renew()
        self._held.update(sequences)
        self._tell()

    def sequence_at(self, description: int) -> int:
        """The sequence of the message whose description lies at that byte."""
        return self._words[description // WORD_SIZE - R_DESCRIPTION + R_SEQUENCE]

    def large_ones(self) -> list[int]:
        """The sequences of the messages larger than a slot that this process is receiving."""
        layout, words = self._ring.layout, self._words
        records = [record for record, word in self._ring.owned_by(self._owner) if word & STATE_MASK == READING]
        return [words[record + R_SEQUENCE] for record in records if words[record + R_META] >> 16 > layout.slot_size]

    def _tell(self) -> None:
        """Say how many are held; again if a signal handler, which may come here too, has changed it meanwhile."""
        word = self._participants.entry + P_TASKS
        with self._lock:
            while self._words[word] != len(self._held):
                self._words[word] = len(self._held)

    def forget_returned(self) -> None:
        """After an exception: what has gone back to its place is not held."""
        self._renew()
        layout, words = self._ring.layout, self._words
        ready = np.flatnonzero(self._kinds() == READY).tolist()
        self._held.difference_update([words[layout.record(slot) + R_SEQUENCE] for slot in ready])
        self._tell()

    def _kinds(self) -> NDArray[np.uint64]:
        """The state of each slot, without its owner."""
        return np.frombuffer(self._ring.slot_words(), np.uint64) & np.uint64(STATE_MASK)

    def done(self) -> bool | None:
        """One task is done; False if none is unfinished, None if the mutex was not to be had within a slice."""
        words, senders = self._words, self._ring.senders
        if senders.owned():
            raise reentrant_call(self._name)
        try:
            gen = senders.enter()
            if not gen:
                return None
            unfinished = words[TAIL] - words[WITHDRAWN] - words[TASKS_DONE] - words[TASKS_LOST]
            if unfinished > 0:
                words[TASKS_DONE] += 1
            senders.leave(gen)
        except BaseException:
            senders.abandon()
            raise
        if unfinished <= 0:
            return False
        self._renew()
        with contextlib.suppress(KeyError):
            self._held.pop()
        self._tell()
        if unfinished == 1:
            self._events.wake_all()
        return True

    # --- what all hold

    def unfinished(self) -> int:
        """Tasks that were sent and are not done.

        Raises:
            ChannelCorrupted: if more are done than were sent.
        """
        words = self._words
        count = words[TAIL] - words[WITHDRAWN] - words[TASKS_DONE] - words[TASKS_LOST]
        if count < 0:
            raise corrupted(self._name)
        if not count and self._ring.hides_messages():
            self._ring.settle()
            return 1  # look again: it was sent, and is about to be counted
        return count

    def lost(self) -> int:
        """Tasks that are unfinished and that nobody holds any more; see 1. above for the order of what is read."""
        words, participants = self._words, self._participants
        sent = words[TAIL]
        kinds = self._kinds()
        in_slots = int(((kinds == READY) | (kinds == READING)).sum())
        statuses = participants.column(P_STATUS)
        held = sum(
            tasks for status, tasks in zip(statuses, participants.column(P_TASKS), strict=False) if status == IN_USE
        )
        return max(0, sent - in_slots - held - words[WITHDRAWN] - words[TASKS_DONE] - words[TASKS_LOST])

    def write_off(self) -> None:
        """Count what is lost as such, unless the mutex is not to be had within a slice."""
        words, senders = self._words, self._ring.senders
        if senders.owned():
            raise reentrant_call(self._name)
        try:
            gen = senders.enter()
            if gen:
                words[TASKS_LOST] = words[TASKS_LOST] + self.lost() & MAX_WORD
                senders.leave(gen)
        except BaseException:
            senders.abandon()
            raise
        self._events.wake_all()


_of: weakref.WeakKeyDictionary[Attachment, Tasks] = weakref.WeakKeyDictionary()


class _Holding:
    """A channel's codec that counts what it decodes as held."""

    def __init__(self, codec: Decodable, tasks: Tasks) -> None:
        self.codec = codec
        self._tasks = tasks

    def encode(self, obj: Any) -> Encoded:
        """What the codec makes of it."""
        return self.codec.encode(obj)

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Any:
        """What the codec makes of it."""
        self._tasks.hold(self._tasks.sequence_at(description))
        return self.codec.decode(memory, offset, meta, description)

    def adopt(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """What the codec makes of it."""
        self._tasks.hold(*self._tasks.large_ones())
        return self.codec.adopt(payload, meta, description)

    def view(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """Tasks are not borrowed."""
        raise TypeError("a channel of tasks has no borrow: get the task, or use a Channel")


class TaskChannel(Channel[T]):
    """A channel of tasks: each message that was put is unfinished until `task_done` was called for it."""

    _tasks: Tasks | None = None

    def _bind(self, attachment: Attachment) -> None:
        super()._bind(attachment)
        self._tasks = Tasks.of(attachment)
        self._codec = _Holding(self._codec, self._tasks)

    def _unbind(self) -> None:
        super()._unbind()
        if isinstance(self._codec, _Holding):
            self._codec = self._codec.codec
        self._tasks = None  # it keeps this process's entry

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
        """As Channel.get_many; see `get`."""
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
        """One task is done; see JoinableQueue."""
        attachment, tasks = self._of_open()
        while (counted := tasks.done()) is None:
            self._check_open(attachment)
        if not counted:
            raise ValueError(f"channel {self._name!r}: task_done() called too many times: no task is unfinished")

    def join(self, timeout: float | None = None) -> bool:
        """Wait until no task is unfinished; see JoinableQueue."""
        deadline = deadline_of(True, timeout)
        attachment, tasks = self._of_open()
        words = attachment.words
        lost_before = words[TASKS_LOST]

        def over() -> bool:
            return not tasks.unfinished() or words[TASKS_LOST] != lost_before

        while True:
            if tasks.unfinished():
                attachment.reaper.look()
                if tasks.lost():
                    tasks.write_off()
            lost = words[TASKS_LOST] - lost_before
            if lost > 0:
                gone = self._gone(attachment, RECEIVER_GONE)
                raise BrokenChannel(
                    errno.EPIPE,
                    f"channel {self._name!r}: {lost} task{'s' * (lost != 1)} will not be done, taken by a process that "
                    f"ended before it called task_done{gone}; put again what is to be done, and join again",
                )
            if not tasks.unfinished():
                return True
            if attachment.over_for_senders() and tasks.unfinished():
                raise self._broken(attachment, " that would do the tasks that are left")
            if not self._sleep_for_event(attachment, over, deadline):
                return not tasks.unfinished()


def _forget_returned(tasks: Tasks | None) -> None:
    if tasks is not None:
        tasks.forget_returned()

"""Waits that could never end: every slot is held by a loan, a borrow or a view in a thread that waits itself.

    word      writer            guarded by      meaning
    P_STUCK   its participant   nothing         slots of the process that only waiting threads could free

1. A thread that waits without a time limit writes P_STUCK. It counts the slots of waiting threads' open blocks, which
   no other thread ends; and, if all threads of the process wait so, the slots that are KEPT for views.
2. It withdraws that before each attempt, since no call may follow an attempt that succeeds (a signal handler could run
   there). So others see the count most of the time while it waits for ever.
3. If P_STUCK of all participants adds up to the capacity again and again, and no slot's word changes for longer than a
   waiter needs to wake up, then no slot can come free, and no message can come: each of the calls gets an error.
4. A call gets the error at once if what it waits for is in open blocks of its own thread: see `check_own`.
5. Views in cycles keep their slots until the garbage collector runs, which it does not do in a process whose threads
   all wait. So a wait without a time limit runs it, once, in a process that keeps slots.
"""

from __future__ import annotations

import gc
import threading

from ..errors import ChannelDeadlock
from ..segment.layout import ENTRY_SHIFT, KEPT, MAX_ENTRIES, P_PID, P_STUCK, READING, STATE_MASK, STATES, WRITING
from ..system import get_ident, monotonic
from .mutex import SLICE
from .observe import SlotTable
from .participants import Participants

_TIMES = 3


class DeadlockDetector:
    """The open blocks of this process on one channel, and its waits without a time limit."""

    def __init__(self, name: str, slots: SlotTable, participants: Participants) -> None:
        self._name = name
        self._slots = slots
        self._participants = participants
        #: The thread, or (negative) asyncio task, in whose open block a slot is, by the slot's index.
        self.blocks: dict[int, int] = {}
        self._waiting: set[int] = set()
        self._uncollected: set[int] = set()
        #: For each thread: since when no slot's word has changed, the words, how often waiting threads held all slots.
        self._seen: dict[int, tuple[float, bytes, int]] = {}

    def rebind(self) -> None:
        """Forget the threads of before a fork, and their blocks."""
        self.blocks.clear()
        self._waiting.clear()
        self._uncollected.clear()
        self._seen.clear()

    def check(self, first: bool, task: int = 0) -> None:
        """Called in each round of a wait without a time limit, the first one or not; `end` follows it.

        Args:
            task: a negative number that stands for the asyncio task that waits, if it is no thread.

        Raises:
            ChannelDeadlock: if it could never end.
        """
        thread, capacity = task or get_ident(), self._slots.layout.capacity
        self._waiting.add(thread)
        self._declare_stuck()
        if first:
            self._seen.pop(thread, None)
            if not task:  # a task's thread goes on, and collects
                self._uncollected.add(thread)
        elif thread in self._uncollected and self._slots.kept():
            self._uncollected.discard(thread)
            gc.collect()
        if sum(self._participants.column(P_STUCK)) < capacity:
            return
        now, words = monotonic(), self._slots.slot_words()
        since, before, times = self._seen.get(thread, (now, b"", 0))
        if words != before or self._slots.may_move():
            since, times = now, 0
        self._seen[thread] = since, words, times + 1
        if times >= _TIMES and now - since > 2 * SLICE:
            raise ChannelDeadlock(
                f"channel {self._name!r}: all {capacity} slots are held by loans, borrows or views in threads that "
                f"wait themselves ({self._holders(words)}): end a block or drop a view before waiting for another slot "
                "or message, or make the channel with more slots"
            )

    def check_own(self, at_least: int = 1, sender: int | None = None, task: int = 0) -> None:
        """Called before a wait without a time limit: for so many slots, or for all messages of a sender to be received.

        Raises:
            ChannelDeadlock: if this thread's own open blocks hold too many slots, or one of the messages.
        """
        slots, thread = self._slots, task or get_ident()
        held = [slot for slot, whose in self.blocks.copy().items() if whose == thread]
        if sender is not None and any(slots.is_from(slot, sender) for slot in held):
            raise ChannelDeadlock(
                f"channel {self._name!r}: flush would wait for a message that this thread itself has borrowed: end "
                "that block first"
            )
        if at_least > slots.layout.capacity - len(held) and at_least > 1:
            raise ChannelDeadlock(
                f"channel {self._name!r}: {at_least} messages can never be there at once while this thread holds "
                f"{len(held)} of {slots.layout.capacity} slots: end its loans and borrows first, or ask for fewer"
            )

    def end(self, task: int = 0) -> None:
        """The wait is over, or interrupted by an attempt."""
        self._waiting.discard(task or get_ident())
        self._declare_stuck()

    def _declare_stuck(self) -> None:
        """Write down how many slots only the waiting threads of this process could give back."""
        slots, stuck = self._slots, 0
        for slot, thread in self.blocks.copy().items():
            if thread in self._waiting and slots.holds(slot, (WRITING, READING)):
                stuck += 1 + len(slots.pieces_of(slot))
        if sum(waiter > 0 for waiter in self._waiting.copy()) >= threading.active_count():
            stuck += slots.kept()
        if self._participants.has_entry:
            slots.words[self._participants.entry + P_STUCK] = stuck

    def _holders(self, words: bytes) -> str:
        """Who had the slots whose words these are: by now another one may have found the deadlock, and let go."""
        pids = dict(enumerate(self._participants.column(P_PID)))
        held = [
            (pids.get(word >> ENTRY_SHIFT & MAX_ENTRIES - 1, 0), STATES[word & STATE_MASK])
            for word in memoryview(words).cast("Q")
            if word & STATE_MASK in (WRITING, READING, KEPT)
        ]
        kinds = sorted(set(held))
        return ", ".join(f"process {pid} {state} {held.count((pid, state))}" for pid, state in kinds)

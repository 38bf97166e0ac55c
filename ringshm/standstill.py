"""Waits that could never end: every slot is held by a loan, a borrow or a view in a thread that waits itself.

A thread that waits without a time limit writes into its participant's entry how many slots the process holds that only
waiting threads could give back: those of their open blocks, which no other thread ends, and, if all threads of the
process wait so, those that are KEPT for views. It withdraws that before each attempt, since what comes after one that
succeeds must not be a call (channel.py). So others see it most of the time, if it waits for ever. If again and again
these add up to the capacity, over all participants, and no slot's word changes for longer than a waiter needs to wake
up, then no slot can come free, no message can come, and each of the calls gets an error. A call gets it at once if
what it waits for is in open blocks of its own thread: see `check_own`.

Views that only the garbage collector finds (they are in cycles) keep their slots until it runs, which it does not do in
a process whose threads all wait. So a wait without a time limit runs it, once, in a process that keeps slots.
"""

from __future__ import annotations

import gc
import threading
import time

from .errors import ChannelDeadlock
from .layout import P_PID, P_STUCK, READING, STATE_MASK, STATES, WRITING
from .mutex import SLICE
from .participants import Participants
from .ring import Ring

_TIMES = 3


class Standstill:
    """The open blocks of this process on one channel, and its waits without a time limit."""

    def __init__(self, name: str, ring: Ring, participants: Participants) -> None:
        self._name = name
        self._ring = ring
        self._participants = participants
        #: The thread, or (negative) asyncio task, in whose open block a slot is, by the slot's index.
        self.blocks: dict[int, int] = {}
        self._waiting: set[int] = set()
        self._uncollected: set[int] = set()
        #: For each thread: since when no slot's word has changed, those words, how often all was held by who waits.
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
            task: a negative number that stands for an asyncio task, if one waits in place of this thread.

        Raises:
            ChannelDeadlock: if it could never end.
        """
        thread, capacity = task or threading.get_ident(), self._ring.layout.capacity
        self._waiting.add(thread)
        self._tell()
        if first:
            self._seen.pop(thread, None)
            if not task:  # whose thread goes on, and collects
                self._uncollected.add(thread)
        elif thread in self._uncollected and self._ring.kept():
            self._uncollected.discard(thread)
            gc.collect()
        if sum(self._participants.column(P_STUCK)) < capacity:
            return
        now, words = time.monotonic(), self._ring.slot_words()
        since, before, times = self._seen.get(thread, (now, b"", 0))
        if words != before or self._ring.may_move():
            since, times = now, 0
        self._seen[thread] = since, words, times + 1
        if times >= _TIMES and now - since > 2 * SLICE:
            raise ChannelDeadlock(
                f"channel {self._name!r}: all {capacity} slots are held by loans, borrows or views in threads that "
                f"wait themselves ({self._holders()}): end a block or drop a view before waiting for another slot or "
                "message, or make the channel with more slots"
            )

    def check_own(self, at_least: int = 1, sender: int | None = None) -> None:
        """Called before a wait without a time limit for so many slots, or for what that sender has sent to be received.

        Raises:
            ChannelDeadlock: if this thread's own open blocks hold too many, or one of those messages.
        """
        ring, thread = self._ring, threading.get_ident()
        held = [slot for slot, whose in list(self.blocks.items()) if whose == thread]
        if sender is not None and any(ring.is_from(slot, sender) for slot in held):
            raise ChannelDeadlock(
                f"channel {self._name!r}: flush would wait for a message that this thread itself has borrowed: end "
                "that block first"
            )
        if at_least > ring.layout.capacity - len(held) and at_least > 1:
            raise ChannelDeadlock(
                f"channel {self._name!r}: {at_least} messages can never be there at once while this thread holds "
                f"{len(held)} of {ring.layout.capacity} slots: end its loans and borrows first, or ask for fewer"
            )

    def end(self, task: int = 0) -> None:
        """The wait is over, or interrupted by an attempt."""
        self._waiting.discard(task or threading.get_ident())
        self._tell()

    def _tell(self) -> None:
        """Write down how many slots only the waiting threads of this process could give back."""
        ring, stuck = self._ring, 0
        for slot, thread in list(self.blocks.items()):
            if thread in self._waiting and ring.holds(slot, (WRITING, READING)):
                stuck += 1 + len(ring.pieces_of(slot))
        if sum(waiter > 0 for waiter in self._waiting) >= threading.active_count():
            stuck += ring.kept()
        ring.words[self._participants.entry + P_STUCK] = stuck

    def _holders(self) -> str:
        pids = self._participants.column(P_PID)
        held = [
            (pids[index], STATES[word & STATE_MASK])
            for index in self._participants.in_use()
            for _, word in self._ring.owned_by(self._participants.owner_of(index))
        ]
        kinds = sorted(set(held))
        return ", ".join(f"process {pid} {state} {held.count((pid, state))}" for pid, state in kinds)

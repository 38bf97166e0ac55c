"""How anyone waits: announce, look again, sleep a slice; and how the waiters are woken.

    word                       writer                 guarded by            meaning
    P_WAITING_*, P_LISTENS_*   the waiter's process   a lock of its own     its threads, or listeners, that wait
    *_HINT                     waiters set it,        nothing               somebody may be waiting
                               wakers clear it
    the semaphore              wakers post it,        nothing               as many threads are being woken
                               waiters wait for it

1. A waiter announces itself in its *own* entry, sets the hint, looks again, and sleeps for at most a slice.
2. A waker first makes true what is waited for, then reads the hint. If the hint is set, the waker clears it, and posts,
   unless somebody is being woken already.
3. A waiter that was woken sets the hint again for those that still wait, and wakes the next of them if there is more
   than it can take (`pass_on`). So wakers pay once for each waiter that comes, not once for each message. Where one
   receiver keeps up with all senders the others sleep on.
4. A count of waiters that all shared would be inflated by the dead. A dead waiter's own entry is reaped; until then it
   costs one spare token. A spare token makes somebody look in vain, nothing else: the ring says what is there.
5. Threads wait here and in the compiled path, which has the same protocol; both announce the sum (`set_waiting`).
6. If a waiter that was woken dies, or is stopped, before it has woken the next one, that one wakes up when its slice is
   over.

SYNC POINT w: the waker stores what is waited for, fences, reads the hint; the waiter stores its announcement, fences,
looks again. The fence is any locked instruction: the post of a mutex, or a local lock. A slot's release takes no mutex
and pays for no fence: its store may still be on its way when the hint is read. So the first sleep of a waiter for a
release is a short one, after which every processor has seen both stores.
"""

from __future__ import annotations

from typing import Any

from ..segment.layout import LISTENED, MAX_ENTRIES, MAX_WORD, P_WAITS
from ..segment.semaphores import Semaphore
from ..system import Lock, RLock, get_ident
from .listeners import CHANGE, WAKE, Listener, Listeners
from .participants import Participants

#: Seconds of the first sleep of a waiter for a release (SYNC POINT w).
SHORT_SLICE = 0.001
#: Seconds of one sleep, once a waiter has slept for so many slices: each takes a tenth of a millisecond of processor
#: time at least. A death is still noticed within 0.2 s.
IDLE_SLICE = 0.18
IDLE_SLICES = 4


class Waiters:
    """The waiters for one kind of thing (a message, space, an event), as this process sees them.

    Args:
        offset: the word of a participant's entry in which it announces its waiting threads.
        hint: the word of the header that says that somebody may be waiting.
        listeners, listens: this process's listeners, and the word of an entry in which they are announced, if a waiter
            for this can be woken through a descriptor.
    """

    def __init__(
        self,
        words: memoryview,
        participants: Participants,
        semaphore: Semaphore,
        offset: int,
        hint: int,
        listeners: Listeners | None = None,
        listens: int = 0,
    ) -> None:
        self._words, self._participants, self._semaphore = words, participants, semaphore
        self._offset, self._hint = offset, hint
        self.listeners, self._listens = listeners, listens
        self._compiled: Any = None
        self.rebind()

    def rebind(self) -> None:
        """Forget the threads of before a fork."""
        self._threads: set[int] = set()
        self._lock = RLock()

    def share(self, compiled: Any, for_space: bool) -> None:
        """Other threads of this process wait for the same in the compiled path."""
        self._compiled, self._for_space = compiled, for_space

    def announce(self) -> None:
        """Say that this thread waits. Look again afterwards, then `sleep`; `withdraw` in any case."""
        words, entry = self._words, self._participants.entry
        with self._lock:  # its release is the fence of SYNC POINT w
            self._threads.add(get_ident())
            self._store_count()
            words[entry + P_WAITS] = words[entry + P_WAITS] + 1 & MAX_WORD
            words[self._hint] = 1

    def sleep(self, seconds: float) -> bool:
        """Wait for a token; whether one came."""
        return self._semaphore.wait(seconds)

    def withdraw(self) -> None:
        """This thread no longer waits."""
        with self._lock:
            self._threads.discard(get_ident())
            if self._participants.has_entry:
                self._store_count()

    def _store_count(self) -> None:
        entry, count = self._participants.entry, len(self._threads)
        if self._compiled is None:
            self._words[entry + self._offset] = count
        else:  # it adds those that wait in it, in one step
            self._compiled.set_waiting(self._for_space, entry, count)

    def listen(self, listener: Listener) -> None:
        """As `announce`, for a thread that waits until the listener is woken, not in `sleep`; `unlisten` ends it."""
        words, entry = self._words, self._participants.entry
        with self._lock:
            words[entry + self._listens] |= listener.mask
            words[entry + P_WAITS] = words[entry + P_WAITS] + 1 & MAX_WORD
            words[self._hint] = 1

    def listen_on(self) -> None:
        """After a listener was drained: be woken again. Look again afterwards."""
        with self._lock:
            self._words[self._hint] = 1

    def unlisten(self, listener: Listener) -> None:
        """That listener no longer waits for this."""
        with self._lock:
            if self._participants.has_entry:
                self._words[self._participants.entry + self._listens] &= ~listener.mask

    def announced(self, entry: int) -> bool:
        """Whether threads or listeners of the process with that entry have announced that they wait."""
        return bool(self._words[entry + self._offset] or (self._listens and self._words[entry + self._listens]))

    def count(self) -> int:
        """How many threads of all processes have announced that they wait."""
        return sum(self._participants.column(self._offset))

    def wake(self, at_most: int = 1, byte: bytes = WAKE) -> None:
        """Post for waiters until so many are being woken, and wake all listeners."""
        self._semaphore.fill(min(self.count(), MAX_ENTRIES, at_most))  # a damaged count must not overflow it
        if self.listeners is not None and self._words[LISTENED]:
            self.listeners.wake(self._listens, byte)

    def pass_on(self, at_most: int) -> None:
        """Call after withdrawing. Sets the hint again for the remaining waiters, and wakes up to `at_most` of them: as
        many as there are more of what they wait for.
        """
        if self.count():
            self._words[self._hint] = 1
            if at_most:
                wake_for(self._words, self._hint, self, at_most=at_most)

    def wake_all(self) -> None:
        """Wake every waiter: something changed that each must see."""
        self.wake(MAX_ENTRIES, CHANGE)


def wake_for(words: memoryview, hint: int, some: Waiters, all_of: Waiters | None = None, at_most: int = 1) -> None:
    """Wake waiters: up to `at_most` of the first kind, for so many things that became true, and all of the second.

    The hint is clear until one of them runs (`Waiters.pass_on`), or another waiter announces itself.
    """
    words[hint] = 0
    try:
        Lock().acquire()  # fence: a waiter that set the hint before this store is counted now
        some.wake(at_most)
        if all_of is not None:
            all_of.wake_all()
    except BaseException:
        words[hint] = 1  # interrupted: the next waker wakes those that this one has not woken
        raise

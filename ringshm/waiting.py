"""How anyone waits: announce, look again, sleep a slice; and how the waiters are woken.

A waiter announces itself in its *own* entry, sets a hint, looks again, and sleeps for at most a slice. A waker first
makes true what is waited for, then reads the hint; if it is set, it clears it, and posts, unless somebody is being
woken already. Whoever was woken sets the hint again for those that still wait, and wakes the next of them if there is
more than one can take. So wakers pay once for each that comes, not once for each message, and where one receiver keeps
up with all senders the others sleep on.

Shared counts of waiters would be inflated by the dead; a dead waiter's entry is reaped, and until then costs one spare
token. A token left over makes somebody look in vain, nothing else: what is true is asked of the ring. If who was woken
dies, or is stopped, before it has woken the next one, that one wakes up when its slice is over.

SYNC POINT w: store what is waited for, fence, read the hint, against store the announcement, fence, look again. The
fence is any locked instruction: the post of a mutex, or a local lock. A slot's release takes no mutex and pays for no
fence: its store may still be on its way when the hint is read. So the first sleep of whoever waits for a release is
a short one, after which every processor has seen both stores.
"""

from __future__ import annotations

import os
import threading

from .layout import LISTENED, MAX_ENTRIES, MAX_WORD, P_WAITS
from .participants import Participants
from .semaphores import Semaphore
from .wakeup import CHANGE, WAKE, Listener, Listeners

#: Looks at a shared word while spinning, 0.03 us each (two words 0.06): less than two switches of a context cost.
SPIN_LOOKS = 400
#: After so many waits without a spin, since spinning did not pay, one tries again.
SPIN_RETRY = 32
#: Seconds of the first sleep of who waits for a release (SYNC POINT w).
SHORT_SLICE = 0.001
#: Seconds of one sleep of who has waited for so many slices: a look round costs up to half a millisecond on a processor
#: that does other things meanwhile.
IDLE_SLICE = 0.08
IDLE_SLICES = 20


class Waiters:
    """Those who wait for one kind of thing (a message, space, an event), as this process sees them.

    Args:
        offset: the word of a participant's entry in which it announces its waiting threads.
        hint: the word of the header that says that somebody may be waiting.
        listeners, listens: those of this process, and the word of an entry in which they are announced; if there are.
    """

    __slots__ = (
        "_hint",
        "_listens",
        "_lock",
        "_offset",
        "_participants",
        "_semaphore",
        "_threads",
        "_words",
        "listeners",
    )

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
        self._words = words
        self._participants = participants
        self._semaphore = semaphore
        self._offset = offset
        self._hint = hint
        self.listeners = listeners
        self._listens = listens
        self.rebind()

    def rebind(self) -> None:
        """Forget the threads of before a fork."""
        self._threads: set[int] = set()
        self._lock = threading.RLock()

    def announce(self) -> None:
        """Say that this thread waits. Look again afterwards, then `sleep`; `withdraw` in any case."""
        words, entry = self._words, self._participants.entry
        with self._lock:  # its release is the fence of SYNC POINT w
            self._threads.add(threading.get_ident())
            words[entry + self._offset] = len(self._threads)
            words[entry + P_WAITS] = words[entry + P_WAITS] + 1 & MAX_WORD
            words[self._hint] = 1

    def sleep(self, seconds: float) -> bool:
        """Wait for a token; whether one came."""
        return self._semaphore.wait(seconds)

    def withdraw(self) -> None:
        """This thread no longer waits."""
        with self._lock:
            self._threads.discard(threading.get_ident())
            self._words[self._participants.entry + self._offset] = len(self._threads)

    def listen(self, listener: Listener) -> None:
        """As `announce`, for a thread that waits until that listener is woken, not in `sleep`; `unlisten` ends it."""
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
            self._words[self._participants.entry + self._listens] &= ~listener.mask

    def count(self) -> int:
        """How many threads of all processes have announced that they wait."""
        return sum(self._participants.column(self._offset))

    def wake(self, at_most: int = 1, byte: bytes = WAKE) -> None:
        """Post for waiters until so many are being woken, and wake all listeners."""
        self._semaphore.fill(min(self.count(), MAX_ENTRIES, at_most))  # a damaged count must not overflow it
        if self.listeners is not None and self._words[LISTENED]:
            self.listeners.wake(self._listens, byte)

    def pass_on(self, at_most: int) -> None:
        """This thread was woken, and has withdrawn: others that wait are woken by the next waker; so many by this one,
        if there is more of what they wait for.
        """
        if self.count():
            self._words[self._hint] = 1
            if at_most:
                wake_for(self._words, self._hint, self, at_most=at_most)

    def wake_all(self) -> None:
        """Wake every waiter: something changed that each must see."""
        self.wake(MAX_ENTRIES, CHANGE)


def wake_for(words: memoryview, hint: int, some: Waiters, all_of: Waiters | None = None, at_most: int = 1) -> None:
    """So many things that are waited for became true: wake as many waiters of the first kind, and all of the second.
    Until one of these comes (`Waiters.pass_on`), or another announces itself, the hint is clear.
    """
    words[hint] = 0
    try:
        threading.Lock().acquire()  # fence: whoever set the hint before our store is counted now
        some.wake(at_most)
        if all_of is not None:
            all_of.wake_all()
    except BaseException:
        words[hint] = 1  # interrupted: the next waker wakes whom this one has not
        raise


class Spin:
    """Whether and how long to look at shared words before sleeping: as long as that paid recently, and not while more
    processes send and receive than there are cores for.

    Costs the core while it lasts, some 10 to 25 us a wait; saves two switches of context, some 100 us of latency.
    """

    __slots__ = ("_cores", "_looks", "_skipped", "always", "crowded")

    def __init__(self, strategy: str) -> None:
        self.always = strategy == "spin"
        self.crowded = False
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._looks = SPIN_LOOKS if self.always or (strategy == "adaptive" and self._cores > 1) else 0
        self._skipped = 0 if self._looks else -1

    def regard(self, processes: int) -> None:
        """So many processes send and receive, this one among them."""
        self.crowded = processes > self._cores and not self.always

    @property
    def looks(self) -> int:
        """How many times to look now."""
        if self.crowded:
            return 0
        if not self._looks and self._skipped >= 0:
            self._skipped += 1
            if self._skipped >= SPIN_RETRY:
                self._looks, self._skipped = SPIN_LOOKS // 8, 0
        return self._looks

    def until_changed(self, words: memoryview, word: int, seen: int) -> bool:
        """Look whether a word changes, for as long as that pays."""
        looks = self.looks
        for _ in range(looks):
            if words[word] != seen:
                self.paid()
                return True
        if looks:
            self.wasted()
        return False

    def paid(self) -> None:
        """What was waited for came while spinning."""
        self._looks = min(SPIN_LOOKS, 2 * self._looks)

    def wasted(self) -> None:
        """It did not."""
        if not self.always:
            self._looks //= 2

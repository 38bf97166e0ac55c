"""The fenced mutex: recovered when its holder died, and only then, without ever granting it twice.

Between the kernel's grant of a semaphore and a store that says so lies a time that nobody can see from outside; in a
process with threads it can be long. So a grant is fenced by a generation. Shared are

    GEN          even in normal use, odd while a recovery is under way
    semaphores   two for each mutex; generation g uses the one chosen by (g // 2) & 1
    hold words   one for each mutex and participant: the generation in which it was granted the mutex, or 0;
                 only the participant itself writes it, and a recoverer once the participant is dead

    acquire   read an even g; wait on its semaphore, in slices; store g in the own hold word; read GEN again;
              if it moved: clear the hold word, do not post, start over                          [SYNC POINT a]
    leave     post; then clear the hold word
    recover   take the recovery lock; make GEN odd; wait a slice; wait until no live participant
              holds; drain all semaphores; rebuild what the mutexes guard; make GEN even; post one token to
              each mutex                                                                          [SYNC POINT a]

1. Who has stored g and then read g in GEN is seen by a recoverer that made GEN odd later: it waits for him. Who reads
   another GEN backs off and posts nothing. The slice is longer than any processor keeps a store to itself.
2. A token is either in the semaphore of the present generation, or with one holder, or lost; never two. A token that
   somebody carried out of an older generation is not posted; a post that comes late, to the semaphore of an older
   generation, comes before its holder clears the hold word, so the recoverer that drains has waited for it.
3. A wrong suspicion does no harm: the recoverer waits for the live holder like everybody else.
4. A recoverer that dies leaves GEN odd, or even without a token. Both look like a lost token to the next waiter.
5. An exception is a kill that leaves the process alive: a call that is left between acquire and leave clears its hold
   word and posts nothing (`abandon`), and the next waiter recovers. No `while` with a condition stands in such a call:
   CPython 3.13.0 lets a signal handler raise at its backward jump, which no `try` around it covers.

tests/test_mutex_model.py explores this completely for a few processes.

Within a process a lock comes first, so that one hold word serves all its threads. It is a re-entrant one because such
a lock knows its owner: that tells `abandon` whether there is something to give back, at whatever bytecode the
exception came. A signal handler or finaliser that calls in while its own thread is inside would wait for itself; it
gets ReentrantCall, before the `try` whose exceptions are all the call's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from .errors import ReentrantCall
from .layout import GEN, LOCK_RECOVERY, MAX_GEN, MAX_WORD, RECOVERIES
from .semaphores import Semaphore

#: Seconds of one wait: after each, a waiter looks whether it waits in vain. Deaths are noticed within about four.
SLICE = 0.05


class Liveness(Protocol):
    """What a mutex must know of the participants (participants.Participants, or a test's stand-in)."""

    def try_lock(self, byte: int) -> bool:
        """Lock that byte of the segment's file."""

    def unlock(self, byte: int) -> None:
        """Give it up."""

    def holders(self, offset: int) -> tuple[list[int], list[int]]:
        """Entries whose hold word at `offset` is set: those of the living, those of the dead."""

    def clear(self, entries: list[int], offset: int) -> None:
        """Clear that hold word of those (dead) participants."""


def reentrant_call(name: str) -> ReentrantCall:
    """The error for a call whose own thread is inside the mutex."""
    return ReentrantCall(
        f"channel {name!r}: this thread was interrupted inside a call on it: a signal handler or finaliser must not "
        "call it too. Set a flag there and make the call in the main program"
    )


def _refuse(_: float) -> bool:
    """In place of a semaphore's `acquire` and `wait` while GEN is odd: there is nothing to be had."""
    return False


class FencedMutex:
    """One of the ring's two mutexes, as this process sees it.

    Args:
        words: the segment's words.
        offset: which word of a participant's entry is the hold word.
        semaphores: the two semaphores, for the even and the odd halves of the generation.
        progress: words that change while the mutex changes hands.
    """

    __slots__ = (
        "_fence",
        "_suspicion",
        "acquires",
        "hold",
        "lock",
        "offset",
        "owned",
        "posts",
        "progress",
        "unlock",
        "waits",
        "words",
    )

    def __init__(
        self, words: memoryview, offset: int, semaphores: Sequence[Semaphore], progress: tuple[int, ...], fence: Fence
    ) -> None:
        even, odd = semaphores
        self.words = words
        self.offset = offset
        self.progress = progress
        self.hold = 0
        self.acquires = (even.acquire, _refuse, odd.acquire, _refuse)  # indexed by gen & 3
        self.waits = (even.wait, _refuse, odd.wait, _refuse)
        self.posts = (even.release, odd.release)  # indexed by gen >> 1 & 1
        self._fence = fence
        fence.mutexes.append((offset, semaphores))
        self.rebind(0)

    def rebind(self, entry: int) -> None:
        """Use the hold word of the entry at that word; forget the threads of before a fork."""
        self.hold = entry + self.offset
        local = threading.RLock()
        self.lock: Callable[[], bool] = local.acquire
        self.unlock: Callable[[], None] = local.release
        self.owned: Callable[[], bool] = local._is_owned  # type: ignore[attr-defined]
        self._suspicion: tuple[object, ...] = ()

    def enter(self) -> int:
        """Acquire; the generation of the grant, or 0 if a slice has passed without one.

        Before the call see that `owned()` is false, else raise `reentrant_call`; then call it within the `try` whose
        `except BaseException` calls `abandon`: so each exception caught there is the call's own. `Ring.send`,
        `Ring.receive` and `Ring.take` have this method in line.
        """
        self.lock()
        words = self.words
        gen = words[GEN]
        if self.acquires[gen & 3](False):
            words[self.hold] = gen  # SYNC POINT a: this store, then this load
            return gen if gen and words[GEN] == gen else self.back_off()
        return self.enter_slowly()

    def back_off(self) -> int:
        """The generation has moved between the grant and its mark, or is the 0 that none can be: give up what it
        granted, but do not post; 0.
        """
        self.words[self.hold] = 0
        self.unlock()
        return 0

    def leave(self, gen: int) -> None:
        """Give the mutex back: post, then clear."""
        self.posts[gen >> 1 & 1]()
        self.words[self.hold] = 0
        self.unlock()

    def abandon(self) -> None:
        """After an exception: let go of whatever this thread holds, as if the process had died in that place."""
        again: BaseException | None = None
        for _ in range(3):  # a second Ctrl-C must not leave it held
            try:
                self._fence.let_go()
                for _ in iter(self.owned, False):  # no `while`: CPython 3.13.0 guards its backward jump with no `try`
                    self.words[self.hold] = 0
                    self.unlock()
                break
            except BaseException as error:
                again = error
        if again is not None:
            raise again

    def enter_slowly(self) -> int:
        """Wait one slice; recover if the token seems lost. Called with the local lock, which 0 has given up."""
        words = self.words
        words[self.hold] = 0  # whatever stands there is no grant: recovery would wait for this very call
        gen = words[GEN]
        if self.waits[gen & 3](SLICE):
            self._suspicion = ()
            words[self.hold] = gen  # SYNC POINT a, as in enter
            return gen if gen and words[GEN] == gen else self.back_off()
        if self._lost(gen):
            self._suspicion = ()
            self._fence.recover()
        self.unlock()
        return 0

    def _lost(self, gen: int) -> bool:
        """Whether the token seems lost: a recovery stands still, a holder died, or nobody moved for two slices."""
        if gen & 1:
            return True
        living, dead = self._fence.liveness.holders(self.offset)
        if living:
            self._suspicion = ()
            return False
        if dead:
            return True
        now = (gen, *(self.words[word] for word in self.progress))
        before, self._suspicion = self._suspicion, now
        return before == now


class Fence:
    """The generation that fences both mutexes, and the recovery that moves it."""

    def __init__(self, words: memoryview, liveness: Liveness, rebuild: Callable[[], None]) -> None:
        self.words = words
        self.liveness = liveness
        self.rebuild = rebuild
        self.mutexes: list[tuple[int, Sequence[Semaphore]]] = []
        self.rebind()

    def rebind(self) -> None:
        """Forget the threads of before a fork."""
        self._local = threading.RLock()
        self._owned: Callable[[], bool] = self._local._is_owned  # type: ignore[attr-defined]

    def recover(self) -> None:
        """Restore the mutexes and what they guard; returns after a few slices at most, done or not.

        If this process dies here, GEN is odd or a token is missing, and the next waiter comes here too.
        """
        if self._owned():
            raise ReentrantCall("this thread was interrupted while it recovered this channel: make the call later")
        try:
            if self._local.acquire(blocking=False) and self.liveness.try_lock(LOCK_RECOVERY):
                self._recover()
            else:
                time.sleep(SLICE)  # somebody else is at it
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Give up the recovery, if this thread is at one; also if a signal handler raises meanwhile."""
        try:
            self._let_go()
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        if self._owned():
            self.liveness.unlock(LOCK_RECOVERY)
            self._local.release()

    def _recover(self) -> None:
        words = self.words
        gen = words[GEN] % MAX_GEN | 1
        words[GEN] = gen  # SYNC POINT a: this store, a slice, then the loads of the hold words
        time.sleep(SLICE)
        doomed = []
        for offset, _ in self.mutexes:
            living, dead = self.liveness.holders(offset)
            if living:
                return  # GEN stays odd: whoever still waits comes back
            doomed.append((offset, dead))
        for _, semaphores in self.mutexes:
            for semaphore in semaphores:
                for _ in iter(partial(semaphore.acquire, False), False):
                    pass
        self.rebuild()
        for offset, dead in doomed:
            self.liveness.clear(dead, offset)
        words[RECOVERIES] = words[RECOVERIES] + 1 & MAX_WORD
        gen += 1
        words[GEN] = gen
        for _, semaphores in self.mutexes:
            semaphores[gen >> 1 & 1].release()

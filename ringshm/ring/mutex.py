"""The fenced mutex: recovered when its holder died, and only then, without ever granting it twice.

Between the kernel's grant of a semaphore and a store that says so lies a time that nobody can see from outside; in a
process with threads it can be long. So a grant is fenced by a generation.

    word         writer                          guarded by         meaning
    GEN          a recoverer                     LOCK_RECOVERY      even: normal use; odd: a recovery is under way
    a hold word  its participant; a recoverer,   its one writer     the generation in which the participant was granted
                 once the participant is dead                       the mutex, or 0; one for each mutex
    semaphores   holders, recoverers             the kernel         two for each mutex; generation g uses the one chosen
                                                                    by (g // 2) & 1

    acquire   read an even g; wait on its semaphore, in slices; store g in the own hold word; read GEN again;
              if it moved: clear the hold word, do not post, start over                          [SYNC POINT a]
    leave     post; then clear the hold word
    recover   take the recovery lock; make GEN odd; wait a slice; wait until no live participant
              holds; drain all semaphores; rebuild what the mutexes guard; make GEN even; post one token to
              each mutex                                                                          [SYNC POINT a]

1. A participant that has stored g and then read g in GEN is seen by a recoverer that made GEN odd later: the recoverer
   waits for it. A participant that reads another GEN backs off and posts nothing. The slice is longer than any
   processor keeps a store to itself.
2. A token is either in the semaphore of the present generation, or with one holder, or lost; never two. A token that a
   participant carried out of an older generation is not posted. A post that comes late, to the semaphore of an older
   generation, comes before its holder clears the hold word: so the recoverer that drains has waited for it.
3. A wrong suspicion does no harm: the recoverer waits for the live holder like everybody else.
4. A recoverer that dies leaves GEN odd, or even without a token. Both look like a lost token to the next waiter.
5. An exception is a kill that leaves the process alive: a call that is left between acquire and leave clears its hold
   word and posts nothing (`abandon`), and the next waiter recovers. No loop that may end a turn early stands in the
   frame of such a `try`, of a `finally` or of a `with`: CPython 3.13 and 3.14 run signal handlers at jumps backward
   that no `try` around them covers. tests/test_jumps.py lists them.

tests/ring/test_mutex_model.py explores this completely for a few processes.

Within a process a lock comes first, so that one hold word serves all its threads. It is an RLock, which knows its
owner: so `abandon` can tell, at whatever bytecode the exception came, whether this thread holds it. A signal handler or
finaliser that calls in while its own thread is inside would wait for itself. It gets ReentrantCall: `critical` checks
this before its `try`, so that all exceptions within the `try` are the call's own.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any, NoReturn, Protocol, TypeVar

from ..errors import ChannelUnavailable, ReentrantCall, again
from ..segment.layout import GEN, LOCK_RECOVERY, MAX_GEN, MAX_WORD, P_RECEIVER_HOLD, P_SENDER_HOLD, RECOVERIES
from ..segment.semaphores import Semaphore
from ..system import RLock, sleep
from .damage import refuse_damage
from .outcomes import CONTENDED, DISTRUSTED, Outcome

Result = TypeVar("Result")

#: Whether stores become visible to other processors in program order. Else the ring's two mutexes are one.
ORDERED_STORES = platform.machine() in ("x86_64", "AMD64", "i686", "i386")

#: The hold word of the receivers' mutex.
RECEIVER_HOLD = P_RECEIVER_HOLD if ORDERED_STORES else P_SENDER_HOLD

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


def _raise_again(error: ChannelUnavailable, *_: bool) -> NoReturn:
    raise again(error)


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
        new_local: makes what keeps the threads of this process apart: an RLock, or what does as one.

    Attributes:
        local: the lock of this process's threads.
    """

    __slots__ = (
        "_fence",
        "_new_local",
        "_suspicion",
        "acquires",
        "hold",
        "local",
        "lock",
        "name",
        "offset",
        "owned",
        "posts",
        "progress",
        "semaphores",
        "unlock",
        "waits",
        "words",
    )

    def __init__(
        self,
        words: memoryview,
        offset: int,
        semaphores: Sequence[Semaphore],
        progress: tuple[int, ...],
        fence: Fence,
        new_local: Callable[[], Any] = RLock,
    ) -> None:
        self.semaphores = even, odd = semaphores
        self.name, self.words = fence.name, words
        self.offset, self.progress = offset, progress
        self.acquires = (even.acquire, _refuse, odd.acquire, _refuse)  # indexed by gen & 3
        self.waits = (even.wait, _refuse, odd.wait, _refuse)
        self.posts = (even.release, odd.release)  # indexed by gen >> 1 & 1
        self._fence, self._new_local = fence, new_local
        fence.mutexes.append((offset, semaphores))
        self.rebind(0)

    def rebind(self, entry: int) -> None:
        """Use the hold word of the entry at that word; forget the threads of before a fork."""
        self.hold = entry + self.offset
        self.local = local = self._new_local()
        self.lock: Callable[..., bool] = local.acquire  # waits, unless it is given False
        self.unlock: Callable[[], None] = local.release
        self.owned: Callable[[], bool] = local._is_owned
        self._suspicion: tuple[object, ...] = ()

    @property
    def recovers(self) -> bool:
        """Whether this thread is at a recovery."""
        return self._fence.owned()

    def refuse(self, error: ChannelUnavailable) -> None:
        """Let no thread of this process in until `rebind`, but raise: it has no hold word that is its own."""
        self.lock = partial(_raise_again, error)

    def enter(self) -> int:
        """Acquire; the generation of the grant, or 0 if a slice has passed without one.

        `critical`, `Ring.send` and `Ring.receive` have it in line, where it succeeds at once.
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
                self._fence.abandon()
                for _ in iter(self.owned, False):  # no `while` with a condition: see 5. above
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

    def enter_within(self, slices: int) -> int:
        """As `enter`, trying again for so many slices."""
        for _ in range(slices):
            gen = self.enter()
            if gen:
                return gen
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


def critical(mutex: FencedMutex, work: Callable[[], Result], slices: int = 1, wait: bool = True) -> Result | Outcome:
    """Do some work inside the mutex: enter, work, leave; after an exception, abandon.

    All of it happens within one `try`, whose exceptions are all this call's own. A context manager would not do: an
    interrupt may come between its `__enter__` and the block. Nor may `work` be undone here: an exception may come after
    it, before its result is returned. So `work` says to its caller what it has taken before it takes it.

    Args:
        work: a function. A loop in it may be of any kind (5. above), since the `try` is not in its frame.
        slices: how many slices to wait for the mutex.
        wait: whether to wait for other threads of this process, however long they are inside. A finaliser must not:
            they may wait for what its thread has locked.

    Returns:
        What `work` returned; CONTENDED if the mutex was not to be had in time, or if `work` returned DISTRUSTED: then
        the mutex is left as the dead leave it, and the next process that wants it rebuilds what it guards.

    Raises:
        ReentrantCall: if this thread is inside the mutex already.
        ChannelCorrupted: if `work` failed on what the segment holds.
        BaseException: what `work` or a signal handler raised.
    """
    if mutex.owned():
        raise reentrant_call(mutex.name)
    try:
        if not mutex.lock(wait):  # FencedMutex.enter, in line: it saves a call, some 0.1 us
            return CONTENDED
        words = mutex.words
        gen = words[GEN]
        if mutex.acquires[gen & 3](False):
            words[mutex.hold] = gen
            if words[GEN] != gen:
                gen = mutex.back_off()
        else:
            gen = mutex.enter_slowly()
        if not gen:
            mutex.abandon()  # nothing, unless GEN is 0, which is damage
            gen = mutex.enter_within(slices - 1)
            if not gen:
                return CONTENDED
        outcome: Result | Outcome | None = work()
        if outcome is DISTRUSTED:
            mutex.abandon()
            return CONTENDED
        mutex.posts[gen >> 1 & 1]()  # FencedMutex.leave, in line
        words[mutex.hold] = 0
        mutex.unlock()
    except BaseException as error:
        outcome = None  # which the traceback would keep alive
        mutex.abandon()
        refuse_damage(mutex.name, error)
        raise
    return outcome  # type: ignore[return-value]


class Fence:
    """The generation that fences both mutexes, and the recovery that moves it."""

    def __init__(self, name: str, words: memoryview, liveness: Liveness, rebuild: Callable[[], None]) -> None:
        self.name, self.words = name, words
        self.liveness, self.rebuild = liveness, rebuild
        self.mutexes: list[tuple[int, Sequence[Semaphore]]] = []
        self.rebind()

    def rebind(self) -> None:
        """Forget the threads of before a fork."""
        self._local = RLock()
        self.owned: Callable[[], bool] = self._local._is_owned  # type: ignore[attr-defined]

    def recover(self) -> None:
        """Restore the mutexes and what they guard; returns after a few slices at most, done or not.

        If this process dies here, GEN is odd or a token is missing, and the next waiter comes here too.
        """
        if self.owned():
            raise ReentrantCall(
                f"channel {self.name!r}: this thread was interrupted while it recovered it: make the call later"
            )
        try:
            if self._local.acquire(blocking=False) and self.liveness.try_lock(LOCK_RECOVERY):
                self._recover()
            else:
                sleep(SLICE)  # somebody else is at it
        finally:
            self.let_go()

    def abandon(self) -> None:
        """After an exception of a call: give up the recovery that it has left. One that it came amid goes on."""
        if self.owned() and not self._is_running():
            self.let_go()

    def _is_running(self) -> bool:
        """Whether this thread is inside `recover`: a signal handler or finaliser came amid it, and called."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not (frame.f_code is Fence.recover.__code__ and frame.f_locals.get("self") is self):
            frame = frame.f_back
        return frame is not None

    def let_go(self) -> None:
        """Give up the recovery, if this thread is at one; also if a signal handler raises meanwhile."""
        try:
            self._let_go()
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        if self.owned():
            self.liveness.unlock(LOCK_RECOVERY)
            self._local.release()

    def _recover(self) -> None:
        words = self.words
        gen = words[GEN] % MAX_GEN | 1
        words[GEN] = gen  # SYNC POINT a: this store, a slice, then the loads of the hold words
        sleep(SLICE)
        doomed = []
        for offset, _ in self.mutexes:
            living, dead = self.liveness.holders(offset)
            if living:
                return  # GEN stays odd: the next waiter comes here again
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

"""Spinning: look at shared words for some microseconds before sleeping, as long as that paid recently.

A spin lasts at most about as long as it takes to wake a sleeper, some 40 us: so a wait never costs much more than twice
what the better of the two would have cost (Karlin, Li, Manasse and Owicki, "Empirical studies of competitive spinning",
1991). Whether it pays is learned: each spin in vain halves the number of looks next time, each that was not doubles it.
Who has given up tries a whole one now and then: of two who answer each other both may sleep, and then an answer takes
as long as waking does, until one of them has waited for it awake. Nobody spins while more processes send and receive
than there are cores for.
"""

from __future__ import annotations

import os

#: Looks at a shared word while spinning, 0.03 us each: all of them take a little longer than to wake a sleeper.
SPIN_LOOKS = 1600
#: After so many waits without a spin, since spinning did not pay, a waiter tries again.
SPIN_RETRY = 128


class Spin:
    """How many times this handle looks before it sleeps.

    Args:
        strategy: "adaptive", "block" (never looks) or "spin" (never sleeps).

    Attributes:
        always: whether it never sleeps.
        crowded: whether there are too few cores to spin.
    """

    __slots__ = ("_cores", "_looks", "_skipped", "always", "crowded")

    def __init__(self, strategy: str) -> None:
        self.always = strategy == "spin"
        self.crowded = False
        self._cores = len(os.sched_getaffinity(0))
        self._looks = SPIN_LOOKS if self.always or (strategy == "adaptive" and self._cores > 1) else 0
        self._skipped = 0 if self._looks else -1

    def adapt_to(self, processes: int) -> None:
        """Say how many processes send and receive, this one among them."""
        self.crowded = processes > self._cores and not self.always

    @property
    def looks(self) -> int:
        """How many times to look now."""
        if self.crowded:
            return 0
        if not self._looks and self._skipped >= 0:
            self._skipped += 1
            if self._skipped >= SPIN_RETRY:
                self._looks, self._skipped = SPIN_LOOKS, 0
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
        """What was waited for did not come while spinning."""
        if not self.always:
            self._looks //= 2

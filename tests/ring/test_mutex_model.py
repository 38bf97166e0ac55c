"""The fenced mutex, explored: every interleaving of a few processes, any of which may be killed at any step.

Theory of operation
===================
This is a model, not a test of code: it imports nothing from ringshm. Each process is a small machine whose
steps are the single shared accesses that the implementation makes, in its order; `_steps` below is the
algorithm and reads like it. Shared are

    gen         even in normal use, odd during recovery            written only under the recovery lock
    tokens[2]   two semaphores; (gen // 2) & 1 says which is used  taken and posted by anyone
    hold        one word per table entry; not 0: may be inside     written by its owner, zeroed for the dead
    alive       a record lock per entry                            the kernel drops it at death
    recovery    a record lock, held by whoever is at RECOVERING    the kernel drops it at death

Between any two steps the environment may kill a process, give a dead one's entry to a new process, or
interrupt a live one (an exception: it clears its hold word without posting, then starts over or ends). None
of this is counted: rounds, suspicions, recoveries, interrupts, deaths and newcomers are unlimited, and the
exploration is complete for its number of table entries. That a process is slow, or stopped for long, is an
interleaving like any other. One that is stopped for good with its hold word 0 and without the recovery lock
looks to the others like a dead one, so the third promise covers it too. One that is stopped elsewhere holds
everybody up: it is alive.

What makes it finite
--------------------
1. *Generations are renumbered* whenever gen moves. A step asks of a remembered generation only whether it
   equals gen and which semaphore it names; gen only grows, so one that has passed never equals it again. The
   current generation is thus renamed into 8..11 and every older one to 4 or 6, keeping its semaphore.
2. *Processes are interchangeable*: a state keeps them sorted. The scan of hold words therefore takes them in
   any order, which includes the order of the table; `mark` is what the recoverer remembers of each.

`test_renumbering_and_sorting_lose_no_state` holds both against a run that does neither.

What is promised, of every reachable state
------------------------------------------
1. EXCLUSION: at most one live process is inside, and none while another rebuilds. Whoever unwinds from inside
   still counts as inside until its hold word is 0: it may be putting its slots back.
2. ONE TOKEN: while gen is even, the tokens of its semaphore, plus the live processes whose token of this very
   generation is still to be posted, plus a recoverer about to post, are at most 1; the other semaphore is at
   0. While gen is odd, all tokens plus those still to be posted by someone inside are at most 1; from the
   drain to the post there are none. (A process that took its token with an older generation is not counted:
   it has burnt it.)
3. NO DEADLOCK: steps of the algorithm alone, without any fault, lead from here to where every live process
   has finished. Waiting changes nothing, and the graph is finite: so all finish under any scheduler that does
   not for ever avoid a choice which it has again and again.

Store buffers
-------------
With `buffered` a store of gen or of a hold word becomes visible later than it is made, in each process's
order, at the latest when that process posts, takes a token or locks: this is x86-64. Here the slice that a
recoverer waits is what orders "store hold, read gen" against "store gen, read hold". It is modelled as what
50 ms amount to: the recoverer's own store lands, then every store made before that moment. Without `buffered`
the slice does nothing. A processor that orders less than x86-64 is not modelled.

Negative controls
-----------------
`FLAWS` are variants with one mistake each, the promise that it must be found to break, and how.

Run as a program, `--full` explores the large sizes too and prints the shortest trace of each flaw.
"""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest

# Where a process is: named for the step it makes next.
READ_GEN = "read gen"
WAIT = "wait for a token"
STORE_HOLD = "store hold"
READ_AGAIN = "read gen again"
BACK_OFF = "back off"
INSIDE = "inside"
POST = "inside, about to post"
CLEAR = "clear hold"
LATE_POST = "post after clearing"  # only in a flawed variant
UNWIND = "unwind"
UNWIND_INSIDE = "unwind from inside"
TRY_LOCK = "try the recovery lock"
READ_ODD = "read gen under the lock"
MAKE_ODD = "make gen odd"
SLEEP = "begin the slice"
SLEPT = "end the slice"
SCAN = "scan"
PROBE = "probe"
DRAIN_0 = "drain semaphore 0"
DRAIN_1 = "drain semaphore 1"
REBUILD = "rebuild"
FORGET = "zero hold words of the dead"
MAKE_EVEN = "make gen even"
POST_TOKEN = "post the token"
UNLOCK = "unlock"
JOIN = "zero the entry's old hold word"
DONE = "done"
DEAD = "dead"

RECOVERING = frozenset(
    (READ_ODD, MAKE_ODD, SLEEP, SLEPT, SCAN, PROBE, DRAIN_0, DRAIN_1, REBUILD, FORGET, MAKE_EVEN, POST_TOKEN, UNLOCK)
)
HOLDS_TOKEN = frozenset((STORE_HOLD, READ_AGAIN, INSIDE, POST))
OCCUPIES = frozenset((INSIDE, POST, UNWIND_INSIDE))
INTERRUPTIBLE = frozenset((READ_GEN, WAIT, STORE_HOLD, READ_AGAIN, BACK_OFF, INSIDE, POST, CLEAR, TRY_LOCK))

# What the recoverer remembers of another entry during its scan.
UNSEEN, SEEN_HELD, PASSED, FOUND_DEAD = range(4)

EXCLUSION = "exclusion"
ONE_TOKEN = "one token"
NO_DEADLOCK = "no deadlock"

FIRST_GEN = 2


class Process(NamedTuple):
    """One table entry and the process behind it."""

    at: str
    g: int = 0  # the generation it acquires or holds under; 0 where no step depends on it
    hold: int = 0  # the hold word as others see it; only "0 or not" is ever asked
    stores: tuple[int, ...] = ()  # stores to the hold word that others do not see yet, oldest first
    old: bool = False  # `stores` was not empty when the slice under way began
    mark: int = UNSEEN


class Shared(NamedTuple):
    """What belongs to nobody."""

    gen: int = FIRST_GEN
    tokens: tuple[int, int] = (0, 1)  # FIRST_GEN uses semaphore 1
    gen_unseen: bool = False  # the recoverer has stored gen + 1, but others still read gen


class State(NamedTuple):
    """Everything: what a step depends on and what it may change."""

    shared: Shared
    processes: tuple[Process, ...]


Change = Callable[[Process], Process | None]


class Step(NamedTuple):
    """One step of one process, with what it changes for itself, for all and for the others' entries."""

    label: str
    me: Process
    shared: Shared
    everyone: Change | None = None  # applied to every other process
    someone: Change | None = None  # applied to any one other process for which it is not None
    fault: bool = False  # the environment's doing


@dataclass(frozen=True)
class Variant:
    """The size of a model and, for negative controls, what is wrong with it."""

    processes: int
    flaw: str = ""
    buffered: bool = False
    newcomers: bool = True


class Others(NamedTuple):
    """What a step may have to know of the other processes together."""

    locked: bool  # someone holds the recovery lock
    unseen: bool  # the scan has not passed everybody
    dead_found: bool  # a dead process's hold word is still to be zeroed
    old: bool  # a store made before the slice is not visible yet


# ------------------------------------------------------------------------------------------------------------
# The algorithm


def _semaphore(gen: int) -> int:
    return (gen // 2) & 1


def _with_token(shared: Shared, semaphore: int, count: int) -> Shared:
    zero, one = shared.tokens
    return shared._replace(tokens=(zero, count) if semaphore else (count, one))


def _posted(shared: Shared, gen: int) -> Shared:
    semaphore = _semaphore(gen)
    return _with_token(shared, semaphore, shared.tokens[semaphore] + 1)


def _landed(shared: Shared) -> Shared:
    """The recoverer's store of an odd gen, if it was still on its way, is visible."""
    return shared._replace(gen=shared.gen + 1, gen_unseen=False) if shared.gen_unseen else shared


def _storing_hold(me: Process, value: int, variant: Variant) -> Process:
    if value == (me.stores[-1] if me.stores else me.hold):
        return me  # nobody can see that it was stored once more
    if variant.buffered:
        return me._replace(stores=(*me.stores, value))
    return me._replace(hold=value)


def _look_clear(other: Process) -> Process | None:
    return other._replace(mark=PASSED) if other.mark == UNSEEN and not other.hold else None


def _look_held(other: Process) -> Process | None:
    return other._replace(mark=SEEN_HELD) if other.mark == UNSEEN and other.hold else None


def _probe_dead(other: Process) -> Process | None:
    return other._replace(mark=FOUND_DEAD) if other.mark == SEEN_HELD and other.at == DEAD else None


def _probe_dead_and_wait(other: Process) -> Process | None:
    return other._replace(mark=UNSEEN) if other.mark == SEEN_HELD and other.at == DEAD else None


def _probe_alive(other: Process) -> Process | None:
    return other._replace(mark=UNSEEN) if other.mark == SEEN_HELD and other.at != DEAD else None


def _probe_alive_and_pass(other: Process) -> Process | None:
    return other._replace(mark=PASSED) if other.mark == SEEN_HELD and other.at != DEAD else None


def _zero_if_found_dead(other: Process) -> Process | None:
    return other._replace(mark=UNSEEN, hold=0) if other.mark == FOUND_DEAD else None


def _keep_only_the_dead_in_mind(other: Process) -> Process:
    return other._replace(mark=UNSEEN) if other.mark == PASSED else other


def _out_of_mind(other: Process) -> Process:
    return other._replace(mark=UNSEEN, old=False)


def _made_before_the_slice(other: Process) -> Process:
    return other._replace(old=True) if other.stores else other


def _steps(me: Process, shared: Shared, others: Others, variant: Variant) -> Iterator[Step]:
    """All that can happen next to one process; `me.at` says what its next own step is."""
    if me.at == DEAD:
        if variant.newcomers:
            yield Step("is a newcomer in this entry and locks it", me._replace(at=JOIN), shared, fault=True)
        return
    yield from _faults(me, shared, variant)
    if me.stores:
        landed = me._replace(hold=me.stores[0], stores=me.stores[1:], old=False)
        yield Step(f"is seen to have stored hold = {'g' if me.stores[0] else '0'}", landed, shared)
    if me.at in RECOVERING or me.at == TRY_LOCK:
        yield from _recover(me, shared, others, variant)
    elif me.at != DONE:
        yield from _acquire_and_leave(me, shared, variant)


def _acquire_and_leave(me: Process, shared: Shared, variant: Variant) -> Iterator[Step]:
    flaw = variant.flaw
    semaphore = _semaphore(me.g)
    visible = not me.stores  # a semaphore call or a lock makes earlier stores visible first
    if me.at == JOIN:
        yield Step("zeroes the entry's hold word", _storing_hold(me, 0, variant)._replace(at=READ_GEN), shared)

    elif me.at == READ_GEN:  # A1
        if shared.gen & 1:
            yield Step("reads an odd gen and goes to help", me._replace(at=TRY_LOCK), shared)
        else:
            yield Step(f"reads gen = {shared.gen}", me._replace(at=WAIT, g=shared.gen), shared)

    elif me.at == WAIT:  # A2
        if shared.tokens[semaphore]:
            if visible:
                taken = _with_token(shared, semaphore, shared.tokens[semaphore] - 1)
                yield Step(f"takes the token of semaphore {semaphore}", me._replace(at=STORE_HOLD), taken)
        else:  # whoever suspects may then stay at TRY_LOCK: by the time it acts, it may be quite wrong
            yield Step("waits a slice in vain, starts over", me._replace(at=READ_GEN, g=0), shared)
            if flaw != "never suspects":
                yield Step("waits a slice in vain, suspects", me._replace(at=TRY_LOCK, g=0), shared)

    elif me.at == STORE_HOLD:  # A3
        after = INSIDE if flaw == "no second look at gen" else READ_AGAIN
        yield Step(f"stores hold = {me.g}", _storing_hold(me, 1, variant)._replace(at=after), shared)

    elif me.at == READ_AGAIN:  # A4
        same = me.g % 4 == shared.gen % 4 if flaw == "gen compared modulo 4" else me.g == shared.gen
        if same:
            yield Step(f"reads gen = {me.g} again, is INSIDE", me._replace(at=INSIDE), shared)
        else:
            keep = me.g if flaw == "posts when it backs off" else 0
            yield Step("reads another gen", me._replace(at=BACK_OFF, g=keep), shared)

    elif me.at == BACK_OFF:  # A5
        left = _posted(shared, me.g) if flaw == "posts when it backs off" else shared
        yield Step("backs off: stores hold = 0", _storing_hold(me, 0, variant)._replace(at=READ_GEN, g=0), left)

    elif me.at == INSIDE:  # C
        yield Step("has worked inside", me._replace(at=POST), shared)

    elif me.at == POST:  # L1
        if flaw == "clears before it posts":
            yield Step("stores hold = 0", _storing_hold(me, 0, variant)._replace(at=LATE_POST), shared)
        elif visible:
            keep = me.g if flaw == "posts again when interrupted after the post" else 0
            yield Step(f"posts semaphore {semaphore}", me._replace(at=CLEAR, g=keep), _posted(shared, me.g))

    elif me.at == CLEAR:  # L2
        cleared = _storing_hold(me, 0, variant)._replace(g=0)
        yield Step("stores hold = 0, starts another round", cleared._replace(at=READ_GEN), shared)
        yield Step("stores hold = 0, ends", cleared._replace(at=DONE), shared)

    elif me.at == LATE_POST:
        left = _posted(shared, me.g)
        yield Step(f"posts semaphore {semaphore}, starts another round", me._replace(at=READ_GEN, g=0), left)
        yield Step(f"posts semaphore {semaphore}, ends", me._replace(at=DONE, g=0), left)

    elif me.at in (UNWIND, UNWIND_INSIDE):
        cleared = me if flaw == "an exception leaves hold set" else _storing_hold(me, 0, variant)
        yield Step("stores hold = 0 without posting, starts over", cleared._replace(at=READ_GEN), shared)
        yield Step("stores hold = 0 without posting, ends", cleared._replace(at=DONE), shared)


def _recover(me: Process, shared: Shared, others: Others, variant: Variant) -> Iterator[Step]:
    flaw = variant.flaw
    if me.at == TRY_LOCK:  # R1
        if others.locked:
            yield Step("finds the recovery lock taken", me._replace(at=READ_GEN), shared)
        elif not me.stores:
            yield Step("takes the recovery lock", me._replace(at=READ_ODD), shared)

    elif me.at == READ_ODD:  # R2
        if shared.gen & 1:
            after = SCAN if flaw == "no slice when gen is odd already" else SLEEP
            yield Step("finds gen odd", me._replace(at=after), shared)
        else:
            yield Step("finds gen even", me._replace(at=MAKE_ODD), shared)

    elif me.at == MAKE_ODD:
        stored = shared._replace(gen_unseen=True)
        after = SCAN if flaw == "no slice" else SLEEP
        stored = stored if variant.buffered else _landed(stored)
        yield Step(f"stores gen = {stored.gen | 1}", me._replace(at=after), stored)

    elif me.at == SLEEP:  # R3
        if not shared.gen_unseen:
            yield Step("waits a slice", me._replace(at=SLEPT), shared, everyone=_made_before_the_slice)

    elif me.at == SLEPT:
        if not others.old:
            yield Step("wakes up", me._replace(at=SCAN), shared)

    elif me.at == SCAN:  # R4
        if others.unseen:
            yield Step("reads hold = 0 of someone", me, shared, someone=_look_clear)
            yield Step("reads a hold word that is set", me._replace(at=PROBE), shared, someone=_look_held)
            yield _unlock("gives up and unlocks, gen stays odd", me, shared, READ_GEN)
        else:
            after = REBUILD if flaw == "does not drain" else DRAIN_0
            yield Step("has seen all", me._replace(at=after), shared, everyone=_keep_only_the_dead_in_mind)

    elif me.at == PROBE:
        alive = _probe_alive_and_pass if flaw == "does not wait for live holders" else _probe_alive
        dead = _probe_dead_and_wait if flaw == "waits for dead holders" else _probe_dead
        yield Step("finds its owner alive", me._replace(at=SCAN), shared, someone=alive)
        yield Step("finds its owner dead", me._replace(at=SCAN), shared, someone=dead)

    elif me.at == DRAIN_0:  # R5
        yield Step("drains semaphore 0", me._replace(at=DRAIN_1), _with_token(shared, 0, 0))

    elif me.at == DRAIN_1:
        yield Step("drains semaphore 1", me._replace(at=REBUILD), _with_token(shared, 1, 0))

    elif me.at == REBUILD:  # R6; while a process is here, it rebuilds
        late = flaw == "zeroes hold words after reopening"
        yield Step("has rebuilt", me._replace(at=MAKE_EVEN if late else FORGET), shared)

    elif me.at == FORGET:
        after = UNLOCK if flaw == "zeroes hold words after reopening" else MAKE_EVEN
        if others.dead_found:
            yield Step("zeroes a hold word whose owner it found dead", me, shared, someone=_zero_if_found_dead)
        else:
            yield Step("has zeroed the hold words of the dead", me._replace(at=after), shared)

    elif me.at == MAKE_EVEN:  # R7; that this store may land later, with the post, is a longer stay here
        if not shared.gen_unseen:
            reopened = shared._replace(gen=shared.gen + 1)
            yield Step(f"stores gen = {reopened.gen}", me._replace(at=POST_TOKEN), reopened)

    elif me.at == POST_TOKEN:  # R8
        after = FORGET if flaw == "zeroes hold words after reopening" else UNLOCK
        left = _posted(shared, shared.gen)
        yield Step(f"posts semaphore {_semaphore(shared.gen)}", me._replace(at=after), left)

    elif me.at == UNLOCK:  # R9
        yield _unlock("unlocks", me, shared, READ_GEN)

    if shared.gen_unseen:
        yield Step(f"is seen to have stored gen = {shared.gen + 1}", me, _landed(shared))


def _unlock(label: str, me: Process, shared: Shared, at: str, fault: bool = False) -> Step:
    return Step(label, me._replace(at=at), _landed(shared), everyone=_out_of_mind, fault=fault)


def _faults(me: Process, shared: Shared, variant: Variant) -> Iterator[Step]:
    dead = Process(DEAD, hold=me.stores[-1] if me.stores else me.hold, mark=me.mark)
    if me.at in RECOVERING:
        yield _unlock("is killed", dead, shared, DEAD, fault=True)
        yield _unlock("is interrupted, unlocks, starts over", me, shared, READ_GEN, fault=True)
        yield _unlock("is interrupted, unlocks, ends", me, shared, DONE, fault=True)
        return
    yield Step("is killed", dead, shared, fault=True)
    if me.at in INTERRUPTIBLE:
        if variant.flaw == "posts again when interrupted after the post" and me.at == CLEAR:
            shared = _posted(shared, me.g)
        unwinding = me._replace(at=UNWIND_INSIDE if me.at in OCCUPIES else UNWIND, g=0)
        yield Step("is interrupted", unwinding, shared, fault=True)


# ------------------------------------------------------------------------------------------------------------
# What is promised

# Counts over all processes, four bits each, so that they add up in one integer.
_OCCUPYING, _REBUILDING, _TO_BE_POSTED, _POSTING, _DRAINED, _UNFINISHED = (1 << 4 * n for n in range(6))


def _contribution(process: Process, gen: int) -> int:
    at = process.at
    total = 0
    if at in OCCUPIES:
        total += _OCCUPYING
    if at == REBUILD:
        total += _REBUILDING
    if (at in HOLDS_TOKEN and process.g == gen) or at == POST_TOKEN:
        total += _TO_BE_POSTED
    if at in (INSIDE, POST):
        total += _POSTING
    if at in (REBUILD, FORGET, MAKE_EVEN):
        total += _DRAINED
    if at not in (DONE, DEAD):
        total += _UNFINISHED
    return total


def _broken_promise(shared: Shared, counts: int) -> str | None:
    """The promise that a state breaks, from the sum of its processes' contributions."""

    def count(unit: int) -> int:
        return counts // unit & 15

    if count(_OCCUPYING) > 1 or (count(_OCCUPYING) and count(_REBUILDING)):
        return EXCLUSION
    current = _semaphore(shared.gen)
    if shared.gen & 1:
        tokens = sum(shared.tokens)
        if tokens + count(_POSTING) > 1 or (count(_DRAINED) and tokens):
            return ONE_TOKEN
    elif shared.tokens[current] + count(_TO_BE_POSTED) > 1 or shared.tokens[1 - current]:
        return ONE_TOKEN
    return None


# ------------------------------------------------------------------------------------------------------------
# The exploration

_ID_BITS = 12
_ID_MASK = (1 << _ID_BITS) - 1


def _renumbered(g: int, gen: int) -> int:
    """`g` with the generations renamed so that `gen` is one of 8..11, and any older one is 4 or 6."""
    if g == gen:
        return g % 4 + 8
    return g % 4 + 4 if g else 0


class _Memo(dict[int, int]):
    """A change of processes, tabulated over their numbers as they come up; -1 where it does not apply."""

    def __init__(self, change: Callable[[int], int]) -> None:
        super().__init__()
        self._change = change

    def __missing__(self, number: int) -> int:
        result = self[number] = self._change(number)
        return result


class _Compiled(NamedTuple):
    """A `Step` by numbers."""

    label: str
    fault: bool
    me: int
    shared: int
    everyone: _Memo | None
    someone: _Memo | None


class Space:
    """The states of a variant, each one integer: the number of its `Shared`, then of each `Process`.

    Reduced, generations are renumbered and processes sorted; otherwise a state is what it says.
    """

    def __init__(self, variant: Variant, reduced: bool = True) -> None:
        self.variant = variant
        self.reduced = reduced
        self._numbers: dict[Process | Shared, int] = {}
        self._processes: list[Process] = []
        self._shareds: list[Shared] = []
        self._steps: dict[tuple[int, int, int], list[_Compiled]] = {}
        self._memos: dict[tuple[Change | None, int], _Memo] = {}
        self._seen_by_others: list[int] = []  # a process's share in `Others`, as bits
        self._asks: list[int] = []  # the bits of `Others` that its own step depends on
        self.initial = self.encode(State(Shared(), (Process(READ_GEN),) * variant.processes))

    def _number(self, thing: Process | Shared) -> int:
        number = self._numbers.get(thing)
        if number is None:
            if isinstance(thing, Process):
                number = len(self._processes)
                self._processes.append(thing)
                bits = (thing.at in RECOVERING, thing.mark == UNSEEN, thing.mark == FOUND_DEAD, thing.old)
                self._seen_by_others.append(sum(bit << n for n, bit in enumerate(bits)))
                self._asks.append({TRY_LOCK: 1, SCAN: 2, FORGET: 4, SLEPT: 8}.get(thing.at, 0))
            else:
                number = len(self._shareds)
                self._shareds.append(thing)
            if number > _ID_MASK:
                raise OverflowError(f"{number} kinds of {type(thing).__name__} do not fit into {_ID_BITS} bits")
            self._numbers[thing] = number
        return number

    def encode(self, state: State) -> int:
        """The integer of a state, after whatever reduction this space makes."""
        shared, processes = state
        if self.reduced:
            gen = shared.gen
            processes = tuple(process._replace(g=_renumbered(process.g, gen)) for process in processes)
            shared = shared._replace(gen=_renumbered(gen, gen))
        return self._packed(self._number(shared), [self._number(process) for process in processes])

    def decode(self, packed: int) -> State:
        """The state that an integer stands for."""
        shared, processes = self._unpacked(packed)
        return State(self._shareds[shared], tuple(self._processes[number] for number in processes))

    def _packed(self, shared: int, processes: list[int]) -> int:
        if self.reduced:
            processes.sort()
        for number in processes:
            shared = shared << _ID_BITS | number
        return shared

    def _unpacked(self, packed: int) -> tuple[int, list[int]]:
        processes = []
        for _ in range(self.variant.processes):
            processes.append(packed & _ID_MASK)
            packed >>= _ID_BITS
        processes.reverse()
        return packed, processes

    def successors(self, packed: int) -> list[tuple[int, _Compiled, int]]:
        """Every state that one step leads to, with the step and the place of the process that makes it."""
        shared, processes = self._unpacked(packed)
        found = []
        before = -1
        for place, me in enumerate(processes):
            if me == before and self.reduced:
                continue  # twins do the same
            before = me
            others = processes[:place] + processes[place + 1 :]
            known = 0
            if self._asks[me]:
                for other in others:
                    known |= self._seen_by_others[other]
                known &= self._asks[me]
            steps = self._steps.get((shared, me, known))
            if steps is None:
                steps = self._compile(shared, me, known)
            for step in steps:
                everyone, someone = step.everyone, step.someone
                if someone is None:
                    after = others[:] if everyone is None else [everyone[other] for other in others]
                    after.insert(place, step.me)
                    found.append((self._packed(step.shared, after), step, place))
                    continue
                for index, other in enumerate(others):
                    changed = someone[other]
                    if changed >= 0:
                        after = others[:]
                        after[index] = changed
                        after.insert(place, step.me)
                        found.append((self._packed(step.shared, after), step, place))
        return found

    def _compile(self, shared: int, me: int, known: int) -> list[_Compiled]:
        others = Others(*(bool(known >> n & 1) for n in range(4)))
        compiled = []
        old = self._shareds[shared]
        for step in _steps(self._processes[me], old, others, self.variant):
            gen = step.shared.gen
            renumber = gen if self.reduced and gen != old.gen else 0
            process, after = step.me, step.shared
            if renumber:
                process = process._replace(g=_renumbered(process.g, gen))
                after = after._replace(gen=_renumbered(gen, gen))
            everyone = self._memo(step.everyone, renumber) if step.everyone or renumber else None
            someone = self._memo(step.someone, 0) if step.someone else None
            compiled.append(
                _Compiled(step.label, step.fault, self._number(process), self._number(after), everyone, someone)
            )
        self._steps[shared, me, known] = compiled
        return compiled

    def _memo(self, change: Change | None, renumber: int) -> _Memo:
        def apply(number: int) -> int:
            process: Process | None = self._processes[number]
            if change is not None:
                process = change(self._processes[number])
            if process is None:
                return -1
            if renumber:
                process = process._replace(g=_renumbered(process.g, renumber))
            return self._number(process)

        if (change, renumber) not in self._memos:
            self._memos[change, renumber] = _Memo(apply)
        return self._memos[change, renumber]

    def judge(self) -> Callable[[int], tuple[str | None, bool]]:
        """A function that tells which promise a state breaks, if any, and whether all in it have finished."""
        contributions = _Memo(lambda key: _contribution(self._processes[key & _ID_MASK], key >> _ID_BITS))
        verdicts: dict[tuple[int, int], tuple[str | None, bool]] = {}

        def verdict(packed: int) -> tuple[str | None, bool]:
            shared, processes = self._unpacked(packed)
            gen = self._shareds[shared].gen << _ID_BITS
            counts = 0
            for process in processes:
                counts += contributions[gen | process]
            known = verdicts.get((shared, counts))
            if known is None:
                known = _broken_promise(self._shareds[shared], counts), counts < _UNFINISHED
                verdicts[shared, counts] = known
            return known

        return verdict


@dataclass(frozen=True)
class Result:
    """What an exploration has found: a broken promise with a shortest trace to it, or none."""

    states: int
    steps: int
    broken: str | None
    trace: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        found = f"BROKEN: {self.broken}" if self.broken else "all promises kept"
        return f"{self.states} states, {self.steps} steps, {self.seconds:.1f} s: {found}"


def explore(variant: Variant, promises: tuple[str, ...] = (EXCLUSION, ONE_TOKEN, NO_DEADLOCK)) -> Result:
    """Visit every reachable state, breadth first, up to the first that breaks one of `promises`."""
    begun = time.monotonic()
    space = Space(variant)
    judge = space.judge()
    place = {space.initial: 0}
    order = [space.initial]
    parent = array("I", (0,))
    finished = bytearray((judge(space.initial)[1],))
    first_step = array("Q", (0,))  # steps of the algorithm out of state n: targets[first_step[n]:first_step[n + 1]]
    targets = array("I")
    steps = 0

    def result(broken: str | None, at: int = 0) -> Result:
        trace = _trace(variant, space, order, parent, at) if broken else ()
        return Result(len(order), steps, broken, trace, time.monotonic() - begun)

    for source, packed in enumerate(order):  # `order` grows meanwhile
        for successor, step, _ in space.successors(packed):
            steps += 1
            target = place.get(successor)
            if target is None:
                target = place[successor] = len(order)
                order.append(successor)
                parent.append(source)
                broken, all_finished = judge(successor)
                finished.append(all_finished)
                if broken in promises:
                    return result(broken, target)
            if not step.fault and target != source:
                targets.append(target)
        first_step.append(len(targets))

    if NO_DEADLOCK in promises:
        stuck = _stuck(finished, first_step, targets)
        if stuck is not None:
            return result(NO_DEADLOCK, stuck)
    return result(None)


def _stuck(finished: bytearray, first_step: array[int], targets: array[int]) -> int | None:
    """The first state from which no steps of the algorithm lead to a finished one."""
    unsure = [state for state in range(len(finished) - 1, -1, -1) if not finished[state]]
    while unsure:
        still_unsure = []
        for state in unsure:
            for edge in range(first_step[state], first_step[state + 1]):
                if finished[targets[edge]]:
                    finished[state] = True
                    break
            else:
                still_unsure.append(state)
        if len(still_unsure) == len(unsure):
            return min(unsure)
        unsure = still_unsure
    return None


def _trace(variant: Variant, reduced: Space, order: list[int], parent: array[int], at: int) -> tuple[str, ...]:
    """The way to a state, told with true generations and lasting names by walking it again unreduced."""
    way = []
    while at:
        way.append(order[at])
        at = parent[at]
    exact = Space(variant, reduced=False)
    here = exact.initial
    lines = []
    for waypoint in reversed(way):
        here, label, place = next(
            (successor, step.label, place)
            for successor, step, place in exact.successors(here)
            if reduced.encode(exact.decode(successor)) == waypoint
        )
        shared = exact.decode(here).shared
        lines.append(f"P{place} {label}    [gen {shared.gen}, tokens {shared.tokens[0]} {shared.tokens[1]}]")
    return tuple(lines)


# ------------------------------------------------------------------------------------------------------------
# Tests

# The number of reachable states is part of the check: a model cut down by mistake keeps all promises, too.
SMALL = (
    (Variant(2), 1_923), (Variant(2, buffered=True), 4_993), (Variant(3), 22_827), (Variant(3, buffered=True), 105_129),
)  # fmt: skip
LARGE = ((Variant(4), 222_559),)
#: They take minutes each, and depend on no code but the model's.
HUGE = ((Variant(4, buffered=True), 1_658_815), (Variant(5), 2_031_653))

FLAWS = (
    # P takes the token; Q recovers and finds hold 0; P stores hold and is inside while Q rebuilds.
    (Variant(2, "no second look at gen"), EXCLUSION),
    # P takes the token; Q recovers twice; P wakes up and finds gen the same; Q gets in with the new token.
    (Variant(2, "gen compared modulo 4"), EXCLUSION),
    # P is inside, only slow; Q recovers and rebuilds beside it.
    (Variant(2, "does not wait for live holders"), EXCLUSION),
    # P posts as Q recovers; the token stays; after another recovery its semaphore is used again and has two.
    (Variant(2, "does not drain"), EXCLUSION),
    # P clears; recovery 1 passes it; after recovery 2 has drained, P posts the semaphore that is used next.
    (Variant(2, "clears before it posts"), EXCLUSION),
    # P takes a token, sleeps through a recovery, backs off and posts after the drain of a second one.
    (Variant(2, "posts when it backs off"), EXCLUSION),
    # P posts; Q is in; P is interrupted before its call ends and posts once more; P is in beside Q.
    (Variant(2, "posts again when interrupted after the post"), EXCLUSION),
    # P dies; Q reopens; a newcomer in P's entry stores hold; Q zeroes it; the next recovery does not wait.
    (Variant(2, "zeroes hold words after reopening"), EXCLUSION),
    # P's store of hold and Q's of gen are both on their way: P reads the old gen, Q reads hold 0.
    (Variant(2, "no slice", buffered=True), EXCLUSION),
    # The same, but Q dies right after its store: R finds gen odd and must not take that for an old store.
    (Variant(3, "no slice when gen is odd already", buffered=True), EXCLUSION),
    # P dies with the token.
    (Variant(2, "never suspects"), NO_DEADLOCK),
    # P dies with its hold word set.
    (Variant(2, "waits for dead holders"), NO_DEADLOCK),
    # P is interrupted and its clean-up too (a second Ctrl-C): P lives on, its hold word set.
    (Variant(2, "an exception leaves hold set"), NO_DEADLOCK),
)


def _name(variant: Variant) -> str:
    return variant.flaw or f"{variant.processes} entries{', store buffers' if variant.buffered else ''}"


def _reachable(space: Space, last_gen: int | None = None) -> set[int]:
    """All states, or all that are reached without going beyond a generation."""
    found = {space.initial}
    order = [space.initial]
    for packed in order:
        for successor, _, _ in space.successors(packed):
            if successor not in found and (last_gen is None or space.decode(successor).shared.gen <= last_gen):
                found.add(successor)
                order.append(successor)
    return found


@pytest.mark.parametrize(("variant", "states"), SMALL, ids=[_name(variant) for variant, _ in SMALL])
def test_all_promises_are_kept_in_every_reachable_state(variant: Variant, states: int) -> None:
    result = explore(variant)
    assert result.broken is None, "\n".join(result.trace)
    assert result.states == states


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "states"), LARGE, ids=[_name(variant) for variant, _ in LARGE])
def test_all_promises_are_kept_by_more_processes(variant: Variant, states: int) -> None:
    result = explore(variant)
    assert result.broken is None, "\n".join(result.trace)
    assert result.states == states


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "states"), HUGE, ids=[_name(variant) for variant, _ in HUGE])
def test_all_promises_are_kept_by_many_processes(variant: Variant, states: int, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--every-bytecode"):
        pytest.skip("with --every-bytecode")
    result = explore(variant)
    assert result.broken is None, "\n".join(result.trace)
    assert result.states == states


@pytest.mark.parametrize(("variant", "promise"), FLAWS, ids=[_name(variant) for variant, _ in FLAWS])
def test_each_flaw_is_found(variant: Variant, promise: str) -> None:
    result = explore(variant, (promise,))
    assert result.broken == promise
    assert result.trace


@pytest.mark.parametrize("buffered", [False, True], ids=["", "store buffers"])
def test_renumbering_and_sorting_lose_no_state(buffered: bool) -> None:
    variant = Variant(2, buffered=buffered)
    reduced = Space(variant)
    exact = Space(variant, reduced=False)
    unreduced = _reachable(exact, last_gen=8)
    assert len(unreduced) > 3 * len(_reachable(reduced))
    assert {reduced.encode(exact.decode(packed)) for packed in unreduced} == _reachable(reduced)


def test_a_process_keeps_a_token_through_two_recoveries() -> None:
    """The case that the whole gen is compared for: it has moved by 4, so the semaphore is the same again."""
    space = Space(Variant(2), reduced=False)
    states = map(space.decode, _reachable(space, last_gen=FIRST_GEN + 4))
    late = [shared for shared, processes in states for p in processes if p.at == READ_AGAIN and p.g == shared.gen - 4]
    assert late
    assert any(sum(shared.tokens) == 1 for shared in late), "the new token is there beside the one that is burnt"


def test_every_step_of_the_algorithm_is_reached() -> None:
    space = Space(Variant(2))
    reached = {process.at for packed in _reachable(space) for process in space.decode(packed).processes}
    assert reached >= RECOVERING | HOLDS_TOKEN | OCCUPIES | INTERRUPTIBLE | {UNWIND, JOIN, DONE, DEAD}


def main() -> int:
    """Explore, print what is found, and return 1 if it is not what is expected."""
    parser = argparse.ArgumentParser(description="Explore the model of the fenced mutex.")
    parser.add_argument("--full", action="store_true", help="the large sizes too, and a trace of each flaw")
    full = parser.parse_args().full
    unexpected = 0
    for variant, states in SMALL + LARGE + HUGE if full else SMALL:
        result = explore(variant)
        print(f"{_name(variant)}: {result}", *result.trace, sep="\n    ", flush=True)
        unexpected += result.broken is not None or result.states != states
    for variant, promise in FLAWS:
        result = explore(variant, (promise,))
        print(f"{_name(variant)}: {result}", *(result.trace if full else ()), sep="\n    ", flush=True)
        unexpected += result.broken != promise
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())

"""Processes are killed, or interrupted, before any bytecode of any operation: nothing hangs or is lost.

operations.py has the calls, arena.py what is asserted, and sweep.py makes many trials.

    python -m pytest tests/kills                                        a seeded sample, and PLACES
    python -m pytest tests/kills --every-bytecode                       over a million trials: many hours on two cores
    python -m pytest tests/kills --every-bytecode --share 0.1 --seed 7  a tenth of these

PLACES are where a death or an interrupt once did harm, or easily could. A place that has ever failed goes there.
`python -m kills` does the same without pytest, also for some operations or one bytecode (__main__.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from support.workers import may_fork

from kills.arena import Trial
from kills.operations import OPERATIONS, Spot
from kills.sweep import TIMED, TRACED, Task, perform_all, sweep, table
from kills.victim import ACTIONS

pytestmark = may_fork


@dataclass(frozen=True)
class Place:
    """A few bytecodes that an operation comes by: of a function, or of a line of its source.

    Attributes:
        blocked: the call that a survivor is blocked in meanwhile; None for the last that the operation names.
    """

    operation: str
    function: str
    fragment: str = ""
    blocked: str | None = None

    @property
    def survivor(self) -> str:
        operation = OPERATIONS[self.operation]
        return operation.blocked[0 if operation.turns else -1] if self.blocked is None else self.blocked


#: By function and fragment of the line, not by number. Add what has failed, once it is mended.
PLACES = [
    # between the grant and the hold word, and between the post and the hold word
    Place("put", "send", "words[senders.hold] = gen"),
    Place("put", "send", "words[senders.hold] = 0"),
    Place("get", "receive", "words[receivers.hold] = gen"),
    Place("get", "receive", "words[receivers.hold] = 0"),
    Place("put large", "critical", "words[mutex.hold] = gen"),
    Place("put large", "critical", "words[mutex.hold] = 0"),
    # between the slot's word and the ring, the tail, the head
    Place("put", "send", "words[self._ring + (tail & self._mask)] = slot"),
    Place("put", "send", "words[TAIL] = tail + 1"),
    Place("put", "send", "words[SENT_NBYTES]"),
    Place("put large", "_append", "words[self._ring + (tail & self._mask)] = slot"),
    Place("put large", "_append", "words[TAIL] = tail + 1"),
    Place("get", "receive", "words[HEAD] = "),
    Place("get", "receive", "words[TAKEN_NBYTES]"),
    Place("get many", "_take_at", "words[HEAD] = position + 1"),
    # loans and borrows: where the slot is claimed or taken and nobody has it yet, and where the block ends
    Place("loan", "claim_free", "words[record] = WRITING | self.owner"),
    Place("loan", "_append", "words[record] = READY"),
    Place("loan", "__enter__", "return self"),
    Place("borrow", "_take_at", "words[HEAD] = position + 1"),
    Place("borrow", "_begin", "hold.begin()"),
    Place("borrow", "end", "self._word = layout.FREE"),
    Place("borrow, and requeue", "_end", "elif self._requeue"),
    Place("borrow, and keep a view", "keep", "= word + layout.KEPT - layout.READING"),
    Place("get batch", "free", "self._states[run] = FREE"),
    Place("put that drops", "_drop_ready", "words[layout.HEAD] += 1"),
    Place("put that drops", "_store_and_count", "words[record] = word"),
    Place("put that drops", "_store_and_count", "words[counter] = total"),
    Place("shutdown", "shut", "words[SHUTDOWN] = 1", blocked=""),  # else none asks between the death and the next put
    Place("shutdown at once", "_store_and_count", "words[counter] = total", blocked=""),  # else there is none to drop
    Place("get that requeues", "_store_and_count", "words[counter] = total"),
    Place("get that drops", "_store_and_count", "words[counter] = total"),
    # in an event loop: where a call has a FIFO, and where it is woken
    Place("aget that waits", "_make", "words[LISTENED] = 1"),
    Place("aget that waits", "make", "os.mkfifo"),
    Place("aget that waits", "listen"),
    Place("aget that waits", "_end"),
    Place("aput that waits", "_sleep", "loop_waits.add(waiters, future, need)"),
    Place("aput that waits", "_sleep", "loop_waits.remove(waiters, future)"),
    Place("aborrow that waits", "__aenter__", "_begin"),
    Place("aloan that waits", "__aenter__", "return loan"),
    Place("put large", "wake_for"),
    Place("get that quietens", "quieten"),
    # messages larger than a slot: their window, their pieces, their end
    Place("put larger than a slot", "write_all", "ALL_THERE"),
    Place("put larger than the ring", "claim", "words[record] = PIECE"),
    Place("put larger than the ring", "_append", "words[record] = READY"),
    Place("put larger than the ring", "_write_next", "self.done += 1"),
    Place("get larger than a slot", "_free_pieces"),
    Place("get larger than the ring", "_copy_next", "self.done += 1"),
    Place("get larger than the ring", "_commit", "words[record] = self.word + KEPT"),
    Place("get larger than the ring", "vacate", "self.words[self._records[slot]] = FREE"),
    # recovery
    Place("put that recovers", "_recover"),
    Place("put that recovers", "rebuild"),
    Place("put that reaps", "rebuild"),
    Place("get that recovers", "_recover"),
    Place("get that requeues", "_put_back"),
    Place("get that requeues", "bury"),
    Place("get that drops", "drop"),
    # a Latest: between the slot's record and the newest version, and where a cell pins the slot or is given back
    Place("publish", "write_next", "words[record + layout.R_SEQUENCE] = version"),
    Place("publish", "write_next", "words[layout.NEWEST] = version"),
    Place("publish", "critical", "mutex.posts[gen"),
    Place("borrow newest", "_pin_newest", "last.cell = cell"),
    Place("borrow newest", "_pin_newest", "self._ends[cell] = first, last"),
    Place("borrow newest", "_pin_newest", "self._cells[cell] = slot + 1"),
    Place("borrow newest", "_pin_newest", "if words[layout.NEWEST] == newest"),
    Place("borrow newest", "_clear", "cells[cell] = 0"),
    Place("borrow newest, keep a view", "__exit__"),
    Place("read", "_pin_newest", "self._free.popleft()"),
    Place("read once more", "_reclaim", "ended.popleft()"),
    Place("publish that takes over", "rebuild"),
    # coming and going
    Place("attach", "join"),
    Place("fork, and put in the child", "_after_fork_in_child", "again: BaseException"),
    Place("fork, and put in the child", "join"),
    Place("fork, and put in the child", "_bind"),
    Place("fork, and put in the child", "rebind", "self.unlock"),
    Place("fork, and put in the child", "open_locks"),
    Place("close", "give_up"),
    Place("exit", "give_up"),
    Place("arrive", "redeem"),
    Place("create", "_link"),
    Place("create over the dead", "_link_reclaiming"),
    Place("create over the dead", "_remove"),
    Place("close of the creator", "remove_names"),
    Place("close of the creator", "_remove"),
    Place("exit of the creator", "_remove"),
]


def _tasks_at_places(actions: Sequence[str], sample: int, seed: int) -> list[Task]:
    return [
        Task(place.operation, place.survivor, (*actions,), (), Spot(place.function, place.fragment), sample, seed + k)
        for k, place in enumerate(PLACES)
    ]


def _sample(names: Sequence[str], actions: Sequence[str], sample: int, seed: int) -> list[Task]:
    return [
        Task(name, blocked, (*actions,), sample=sample, seed=seed)
        for name in names
        for blocked in OPERATIONS[name].sweeps
    ]


def _check(tasks: list[Task]) -> None:
    trials = [trial for some in perform_all(tasks) for trial in some]
    print(table(trials))
    _judge(trials)


def _judge(trials: list[Trial]) -> None:
    failures = [str(trial) for trial in trials if trial.failure]
    assert not failures, "\n".join([f"{len(failures)} of {len(trials)} trials failed:", *failures])


@pytest.mark.parametrize("action", ["kill", "KeyboardInterrupt"])
def test_survivors_go_on_after_a_death_or_interrupt_at_a_delicate_place(action: str) -> None:
    _check(_tasks_at_places([action], 1, seed=0))


@pytest.fixture
def seed() -> int:
    """A new one each time, which a failure shows."""
    seed = random.randrange(1 << 32)
    print(f"{seed=}")
    return seed


@pytest.mark.slow
def test_survivors_go_on_after_a_death_or_interrupt_at_any_delicate_place(seed: int) -> None:
    _check(_tasks_at_places(ACTIONS, 5, seed))


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_survivors_go_on_after_a_death_or_interrupt_anywhere(half: int, seed: int) -> None:
    _check(_sample(TRACED[half::2], ACTIONS, 9, seed))


@pytest.mark.slow
def test_survivors_go_on_after_a_death_inside_a_long_call_in_c(seed: int) -> None:
    _check(_sample(TIMED, ["kill"], 18, seed))


def _share_and_seed(request: pytest.FixtureRequest) -> tuple[float, int]:
    if not request.config.getoption("--every-bytecode"):
        pytest.skip("with --every-bytecode")
    seed = request.config.getoption("--seed")
    return request.config.getoption("--share"), random.randrange(1 << 32) if seed is None else seed


@pytest.mark.slow(seconds=24 * 3600.0)
@pytest.mark.parametrize("action", ACTIONS)
def test_survivors_go_on_after_a_death_or_interrupt_at_every_bytecode(
    action: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    share, seed = _share_and_seed(request)
    with capsys.disabled():
        print()
        _judge(sweep(TRACED, [action], share, seed))


@pytest.mark.slow(seconds=24 * 3600.0)
def test_survivors_go_on_after_thousands_of_deaths_inside_long_calls_in_c(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    share, seed = _share_and_seed(request)
    with capsys.disabled():
        print()
        _judge(sweep(TIMED, ["kill"], share, seed))

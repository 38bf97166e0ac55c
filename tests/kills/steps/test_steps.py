"""Processes are killed at any machine instruction of the compiled path: the others go on, and nothing is lost.

operations.py has the calls, trial.py what is asserted, and stepper.py steps. `python -m kills.steps` does the same
without pytest, also for some operations or one trial (__main__.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from support.workers import may_fork

from kills.steps.operations import OPERATIONS
from kills.steps.stepper import why_not
from kills.steps.sweep import count, killed_recoverers, kills, perform, stops, table
from kills.steps.trial import Outcome, Trial

_REASON = why_not()
pytestmark = [may_fork, pytest.mark.skipif(bool(_REASON), reason=_REASON)]


#: Of so many trials, in random order, the first few.
Share = Callable[[Sequence[Trial], int], Sequence[Trial]]


@pytest.fixture
def share(request: pytest.FixtureRequest) -> Share:
    """With --every-bytecode all of them."""
    return lambda trials, few: trials if request.config.getoption("--every-bytecode") else trials[:few]


def _judge(outcomes: Sequence[Outcome]) -> None:
    failed = [str(outcome) for outcome in outcomes if outcome.failure]
    print(table([outcome for outcome in outcomes if not outcome.trial.deaths[0].at]))
    assert not failed, f"{len(failed)} of {len(outcomes)} failed:\n" + "\n".join(failed[:20])


def _sweep(trials: Sequence[Trial]) -> None:
    assert trials
    outcomes = list(perform(trials))
    _judge(outcomes)
    if trials[0].stops:
        return
    killed = sum(bool(outcome.steps and outcome.steps[0].killed) for outcome in outcomes)
    assert killed > len(trials) // 2, f"of {len(trials)} victims {killed} were killed: the counts are not the same"


def test_survivors_go_on_after_a_death_at_some_instruction() -> None:
    counted = count(OPERATIONS, few=True)
    _judge(counted)
    pick = random.Random(20261127)
    _sweep([*kills(counted, "instruction", pick)[:60], *kills(counted, "store", pick)[:40]])


@pytest.mark.slow(seconds=60)
def test_a_process_may_stop_after_any_store(share: Share) -> None:
    names = ["put", "get", "put many", "get many", "put typed", "get typed", "loan", "borrow"]
    _sweep(share(stops(count(names, few=True), random.Random(20261127)), 60))


@pytest.mark.slow(seconds=60)
def test_survivors_go_on_after_a_death_after_any_store(share: Share) -> None:
    counted = count(OPERATIONS)
    _judge(counted)
    _sweep(share(kills(counted, "store", random.Random(20261127)), 400))


@pytest.mark.slow(seconds=60)
def test_survivors_go_on_after_a_death_at_many_instructions(share: Share) -> None:
    _sweep(share(kills(count(OPERATIONS), "instruction", random.Random(20261127))[:2000], 300))


@pytest.mark.slow(seconds=60)
def test_survivors_go_on_after_the_next_has_died_in_the_recovery(share: Share) -> None:
    names = ["put", "get", "put large", "put many", "get many", "loan", "borrow"]
    _sweep(share(killed_recoverers(count(names), random.Random(20261127))[:250], 60))

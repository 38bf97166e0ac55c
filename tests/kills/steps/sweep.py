"""Many trials: which of them, in how many processes, and what they came to.

A sweep first makes each operation undisturbed, once for each way in which it is tried, and so counts its instructions
and stores. An operation that ran no compiled code, or that was handed over to Python though its handle was in use, has
not tested what it is there for: its trial fails.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from support.workers import die_with_parent

from ringshm import Channel, Latest

from .operations import KINDS, OPERATIONS, SPEC
from .trial import Death, Outcome, Trial, run

#: Trials at a time; most of their time they wait for slices.
PROCESSES = 4 * (os.cpu_count() or 1)
#: How many stores a call has at least that is compiled throughout; what Python does in it is one.
_FEWEST_STORES = 9
#: How many bytecodes a call has at least that recovers a mutex; one that need not lives.
_RECOVERY = 3000


def prepare() -> None:
    """Bind what the loader binds at its first use, and know all kinds: for counts that are the same in each process."""
    die_with_parent()
    with Channel(3, 200_000) as channel, Channel(3, spec=SPEC) as typed, Latest(200_000) as latest:
        for kind, message in KINDS.items():
            for name, operation in OPERATIONS.items():
                if kind in operation.kinds and operation.handle is Channel and not name.startswith("loan"):
                    handle = typed if kind == "typed" else channel
                    sends = operation.sends or operation.takes
                    for _ in range(3):
                        for _ in range(sends):
                            handle.put(message(1))
                        if operation.takes:
                            operation.call(handle, [])
                        while handle.qsize():
                            handle.get()
            latest.publish(message(1))
            latest.read()


def perform(trials: Sequence[Trial], processes: int = PROCESSES) -> Iterator[Outcome]:
    """Make them, as they come."""
    with ProcessPoolExecutor(processes, get_context("fork"), prepare) as pool:
        yield from pool.map(run, trials)


def undisturbed(names: Iterable[str], few: bool = False) -> list[Trial]:
    """The ways in which operations are tried; or one of them for each kind of messages."""
    trials = []
    for name in names:
        operation = OPERATIONS[name]
        for kind in operation.kinds:
            trials.append(Trial((Death(name),), kind, ready=3))
            if few:
                continue
            trials.append(Trial((Death(name),), kind, cold=True))
            if operation.handle is Channel and not operation.waits:
                trials.append(Trial((Death(name),), kind, ready=0))
                trials.append(Trial((Death(name),), kind, blocked=True))
    return trials


def count(names: Iterable[str], processes: int = PROCESSES, few: bool = False) -> list[Outcome]:
    """Make the operations undisturbed."""
    outcomes = list(perform(undisturbed(names, few), processes))
    for outcome in outcomes:
        if outcome.failure:
            continue
        instructions, stores = outcome.steps[0].instructions, outcome.steps[0].stores
        if not instructions:
            outcome.failure = "it ran no compiled instruction"
        elif outcome.trial.operation.handle is Channel and not outcome.trial.cold and stores < _FEWEST_STORES:
            outcome.failure = f"of {stores} stores: it was handed over to Python"
    return outcomes


def kills(counted: Iterable[Outcome], unit: str, pick: random.Random) -> list[Trial]:
    """All kills of undisturbed operations by that unit, in an order drawn by `pick`, and so who survives."""
    trials = []
    for outcome in counted:
        trial = outcome.trial
        if outcome.failure or not outcome.steps[0].instructions:
            continue
        steps = outcome.steps[0]
        for at in range(1, (steps.stores if unit == "store" else steps.instructions) + 1):
            death = replace(trial.deaths[0], unit=unit, at=at)
            trials.append(replace(trial, deaths=(death,), turn=pick.randrange(7), pure=pick.random() < 0.3))
    pick.shuffle(trials)
    return trials


def killed_recoverers(counted: Iterable[Outcome], pick: random.Random) -> list[Trial]:
    """A first victim is killed after each of its stores; the next, in the same call, where it recovers from that."""
    trials = []
    for trial in _of_one_victim(counted, pick):
        second = Death(trial.deaths[0].operation, "bytecode", pick.randrange(1, _RECOVERY))
        trials.append(replace(trial, deaths=(*trial.deaths, second)))
    return trials


def stops(counted: Iterable[Outcome], pick: random.Random) -> list[Trial]:
    """The victim is stopped after each of its stores."""
    return [replace(trial, stops=True) for trial in _of_one_victim(counted, pick)]


def _of_one_victim(counted: Iterable[Outcome], pick: random.Random) -> list[Trial]:
    """Kills after each store, on a channel where nobody waits."""
    trials = kills(counted, "store", pick)
    return [
        one
        for one in trials
        if one.operation.handle is Channel and not (one.blocked or one.cold or one.operation.waits)
    ]


def table(counted: Iterable[Outcome]) -> str:
    """What was counted, a line for each way; and what failed."""
    lines = [f"{'operation':20}{'kind':8}{'ready':>6}  {'way':10}{'instructions':>13}{'stores':>8}"]
    for outcome in counted:
        trial, steps = outcome.trial, outcome.steps[0] if outcome.steps else None
        way = "cold" if trial.cold else "blocked" if trial.blocked else "warm"
        figures = f"{steps.instructions:13}{steps.stores:8}" if steps else ""
        lines.append(
            f"{trial.deaths[0].operation:20}{trial.kind:8}{trial.ready:6}  {way:10}{figures} {outcome.failure}".rstrip()
        )
    return "\n".join(lines)

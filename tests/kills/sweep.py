"""Many trials: which of them, in how many processes, and what they came to.

A sweep makes all trials of some operations, or a share of them by seed. It first makes each call undisturbed, to count
its bytecodes; then each process makes a few trials of one operation, one after the other, with the same survivors. A
call of which the tracer saw no bytecode has tested nothing, and counts as a failed trial.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from support.workers import die_with_parent

from ringshm import Latest

from .arena import Arena, LatestArena, Trial
from .operations import OPERATIONS, TURNS, Spot

#: Arenas at a time; most of their time they wait for slices.
PROCESSES = 8 * (os.cpu_count() or 1)
#: Trials that one process makes before it takes others.
CHUNK = 20
#: Trials of a whole sweep for an operation that a timer kills.
TIMED_TRIALS = 400
#: Seconds between two lines that say how far a sweep is.
PROGRESS_SECONDS = 15.0

#: Operations that are killed at their bytecodes, and those that a timer kills.
TRACED = [name for name, operation in OPERATIONS.items() if not operation.seconds]
TIMED = [name for name, operation in OPERATIONS.items() if operation.seconds]


@dataclass(frozen=True)
class Task:
    """Some trials of one operation, made one after the other in one process.

    Attributes:
        actions: each is done at so many bytecodes.
        ats: the bytecodes; if empty, an undisturbed call comes first, which counts them.
        sample: how many of those to draw with `seed` then, for each action.
    """

    operation: str
    blocked: str
    actions: tuple[str, ...]
    ats: tuple[int, ...] = ()
    spot: Spot | None = None
    sample: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.actions) * (len(self.ats) or self.sample) + (not self.ats)


def perform(task: Task) -> list[Trial]:
    """Make the trials; the undisturbed call is the first, if there is one."""
    operation = OPERATIONS[task.operation]
    arena = LatestArena() if operation.kind is Latest else Arena()
    try:
        trials, steps, draw = [], range(0), random.Random(task.seed)
        if not task.ats:
            first = arena.run(task.operation, task.blocked, task.actions[0], 0, task.spot)
            if operation.seconds:
                steps = range(1, 1_000_000)  # seeds of the timer
            else:
                steps = range(1, first.count + 1)
                if not first.count and not first.failure:
                    first.failure = f"nothing came by {task.spot or 'the package'}: was it renamed?"
            trials.append(first)
        for action in task.actions:
            ats = task.ats or draw.sample(steps, min(task.sample, len(steps)))
            trials += [arena.run(task.operation, task.blocked, action, at, task.spot) for at in ats]
        return trials
    finally:
        arena.end()


def perform_all(tasks: Iterable[Task], processes: int = PROCESSES) -> Iterator[list[Trial]]:
    """The trials of each task."""
    with ProcessPoolExecutor(processes, get_context("fork"), die_with_parent) as pool:
        yield from pool.map(perform, tasks)


def count_all(names: Sequence[str], processes: int = PROCESSES) -> list[Trial]:
    """The undisturbed calls of those operations, with each survivor that may be blocked meanwhile."""
    tasks = [Task(name, blocked, ("kill",)) for name in names for blocked in OPERATIONS[name].blocked]
    return [trial for (trial,) in perform_all(tasks, processes)]


def sweep(
    names: Sequence[str], actions: Sequence[str], share: float = 1.0, seed: int = 0, processes: int = PROCESSES
) -> list[Trial]:
    """Kill and interrupt those operations at all their bytecodes, or at that share of them, drawn with `seed`.

    Prints a table, a line for each operation, blocked survivor and action, as soon as it is complete.
    """
    counted = count_all([name for name in names if name in TRACED], processes)
    longest: dict[tuple[str, str], int] = {}
    for trial in counted:
        key = trial.operation, TURNS if OPERATIONS[trial.operation].turns else trial.blocked
        longest[key] = max(trial.count, longest.get(key, 0))
    draw = random.Random(seed)
    tasks = []
    for action in actions:
        for (name, blocked), count in longest.items():  # 0 if the undisturbed call has failed
            ats = sorted(draw.sample(range(1, count + 1), min(count, max(1, round(share * count)))))
            tasks += [Task(name, blocked, (action,), tuple(ats[k : k + CHUNK])) for k in range(0, len(ats), CHUNK)]
    for name in (name for name in names if name in TIMED and "kill" in actions):
        for blocked in OPERATIONS[name].sweeps:
            trials = max(1, round(share * TIMED_TRIALS))
            tasks.append(Task(name, blocked, ("kill",), sample=trials, seed=draw.randrange(1 << 32)))
    total, begin, shown = sum(map(len, tasks)), time.monotonic(), time.monotonic()
    print(f"{total} trials, {share:.3g} of all, seed {seed}, in {processes} processes", HEADING, sep="\n", flush=True)
    print(*(f"{trial}\n" for trial in counted if trial.failure), sep="", end="", flush=True)
    made = counted
    for _, group in itertools.groupby(perform_all(tasks, processes), lambda trials: _kind(trials[0])):
        some: list[Trial] = []
        for trials in group:
            some += trials
            print(*(f"{trial}\n" for trial in trials if trial.failure), sep="", end="", flush=True)
            if time.monotonic() > shown + PROGRESS_SECONDS:
                shown = time.monotonic()
                print(_progress(len(made) - len(counted) + len(some), total, shown - begin), flush=True)
        print(_line(some), flush=True)
        made = made + some
    count = len(made) - len(counted)
    seconds = time.monotonic() - begin
    failed = sum(bool(trial.failure) for trial in made)
    print(f"{count} trials in {seconds:.0f} s, {count / seconds:.0f} a second; {failed} failed", flush=True)
    return made


def _progress(count: int, total: int, seconds: float) -> str:
    left = (total - count) * seconds / count / 60
    return f"... {count} of {total} trials, {count / seconds:.0f} a second, some {left:.0f} minutes left"


# --- the table

#: Of the trials of a kind: those that failed, those that finished undisturbed, those in which a message was lost with
#: the victim, those in which one was sent though `put` had not returned, those with redeliveries and recoveries, those
#: in which the exception went nowhere (a finaliser, an at-fork hook), the most files that were left, how many bytecodes
#: the call has, and in which functions a message went with the victim, with the number of bytecodes.
HEADING = (
    f"{'operation':36}{'blocked':8}{'action':18}{'trials':>7}{'failed':>8}{'finished':>9}{'lost':>6}{'in doubt':>9}"
    f"{'redelivered':>12}{'recovered':>10}{'swallowed':>10}{'left':>5}  lost in"
)


def _kind(trial: Trial) -> tuple[str, str, str]:
    return trial.operation, trial.blocked, trial.action


def _line(trials: Sequence[Trial]) -> str:
    name, blocked, action = _kind(trials[0])
    undisturbed = sum(trial.ended == "finished" and not trial.place for trial in trials)
    swallowed = sum(trial.ended == "finished" and bool(trial.place) for trial in trials)
    lost = Counter(trial.hit.function for trial in trials if trial.lost and trial.hit)
    return (
        f"{name:36}{blocked or '-':8}{action:18}{len(trials):7}{sum(bool(t.failure) for t in trials):8}{undisturbed:9}"
        f"{sum(t.lost > 0 for t in trials):6}{sum(t.doubt > 0 for t in trials):9}"
        f"{sum(t.redelivered > 0 for t in trials):12}{sum(t.recoveries > 0 for t in trials):10}{swallowed:10}"
        f"{max(t.left for t in trials):5}  {', '.join(f'{function} {times}' for function, times in lost.items())}"
    ).rstrip()


def table(trials: Iterable[Trial]) -> str:
    """What was seen, a line for each operation, blocked survivor and action."""
    groups = itertools.groupby(sorted((trial for trial in trials if trial.at), key=_kind), _kind)
    return "\n".join([HEADING, *(_line(list(group)) for _, group in groups)])

"""What is asked of a contender, in a process of its own: whether it is right, how fast, what a killed worker does.

Each function takes a contender, a game, how many environments, and seconds; and gives what JSON can hold. `run` calls
it here, or, where a contender has an interpreter of its own, there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import Pace, Vectorised, actions_of, descendants, everyone, processor_seconds

_CHECKED = 20  # Steps that are compared.
_WARM_UP = 5  # Steps, before the clock runs.
LOAD = 20  # Other processes that want the processor.
_ROOM = 30.0  # Seconds for a call to return after a worker was killed; from there on it hangs.


class Hangs(BaseException):
    """A call did not return in time."""


def run(task: Callable[..., Any], contender: Vectorised, game: str, count: int, seconds: float) -> Any:
    """Call a function of this file, in the contender's own interpreter if it has one."""
    if not contender.python:
        return task(contender, game, count, seconds)
    command = [os.environ[contender.python], "-m", f"{__package__}.elsewhere"]
    command += [task.__name__, contender.name, game, str(count), str(seconds)]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with tempfile.TemporaryDirectory() as folder:  # PufferLib leaves a link in the current one.
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=here)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
    return json.loads(done.stdout.splitlines()[-1])


def check(contender: Vectorised, game: str, count: int, seconds: float) -> str:
    """Compare its first steps with those of its library's own environments in one process; "" or what is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = _trajectories(contender, game, count)
        if not contender.reference:
            return "" if len(given[0]) == count and not np.array_equal(given[0], given[-4]) else "it does not step"
        reference = next(other for other in everyone() if other.name == contender.reference)
        expected = _trajectories(reference, game, count)
    same = len(given) == len(expected) and all(map(np.array_equal, given, expected))
    return "" if same else f"its trajectories are not those of {reference.name}"


def _trajectories(contender: Vectorised, game: str, count: int) -> list[Any]:
    envs = contender.make(game, count)
    try:
        given = [np.array(envs.reset(0))]
        for actions in actions_of(game, count, _CHECKED):
            given += [np.array(part) for part in envs.step(actions)]
        return given
    finally:
        envs.close()


def rate(contender: Vectorised, game: str, count: int, seconds: float) -> dict[str, float]:
    """Steps per second of all environments together, alone and beside `load`; processor seconds per million steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        envs = contender.make(game, count)
    try:
        envs.reset(0)
        chosen = actions_of(game, count, 100)
        _steps(envs, chosen, _WARM_UP)
        used = processor_seconds()
        alone, steps = _timed(envs, chosen, seconds)
        used = processor_seconds() - used
        with load():
            _steps(envs, chosen, _WARM_UP)
            beside, _ = _timed(envs, chosen, seconds)
        return {"steps/s": alone, "steps/s beside a load": beside, "processor s/1M steps": 1e6 * used / steps}
    finally:
        envs.close()


def _steps(envs: Any, chosen: list[Any], count: int) -> None:
    for actions in chosen[:count]:
        envs.step(actions)


def _timed(envs: Any, chosen: list[Any], seconds: float) -> tuple[float, int]:
    """Steps per second, and how many were made; each of one environment."""
    made, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds:
        envs.step(chosen[made % len(chosen)])
        made += 1
    steps = made * len(chosen[0])
    return steps / taken, steps


@contextlib.contextmanager
def load() -> Iterator[None]:
    """Keep `LOAD` other processes busy."""
    busy = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(LOAD)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
        for process in busy:
            process.wait()


def pace(contender: Vectorised, game: str, count: int, seconds: float) -> dict[str, float]:
    """Steps per second at the contender's own pace, or by steps of all where it has none."""
    from .delayed import CEILING

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = contender.pace(game, count) if contender.pace else _stepwise(contender.make(game, count), game, count)
    try:
        own.begin()
        for _ in range(_WARM_UP):
            own.turn()
        steps, began = 0, time.perf_counter()
        while (taken := time.perf_counter() - began) < seconds:
            steps += own.turn()
        return {"% of the ceiling": 100 * steps / taken / (count * CEILING)}
    finally:
        own.close()


def _stepwise(envs: Any, game: str, count: int) -> Pace:
    actions = actions_of(game, count, 1)[0]

    def turn() -> int:
        envs.step(actions)
        return count

    return Pace(lambda: envs.reset(0), turn, envs.close)


def first_killed(contender: Vectorised, game: str, count: int, seconds: float) -> dict[str, Any]:
    """Kill the worker that was started first with SIGKILL amid the run: the seconds until this is told, and until new
    environments step.

    Where a call does not return for `_ROOM` seconds, "hangs" says which.
    """
    return _killed(min, contender, game, count, seconds)


def last_killed(contender: Vectorised, game: str, count: int, seconds: float) -> dict[str, Any]:
    """The same, of the one that was started last: those before it may have inherited its end of a pipe."""
    return _killed(max, contender, game, count, seconds)


def _killed(
    choose: Callable[[list[int]], int], contender: Vectorised, game: str, count: int, seconds: float
) -> dict[str, Any]:
    told, gone, killed_at = 0.0, False, [0.0]
    envs = contender.make(game, count)
    chosen = actions_of(game, count, 100)
    envs.reset(0)
    _steps(envs, chosen, _WARM_UP)
    victim = choose(descendants())

    def kill() -> None:
        killed_at[0] = time.perf_counter()
        os.kill(victim, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    with _hanging("step") as hangs:
        try:
            while not killed_at[0] or time.perf_counter() < killed_at[0] + _ROOM:
                envs.step(chosen[0])
        except Hangs:
            raise
        except Exception:
            told, gone = time.perf_counter() - killed_at[0], True
    if hangs or not gone:
        _kill_all()
        return {"hangs": hangs[0] if hangs else f"nothing is said of it in {_ROOM:.0f} s"}
    with _hanging("close") as hangs, contextlib.suppress(Exception):
        envs.close()
    if hangs:
        _kill_all()
        return {"hangs": hangs[0]}
    envs = contender.make(game, count)
    envs.reset(0)
    _steps(envs, chosen, 1)
    again = time.perf_counter() - killed_at[0]
    envs.close()
    return {"s until told": told, "s until it goes on": again}


def _kill_all() -> None:
    """End the workers that nobody waits for: else this process waits for them as it exits."""
    for worker in descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


@contextlib.contextmanager
def _hanging(call: str) -> Iterator[list[str]]:
    """End the block after `_ROOM` seconds and some more; the list then names the call that had not returned."""
    hangs: list[str] = []

    def end(*_: object) -> None:
        hangs.append(call)
        raise Hangs(call)

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 1.2 * _ROOM)
    try:
        yield hangs
    except Hangs:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

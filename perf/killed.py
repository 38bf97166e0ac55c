"""What happens to a vectorised environment of which one worker is killed with SIGKILL amid the run?

Four CartPoles, with the number of workers that each library chooses. Once it is the worker that was started first, and
once the last. Told are the seconds until a call says that a
worker is gone, and until new environments, made in place of the old, have made a step. Where a call has not returned
half a minute later, the contender hangs, and the report says in which call.
"""

from __future__ import annotations

from .contenders import Contender
from .measure import Case, Measurement, Metrics, Options
from .vector_env import ask, counted_steps
from .vector_envs import CARTPOLE, Vectorised, everyone, tasks

_COUNT = 4
_METRICS: Metrics = {"s until told": False, "s until it goes on": False}
_WHICH = {"first": tasks.first_killed, "last": tasks.last_killed}
_RUNS = 5
_SECONDS = 0.3  # Before the worker is killed.


def _taking_part() -> list[Vectorised]:
    return [one for one in everyone() if one.processes and CARTPOLE in one.games]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return len(_WHICH) * counted_steps(_taking_part(), options, _RUNS)


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Kill a worker of everyone that has some."""
    rows = [
        measurement
        for which, task in _WHICH.items()
        for measurement in ask(
            Case("killed", f"{_COUNT} of CartPole, the {which} worker killed"), task, CARTPOLE, _COUNT, _SECONDS,
            _taking_part(), options, _METRICS, _RUNS,
        )
    ]  # fmt: skip
    for row in rows:
        if "hangs: " in row.note and not row.contender.startswith("ringshm"):
            row.left_out = True  # which is an answer, and no failure to ask
    return rows

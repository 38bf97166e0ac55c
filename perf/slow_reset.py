"""How near to its environments' own pace does a learner come that need not wait for the slowest?

TorchRL's series `fast_step_slow_reset`: 32 environments whose steps take 1 ms, and whose resets, one every 200 steps,
take 200 ms; here a CartPole that sleeps. Each begins somewhere in its first episode, so that resets come one by one, as
they do where episodes differ: all at once, they would cost those nothing who step all. So the environments could make
16,000 steps per second, on as many cores as they like; what is measured is the percentage of that. ringshm and
PufferLib give partial batches (of 16 and of 8 of the 32), and TorchRL's `AsyncEnvPool` whatever is ready; the others
step all.
"""

from __future__ import annotations

from .contenders import Contender
from .measure import Case, Measurement, Metrics, Options
from .vector_env import ask, counted_steps
from .vector_envs import SLOW_RESETS, Vectorised, everyone, tasks

_COUNT = 32
_STEPPED = ("AsyncVectorEnv", "SubprocVecEnv", "ParallelEnv")
_METRICS: Metrics = {"% of the ceiling": True}
_CASE = Case("slow_reset", f"{_COUNT} environments, resets of 200 ms")
_RUNS = 5
_SECONDS = 4.0  # Of a timing, some twenty resets of each environment.


def _taking_part() -> list[Vectorised]:
    return [one for one in everyone() if one.pace or one.name in _STEPPED]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return counted_steps(_taking_part(), options, _RUNS)


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Ask everyone that has a pace of its own, and those that step all in processes."""
    seconds = 0.5 if options.quick else _SECONDS
    return ask(_CASE, tasks.pace, SLOW_RESETS, _COUNT, seconds, _taking_part(), options, _METRICS, _RUNS)

"""How many steps of environments per second does a vectorised environment make, and what of the processor does it take?

`RingVectorEnv` and `RingVecEnv` beside those of Gymnasium, Stable-Baselines3, TorchRL, PufferLib 3 and EnvPool, with
the same games and the same actions, and with observations copied, as is their default where they have one: CartPole, of
which a step takes some 5 us, and Pong's frames of 210x160x3 bytes from ale-py. 1, 2, 8 and 64 environments; alone, and
beside a load of 20 processes that want the processor. Processor seconds are those of all processes of a contender.

Each has the number of workers that it chooses by itself: ringshm and PufferLib one for each core, the others one for
each environment. ringshm is also asked with one worker fewer, so that the process that steps has a core of its own, and
with a worker for each environment. Those that step in the process that asks are for comparison, as is EnvPool, whose
games are in C++. PufferLib needs versions of NumPy and Gymnasium of its own: PUFFERLIB_PYTHON names an interpreter that
has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .contenders import Contender, Entrant, installed
from .measure import Case, Measurement, Metrics, Options, Timing, alternate
from .measure import steps as steps_of
from .vector_envs import Vectorised, everyone, tasks
from .workers import Failed

_METRICS: Metrics = {"steps/s": True, "steps/s beside a load": True, "processor s/1M steps": False}
_LEAST_SECONDS = 0.3  # Of a timing: the kernel counts processor time in hundredths.
_HEAVY = ("torch", "stable_baselines3", "torchrl.envs", "gymnasium", "ale_py")  # Imported once, before all forks.


def ask(
    case: Case, task: Callable[..., Any], game: str, count: int, seconds: float, taking_part: list[Vectorised],
    options: Options, metrics: Metrics, runs: int,
) -> list[Measurement]:  # fmt: skip
    """Give a task to each contender in turn, `runs` times, in processes of its own."""
    for module in _HEAVY:
        if find_spec(module.partition(".")[0]) is not None:
            import_module(module)

    def check(one: Vectorised) -> None:
        if game in one.games and (wrong := tasks.run(tasks.check, one, game, count, 0.0)):
            raise Failed(wrong)

    def time(one: Vectorised, _: int, runs: int) -> list[Timing]:
        values = [tasks.run(task, one, game, count, seconds) for _ in range(runs)]
        if hangs := [value["hangs"] for value in values if "hangs" in value]:
            raise Failed(f"hangs: {hangs[0]}")
        return [Timing(seconds, value) for value in values]

    present, missing = installed(taking_part)
    absent = [row for name, why in missing.items() for row in case.left_out([Entrant(name)], metrics, why)]
    return absent + alternate(case, present, _several(options, runs), check, time, metrics, count=1)


def _several(options: Options, runs: int) -> Options:
    return replace(options, runs=min(runs, options.runs), margin=120.0)


def counted_steps(taking_part: list[Vectorised], options: Options, runs: int) -> int:
    """How many times `ask` will call ``options.step``."""
    return steps_of(installed(taking_part)[0], _several(options, runs))


def _plan(options: Options) -> list[tuple[Case, str, int, list[Vectorised]]]:
    return [
        (
            Case("vector_env", f"{count} of {game}", {"environments": count}), game, count,
            [one for one in everyone() if game in one.games],
        )
        for game in ("CartPole", "Pong")
        for count in ([2] if options.quick else [1, 2, 8, 64])
    ]  # fmt: skip


_RUNS = 5  # At most: 64 processes take seconds to start.


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return sum(counted_steps(taking_part, options, _RUNS) for *_, taking_part in _plan(options))


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Step the environments, with everyone."""
    seconds = max(_LEAST_SECONDS, 10 * options.seconds)
    return [
        measurement
        for case, game, count, taking_part in _plan(options)
        for measurement in ask(case, tasks.rate, game, count, seconds, taking_part, options, _METRICS, _RUNS)
    ]

"""How many steps of environments per second does a vectorised Gymnasium environment make?

`RingVectorEnv` beside Gymnasium's `AsyncVectorEnv(shared_memory=True)` and `SyncVectorEnv`, with the same
environments and the same actions, and with observations copied, as is their default: CartPole, of which a step takes
some 5 us, and Pong's frames of 210x160x3 bytes from ale-py. It with a worker for each core ("ringshm"), with
one fewer, so that the process that steps has a core of its own, and with a worker for each environment. Last, what
partial batches of half of the environments gain (`batch_size`) where times vary: a step of CartPole then takes 2 ms
more, as if it waited for a game, an episode has ten steps, and one reset in two hundred takes 200 ms.

And the same of Stable-Baselines3: `RingVecEnv` ("ringshm") beside its `SubprocVecEnv` and `DummyVecEnv`.
"""

from __future__ import annotations

import os
import time as clock
import warnings
from functools import partial
from importlib.util import find_spec
from multiprocessing.context import ForkContext
from typing import Any

import numpy as np

from .contenders import Contender, Pair
from .measure import Case, Measurement, Metrics, Options, Timing, alternate
from .measure import steps as steps_of
from .workers import Failed

_METRICS: Metrics = {"steps/s": True}
_ENVIRONMENTS = {"CartPole": "CartPole-v1", "Pong": "ALE/Pong-v5"}
_UNEVEN = "uneven"  # CartPole, whose times vary
_STEP_SECONDS, _SLOW_SHARE, _SLOW_SECONDS = 0.002, 1 / 200, 0.2  # More for a step; which of its resets take so long.
_UNEVEN_TIMES = 10  # As long as another timing takes: slow resets are seldom.
_LEAST = 20  # Steps of all environments in a timing.


def _no_channel(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    raise Failed("a vectorised environment is no channel")


_OURS, _FEWER, _EACH, _PARTIAL, _ASYNC, _SYNC = (
    "ringshm", "ringshm, a worker fewer", "ringshm, a worker each", "ringshm, partial batches", "AsyncVectorEnv",
    "SyncVectorEnv",
)  # fmt: skip
_CONTENDERS = [
    *(Contender(name, _no_channel, "ringshm", "ringshm") for name in (_OURS, _FEWER, _EACH, _PARTIAL)),
    *(Contender(name, _no_channel, "gymnasium", "gymnasium") for name in (_ASYNC, _SYNC)),
]


_SUBPROC, _DUMMY = "SubprocVecEnv", "DummyVecEnv"
_SB3 = [
    *(contender for contender in _CONTENDERS if contender.name in (_OURS, _FEWER)),
    *(Contender(name, _no_channel, "stable-baselines3", "stable_baselines3") for name in (_SUBPROC, _DUMMY)),
]


def _makers(environment: str, count: int) -> list[Any]:
    import gymnasium

    if environment.startswith("ALE/"):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        gymnasium.register_envs(ale_py)
    return [_uneven if environment == _UNEVEN else partial(gymnasium.make, environment)] * count


def _workers(contender: Contender, count: int) -> int:
    cores = len(os.sched_getaffinity(0))
    return {_OURS: min(cores, count), _FEWER: max(1, min(cores - 1, count)), _EACH: count}[contender.name]


def _make(contender: Contender, environment: str, count: int) -> Any:
    import gymnasium

    from ringshm.gymnasium import RingVectorEnv

    makers = _makers(environment, count)
    if contender.name == _SYNC:
        return gymnasium.vector.SyncVectorEnv(makers)
    if contender.name == _ASYNC:
        return gymnasium.vector.AsyncVectorEnv(makers, shared_memory=True, context="fork")
    if contender.name == _PARTIAL:
        return RingVectorEnv(makers, batch_size=count // 2, context="fork")
    return RingVectorEnv(makers, num_workers=_workers(contender, count), context="fork")


def _make_vec_env(contender: Contender, environment: str, count: int) -> Any:
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    from ringshm.stable_baselines3 import RingVecEnv

    makers = _makers(environment, count)
    if contender.name == _DUMMY:
        return DummyVecEnv(makers)
    if contender.name == _SUBPROC:
        return SubprocVecEnv(makers, "fork")
    return RingVecEnv(makers, "fork", num_workers=_workers(contender, count))


def _uneven() -> Any:
    import gymnasium

    class Uneven(gymnasium.Wrapper[Any, Any, Any, Any]):
        """Sleeps in its steps, and for long in some of its resets."""

        def step(self, action: Any) -> Any:
            clock.sleep(_STEP_SECONDS)
            return self.env.step(action)

        def reset(self, **options: Any) -> Any:
            given = self.env.reset(**options)
            if self.np_random.random() < _SLOW_SHARE:
                clock.sleep(_SLOW_SECONDS)
            return given

    return Uneven(gymnasium.make("CartPole-v1", max_episode_steps=10))


def _play_partly(envs: Any, actions: list[Any], seconds: float) -> tuple[float, list[Any]]:
    """As `_play`, in partial batches: each environment is given its own share of the actions, in their order."""
    given: list[list[Any]] = [[None] * envs.num_envs for _ in range(1 + 4 * len(actions))]
    turns = [0] * envs.num_envs  # Steps that an environment has made.
    envs.async_reset(seed=0)
    began, steps = clock.perf_counter(), 0
    while clock.perf_counter() < began + seconds or min(turns) <= len(actions):
        *batch, infos = envs.recv()
        for row, i in enumerate(infos["env_id"].tolist()):
            if turns[i] <= len(actions):
                for k, part in enumerate(batch if turns[i] else batch[:1]):
                    given[k + 4 * turns[i] - 3 if turns[i] else 0][i] = part[row]
            turns[i] += 1
        envs.send(np.array([actions[(turns[i] - 1) % len(actions)][i] for i in infos["env_id"]]), infos["env_id"])
        steps += len(infos["env_id"])
    return steps / (clock.perf_counter() - began), [np.array(part) for part in given]


def _play(environment: str, count: int, contender: Contender, seconds: float) -> tuple[float, list[Any]]:
    """Steps per second, of all environments together; and what the first `_LEAST` of them gave."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pong asks for a render mode
        envs = _make(contender, environment, count)
    try:
        envs.action_space.seed(0)
        actions = [envs.action_space.sample() for _ in range(_LEAST)]
        if contender.name == _PARTIAL:
            return _play_partly(envs, actions, seconds)
        given = [envs.reset(seed=0)[0]]
        for action in actions:
            given += envs.step(action)[:4]
        return _rate(envs, actions, seconds), given
    finally:
        envs.close()


def _play_sb3(environment: str, count: int, contender: Contender, seconds: float) -> tuple[float, list[Any]]:
    """As `_play`, of Stable-Baselines3's kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        envs = _make_vec_env(contender, environment, count)
    try:
        envs.seed(0)
        envs.action_space.seed(0)
        actions = [np.array([envs.action_space.sample() for _ in range(count)]) for _ in range(_LEAST)]
        given = [envs.reset()]
        for action in actions:
            given += envs.step(action)[:3]
        return _rate(envs, actions, seconds), given
    finally:
        envs.close()


def _rate(envs: Any, actions: list[Any], seconds: float) -> float:
    steps, count, began = 0, int(envs.num_envs), clock.perf_counter()
    while clock.perf_counter() < began + seconds:
        for action in actions:
            envs.step(action)
        steps += len(actions)
    return steps * count / (clock.perf_counter() - began)


def time(
    play: Any, environment: str, count: int, options: Options, contender: Contender, _: int, runs: int
) -> list[Timing]:
    """Step them for some times as long as a timing takes, so many times."""
    seconds = 4 * options.seconds * (_UNEVEN_TIMES if environment == _UNEVEN else 1)
    return [Timing(seconds, {"steps/s": play(environment, count, contender, seconds)[0]}) for _ in range(runs)]


def _check(play: Any, environment: str, count: int, reference: Contender, contender: Contender) -> None:
    given, expected = (play(environment, count, one, 0)[1] for one in (contender, reference))
    if not all(map(np.array_equal, given, expected)):
        raise Failed(f"its trajectories are not those of {reference.name}")


def _plan(options: Options) -> list[tuple[Case, str, int, list[Contender]]]:
    counts = [2] if options.quick else [2, 8]
    alike = [contender for contender in _CONTENDERS if contender.name != _PARTIAL]
    plan = [
        (Case("vector_env", f"{count} of {name}", {"environments": count}), environment, count, alike)
        for name, environment in _ENVIRONMENTS.items()
        for count in counts
    ]
    theirs = [
        (Case("vector_env", f"{case.name}, Stable-Baselines3", case.at), environment, count, _SB3)
        for case, environment, count, _ in plan
    ]
    apart = [contender for contender in _CONTENDERS if contender.name not in (_OURS, _FEWER)]
    return [*theirs, *plan, (Case("vector_env", "16 of CartPole, whose times vary"), _UNEVEN, 16, apart)]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return sum(steps_of(taking_part, options) for *_, taking_part in _plan(options))


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Step the environments, with everyone."""
    result: list[Measurement] = []
    for case, environment, count, taking_part in _plan(options):
        if find_spec("ale_py") is None or find_spec("gymnasium") is None:
            result += case.left_out(taking_part, _METRICS, "ale-py and gymnasium are not installed (extra [examples])")
            continue
        if taking_part is _SB3 and find_spec("stable_baselines3") is None:
            result += case.left_out(taking_part, _METRICS, "Stable-Baselines3 is not installed (extra [sb3])")
            continue
        play = _play_sb3 if taking_part is _SB3 else _play
        run = partial(time, play, environment, count, options)
        check = partial(_check, play, environment, count, taking_part[-1])
        result += alternate(case, taking_part, options, check, run, _METRICS, count=1)
    return result

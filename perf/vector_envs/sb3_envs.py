"""Stable-Baselines3's vectorised environments."""

from __future__ import annotations

from typing import Any

from . import Stepper, Vectorised, makers

SUBPROC, DUMMY = "SubprocVecEnv", "DummyVecEnv"


def stepper(envs: Any) -> Stepper:
    """A `VecEnv`."""

    def reset(seed: int) -> Any:
        envs.seed(seed)
        return envs.reset()

    return Stepper(reset, lambda actions: list(envs.step(actions)[:3]), envs.close)


def _make_subproc(game: str, count: int) -> Stepper:
    from stable_baselines3.common.vec_env import SubprocVecEnv

    return stepper(SubprocVecEnv(makers(game, count), "fork"))


def _make_dummy(game: str, count: int) -> Stepper:
    from stable_baselines3.common.vec_env import DummyVecEnv

    return stepper(DummyVecEnv(makers(game, count)))


_OF = ("stable-baselines3", "stable_baselines3")
CONTENDERS = [
    Vectorised(SUBPROC, *_OF, make=_make_subproc, reference=DUMMY),
    Vectorised(DUMMY, *_OF, make=_make_dummy, reference=DUMMY, processes=False),
]

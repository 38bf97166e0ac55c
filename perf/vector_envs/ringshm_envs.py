"""ringshm's own: `RingVectorEnv`, and `RingVecEnv` in Stable-Baselines3's shape."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np

from . import Pace, Stepper, Vectorised, gymnasium_envs, makers, sb3_envs


def _workers(fewer: int, count: int) -> int:
    return max(1, min(len(os.sched_getaffinity(0)) - fewer, count))


def _make(fewer: int, game: str, count: int) -> Stepper:
    from ringshm.gymnasium import RingVectorEnv

    return gymnasium_envs.stepper(
        RingVectorEnv(makers(game, count), num_workers=_workers(fewer, count), context="fork")
    )


def _make_each(game: str, count: int) -> Stepper:
    from ringshm.gymnasium import RingVectorEnv

    return gymnasium_envs.stepper(RingVectorEnv(makers(game, count), num_workers=count, context="fork"))


def _make_vec_env(game: str, count: int) -> Stepper:
    from ringshm.stable_baselines3 import RingVecEnv

    return sb3_envs.stepper(RingVecEnv(makers(game, count), "fork", num_workers=_workers(0, count)))


def _pace_partly(share: int, game: str, count: int) -> Pace:
    """Partial batches: of one environment in `share`, that are ready first."""
    from ringshm.gymnasium import RingVectorEnv

    envs: Any = RingVectorEnv(makers(game, count), batch_size=max(1, count // share), context="fork")

    def turn() -> int:
        *_, infos = envs.recv()
        ids = infos["env_id"]
        envs.send(np.zeros(len(ids), np.int64), ids)
        return len(ids)

    return Pace(partial(envs.async_reset, seed=0), turn, envs.close)


_OF: dict[str, Any] = {"distribution": "ringshm", "module": "ringshm", "reference": gymnasium_envs.SYNC}
CONTENDERS = [
    Vectorised("ringshm", **_OF, make=partial(_make, 0), pace=partial(_pace_partly, 2)),
    Vectorised("ringshm, a worker fewer", **_OF, make=partial(_make, 1)),
    Vectorised("ringshm, a worker each", **_OF, make=_make_each, pace=partial(_pace_partly, 4)),
    Vectorised(
        "ringshm, RingVecEnv", "stable-baselines3", "stable_baselines3", make=_make_vec_env, reference=sb3_envs.DUMMY
    ),
]

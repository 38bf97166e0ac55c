"""Gymnasium's own vectorised environments."""

from __future__ import annotations

from typing import Any

from . import Stepper, Vectorised, makers

ASYNC, SYNC = "AsyncVectorEnv", "SyncVectorEnv"


def stepper(envs: Any) -> Stepper:
    """A `VectorEnv`."""
    return Stepper(lambda seed: envs.reset(seed=seed)[0], lambda actions: list(envs.step(actions)[:4]), envs.close)


def _make_async(game: str, count: int) -> Stepper:
    from gymnasium.vector import AsyncVectorEnv

    return stepper(AsyncVectorEnv(makers(game, count), shared_memory=True, context="fork"))


def _make_sync(game: str, count: int) -> Stepper:
    from gymnasium.vector import SyncVectorEnv

    return stepper(SyncVectorEnv(makers(game, count)))


CONTENDERS = [
    Vectorised(ASYNC, "gymnasium", "gymnasium", make=_make_async, reference=SYNC),
    Vectorised(SYNC, "gymnasium", "gymnasium", make=_make_sync, reference=SYNC, processes=False),
]

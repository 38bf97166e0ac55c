"""PufferLib 3's `Multiprocessing`, in an interpreter of its own: it needs NumPy 1 and Gymnasium 0.29."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from . import Pace, Stepper, Vectorised, makers

MULTIPROCESSING, SERIAL = "PufferLib Multiprocessing", "PufferLib Serial"
PYTHON = "PUFFERLIB_PYTHON"  # Names the interpreter where it is installed.


def _vectorised(backend: str, game: str, count: int, **options: Any) -> Any:
    import pufferlib.emulation
    import pufferlib.vector

    creators = [partial(pufferlib.emulation.GymnasiumPufferEnv, env_creator=maker) for maker in makers(game, count)]
    return pufferlib.vector.make(
        creators, [[]] * count, [{}] * count, getattr(pufferlib.vector, backend), count, **options
    )


def _stepper(envs: Any) -> Stepper:
    """Its vectorised environments; what they give are views of memory that the next step overwrites."""
    return Stepper(
        lambda seed: np.array(envs.reset(seed=seed)[0]),
        lambda actions: [np.array(part) for part in envs.step(actions)[:4]],
        envs.close,
    )


def _make(game: str, count: int) -> Stepper:
    """With a worker for each core, as it asks for."""
    import psutil

    workers = min(count, psutil.cpu_count(logical=False) or 1)
    return _stepper(_vectorised("Multiprocessing", game, count, num_workers=workers))


def _make_serial(game: str, count: int) -> Stepper:
    return _stepper(_vectorised("Serial", game, count))


def _pace(game: str, count: int) -> Pace:
    """Partial batches of a quarter of the environments, a worker each; whoever is ready, in any order."""
    envs = _vectorised(
        "Multiprocessing", game, count, num_workers=count, batch_size=count // 4, overwork=True, zero_copy=False
    )
    envs.sync_traj = False  # Its own option to wait for workers in a fixed order; `make` cannot be told.

    def turn() -> int:
        agents = len(envs.recv()[0])
        envs.send(np.zeros(agents, np.int32))
        return agents

    return Pace(lambda: envs.async_reset(0), turn, envs.close)


CONTENDERS = [
    # Its workers' seeds overlap, so that not all trajectories are those of `Serial`.
    Vectorised(MULTIPROCESSING, "pufferlib", "pufferlib", make=_make, pace=_pace, python=PYTHON),
    Vectorised(SERIAL, "pufferlib", "pufferlib", make=_make_serial, reference=SERIAL, processes=False, python=PYTHON),
]

"""A game whose steps take milliseconds, and whose resets take long: as a game engine's do."""

from __future__ import annotations

import time
from typing import Any

import gymnasium

# As TorchRL's series `fast_step_slow_reset` has them, in its benchmarks/test_envs_benchmark.py.
STEP_SECONDS, RESET_SECONDS, EPISODE_STEPS = 1e-3, 0.2, 200
#: Steps per second of one environment that never waits for anybody.
CEILING = EPISODE_STEPS / (EPISODE_STEPS * STEP_SECONDS + RESET_SECONDS)


class Delayed(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Stands at the observation of its reset, until its episode is over.

    The first one is shorter, by chance, so that environments that began together do not all reset at once.
    """

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self._played: int | None = None
        self._shown: Any = None

    def reset(self, **options: Any) -> Any:
        """Take long."""
        self._shown, info = self.env.reset(**options)
        self._played = int(self.np_random.integers(EPISODE_STEPS)) if self._played is None else 0
        time.sleep(RESET_SECONDS)
        return self._shown, info

    def step(self, action: Any) -> Any:
        """Take a moment."""
        self._played = (self._played or 0) + 1
        time.sleep(STEP_SECONDS)
        return self._shown, 1.0, self._played >= EPISODE_STEPS, False, {}

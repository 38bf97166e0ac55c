"""What a step is, by Gymnasium's modes of reset."""

from __future__ import annotations

from typing import Any

from gymnasium.vector import AutoresetMode

from ..environments.worker import Played, Worker


class AutoresetWorker(Worker):
    """Resets the environments whose episodes are over."""

    def __init__(self, autoreset: AutoresetMode, *args: Any) -> None:
        super().__init__(*args)
        self.autoreset = autoreset

    def play(self, i: int, action: Any) -> Played:
        """A step, or the reset of an environment whose time it is."""
        env = self.envs[i]
        if self.over[i] and self.autoreset is AutoresetMode.NEXT_STEP:
            observation, info = env.reset()
            return observation, 0.0, False, False, info
        if self.over[i] and self.autoreset is AutoresetMode.DISABLED:
            raise AssertionError("its episode is over: call reset(options={'reset_mask': ...}) before the next step")
        observation, reward, ended, cut, info = env.step(action)
        if (ended or cut) and self.autoreset is AutoresetMode.SAME_STEP:
            final = {"final_obs": observation, "final_info": info}
            observation, info = env.reset()
            info = {**final, **info}
        return observation, reward, ended, cut, info

"""What a step is to Stable-Baselines3, and what else its environments are asked.

Workers need nothing of that library, nor PyTorch, which it imports: they start sooner, and are smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium

from .worker import Played, Worker


def patched(env: Any) -> Any:
    """An environment; in the wrapper that Stable-Baselines3 puts around it, if it is one of gym."""
    if isinstance(env, gymnasium.Env):
        return env
    from stable_baselines3.common.vec_env.patch_gym import _patch_env

    return _patch_env(env)


class VecEnvWorker(Worker):
    """Resets an environment in the step that ends its episode."""

    def make(self, slot: Any, makers: Sequence[Callable[[], Any]]) -> Any:
        """Make the environments, each another one, and tell their spaces."""
        super().make(slot, makers)
        self.envs = [patched(env) for env in self.envs]
        if len({id(env.unwrapped) for env in self.envs}) < len(self.envs):
            raise ValueError("several of env_fns have returned the same environment: each must make its own")
        return [(env.observation_space, env.action_space) for env in self.envs]

    def step(self, slot: Any, actions: Sequence[Any]) -> Any:
        """Step all of them; the infos of resets, by environment, are the third part of the note."""
        self.reset_infos: dict[int, Any] = {}
        note = super().step(slot, actions)
        return note and (*note, self.reset_infos)

    def play(self, i: int, action: Any) -> Played:
        """A step, and the reset where it has ended the episode."""
        env = self.envs[i]
        observation, reward, ended, cut, info = env.step(action)
        if ended or cut:
            info["terminal_observation"] = observation
            observation, self.reset_infos[i] = env.reset()
        return observation, reward, ended, cut, info

    def reset_each(self, slot: Any, seeds: Sequence[Any], options: Sequence[Any]) -> Any:
        """Reset all of them, each with a seed and options of its own."""

        def play(i: int) -> Played:
            observation, info = self.envs[i].reset(seed=seeds[i], **({"options": options[i]} if options[i] else {}))
            return observation, 0.0, False, False, info

        return self._told(slot, play)

    def ask(self, slot: Any, asked: Sequence[int], function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """What a function returns of some of them."""
        results = []
        for self.at in asked:
            results.append(function(self.envs[self.at], *args))
        return results


# --- such functions


def attribute_of(env: Any, name: str) -> Any:
    """An attribute, of whichever wrapper has it."""
    return env.get_wrapper_attr(name)


def has_attribute(env: Any, name: str) -> Any:
    """Whether the environment, or a wrapper, has it."""
    return env.has_wrapper_attr(name)


def call_method(env: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a method returns."""
    return env.get_wrapper_attr(name)(*args, **kwargs)


def is_wrapped(env: Any, wrapper_class: type) -> bool:
    """Whether one of the wrappers is of a class."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, wrapper_class):
            return True
        env = env.env
    return False

"""Environments for tests of vectorised ones, which are alike if all that they give is equal."""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from ringshm import EndOfChannel

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


class Nested(gymnasium.Env[Any, Any]):
    """Episodes of random length, observations of several arrays, infos of all kinds, some of which are seldom there."""

    _PAIR = spaces.Tuple((spaces.Discrete(7, start=-2), spaces.MultiBinary(4)))
    _IMAGE, _MANY = spaces.Box(0, 255, (6, 5, 3), np.uint8), spaces.MultiDiscrete([3, 5])
    observation_space = spaces.Dict({"image": _IMAGE, "pair": _PAIR, "many": _MANY})
    action_space = spaces.Dict({"push": spaces.Box(-1, 1, (2,), np.float32), "fire": spaces.Discrete(2)})

    def _look(self) -> dict[str, Any]:
        rng = self.np_random
        return {
            "image": rng.integers(0, 256, (6, 5, 3), np.uint8),
            "pair": (int(rng.integers(-2, 5)), rng.integers(0, 2, 4, np.int8)),
            "many": rng.integers(0, 3, 2),
        }

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._look(), {"options": str(options), "drawn": self.np_random.random()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        draw = self.np_random.random()
        infos: dict[str, Any] = {"nested": {"array": np.arange(3) * draw}} if draw < 0.3 else {}
        reward = float(action["push"].sum()) + float(action["fire"])
        return self._look(), reward, draw < 0.1, 0.1 < draw < 0.2, infos


class Faulty(gymnasium.Env[Any, Any]):
    """Does as it is told by its actions."""

    observation_space = spaces.Box(0, 1, (2,), np.float32)
    action_space = spaces.Discrete(20)
    FINE, RAISE, DIE, EXIT, LARGE, SLEEP, STRANGE, END = range(8)  # it raises, dies, takes long, tells much
    SECRET, KEYWORD, LIST, ITSELF = range(8, 12)  # its info cannot be pickled, unpickled, put together
    SCALAR, LONG, TEXT, NOTHING = range(12, 16)  # its observation is none of its space
    FORK = 16  # it starts a process that does not end, and tells which

    def __init__(self) -> None:
        self.pid = os.getpid()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if options:
            raise KeyError("lost")
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        infos: Any = {}
        observation: Any = np.ones(2, np.float32)
        if action == self.RAISE:
            raise ZeroDivisionError("one over nought")
        if action == self.STRANGE:
            raise Unpicklable("strange")
        if action == self.END:
            raise EndOfChannel("of a channel of its own")
        if action == self.DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if action == self.EXIT:
            sys.exit(3)
        if action == self.SLEEP:
            time.sleep(0.5)
        if action == self.LARGE:
            infos["large"] = np.arange(100_000)
        if action == self.SECRET:
            infos["secret"] = lambda: None
        if action == self.KEYWORD:
            infos["error"] = Keyword(code=1)
        if action == self.LIST:
            infos = ["a list"]
        if action == self.ITSELF:
            infos["self"] = infos
        if action == self.FORK:
            infos["helper"] = os.fork() or signal.pause()
        observation = {
            self.SCALAR: 1.0, self.LONG: np.ones(3, np.float32), self.TEXT: ["a", "b"], self.NOTHING: None,
        }.get(int(action), observation)  # fmt: skip
        return observation, float(action), False, False, infos


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


class Keyword(Exception):
    """Can be pickled, and not unpickled."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class Loose(gymnasium.Env[Any, Any]):
    """Observations of which some parts have no fixed size."""

    observation_space = spaces.Dict({
        "fixed": spaces.Box(0, 1, (3,), np.float64),
        "text": spaces.Text(5),
        "pair": spaces.Tuple((spaces.Sequence(spaces.Discrete(4)), spaces.Discrete(3))),
        "stack": spaces.Sequence(spaces.Box(0, 1, (2,)), stack=True),
        "graph": spaces.Graph(spaces.Box(0, 1, (2,)), spaces.Discrete(3)),
        "one": spaces.OneOf((spaces.Discrete(2), spaces.Box(0, 1, (2,)))),
    })  # fmt: skip
    action_space = spaces.Text(4)

    def __init__(self) -> None:
        self.observation_space = copy.deepcopy(self.observation_space)  # with a generator of its own

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation = self.observation_space.sample()
        return observation, float(len(action)), self.np_random.random() < 0.2, False, {"action": action}


class Drawn(gymnasium.Env[Any, Any]):
    """Observations of any space, rewards, and how long an episode is: all drawn at random. Counts its calls."""

    action_space = spaces.Discrete(5)

    def __init__(self, space: spaces.Space[Any], render_mode: str | None = None) -> None:
        self.observation_space, self.render_mode = copy.deepcopy(space), render_mode
        self.counted = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {"options": options, "drawn": self.np_random.random()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        draw = self.np_random.random()
        infos = {"nested": {"array": np.arange(3) * draw}} if draw < 0.3 else {}
        return self.observation_space.sample(), float(action) * draw, draw < 0.1, 0.05 < draw < 0.15, infos

    def count(self, by: int = 1) -> int:
        self.counted += by
        return self.counted

    def render(self) -> Any:
        return np.full((2, 3, 3), self.counted, np.uint8)


def cartpole() -> Any:
    return gymnasium.make("CartPole-v1")


def pong() -> Any:
    gymnasium.register_envs(pytest.importorskip("ale_py"))
    return gymnasium.make("ALE/Pong-v5", max_episode_steps=20)


def assert_same(ours: Any, theirs: Any, where: str = "it") -> None:
    """Equal to the last bit and dtype; of dicts the order of keys may differ."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert set(ours) == set(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, (tuple, list)):
        assert len(ours) == len(theirs), where
        for k, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(our, their, f"{where}[{k}]")
    elif isinstance(ours, np.ndarray) and ours.dtype == object:
        assert_same(list(ours), list(theirs), where)
    elif isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        np.testing.assert_array_equal(ours, theirs, where)
    else:
        assert ours == theirs, where

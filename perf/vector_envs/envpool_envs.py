"""EnvPool: games in C++, stepped by threads; no process is asked, and no environment of a user's own can be one."""

from __future__ import annotations

from typing import Any

from . import CARTPOLE, PONG, Stepper, Vectorised

_IDS = {CARTPOLE: "CartPole-v1", PONG: "Pong-v5"}
_FRAMES: dict[str, Any] = {
    "img_height": 210,
    "img_width": 160,
    "stack_num": 1,
    "gray_scale": False,
    "noop_max": 1,
}  # As ale-py's.


def _make(game: str, count: int) -> Stepper:
    import envpool

    envs = envpool.make_gymnasium(_IDS[game], num_envs=count, seed=0, **({} if game == CARTPOLE else _FRAMES))
    return Stepper(lambda seed: envs.reset()[0], lambda actions: list(envs.step(actions)[:4]), envs.close)


CONTENDERS = [Vectorised("EnvPool (C++)", "envpool", "envpool", make=_make, processes=False)]

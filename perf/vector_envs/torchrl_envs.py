"""TorchRL's: `ParallelEnv`, and `AsyncEnvPool` for those that do not wait for the slowest."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from . import Pace, Stepper, Vectorised
from . import game as gymnasium_game

PARALLEL, SERIAL, POOL = "ParallelEnv", "SerialEnv", "AsyncEnvPool"


def _one(game: str) -> Any:
    from torchrl.envs import GymWrapper

    return GymWrapper(gymnasium_game(game), categorical_action_encoding=True)


def _stepper(envs: Any) -> Stepper:
    """A batched environment, which resets those whose episode is over within the step."""
    import torch

    roots: list[Any] = []

    def observation(tensordict: Any) -> Any:
        return np.array(tensordict["pixels" if "pixels" in tensordict else "observation"])

    def reset(seed: int) -> Any:
        envs.set_seed(seed, static_seed=True)
        roots[:] = [envs.reset()]
        return observation(roots[0])

    def step(actions: Any) -> list[Any]:
        roots[0]["action"] = torch.from_numpy(actions)
        stepped, roots[0] = envs.step_and_maybe_reset(roots[0])
        after = stepped["next"]
        return [observation(after), after["reward"].numpy(), after["terminated"].numpy()]

    return Stepper(reset, step, envs.close)


def _make_parallel(game: str, count: int) -> Stepper:
    from torchrl.envs import ParallelEnv

    return _stepper(ParallelEnv(count, partial(_one, game), mp_start_method="fork"))


def _make_serial(game: str, count: int) -> Stepper:
    from torchrl.envs import SerialEnv

    return _stepper(SerialEnv(count, partial(_one, game)))


def _pace_pool(game: str, count: int) -> Pace:
    """As in TorchRL's own benchmark: whatever is ready; a worker resets its environment within the step."""
    import torch
    from tensordict import set_capture_non_tensor_stack
    from torchrl.envs import AsyncEnvPool

    set_capture_non_tensor_stack(False).set()
    pool = AsyncEnvPool([partial(_one, game)] * count, backend="multiprocessing", exchange="shm")

    def send(root: Any) -> int:
        root["action"] = torch.zeros(root.shape, dtype=torch.int64)
        pool.async_step_and_maybe_reset_send(root)
        return int(root.shape[0])

    def turn() -> int:
        return send(pool.async_step_and_maybe_reset_recv(min_get=1, max_get=count)[1])

    return Pace(lambda: send(pool.reset()), turn, pool.close)


def _no_steps(game: str, count: int) -> Stepper:
    raise NotImplementedError("it is asked for its own pace alone")


_OF = ("torchrl", "torchrl")
CONTENDERS = [
    Vectorised(PARALLEL, *_OF, make=_make_parallel, reference=SERIAL),
    Vectorised(SERIAL, *_OF, make=_make_serial, reference=SERIAL, processes=False),
    Vectorised(POOL, *_OF, make=_no_steps, pace=_pace_pool, games=()),
]

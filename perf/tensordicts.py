"""What does a message cost that is a TensorDict: `python -m perf.tensordicts`, where tensordict is installed.

A `put` and a `get` in one process, through a channel of TensorDicts, beside dicts with the same fields: arrays and
tensors in a typed channel, tensors in a pickle, and TensorDicts made of those by `from_dict`. All take turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

import ringshm.torch

_ROUNDS, _MESSAGES = 15, 300


def _examples() -> Iterator[tuple[str, Any]]:
    def rollout(size: list[int], observation: Any) -> Any:
        flag = torch.zeros(*size, 1, dtype=torch.bool)
        following = {"observation": observation, "reward": torch.zeros(*size, 1), "done": flag, "terminated": flag}
        own = {"observation": observation, "log_prob": torch.zeros(size), "done": flag, "terminated": flag}
        action = torch.zeros(size, dtype=torch.int64)
        return TensorDict({**own, "action": action, "next": TensorDict(following, size)}, size)

    yield "a step of CartPole", rollout([], torch.zeros(4))
    yield "32 steps of CartPole", rollout([32], torch.zeros(32, 4))
    yield "a step of Atari", rollout([], torch.zeros(84, 84, dtype=torch.uint8))
    yield "16 steps of Atari", rollout([16], torch.zeros(16, 84, 84, dtype=torch.uint8))


def _mapped(message: Any, make: Callable[[Any], Any]) -> Any:
    return {name: _mapped(value, make) if isinstance(value, dict) else make(value) for name, value in message.items()}


def _ways(tensordict: Any, stack: ExitStack) -> dict[str, Callable[[], Any]]:
    """A `put` and a `get` in each way."""
    tensors = tensordict.to_dict()
    arrays = _mapped(tensors, lambda tensor: tensor.numpy())
    like = ringshm.spec_like(arrays)
    typed = stack.enter_context(ringshm.Channel(1, spec=like))
    pickled = stack.enter_context(ringshm.Channel(1, like.slot_size + 16384))
    channel = stack.enter_context(ringshm.Channel(1, spec=ringshm.torch.spec(tensordict)))

    def passed(through: Any, message: Any) -> Any:
        through.put(message)
        return through.get()

    def from_dict() -> Any:
        pickled.put(tensordict.to_dict())
        return TensorDict.from_dict(pickled.get(), batch_size=tensordict.batch_size)

    return {
        "TensorDict": lambda: passed(channel, tensordict),
        "typed, tensors in and out": lambda: _mapped(
            passed(typed, tensors), lambda value: torch.from_numpy(np.asarray(value))
        ),
        "typed, tensors in": lambda: passed(typed, tensors),
        "typed, arrays": lambda: passed(typed, arrays),
        "pickled, tensors": lambda: passed(pickled, tensors),
        "pickled, from_dict": from_dict,
    }


def main() -> int:
    """Time the ways in turns, and show their medians, and the ratio of the first to each."""
    torch.set_num_threads(1)
    for name, tensordict in _examples():
        with ExitStack() as stack:
            ways = _ways(tensordict, stack)
            times: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(_ROUNDS + 1):
                for way, call in ways.items():
                    begin = time.perf_counter()
                    for _ in range(_MESSAGES):
                        call()
                    if number:  # the first round warms up
                        times[way].append((time.perf_counter() - begin) / _MESSAGES * 1e6)
        first = times["TensorDict"]
        print(name)
        for way, took in times.items():
            ratio = median(one / other for one, other in zip(first, took, strict=True))
            print(f"    {way:26} {median(took):8.1f} us   ratio {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

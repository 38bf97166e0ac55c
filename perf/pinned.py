"""What does `ringshm.torch.pin` save on the way to a GPU: `python -m perf.pinned`, on a machine with CUDA and PyTorch.

Borrowed views are copied to the GPU, out of a ring that is pinned and out of one that is not, beside a tensor that
PyTorch has pinned: the least that such a copy takes. How long the call takes, and how long until the bytes are there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import numpy as np
import torch

import ringshm.torch
from ringshm import Channel
from ringshm.messages.tensors import unprotected

_SHAPES = [(1, 84, 84, 4), (64, 84, 84, 4), (1024, 84, 84, 4)]
_RUNS, _COPIES = 15, 20


def _copy(view: torch.Tensor) -> tuple[float, float]:
    """Seconds until the call has returned, and until the bytes are on the GPU; means of some copies."""
    called = done = 0.0
    for _ in range(_COPIES):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        there = view.to("cuda", non_blocking=True)
        called += time.perf_counter() - begin
        torch.cuda.synchronize()
        done += time.perf_counter() - begin
    assert there.cpu().equal(view)
    return called / _COPIES, done / _COPIES


@contextmanager
def _borrowed(obs: np.ndarray, pinned: bool) -> Iterator[torch.Tensor]:
    with Channel(2, spec={"obs": (obs.dtype, obs.shape)}) as channel:
        if pinned:
            ringshm.torch.pin(channel)
        channel.put({"obs": obs})
        with channel.borrow() as message:
            view = torch.from_numpy(unprotected(message["obs"]))
            assert view.is_pinned() == pinned
            yield view
            del view


def main() -> int:
    """Time the copies, in turns, and show their medians."""
    if not torch.cuda.is_available():
        print("PyTorch finds no CUDA device here")
        return 1
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}; medians of {_RUNS} runs")
    for shape in _SHAPES:
        obs = np.random.default_rng(1).integers(0, 255, shape, np.uint8)
        with _borrowed(obs, True) as pinned, _borrowed(obs, False) as pageable:
            views = {
                "pinned ring": pinned,
                "ring": pageable,
                "pinned tensor": torch.from_numpy(obs).pin_memory(),
            }
            for view in views.values():
                _copy(view)
            runs: dict[str, list[tuple[float, float]]] = {name: [] for name in views}
            for _ in range(_RUNS):
                for name, view in views.items():
                    runs[name].append(_copy(view))
            del pinned, pageable, views, view
        print(f"{obs.nbytes / 1e6:.2f} MB:")
        for name, timings in runs.items():
            called, done = (median(column) * 1e6 for column in zip(*timings, strict=True))
            print(f"  {name:14} call {called:8.1f} us, there after {done:8.1f} us, {obs.nbytes / done / 1e3:6.2f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

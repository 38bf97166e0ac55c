"""Actors and tasks that send and receive through `ringshm.ray`. Imported where Ray is installed."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import ray

from ringshm import BrokenChannel, EndOfChannel


@ray.remote(num_cpus=0)
class Sends:
    """An actor that has a sender, from its constructor or later."""

    def __init__(self, out: Any = None) -> None:
        self.out = out

    def take(self, handle: Any) -> None:
        self.out = handle[0]

    def pid(self) -> int:
        return os.getpid()

    def send(self, who: int, count: int, nbytes: int = 0, pause: float = 0.0) -> int:
        for k in range(count):
            self.out.put((who, k, np.full(nbytes, k % 251, np.uint8)))
            time.sleep(pause)
        return count

    def send_until_broken(self, who: int) -> str:
        try:
            for k in range(10**6):
                self.out.put((who, k, None))
                time.sleep(0.01)
        except BrokenChannel as error:
            return str(error)
        return ""

    def flush(self, timeout: float | None) -> bool:
        return bool(self.out.flush(timeout))

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.out, method)(*args)

    def close(self) -> None:
        self.out.close()


@ray.remote(num_cpus=0)
class Receives:
    """An actor that has a receiver."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.got: list[tuple[int, int]] = []

    def pid(self) -> int:
        return os.getpid()

    def receive(self, at_most: int = 10**9, pause: float = 0.0) -> tuple[list[tuple[int, int]], str]:
        """Who and which number, in order; and how it ended."""
        got = []
        try:
            while len(got) < at_most:
                who, k, payload = self.source.get()
                assert payload is None or (payload == k % 251).all()
                got.append((who, k))
                time.sleep(pause)
        except EndOfChannel as error:
            return got, str(error)
        return got, ""

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.source, method)(*args)

    def hold(self, seconds: float) -> int:
        """Borrow a message for so long; its delivery count."""
        with self.source.borrow() as message:
            time.sleep(seconds)
            return int(message.delivery_count)

    def close(self) -> None:
        self.source.close()

"""Actors that make channels of `ringshm.ray`, send and receive, and the account of it. Imported where Ray is."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import numpy as np
import ray

import ringshm.ray
from ringshm import BrokenChannel, EndOfChannel


def in_order(got: list[tuple[int, int]], senders: int, count: int) -> None:
    """Each message once, those of each sender in order."""
    for who in range(senders):
        assert [k for one, k in got if one == who] == [*range(count)]
    assert len(got) == senders * count


@ray.remote(num_cpus=0)
class Makes:
    """An actor that makes a channel, or a Latest, and hands out."""

    def channel(self, *args: Any, **options: Any) -> None:
        self.made = ringshm.ray.Channel(*args, **options)

    def latest(self, *args: Any, **options: Any) -> list[Any]:
        self.made = ringshm.ray.Latest(*args, **options)
        return [self.made]

    def hand_out(self, role: str) -> list[Any]:
        return [getattr(self.made, role)()]

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.made, method)(*args)


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

    def __init__(self, source: Any = None) -> None:
        self.source = source
        self.holds = False

    def take(self, handle: Any) -> None:
        self.source = handle[0]

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

    def receive_counted(self) -> list[tuple[int, int]]:
        """Which number, and the how manieth delivery, in order."""
        got = []
        with contextlib.suppress(EndOfChannel):
            while True:
                with self.source.borrow() as message:
                    got.append((message.value[1], int(message.delivery_count)))
        return got

    def hold(self) -> None:
        """Borrow a message until this process is killed. Needs `max_concurrency=2`, as `held`."""
        with self.source.borrow() as message:
            self.count, self.holds = int(message.delivery_count), True
            time.sleep(1000)

    def held(self) -> int:
        """Its delivery count, once it is borrowed."""
        while not self.holds:
            time.sleep(0.01)
        return self.count

    def close(self) -> None:
        self.source.close()


@ray.remote(num_cpus=0)
class Holds:
    """An actor that has a Latest, from its constructor or later."""

    def __init__(self, latest: Any = None) -> None:
        self.latest = latest

    def take(self, handle: list[Any]) -> None:
        self.latest = handle[0]

    def pid(self) -> int:
        return os.getpid()

    def read(self, newer_than: int | None = None, timeout: float | None = None) -> tuple[int, Any]:
        found: tuple[int, Any] = self.latest.read(newer_than, timeout)
        return found

    def read_until(self, version: int) -> list[tuple[int, Any]]:
        """All that it sees, up to that version."""
        seen = [self.latest.read()]
        while seen[-1][0] < version:
            seen.append(self.latest.read(newer_than=seen[-1][0]))
        return seen

    def read_to_the_end(self) -> tuple[int, str]:
        """The last version, and how it ended."""
        version = 0
        try:
            while True:
                version, _ = self.latest.read(newer_than=version)
        except EndOfChannel as error:
            return version, str(error)

    def borrow(self) -> tuple[int, float, bool, int]:
        """Version, a sum, whether it may be written, and how many versions a second borrow of a newer one makes."""
        with self.latest.borrow() as weights:
            array = weights["w"]
            return weights.version, float(array.sum()), array.flags.writeable, self.latest.borrows

    def publish(self, obj: Any) -> int:
        return int(self.latest.publish(obj))

    def publish_many(self, first: int, count: int) -> list[int]:
        return [self.latest.publish((k, np.full(5000, k))) for k in range(first, first + count)]

    def name(self) -> str:
        return str(self.latest.name)

    def forward(self) -> list[Any]:
        return [self.latest]

    def close(self) -> None:
        self.latest.close()

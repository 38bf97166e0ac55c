"""Messages that are passed on from ring to ring, and given back: their places, and how often they were delivered."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ringshm import Channel
from ringshm.channel.raw import RawReceiver, RawSender, give_back

NBYTES = {"small": 10, "a slot": 900, "larger than a slot": 3000}


@contextlib.contextmanager
def _relay(first: Channel[Any], second: Channel[Any]) -> Iterator[Callable[[int], None]]:
    """Passes a message on, with so many deliveries that have failed."""
    with RawReceiver(first._open(), None) as source, RawSender(second._open(), None) as out:

        def pass_on(failed: int) -> None:
            with source.borrow() as raw:
                out.pass_on(raw.value, failed, timeout=10)

        yield pass_on


@pytest.mark.parametrize("nbytes", NBYTES)
@pytest.mark.parametrize("failed", [0, 1, 7, 300])
def test_a_message_that_is_passed_on_shows_how_often_it_was_delivered_before(nbytes: str, failed: int) -> None:
    with Channel(8, "1KiB") as first, Channel(8, "1KiB") as second, _relay(first, second) as pass_on:
        sent = np.arange(NBYTES[nbytes], dtype=np.uint8)
        first.put(sent)
        pass_on(failed)
        with second.borrow() as message:
            assert (message.value == sent).all() and message.delivery_count == min(failed, 255) + 1


def test_one_that_is_passed_on_has_its_place_behind_the_others() -> None:
    with Channel(8, 100) as first, Channel(8, 100) as second, _relay(first, second) as pass_on:
        for k in range(4):
            first.put(k)
            pass_on(k % 2)
        assert second.get_many(10) == [0, 1, 2, 3]


@pytest.mark.parametrize("failed", [0, 1, 2])
def test_one_that_is_given_back_has_its_old_place_and_its_count(failed: int) -> None:
    with Channel(8, 100, max_deliveries=3) as channel:
        channel.put_many("abc")
        with RawReceiver(channel._open(), None) as source:
            borrows = [source.borrow().__enter__() for _ in range(2)]
            for borrow in reversed(borrows):
                give_back(borrow, failed)
        got = []
        for _ in range(3):
            with channel.borrow() as message:
                got.append((message.value, message.delivery_count))
        assert got == [("a", failed + 1), ("b", failed + 1), ("c", 1)]
        assert channel.stats().free == 8


def test_one_that_was_delivered_too_often_is_dropped_counted_and_warned_of() -> None:
    with Channel(8, 100, max_deliveries=2) as channel:
        channel.put_many("ab")
        with RawReceiver(channel._open(), None) as source:
            give_back(source.borrow().__enter__(), 1)
            with pytest.warns(RuntimeWarning, match="max_deliveries=2"):
                give_back(source.borrow().__enter__(), 1)
        assert channel.get() == "b"
        assert (channel.stats().dropped, channel.stats().free) == (1, 8)


def test_what_was_given_back_is_not_freed_when_another_thread_has_taken_it_again() -> None:
    with Channel(2, 100) as channel:
        channel.put("a")
        with RawReceiver(channel._open(), None) as source, warnings.catch_warnings():
            first = source.borrow().__enter__()
            give_back(first, 0)
            second = source.borrow().__enter__()
            del first
            assert channel.stats().free == 1
            give_back(second, 0)
        assert channel.get() == "a"

"""What must hold of a channel after a death, a stop or an interruption."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import pytest

from ringshm import Channel
from support.workers import until


def check_empty(get: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """That call finds no message, in its time."""
    with pytest.raises(queue.Empty):
        get(*args, **kwargs)


def check_full(put: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """That call finds no space, in its time."""
    with pytest.raises(queue.Full):
        put(*args, **kwargs)


def reap(channel: Channel, count: int) -> None:
    """Look for the dead until so many were found."""
    until(lambda: channel.wait_for_peers(senders=99, timeout=0.01) or channel.stats().reaped >= count)


def check_whole(channel: Channel, *messages: Any) -> None:
    """Those messages are there and no others, nobody waits or holds a slot, and every slot can be used."""
    assert [channel.get_nowait() for _ in range(channel.qsize())] == list(messages)
    stats = channel.stats()
    assert (stats.free, stats.slots, stats.ready) == (channel.capacity, (), 0)
    assert (stats.waiting_senders, stats.waiting_receivers) == (0, 0)
    assert not any(person.waiting_for for person in stats.participants)
    assert stats.sent == stats.received + stats.dropped
    for k in range(channel.capacity):
        channel.put_nowait(k)
    check_full(channel.put_nowait, "one too many")
    assert [channel.get_nowait() for _ in range(channel.capacity)] == list(range(channel.capacity))
    check_empty(channel.get_nowait)

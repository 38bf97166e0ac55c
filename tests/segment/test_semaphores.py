"""Semaphores of both libraries: how they are filled, and what a damaged value does."""

from __future__ import annotations

import signal
import sys
import uuid
from collections.abc import Callable, Iterator

import pytest
from support.workers import Interrupt

from ringshm.segment import semaphores
from ringshm.segment.semaphores import Semaphore

KINDS: list[Callable[[str], Semaphore]] = [semaphores.open_existing]
if sys._is_gil_enabled() if hasattr(sys, "_is_gil_enabled") else True:  # posix_ipc would switch it on
    from ringshm.segment.posix_semaphores import PosixSemaphore

    KINDS.append(PosixSemaphore)


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a semaphore without a token."""
    name = f"/ringshm.test-{uuid.uuid4().hex[:8]}"
    semaphores.create(name, 0)
    yield name
    semaphores.remove(name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_semaphore_is_filled_up_to_the_tokens_that_are_asked_for(kind: Callable[[str], Semaphore], name: str) -> None:
    semaphore = kind(name)
    for found, asked, expected in [(0, 3, 3), (3, 3, 3), (3, 1, 3), (3, 0, 3), (2, 4, 4)]:
        while semaphore._get_value() > found:
            semaphore.acquire(False)
        semaphore.fill(asked)
        assert semaphore._get_value() == expected, (found, asked)
    while semaphore.wait(0.001):
        pass
    assert semaphore._get_value() == 0
    assert not semaphore.acquire(False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_waker_is_not_held_up_by_a_damaged_value(kind: Callable[[str], Semaphore], name: str) -> None:
    semaphore, most = kind(name), 2**31 - 1
    with open(f"/dev/shm/sem.{name[1:]}", "r+b") as file:
        file.write(most.to_bytes(4, sys.byteorder))
    semaphore.fill(3)
    assert semaphore._get_value() == most


@pytest.mark.parametrize("raised", [TimeoutError("of an alarm"), Interrupt()], ids=["an OSError", "a BaseException"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_handler_raises_ends_a_wait(kind: Callable[[str], Semaphore], raised: BaseException, name: str) -> None:
    def handle(*_: object) -> None:
        raise raised

    semaphore, before = kind(name), signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(type(raised)) as caught:
            while not semaphore.wait(3600):
                pass
        assert caught.value is raised
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

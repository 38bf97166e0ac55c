"""Channels and Latest: the type of what goes in is the type of what comes out, for each role."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import ringshm
from ringshm import Borrow, Channel, Latest, LatestBorrow, Loan, Receiver, Sender

if TYPE_CHECKING:
    from typing_extensions import assert_type
else:

    def assert_type(value, _):
        return value


class Step(NamedTuple):
    obs: NDArray[np.float32]
    reward: float


class LastStep(Step):
    pass


STEP = Step(np.zeros(4, np.float32), 1.0)


def act(sender: Sender[Step]) -> None:
    with sender:
        sender.put(STEP)
        sender.put(LastStep(*STEP), timeout=1)
        sender.put_nowait(STEP)
        assert_type(sender.put_many([STEP, STEP]), int)
        with sender.loan() as loan:
            assert_type(loan, Loan)
            assert_type(loan.array((4, 4), np.uint8), NDArray[Any])
            loan.discard()


def learn(receiver: Receiver[Step]) -> Iterator[float]:
    with receiver:
        assert_type(receiver.get(), Step)
        assert_type(receiver.get_nowait(), Step)
        with receiver.borrow(timeout=1) as message:
            assert_type(message, Borrow[Step])
            assert_type(message.value, Step)
            assert_type(message.sequence, int)
        assert_type(receiver.get_many(1), list[Step])
        for step in receiver:
            assert_type(step, Step)
            yield step.reward


def steps() -> None:
    with Channel[Step](8, "4KiB", wait="block", when_full="wait") as channel:
        assert_type(channel, Channel[Step])
        assert_type(channel.sender(), Sender[Step])
        assert_type(ringshm.wait([channel], timeout=0), list[Channel[Step]])
        receiver = channel.receiver()
        less: Sender[LastStep] = channel.sender()  # who may send any step may send last ones
        more: Receiver[tuple[Any, ...]] = channel.receiver()  # and whoever reads tuples may read steps
        assert not less.closed and not more.closed
        act(channel.sender())
        channel.shutdown()
        assert [*learn(receiver)] == [1.0]


def untold() -> None:
    """What nothing tells is Any, and needs no annotation."""
    with Channel(4, "1KiB") as channel:
        assert_type(channel, Channel[Any])
        channel.put({"any": "thing"})
        assert_type(channel.get(), Any)
        with Channel.attach(channel.name) as attached:
            assert_type(attached, Channel[Any])
        with Channel[Step].attach(channel.name, timeout=1) as steps:
            assert_type(steps, Channel[Step])
        declared: Channel[int] = Channel.attach(channel.name)
        declared.close()
    with Channel[int](4, 64) as numbers, Channel[str](4, 64) as texts:
        numbers.put(3)
        for ready in ringshm.wait([numbers, texts]):
            assert ready is numbers


def into_own_memory(frame: NDArray[np.float32]) -> None:
    buffer = bytearray(8)
    with Channel[NDArray[np.float32]](4, "1KiB") as frames, Channel[bytes](4, "1KiB") as texts:
        frames.put(frame)
        assert_type(frames.get(out=frame), NDArray[np.float32])
        texts.put(bytes(8))
        assert_type(texts.get(True, 1.0, buffer), bytearray)
    with Channel[dict[str, NDArray[np.float32]]](4, "1KiB") as channel:
        channel.put({"frame": frame})
        assert_type(channel.get(out={"frame": frame}), dict[str, NDArray[np.float32]])


def newest() -> None:
    with ExitStack() as stack:
        latest = stack.enter_context(Latest[Step]("4KiB", borrows=2))
        assert_type(latest.publish(STEP), int)
        assert_type(latest.read(timeout=1), tuple[int, Step])
        with latest.borrow(newer_than=0) as weights:
            assert_type(weights, LatestBorrow[Step])
            assert_type(weights.value.obs, NDArray[np.float32])
        any_of_them = stack.enter_context(Latest.attach(latest.name))
        assert_type(any_of_them.read(), tuple[int, Any])


if __name__ == "__main__":
    steps()
    untold()
    into_own_memory(np.zeros(8, np.float32))
    newest()

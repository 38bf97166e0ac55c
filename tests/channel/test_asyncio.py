"""Channels in asyncio: calls that wait in an event loop, how they are cancelled, and how they end."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import workers
from support.checks import check_whole, reap
from support.loops import LOOPS, run
from support.tracer import Interrupt, Tracer

import ringshm
from ringshm.channel import event_loop as aio
from ringshm.channel import steps
from ringshm.ring.mutex import SLICE
from ringshm.segment import fifos
from ringshm.segment.layout import LISTENED, MESSAGE_HINT, P_FIFOS, P_INCARNATION, P_LISTENS_MESSAGE
from ringshm.tools.leftovers import clean

pytestmark = workers.may_fork


async def waiting(channel: ringshm.Channel, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
    """That task, once it waits in the loop (or is done)."""
    while not (task.done() or channel._open().loops.get(id(asyncio.get_running_loop()))):
        await asyncio.sleep(0.001)
    return task


async def waits(channel: ringshm.Channel, call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task that makes the call, which waits already."""
    return await waiting(channel, asyncio.create_task(call))


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def wakes(channel: Any) -> list[str]:
    """The FIFOs of a channel's segment."""
    start = f"{fifos.PREFIX}{channel._open().segment.nonce}."
    return sorted(name for name in workers.ringshm_files() if name.startswith(start))


def listens(channel: ringshm.Channel) -> int:
    return sum(channel._open().participants.column(P_LISTENS_MESSAGE))


# --- what runs in other processes


def receive_in_a_loop(channel: ringshm.Channel | ringshm.Receiver, kind: str = "asyncio") -> list[Any]:
    async def main() -> list[Any]:
        return [message async for message in channel]

    messages = run(main(), kind)
    channel.close()
    return messages  # type: ignore[no-any-return]


def send_in_a_loop(channel: ringshm.Channel | ringshm.Sender, sender: int, count: int, kind: str = "asyncio") -> None:
    async def main() -> None:
        for k in range(count):
            await channel.aput((sender, k))

    run(main(), kind)
    channel.close()


def aget_one(channel: ringshm.Channel) -> Any:
    return asyncio.run(channel.aget())


def rely_on_wake_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timer is there to make up for a lost wake-up."""
    monkeypatch.setattr(aio, "SLICE", 3600.0)
    monkeypatch.setattr(aio, "SHORT_SLICE", 3600.0)


# --- messages come and go


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_messages_pass_between_the_loops_of_processes_in_order(method: str, kind: str) -> None:
    with workers.Crew() as crew, ringshm.Channel(3, 256) as channel:
        receivers = [
            crew.start(receive_in_a_loop, channel.receiver(), kind, method=start) for start in ("fork", method)
        ]
        senders = [
            crew.start(send_in_a_loop, channel.sender(), number, 300, kind, method="fork") for number in range(2)
        ]
        for sender in senders:
            sender.result()
        channel.close()
        workers.check_delivery([300, 300], [receiver.result() for receiver in receivers])


@pytest.mark.parametrize("kind", LOOPS)
def test_wake_ups_alone_bring_every_message(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rely_on_wake_ups(monkeypatch)
    with workers.Crew("fork") as crew, ringshm.Channel(2, 256) as channel:
        sender = crew.start(workers.put_at_random_times, channel, 0, 1500, 1)

        async def main() -> list[Any]:
            return [await channel.aget() for _ in range(1500)]

        assert run(main(), kind) == [(0, k) for k in range(1500)]
        sender.result()


def test_wake_ups_alone_bring_all_space(monkeypatch: pytest.MonkeyPatch) -> None:
    rely_on_wake_ups(monkeypatch)
    with workers.Crew("fork") as crew, ringshm.Channel(2, 256) as channel:
        receiver = crew.start(workers.get_all, channel.receiver())

        async def main() -> None:
            for k in range(1500):
                await channel.aput(k)

        asyncio.run(main())
        channel.close()
        assert receiver.result() == list(range(1500))


async def test_a_call_whose_message_is_there_does_not_wait() -> None:
    with ringshm.Channel(2, 64) as channel:
        await channel.aput("one")
        assert await channel.aget(timeout=0) == "one"
        assert channel._open().words[LISTENED] == 0


async def test_several_tasks_of_a_loop_wait_for_one_channel_each_in_its_turn() -> None:
    with ringshm.Channel(8, 64) as channel:
        tasks = [asyncio.create_task(channel.aget()) for _ in range(5)]
        await waiting(channel, tasks[-1])
        for k in range(5):
            await channel.aput(k)
        assert await asyncio.gather(*tasks) == list(range(5))
        assert not channel._open().loops


def test_a_loop_waits_for_several_channels() -> None:
    async def main() -> None:
        tasks = [await waits(channel, channel.aget()) for channel in channels]
        for number, channel in reversed(list(enumerate(channels))):
            channel.put(number)
        assert await asyncio.gather(*tasks) == list(range(5))

    channels = [ringshm.Channel(1, 64) for _ in range(5)]
    asyncio.run(main())
    for channel in channels:
        channel.close()


async def test_no_time_left_is_full_or_empty() -> None:
    with ringshm.Channel(1, 64) as channel:
        for timeout in (0, 0.01):
            with pytest.raises(queue.Empty):
                await channel.aget(timeout)
        await channel.aput("one")
        for timeout in (0, 0.01):
            with pytest.raises(queue.Full):
                await channel.aput("two", timeout)
            with pytest.raises(queue.Full):
                async with channel.aloan(timeout):
                    pass
        for bad in (-1, float("nan")):
            with pytest.raises(ValueError, match="timeout"):
                await channel.aget(bad)
        with pytest.raises(ringshm.PayloadTooLarge):
            await channel.aput(bytes(100), timeout=0)
        check_whole(channel, "one")


async def test_when_full_the_oldest_goes_if_the_channel_is_so() -> None:
    with ringshm.Channel(2, 64, when_full="drop_oldest") as channel:
        for k in range(5):
            await channel.aput(k)
        assert [await channel.aget() for _ in range(2)] == [3, 4]


async def test_loans_and_borrows_are_those_of_the_blocking_calls() -> None:
    with ringshm.Channel(2, 4096) as channel:
        async with channel.aloan() as loan:
            loan.array((3,), np.uint8)[...] = 7
        with pytest.raises(ZeroDivisionError):
            async with channel.aloan() as loan:
                loan.array((3,), np.uint8)
                raise ZeroDivisionError
        async with channel.aborrow() as message:
            message.requeue()
        async with channel.aborrow(timeout=1) as message:
            assert (message.value.tolist(), message.sender, message.delivery_count) == ([7, 7, 7], os.getpid(), 1)
        block = channel.aloan()
        async with block as loan:
            loan.discard()
            with pytest.raises(ValueError, match="begun already"):
                await block.__aenter__()
        with pytest.raises(queue.Empty):
            async with channel.aborrow(timeout=0):
                pass
        check_whole(channel)


async def test_loans_and_borrows_wait() -> None:
    async def borrow() -> Any:
        async with channel.aborrow() as message:
            return message.value.tolist()

    async def lend(number: int) -> None:
        async with channel.aloan() as loan:
            loan.array((1,), np.int64)[...] = number

    with ringshm.Channel(1, 4096) as channel:
        tasks = [asyncio.create_task(borrow()) for _ in range(3)]
        await waiting(channel, tasks[-1])
        await asyncio.gather(*[lend(number) for number in range(3)])
        assert sorted(await asyncio.gather(*tasks)) == [[0], [1], [2]]


async def test_a_message_is_copied_into_memory_that_the_caller_has() -> None:
    with ringshm.Channel(2, 256) as channel:
        out = np.zeros(3)
        task = await waits(channel, channel.aget(out=out))
        await channel.aput(np.arange(3.0))
        assert await task is out
        assert out.tolist() == [0, 1, 2]
        await channel.aput("no array")
        with pytest.raises(ringshm.SpecMismatch):
            await channel.aget(out=out)
        assert await channel.aget() == "no array"


# --- messages larger than a slot


def large(number: int) -> Any:
    """As large as several slots of 4 KiB, or as one."""
    return np.full((number % 7) * 6000 + 1, number % 251, np.uint8)


def number_of(message: Any, number: int) -> int:
    assert np.array_equal(message, large(number)), f"message {number} is torn"
    return number


def send_large(channel: ringshm.Channel, count: int) -> None:
    for k in range(count):
        channel.put(large(k))
    channel.close()


def receive_large(channel: ringshm.Receiver) -> int:
    count = 0
    for message in channel:
        count = number_of(message, count) + 1
    channel.close()
    return count


@pytest.mark.parametrize("capacity", [1, 3])
async def test_messages_larger_than_a_slot_flow_within_a_loop(capacity: int) -> None:
    async def send() -> None:
        for k in range(60):
            await channel.aput(large(k))

    with ringshm.Channel(capacity, 4096) as channel:
        sending = asyncio.create_task(send())
        for k in range(30):
            assert number_of(await channel.aget(), 2 * k) == 2 * k
            async with channel.aborrow() as message:
                number_of(message.value, 2 * k + 1)
        await sending
        assert not channel._open().loops
        check_whole(channel)


def test_messages_larger_than_a_slot_flow_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def receive() -> None:
        for k in range(200):
            number_of(await receiver.aget(timeout=30), k)

    async def send() -> None:
        for k in range(200):
            await channel.aput(large(k), timeout=30)

    with workers.Crew("fork") as crew, ringshm.Channel(3, 4096) as channel:
        receiver = channel.receiver()
        sender = crew.start(send_large, channel.sender(), 200)
        asyncio.run(receive())
        sender.result()
        receiver.close()
        member = crew.start(receive_large, channel.receiver())
        asyncio.run(send())
        channel.close()
        assert member.result() == 200


async def test_a_message_larger_than_a_slot_arrives_in_memory_that_the_caller_has() -> None:
    with ringshm.Channel(2, 4096) as channel:
        out = np.zeros(20_000, np.uint8)
        task = asyncio.create_task(channel.aget(out=out))
        await channel.aput(np.full(20_000, 7, np.uint8))
        assert await task is out
        assert out.min() == 7


async def test_no_time_for_a_message_larger_than_a_slot() -> None:
    with ringshm.Channel(2, 4096) as channel:
        with pytest.raises(ringshm.PayloadTooLarge):
            await channel.aput(bytes(20_000), timeout=0)
        with pytest.raises(queue.Full, match="was not received"):
            await channel.aput(bytes(20_000), timeout=0.01)
        check_whole(channel)


def test_a_storm_of_deadlines_loses_no_message_larger_than_a_slot() -> None:
    async def main() -> int:
        chance, cancelled, count = random.Random(3), 0, 0

        async def get() -> None:
            nonlocal count
            count = number_of(await receiver.aget(), count) + 1

        async def borrow() -> None:
            nonlocal count
            async with receiver.aborrow() as message:
                count = number_of(message.value, count) + 1

        while count < 300:
            try:
                await _cancel_some(chance, chance.choice([get, borrow])())
            except _CANCELLED:
                cancelled += 1
        return cancelled

    with workers.Crew("fork") as crew, ringshm.Channel(3, 4096) as channel:
        receiver = channel.receiver()
        sender = crew.start(send_large, channel.sender(), 300)
        cancelled = asyncio.run(main())
        sender.result()
        print(f"{cancelled} calls cancelled")
        assert cancelled > 30
        check_whole(channel)
        receiver.close()


def receive_numbered_large(channel: ringshm.Receiver) -> list[int]:
    numbers = [number_of(body, number) for number, body in channel]
    channel.close()
    return numbers


def test_a_storm_of_deadlines_sends_messages_larger_than_a_slot_whole_or_not_at_all() -> None:
    async def main() -> None:
        chance = random.Random(4)
        for k in range(600):
            try:
                await _cancel_some(chance, channel.aput((k, large(k))))
                sent.append(k)
            except _CANCELLED:
                cancelled.append(k)

    sent: list[int] = []
    cancelled: list[int] = []
    with workers.Crew("fork") as crew, ringshm.Channel(3, 4096) as channel:
        receiver = crew.start(receive_numbered_large, channel.receiver())
        asyncio.run(main())
        channel.close()
        received = receiver.result()
        print(f"{len(cancelled)} calls cancelled")
        assert received == sent
        assert len(cancelled) > 60


def test_a_cancellation_that_comes_when_a_large_message_was_received_is_put_off() -> None:
    async def send() -> None:
        while True:
            number = len(sent)
            await channel.aput((number, large(number)))
            sent.append(number)

    async def main() -> None:
        chance = random.Random(5)
        for k in range(300):
            if k % 2:
                task = asyncio.create_task(send())
                await asyncio.sleep(chance.random() * 0.001)
                await cancelled(task)
            else:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(send(), chance.random() * 0.001)
            await asyncio.sleep(0)  # the cancellation was of that task

    sent: list[int] = []
    with workers.Crew("fork") as crew, ringshm.Channel(3, 4096) as channel:
        receiver = crew.start(receive_numbered_large, channel.receiver())
        asyncio.run(main())
        channel.close()
        assert receiver.result() == sent


def _send_half_and_die(channel: ringshm.Channel) -> None:
    async def main() -> None:
        sending = asyncio.create_task(channel.aput(bytes(1 << 20)))
        while channel.stats().ready == 0 and channel.stats().pieces == 0:
            await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGKILL)
        await sending

    asyncio.run(main())


def test_a_sender_that_dies_inside_a_large_message_has_not_sent_it() -> None:
    async def main() -> None:
        with pytest.raises(ringshm.EndOfChannel):
            await receiver.aget()

    with workers.Crew("fork") as crew, ringshm.Channel(2, 4096) as channel, channel.receiver() as receiver:
        crew.start(_send_half_and_die, channel.sender())
        channel.close()
        asyncio.run(main())
        assert receiver.stats().free == 2


class Refuses:
    name = "refuses"

    @staticmethod
    def encode(obj: Any) -> bytes:
        return bytes(obj)

    @staticmethod
    def decode(payload: Any) -> Any:
        raise ZeroDivisionError


async def test_a_message_that_cannot_be_decoded_is_told_of() -> None:
    with ringshm.Channel(1, 64, codec=Refuses()) as channel:
        task = await waits(channel, channel.aget())
        await channel.aput(b"1")
        with pytest.raises(ringshm.UndecodableMessage):
            await task


def test_each_role_has_its_own_methods() -> None:
    with ringshm.Channel(1, 64) as channel, channel.sender() as sender, channel.receiver() as receiver:
        for missing in ("aget", "aget_many", "aget_batch", "aborrow", "fileno"):
            with pytest.raises(AttributeError, match=r"channel\.receiver\(\)"):
                getattr(sender, missing)
        for missing in ("aput", "aput_many", "aput_batch", "aflush", "aloan"):
            with pytest.raises(AttributeError, match=r"channel\.sender\(\)"):
                getattr(receiver, missing)
        assert not hasattr(type(sender), "__aiter__")


# --- cancelling


def _cancel_some(chance: random.Random, call: Coroutine[Any, Any, Any]) -> Coroutine[Any, Any, Any]:
    """The call, with a random tiny deadline; cancelled in one of three ways."""

    async def cancelled_by_hand() -> Any:
        task = asyncio.create_task(call)
        timer = asyncio.get_running_loop().call_later(seconds, task.cancel)
        try:
            return await task
        finally:
            timer.cancel()

    async def at_once() -> Any:
        task = asyncio.create_task(call)
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        task.cancel()
        return await task

    seconds = chance.random() ** 3 * 0.003
    way = chance.randrange(4)
    return cancelled_by_hand() if way == 0 else at_once() if way == 1 else asyncio.wait_for(call, seconds)


_CANCELLED = (asyncio.CancelledError, asyncio.TimeoutError, queue.Empty, queue.Full)


async def _receive_in_a_storm(
    channel: ringshm.Channel, chance: random.Random, done: Callable[[], bool], taken: list[Any]
) -> int:
    """Receive by calls with random deadlines; how many were cancelled."""
    cancelled = 0

    async def borrow() -> None:
        async with channel.aborrow() as message:
            taken.append(message.value)

    async def get() -> None:
        taken.append(await channel.aget(timeout=chance.choice([None, chance.random() * 0.002])))

    async def many() -> None:
        taken.extend(await channel.aget_many(3))

    while not done():
        try:
            await _cancel_some(chance, chance.choice([get, borrow, many])())
        except _CANCELLED:
            cancelled += 1
        except ringshm.EndOfChannel:  # another task has taken the last one
            break
    return cancelled


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("tasks", [1, 4])
def test_a_storm_of_deadlines_loses_and_doubles_no_message_that_is_received(tasks: int, kind: str) -> None:
    _storm_of_receivers(tasks, kind, 1000, 5)


@pytest.mark.slow
def test_a_longer_storm_of_deadlines_loses_and_doubles_no_message_that_is_received() -> None:
    seed = random.randrange(1 << 32)
    print(f"{seed=}")
    _storm_of_receivers(6, "asyncio", 12_000, seed)


def _storm_of_receivers(tasks: int, kind: str, count: int, seed: int) -> None:
    with workers.Crew("fork") as crew, ringshm.Channel(2, 256) as channel:
        senders = [
            crew.start(workers.put_at_random_times, channel, number, count, seed + number) for number in range(2)
        ]
        views: list[list[Any]] = [[] for _ in range(tasks)]

        async def main() -> int:
            def done() -> bool:
                return sum(map(len, views)) == 2 * count

            chances = [random.Random(seed + 7 * number) for number in range(tasks)]
            storm = [
                _receive_in_a_storm(channel, chance, done, view) for chance, view in zip(chances, views, strict=True)
            ]
            return sum(await asyncio.gather(*storm))

        cancelled = run(main(), kind)
        for sender in senders:
            sender.result()
        print(f"{cancelled} calls cancelled")
        assert cancelled > count / 10
        workers.check_delivery([count, count], views)
        check_whole(channel)


@pytest.mark.parametrize("kind", LOOPS)
def test_a_storm_of_deadlines_sends_each_message_once_or_not_at_all(kind: str) -> None:
    _storm_of_senders(kind, 2000, 5)


@pytest.mark.slow
def test_a_longer_storm_of_deadlines_sends_each_message_once_or_not_at_all() -> None:
    seed = random.randrange(1 << 32)
    print(f"{seed=}")
    _storm_of_senders("asyncio", 20_000, seed)


def receive_at_random_times(channel: ringshm.Receiver, seed: int) -> list[Any]:
    chance, messages = random.Random(seed), []
    for message in channel:
        messages.append(message if isinstance(message, tuple) else tuple(message.tolist()))
        if chance.random() < 0.3:
            time.sleep(chance.random() * 0.002)
    channel.close()
    return messages


def _storm_of_senders(kind: str, count: int, seed: int) -> None:
    sent: list[Any] = []
    cancelled = 0

    async def put(message: tuple[int, int]) -> None:
        await channel.aput(message)
        sent.append(message)

    async def lend(message: tuple[int, int]) -> None:
        async with channel.aloan() as loan:
            loan.array((2,), np.int64)[...] = message
        sent.append(message)

    async def storm(sender: int) -> None:
        nonlocal cancelled
        chance = random.Random(seed + sender)
        for k in range(count // 4):
            try:
                await _cancel_some(chance, chance.choice([put, lend])((sender, k)))
            except _CANCELLED:
                cancelled += 1

    async def main() -> None:
        await asyncio.gather(*map(storm, range(4)))

    with workers.Crew("fork") as crew, ringshm.Channel(2, 4096) as channel:
        receiver = crew.start(receive_at_random_times, channel.receiver(), seed)
        run(main(), kind)
        stats = channel.stats()
        channel.close()
        assert receiver.result() == sent
        print(f"{cancelled} of {count} cancelled")
        assert stats.sent == len(sent) == count - cancelled
        assert cancelled > count / 10


async def test_a_call_that_was_woken_and_is_cancelled_passes_the_wake_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rely_on_wake_ups(monkeypatch)
    with ringshm.Channel(2, 64) as channel:
        channel.put(0)
        assert await channel.aget() == 0  # roles are taken, which wakes everybody
        first = await waits(channel, channel.aget())
        second = asyncio.create_task(channel.aget())
        await asyncio.sleep(0)
        loop_waits = channel._open().loops[id(asyncio.get_running_loop())]
        assert len(loop_waits.futures[channel._open().messages]) == 2
        channel.put("the only one")
        loop_waits._woken()
        assert [future.done() for future in loop_waits.futures[channel._open().messages]] == [True, False]
        first.cancel()
        assert await second == "the only one"
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_a_cancelled_call_leaves_no_registration(kind: str = "asyncio") -> None:
    with ringshm.Channel(1, 64) as channel:
        task = await waits(channel, channel.aget())
        assert (listens(channel), channel.stats().waiting_receivers) == (1, 1)
        assert channel.stats().participants[0].waiting_for == "message"
        await cancelled(task)
        assert (listens(channel), channel.stats().waiting_receivers, len(channel._open().loops)) == (0, 0, 0)
        await channel.aput(1)
        task = await waits(channel, channel.aput(2))
        assert channel.stats().waiting_senders == 1
        await cancelled(task)
        check_whole(channel, 1)


def test_an_interrupt_in_the_loops_own_callback_loses_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        await waits(channel, channel.aget())
        channel.put("still there")
        await asyncio.sleep(60)

    with ringshm.Channel(1, 64) as channel:
        monkeypatch.setattr(aio._LoopWaits, "_woken", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main())
        gc.collect()
        check_whole(channel, "still there")


def test_an_interrupt_while_a_call_begins_or_ends_to_wait_leaves_nothing_in_the_loop() -> None:
    complaints: list[dict[str, Any]] = []

    functions = ("in_loop", "_sleep", "__init__", "_set_timer", "_look_in", "add", "remove", "_end")

    def interrupt() -> None:
        raise Interrupt(f"at bytecode {at}")

    async def main() -> None:
        loop.call_soon(asyncio.current_task().cancel)
        with suppress(asyncio.CancelledError):
            await channel.aget()

    with ringshm.Channel(1, 64) as channel:
        loop: Any = asyncio.new_event_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        loop.run_until_complete(main())  # takes the role
        readers = len(loop._selector.get_map())
        for at in range(1, 2000):
            for _ in range(9):  # on a busy machine a call's time may be up before it waits
                with Tracer(interrupt, at, folders=["channel"], functions=functions) as tracer, suppress(Interrupt):
                    loop.run_until_complete(main())
                if tracer.count >= at:
                    break
            else:
                break
            loop.run_until_complete(asyncio.sleep(0))
            while channel._open().loops:
                gc.collect()
                loop.run_until_complete(asyncio.sleep(SLICE / 10))
            assert len(loop._selector.get_map()) == readers, f"after an interrupt at bytecode {at}"
        loop.close()
        assert not complaints
        assert 100 < at < 1999
        check_whole(channel)


def test_a_loop_that_is_closed_with_a_call_in_it_leaves_no_registration() -> None:
    with ringshm.Channel(1, 64) as channel:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # which says that a pending task was destroyed
        task = loop.create_task(channel.aget())
        loop.run_until_complete(waiting(channel, task))
        assert listens(channel) == 1
        loop.close()
        del task, loop
        workers.until(lambda: gc.collect() >= 0 and not listens(channel))
        assert not channel._open().loops
        channel.put(1)
        assert asyncio.run(channel.aget()) == 1


# --- many at once

NUMBER = {"x": np.int64}


def numbers(*values: int) -> dict[str, Any]:
    return {"x": np.array(values)}


@pytest.mark.parametrize("kind", LOOPS)
def test_many_messages_pass_in_order(kind: str) -> None:
    async def send() -> None:
        for start in range(0, 600, 20):
            assert await channel.aput_many(range(start, start + 20)) == 20
        channel.shutdown()

    async def main() -> list[Any]:
        sending = asyncio.create_task(send())
        received: list[Any] = []
        with suppress(ringshm.EndOfChannel):
            while True:
                some = await channel.aget_many(7)
                assert 1 <= len(some) <= 7
                received += some
        await sending
        return received

    with ringshm.Channel(3, 64) as channel:
        assert run(main(), kind) == list(range(600))


@pytest.mark.parametrize("kind", LOOPS)
async def test_batches_pass_in_order_and_are_copied_into_memory_that_the_caller_has(kind: str) -> None:
    async def send() -> None:
        for start in range(0, 60, 10):
            assert await channel.aput_batch(numbers(*range(start, start + 10))) == 10

    with ringshm.Channel(4, spec=NUMBER) as channel:
        sending = asyncio.create_task(send())
        out = {"x": np.zeros(3, np.int64)}
        for start in range(0, 60, 3):
            batch = await channel.aget_batch(3, out=out)
            assert batch["x"].base is out["x"] or batch["x"] is out["x"]
            assert out["x"].tolist() == [start, start + 1, start + 2]
        await sending
        check_whole_typed(channel)


def check_whole_typed(channel: ringshm.Channel, *left: int) -> None:
    """As check_whole, for a channel of numbers."""
    assert [int(channel.get_nowait()["x"]) for _ in range(channel.qsize())] == list(left)
    assert channel.stats().free == channel.capacity
    assert channel.put_batch(numbers(*range(channel.capacity)), timeout=0) == channel.capacity
    assert channel.get_batch(channel.capacity, timeout=0)["x"].tolist() == list(range(channel.capacity))


async def test_time_is_up_for_many() -> None:
    with ringshm.Channel(3, spec=NUMBER) as channel:
        for timeout in (0, 0.01):
            with pytest.raises(queue.Empty, match="no message came"):
                await channel.aget_many(3, timeout)
            with pytest.raises(queue.Empty, match="0 of 2 messages came"):
                await channel.aget_batch(2, timeout=timeout)
        assert await channel.aput_many([{"x": k} for k in range(5)], timeout=0.01) == 3
        assert await channel.aput_batch(numbers(9), timeout=0) == 0
        assert await channel.aflush(timeout=0.01) is False
        assert [int(message["x"]) for message in await channel.aget_many(2)] == [0, 1]
        with pytest.raises(queue.Empty, match="1 of 2 messages came"):
            await channel.aget_batch(2, timeout=0.01)
        assert (await channel.aget_batch(2, min=1, timeout=0.01))["x"].tolist() == [2]
        assert await channel.aflush(timeout=0) is True
        check_whole_typed(channel)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_wrong_timeouts_of_many_are_refused(timeout: float) -> None:
    with ringshm.Channel(2, spec=NUMBER) as channel:
        for call in (
            channel.aput_many([{"x": 1}], timeout), channel.aput_batch(numbers(1), timeout),
            channel.aget_many(1, timeout), channel.aget_batch(1, timeout=timeout), channel.aflush(timeout),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="timeout"):
                asyncio.run(call)
        check_whole_typed(channel)


def test_batches_need_a_spec_and_its_fields() -> None:
    with ringshm.Channel(2, 64) as channel:
        for call, name in ((channel.aput_batch({}), "aput_batch"), (channel.aget_batch(1), "aget_batch")):
            with pytest.raises(TypeError, match=f"no spec, which {name} needs"):
                asyncio.run(call)
    with ringshm.Channel(2, spec=NUMBER) as channel:
        with pytest.raises(ringshm.SpecMismatch, match="'y'"):
            asyncio.run(channel.aput_batch({"y": np.zeros(2)}))
        with pytest.raises(ringshm.SpecMismatch, match="x"):
            asyncio.run(channel.aget_batch(1, out={"x": np.zeros(1, np.float32)}))
        check_whole_typed(channel)


async def test_the_end_of_the_stream_ends_calls_for_many() -> None:
    with ringshm.Channel(4, spec=NUMBER) as channel:
        few = await waits(channel, channel.aget_batch(3, min=1))
        all_or_none = asyncio.create_task(channel.aget_batch(3))
        some = asyncio.create_task(channel.aget_many(3))
        await asyncio.sleep(0)
        await channel.aput({"x": 1})
        assert [int(message["x"]) for message in await some] == [1]
        await channel.aput_many([{"x": 2}, {"x": 3}])
        channel.shutdown()
        assert (await few)["x"].tolist() == [2, 3]
        with pytest.raises(ringshm.EndOfChannel):
            await all_or_none
        with pytest.raises(ringshm.EndOfChannel):
            await channel.aget_many(3)
        with pytest.raises(ringshm.ChannelClosed):
            await channel.aput_many([{"x": 4}])


async def test_what_is_left_at_the_end_stays_for_a_batch_that_wants_more() -> None:
    with ringshm.Channel(4, spec=NUMBER) as channel:
        task = await waits(channel, channel.aget_batch(3))
        await channel.aput_batch(numbers(1, 2))
        channel.shutdown()
        with pytest.raises(ringshm.EndOfChannel, match="2 messages are left, fewer than were asked for"):
            await task
        assert (await channel.aget_batch(3, min=2))["x"].tolist() == [1, 2]


def test_a_broken_channel_ends_calls_that_send_many() -> None:
    async def main() -> None:
        sending = await waits(sender, sender.aput_many(range(5)))
        receiver.send_signal(signal.SIGCONT)
        with pytest.raises(ringshm.BrokenChannel) as broken:
            await sending
        assert broken.value.sent == 1
        for call in (sender.aput_many([7]), sender.aflush()):
            with pytest.raises(ringshm.BrokenChannel):
                await call

    with workers.Crew("fork") as crew, ringshm.Channel(1, 64) as channel, channel.sender() as sender:
        receiver = crew.start(_take_a_role_and_stop, channel.receiver())
        channel.close()
        assert receiver.wait_stopped()
        asyncio.run(main())


async def test_a_message_larger_than_a_slot_is_one_of_many() -> None:
    with ringshm.Channel(2, 4096) as channel:
        sending = asyncio.create_task(channel.aput_many([large(0), large(6), large(7)]))
        received: list[Any] = []
        while len(received) < 3:
            received += await channel.aget_many(3)
        assert await sending == 3
        for message, number in zip(received, (0, 6, 7), strict=True):
            number_of(message, number)
        with pytest.raises(ringshm.PayloadTooLarge):
            await channel.aput_many([b"small", large(6)], timeout=0)
        check_whole(channel)


async def test_a_call_for_several_messages_takes_no_wake_up_from_one_that_needs_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rely_on_wake_ups(monkeypatch)
    with ringshm.Channel(4, spec=NUMBER) as channel:
        batch = await waits(channel, channel.aget_batch(3))
        one = asyncio.create_task(channel.aget())
        await asyncio.sleep(0)
        await channel.aput({"x": 1})
        assert int((await one)["x"]) == 1
        await channel.aput({"x": 2})
        await asyncio.sleep(0.01)
        assert not batch.done()
        await channel.aput_batch(numbers(3, 4))
        assert (await batch)["x"].tolist() == [2, 3, 4]


async def test_other_tasks_run_while_many_are_sent_at_once() -> None:
    with ringshm.Channel(4, 500_000, when_full="drop_oldest") as channel:
        ticks = 0

        async def count() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        await channel.aput_many([bytes(500_000)] * 200)
        assert ticks > 1
        counting.cancel()


# --- many at once: cancelled


class _Await:
    """Awaits a call, and cancels it where it suspends for the n-th time, counted from 0."""

    def __init__(self, call: Coroutine[Any, Any, Any], at: int) -> None:
        self._call = call
        self._at = at
        self.count = 0

    def __await__(self) -> Iterator[Any]:
        steps = self._call.__await__()
        try:
            future = steps.send(None)
            while self.count < self._at:
                self.count += 1
                try:
                    yield future
                except BaseException as error:
                    future = steps.throw(error)
                else:
                    future = steps.send(None)
            if future is not None:
                future.cancel()
            steps.throw(asyncio.CancelledError())
        except StopIteration as end:
            return end.value  # type: ignore[return-value]
        raise AssertionError("a cancelled call goes on")


MANY: dict[str, Callable[[ringshm.Channel], Coroutine[Any, Any, Any]]] = {
    "aget_many": lambda channel: channel.aget_many(3),
    "aget_batch": lambda channel: channel.aget_batch(3),
    "aget_batch(min=1)": lambda channel: channel.aget_batch(3, min=1, timeout=60),
}


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("call", MANY)
def test_a_call_for_many_that_is_cancelled_at_any_await_has_taken_nothing(call: str, kind: str) -> None:
    """Two messages come, one after the other; a thief takes the first that wakes the call, so that it waits again."""

    async def main(at: int) -> Any:
        waiting_call = _Await(MANY[call](channel), at)

        async def wait() -> Any:
            return await waiting_call

        task = asyncio.create_task(wait())
        await waiting(channel, task)
        for number in range(3):
            with suppress(queue.Empty):
                channel.put({"x": number})
                await asyncio.sleep(0.001)
                if number == 0 and not task.done():
                    channel.get_nowait()
        await asyncio.sleep(0.001)
        if not task.done() and not at:
            raise AssertionError("it was not cancelled")
        if not task.done():
            task.cancel()
        with suppress(asyncio.CancelledError):
            taken = await task
            return [int(x) for x in (taken["x"] if isinstance(taken, dict) else [message["x"] for message in taken])]
        assert not channel._open().loops
        return []

    for at in range(4):
        with ringshm.Channel(4, spec=NUMBER) as channel:
            taken = run(main(at), kind)
            left = [int(channel.get_nowait()["x"]) for _ in range(channel.qsize())]
            assert taken + left in ([0, 1, 2], [1, 2]), (at, taken, left)
            if not at:
                assert not taken
            check_whole_typed(channel)


@pytest.mark.parametrize("kind", LOOPS)
def test_a_call_that_sends_many_and_is_cancelled_at_any_await_has_sent_the_first_ones(kind: str) -> None:
    async def main(at: int) -> bool:
        received: list[Any] = []

        async def receive() -> None:
            async for message in channel:
                received.append(message)
                await asyncio.sleep(0)

        receiving = asyncio.create_task(receive())
        cancelled = False
        try:
            sent = await _Await(channel.aput_many(range(12)), at)
        except asyncio.CancelledError as error:
            cancelled, sent = True, error.sent  # type: ignore[attr-defined]
        channel.shutdown()
        await receiving
        assert received == list(range(sent))
        assert cancelled or sent == 12
        assert not channel._open().loops
        return not cancelled

    for at in range(100):
        with ringshm.Channel(2, 64) as channel:
            if run(main(at), kind):
                break
    assert at >= 3, "it seldom waits"


@pytest.mark.parametrize("call", [*MANY, "aput_many", "aflush"])
def test_an_interrupt_ends_calls_for_many_and_leaves_the_channel_whole(call: str) -> None:
    calls = {**MANY, "aput_many": lambda channel: channel.aput_many([{"x": 1}] * 2), "aflush": ringshm.Channel.aflush}
    left = [0, 0] if call in ("aput_many", "aflush") else []

    async def main() -> None:
        await waits(channel, calls[call](channel))
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)

    with ringshm.Channel(2 if left else 4, spec=NUMBER) as channel:
        channel.put_many([{"x": x} for x in left])
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main())
        assert not channel._open().loops
        check_whole_typed(channel, *left)


# --- until all is received


@pytest.mark.parametrize("kind", LOOPS)
async def test_flush_lets_other_tasks_receive(kind: str) -> None:
    with ringshm.Channel(4, 64) as channel:
        assert await channel.aflush() is True
        await channel.aput_many(range(3))
        task = await waits(channel, channel.aflush())
        for number in range(3):
            assert not task.done()
            assert await channel.aget() == number
        assert await task is True
        assert not channel._open().loops


def test_flush_in_a_loop_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    rely_on_wake_ups(monkeypatch)
    monkeypatch.setattr(steps, "SLICE", 3600.0)

    async def main() -> None:
        channel.put(1)
        task = await waits(channel, channel.aflush())
        member = crew.start(channel.get)
        assert await asyncio.wait_for(task, 10) is True
        assert member.result() == 1

    with workers.Crew("thread") as crew, ringshm.Channel(1, 64) as channel:
        asyncio.run(main())


async def test_flush_does_not_wait_for_what_its_own_task_has_borrowed() -> None:
    with ringshm.Channel(2, 64) as channel:
        await channel.aput(1)
        async with channel.aborrow():
            with pytest.raises(ringshm.ChannelDeadlock, match="itself has borrowed"):
                await channel.aflush()
            assert await channel.aflush(timeout=0.01) is False
            flushing = await waits(channel, channel.aflush())  # of another task, which may wait
        assert await flushing is True


async def test_flush_that_is_cancelled_leaves_no_registration() -> None:
    with ringshm.Channel(2, 64) as channel:
        await channel.aput(1)
        task = await waits(channel, channel.aflush())
        await cancelled(task)
        assert not channel._open().loops
        assert channel.stats().waiting_senders == 0
        check_whole(channel, 1)


# --- the stream ends


@pytest.mark.parametrize("how", ["closed", "killed", "shutdown"])
@pytest.mark.parametrize("call", ["aget", "aborrow", "async for"])
def test_the_end_of_the_stream_wakes_a_call_that_waits_for_a_message(call: str, how: str) -> None:
    async def make() -> Any:
        if call == "async for":
            return [message async for message in receiver]
        if call == "aborrow":
            async with receiver.aborrow():
                return None
        return await receiver.aget()

    async def main() -> None:
        task = asyncio.create_task(make())
        await waiting(receiver, task)  # type: ignore[arg-type]
        if how == "closed":
            os.kill(sender.pid, signal.SIGCONT)
        elif how == "killed":
            sender.kill()
        else:
            receiver.shutdown()
        if call == "async for":
            assert await task == []
        else:
            with pytest.raises(ringshm.EndOfChannel):
                await task

    with workers.Crew("fork") as crew, ringshm.Channel(2, 64) as channel, channel.receiver() as receiver:
        sender = crew.start(_take_a_role_and_stop, channel.sender())
        channel.close()
        assert sender.wait_stopped()
        assert receiver.get() == "hello"
        if how == "shutdown":
            sender.send_signal(signal.SIGCONT)
        asyncio.run(main())
        sender.kill()


def _take_a_role_and_stop(channel: Any) -> None:
    if isinstance(channel, ringshm.Sender):
        channel.put("hello")
    else:
        with suppress(queue.Empty):
            channel.get_nowait()
    os.kill(os.getpid(), signal.SIGSTOP)
    channel.close()


@pytest.mark.parametrize("how", ["closed", "killed", "shutdown"])
@pytest.mark.parametrize("call", ["aput", "aloan"])
def test_a_broken_channel_wakes_a_call_that_waits_for_space(call: str, how: str) -> None:
    async def make() -> None:
        if call == "aloan":
            async with sender.aloan():
                return None
        await sender.aput("too much")

    async def main() -> None:
        task = asyncio.create_task(make())
        await waiting(sender, task)  # type: ignore[arg-type]
        if how == "closed":
            receiver.send_signal(signal.SIGCONT)
        elif how == "killed":
            receiver.kill()
        else:
            sender.shutdown()
        with pytest.raises(ringshm.ChannelClosed if how == "shutdown" else ringshm.BrokenChannel):
            await task

    with workers.Crew("fork") as crew, ringshm.Channel(1, 4096) as channel, channel.sender() as sender:
        receiver = crew.start(_take_a_role_and_stop, channel.receiver())
        channel.close()
        assert receiver.wait_stopped()
        sender.put("it is full")
        asyncio.run(main())
        receiver.kill()


@pytest.mark.parametrize("where", ["task", "thread"])
@pytest.mark.parametrize("call", ["aget", "aput"])
async def test_a_handle_that_is_closed_ends_the_calls_on_it(call: str, where: str) -> None:
    with ringshm.Channel(1, 64) as channel:
        handle = ringshm.Channel.attach(channel.name)
        if call == "aput":
            channel.put(1)
        tasks = [asyncio.create_task(handle.aget() if call == "aget" else handle.aput(2)) for _ in range(3)]
        await waiting(handle, tasks[-1])
        if where == "task":
            handle.close()
        else:
            thread = threading.Thread(target=handle.close)
            thread.start()
            thread.join()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, ringshm.ChannelClosed)
        for attempt in (handle.aget, lambda: handle.aput(1)):
            with pytest.raises(ringshm.ChannelClosed):
                await attempt()


async def test_tasks_that_hold_all_slots_and_wait_get_an_error() -> None:
    async def hold_and_wait(index: int) -> str:
        try:
            async with channel.aborrow():
                held.release()
                await everybody.wait()
                await channel.aget()
        except ringshm.ChannelDeadlock as error:
            return str(error)
        return ""

    with ringshm.Channel(2, 64) as channel:
        for k in range(2):
            channel.put(k)
        held, everybody = asyncio.Semaphore(0), asyncio.Event()
        tasks = [asyncio.create_task(hold_and_wait(index)) for index in range(2)]
        for _ in tasks:
            await held.acquire()
        everybody.set()
        first = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert "all 2 slots are held" in next(iter(first[0])).result()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_task_that_holds_all_slots_is_waited_for() -> None:
    with ringshm.Channel(1, 64) as channel:
        channel.put("first")
        async with channel.aborrow():
            task = await waits(channel, channel.aput("then"))
            await asyncio.sleep(0.3)  # more than it takes to find a deadlock
            assert not task.done()
        await task
        assert await channel.aget() == "then"


# --- processes, threads, forks, deaths


def test_loops_in_several_threads_share_a_handle() -> None:
    def serve() -> list[Any]:
        async def main() -> list[Any]:
            return [message async for message in receiver]

        return asyncio.run(main())

    with workers.Crew("thread") as threads, workers.Crew("fork") as crew, ringshm.Channel(2, 256) as channel:
        receiver = channel.receiver()
        sender = crew.start(send_in_a_loop, channel.sender(), 0, 1000)
        channel.close()
        loops = [threads.start(serve) for _ in range(3)]
        sender.result()
        workers.check_delivery([1000], [loop.result() for loop in loops])
        assert len(wakes(receiver)) <= 3
        receiver.close()


def test_two_loops_wait_at_a_time_and_each_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    rely_on_wake_ups(monkeypatch)
    with workers.Crew("thread") as threads, ringshm.Channel(2, 64) as channel:
        members = [threads.start(aget_one, channel) for _ in range(2)]
        workers.until(lambda: channel.stats().waiting_receivers == 2)
        assert bin(listens(channel)).count("1") == 2
        for k in range(2):
            channel.put(k)
        assert sorted(member.result() for member in members) == [0, 1]


def test_no_thread_is_left_and_none_is_used() -> None:
    before = threading.active_count()

    async def main() -> int:
        task = await waits(channel, channel.aget())
        during = threading.active_count()
        channel.put(1)
        await task
        return during

    with ringshm.Channel(1, 64) as channel:
        assert asyncio.run(main()) == before
    assert threading.active_count() == before


async def test_a_fork_while_a_call_waits_disturbs_neither() -> None:
    def child() -> None:
        gc.collect()
        asyncio.run(up.aput("from the child"))
        assert asyncio.run(down.aget()) == "for the child"
        asyncio.run(up.aput("done"))

    with ringshm.Channel(2, 64) as up, ringshm.Channel(2, 64) as down:
        task = await waits(up, up.aget())
        mine = wakes(up)
        pid = workers.fork_off(child)
        assert await task == "from the child"
        await down.aput("for the child")
        assert await up.aget() == "done"
        assert workers.exit_code(pid) == 0
        up.put("for the parent")
        assert await up.aget() == "for the parent"
        assert wakes(up) == mine


def test_a_childs_fifos_are_its_own() -> None:
    with ringshm.Channel(2, 64) as channel:
        with pytest.raises(queue.Empty):
            asyncio.run(channel.aget(timeout=0.2))
        mine = wakes(channel)
        assert len(mine) == 1
        pid = workers.fork_off(lambda: asyncio.run(channel.aget()) and os._exit(3))
        workers.until(lambda: channel.stats().waiting_receivers)
        assert len(wakes(channel)) == 2
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reap(channel, 1)
        assert wakes(channel) == mine
        # the lock on the parent's is the parent's alone
        assert not fifos.is_orphan(f"/dev/shm/{mine[0]}")


def test_a_killed_waiter_leaves_nothing_and_others_go_on() -> None:
    with workers.Crew("fork") as crew, ringshm.Channel(2, 64) as channel:
        victim, other = crew.start(aget_one, channel), crew.start(aget_one, channel)
        workers.until(lambda: channel.stats().waiting_receivers == 2)
        assert len(wakes(channel)) == 2
        victim.kill()
        reap(channel, 1)
        assert len(wakes(channel)) == 1
        channel.put("for the other")
        assert other.result() == "for the other"
        workers.until(lambda: not wakes(channel))


def test_the_fifos_of_a_process_go_when_it_closes() -> None:
    with ringshm.Channel(2, 64) as channel:
        attached = ringshm.Channel.attach(channel.name)
        with pytest.raises(queue.Empty):
            asyncio.run(attached.aget(timeout=0.2))
        assert len(wakes(channel)) == 1
    attached.close()
    del attached
    gc.collect()
    assert not [name for name in workers.ringshm_files() if name.startswith(fifos.PREFIX)]


WAITER = """
import asyncio, sys, ringshm
channel = ringshm.Channel(1, 64, name=sys.argv[1]) if sys.argv[2] == "make" else ringshm.Channel.attach(sys.argv[1])
async def main():
    task = asyncio.ensure_future(channel.aget())
    await asyncio.sleep(0.01)
    print("waits", flush=True)
    await task
asyncio.run(main())
"""


@pytest.mark.parametrize("creator", ["killed", "closed"])
def test_what_killed_waiters_have_left_is_cleaned_up(creator: str) -> None:
    name, before = f"test-asyncio-{os.getpid()}", workers.ringshm_files()
    channel = ringshm.Channel(1, 64, name=name) if creator == "closed" else None
    with workers.script(WAITER, name, "attach" if channel else "make") as process:
        assert workers.line_of(process) == "waits"
        if channel is not None:
            channel.close()  # and its names go; the waiter goes on
            del channel
            gc.collect()
            assert [name[: len(fifos.PREFIX)] for name in workers.ringshm_files() - before] == [fifos.PREFIX]
            assert clean() == ((), ())
        process.kill()
    segments, orphans = clean()
    assert (len(segments), len(orphans)) == ((0, 1) if creator == "closed" else (1, 0))
    assert workers.ringshm_files() == before


EXITS = {
    "in a daemon thread": """
import threading
threading.Thread(target=lambda: asyncio.run(channel.aget()), daemon=True).start()
while not channel.stats().waiting_receivers:
    time.sleep(0.001)
""",
    "in a loop that was left": """
loop = asyncio.new_event_loop()
task = loop.create_task(channel.aget())
loop.run_until_complete(asyncio.sleep(0.01))
assert channel.stats().waiting_receivers
import os
os.dup2(os.open("/dev/null", os.O_WRONLY), 2)  # asyncio says that it was left
""",
    "of a handle that was not closed": """
receiver = channel.receiver()
receiver.fileno()
""",
}


@pytest.mark.parametrize("how", EXITS)
def test_a_process_that_exits_with_a_call_in_a_loop_leaves_nothing(how: str) -> None:
    before = workers.ringshm_files()
    source = "import asyncio, time, ringshm\nchannel = ringshm.Channel(1, 64)" + EXITS[how] + "print('exits')\n"
    assert workers.finish(workers.script(source)) == "exits\n"
    assert workers.ringshm_files() == before


def test_a_process_that_is_stopped_inside_the_mutex_does_not_stop_the_loop() -> None:
    async def count() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0.001)

    async def main() -> None:
        counting = asyncio.create_task(count())
        with pytest.raises(queue.Empty, match="holds the receivers' mutex"):
            await channel.aget(timeout=0.5)
        task = asyncio.create_task(channel.aget())
        while rounds < 20:
            await asyncio.sleep(0.001)
        await cancelled(task)
        counting.cancel()

    rounds = 0
    with workers.Crew("fork") as crew, ringshm.Channel(2, 64) as channel:
        channel.put("for the stopped one")
        holder = crew.start(workers.act_holding, workers.stop, channel, "get")
        assert holder.wait_stopped()
        channel.put("for us")
        asyncio.run(main())
        holder.send_signal(signal.SIGCONT)
        assert holder.result() == "for the stopped one"
        check_whole(channel, "for us")


def test_an_idle_call_sleeps() -> None:
    async def main() -> int:
        for task in [asyncio.create_task(channel.aget()) for _ in range(20)]:
            await waiting(channel, task)
        ticks = 0
        tick = aio._LoopWaits._tick

        def counting(self: Any) -> None:
            nonlocal ticks
            ticks += 1
            tick(self)

        loop_waits = channel._open().loops[id(asyncio.get_running_loop())]
        loop_waits._tick = counting.__get__(loop_waits)
        while not ticks:
            await asyncio.sleep(0.01)
        ticks, before = 0, workers.voluntary_switches()
        await asyncio.sleep(1.0)
        print(f"{ticks} ticks, {workers.voluntary_switches() - before} switches")
        return (workers.voluntary_switches() - before) / max(1, ticks)  # type: ignore[return-value]

    with ringshm.Channel(1, 64) as channel:
        assert asyncio.run(main()) < 4  # per slice, however long a slice took


# --- FIFOs that do not what they should


def test_a_sender_does_not_wait_for_a_stopped_receiver_whose_fifo_is_full() -> None:
    with workers.Crew("fork") as crew, ringshm.Channel(4, 64) as channel:
        waiter = crew.start(aget_one, channel)
        workers.until(lambda: channel.stats().waiting_receivers)
        os.kill(waiter.pid, signal.SIGSTOP)
        (name,) = wakes(channel)
        fd = fifos.open_existing(f"/dev/shm/{name}")
        with suppress(BlockingIOError):
            while True:
                os.write(fd, bytes(4096))
        os.close(fd)
        for k in range(4):
            channel._open().words[MESSAGE_HINT] = 1
            channel.put(k)
        os.kill(waiter.pid, signal.SIGCONT)
        assert waiter.result() == 0


@pytest.fixture
def attached() -> Iterator[ringshm.Channel]:
    with ringshm.Channel(2, 64) as channel:
        yield channel


def _next_fifo(channel: ringshm.Channel) -> Path:
    """Where this process's first FIFO will be."""
    attachment = channel._open()
    index, entry = attachment.participants.index, attachment.participants.entry
    return Path(fifos.path_of(attachment.segment.nonce, index, attachment.words[entry + P_INCARNATION], 0))


@pytest.mark.parametrize("what", ["file", "link", "directory"])
def test_something_else_in_the_place_of_a_fifo_is_an_error_that_names_it(
    what: str, attached: ringshm.Channel, tmp_path: Path
) -> None:
    path, target = _next_fifo(attached), tmp_path / "target"
    target.write_bytes(b"mine")
    if what == "file":
        path.write_bytes(b"mine")
    elif what == "link":
        path.symlink_to(target)
    else:
        path.mkdir()
    with pytest.raises(ringshm.ChannelCorrupted, match=f"{path} is no FIFO"):
        asyncio.run(attached.aget(timeout=5))
    assert target.read_bytes() == b"mine"
    path.rmdir() if what == "directory" else path.unlink()
    with pytest.raises(queue.Empty):
        asyncio.run(attached.aget(timeout=0.2))


@pytest.mark.parametrize("what", ["file", "link"])
def test_nothing_is_written_to_what_takes_the_place_of_a_fifo(
    what: str, attached: ringshm.Channel, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.touch()
    with workers.Crew("fork") as crew:
        waiter = crew.start(aget_one, attached)
        workers.until(lambda: attached.stats().waiting_receivers)
        (name,) = wakes(attached)
        path = Path(f"/dev/shm/{name}")
        path.unlink()
        if what == "file":
            path.touch()
            target = path
        else:
            path.symlink_to(target)
        attached.put("seen within a slice")
        assert waiter.result() == "seen within a slice"
        assert target.read_bytes() == b""
        path.unlink()  # the waiter has let it be


@pytest.mark.parametrize("mask", [0, 0o777])
def test_a_fifo_is_its_users_alone_whatever_the_umask(mask: int, attached: ringshm.Channel) -> None:
    before = os.umask(mask)
    try:
        assert os.fstat(attached.fileno()).st_mode & 0o7777 == 0o600
    finally:
        os.umask(before)


def test_a_fifo_that_was_removed_by_hand_costs_a_slice_and_no_message(attached: ringshm.Channel) -> None:
    with workers.Crew("fork") as crew:
        waiter = crew.start(aget_one, attached)
        workers.until(lambda: attached.stats().waiting_receivers)
        for name in wakes(attached):
            os.unlink(f"/dev/shm/{name}")
        attached.put("seen")
        assert waiter.result() == "seen"


def test_a_damaged_word_of_listeners_harms_nobody(attached: ringshm.Channel) -> None:
    attachment = attached._open()
    for word in (P_LISTENS_MESSAGE, P_FIFOS):
        attachment.words[attachment.participants.entry + word] = (1 << 64) - 1
    attachment.words[LISTENED] = 1
    attached.put(1)
    attachment.messages.wake_all()
    assert attached.get() == 1
    for word in (P_LISTENS_MESSAGE, P_FIFOS):
        attachment.words[attachment.participants.entry + word] = 0


def test_a_reused_entrys_fifo_is_another() -> None:
    with workers.Crew("fork") as crew, ringshm.Channel(2, 64) as channel:
        for k in range(3):
            waiter = crew.start(aget_one, channel)
            workers.until(lambda: channel.stats().waiting_receivers)
            channel.put(k)
            assert waiter.result() == k
            workers.until(lambda: not wakes(channel))


def test_a_maker_and_a_cleaner_at_work_at_a_time_leave_the_makers_fifo(tmp_path: Path) -> None:
    path = f"/dev/shm/{fifos.PREFIX}{'0' * 16}.0.{os.getpid()}.0"
    stop, cleaned = threading.Event(), 0

    def clean_all_the_time() -> None:
        nonlocal cleaned
        while not stop.is_set():
            cleaned += fifos.remove_orphan(path)

    cleaner = threading.Thread(target=clean_all_the_time)
    cleaner.start()
    try:
        rounds = 0
        while rounds < 300 or cleaned < 10:
            rounds += 1
            fd = fifos.make(path)
            assert os.fstat(fd).st_ino == os.stat(path).st_ino
            assert not fifos.is_orphan(path)
            os.close(fd)
            time.sleep(rounds % 3 / 10_000)
    finally:
        stop.set()
        cleaner.join()
        fifos.remove(path)
    assert cleaned >= 10

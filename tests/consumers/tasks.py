"""Queues, the seed system's pair, and asyncio."""

from __future__ import annotations

import asyncio
import queue
from typing import TYPE_CHECKING, Any

from ringshm import (
    AsyncBorrow,
    Borrow,
    Channel,
    JoinableQueue,
    Loan,
    Queue,
    SharedMemoryReceiver,
    SharedMemorySender,
    SimpleQueue,
    create_shared_memory_pair,
)

if TYPE_CHECKING:
    from typing_extensions import assert_type
else:

    def assert_type(value, _):
        return value


def queues() -> None:
    tasks, texts, untold = Queue[int](), SimpleQueue[str](), Queue()
    tasks.put(1)
    tasks.put_many([2, 3])
    assert_type(tasks.get(), int)
    assert_type(tasks.get_many(), list[int])
    texts.put("text")
    assert_type(texts.get(), str)
    assert_type(untold, Queue[Any])
    joinable: JoinableQueue[int] = JoinableQueue(8)
    joinable.put(1)
    assert_type(joinable.get(), int)
    joinable.task_done()
    assert_type(joinable.join(timeout=1), bool)


def pair() -> None:
    ends: tuple[SharedMemorySender[int], SharedMemoryReceiver[int]] = create_shared_memory_pair(4, "1KiB")
    with ends[0] as sender, ends[1] as receiver:
        sender.put(1)
        assert_type(receiver.get(), int)
        assert_type(receiver.get_nowait(), int | None)
    some_sender, some_receiver = create_shared_memory_pair(4, "1KiB")
    assert_type(some_sender, SharedMemorySender[Any])
    some_sender.close()
    some_receiver.close()


async def in_an_event_loop(channel: Channel[int]) -> None:
    await channel.aput(1)
    assert_type(await channel.aget(timeout=1), int)
    async with channel.aloan() as loan:
        assert_type(loan, Loan)
        loan.discard()
    await channel.aput(2)
    block = channel.aborrow()
    assert_type(block, AsyncBorrow[int])
    async with block as message:
        assert_type(message, Borrow[int])
        assert_type(message.value, int)
    try:
        await channel.aget(0)
    except queue.Empty:
        pass
    assert_type(await channel.aput_many([3, 4]), int)
    assert_type(await channel.aget_many(1, timeout=1), list[int])
    assert_type(await channel.aflush(timeout=0), bool)
    channel.shutdown()
    async for number in channel:
        assert_type(number, int)


if __name__ == "__main__":
    queues()
    pair()
    with Channel[int](4, 64) as numbers:
        asyncio.run(in_an_event_loop(numbers))

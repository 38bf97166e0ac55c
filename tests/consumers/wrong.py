"""Mistakes that a type checker must find, each on the line that says so; it is never run."""

from __future__ import annotations

from typing import Any, TypedDict

import ringshm
from ringshm import Channel, Codec, JoinableQueue, Latest, Queue, Receiver, Sender, Spec


class Step(TypedDict):
    reward: float


class Text:
    name = "text"

    def encode(self, obj: str) -> bytes:
        return obj.encode()

    def decode(self, data: memoryview) -> str:
        return str(data, "utf-8")


class NoBuffer:
    name = "no buffer"

    def encode(self, obj: str) -> str:
        return obj

    def decode(self, data: memoryview) -> str:
        return str(data, "utf-8")


class NoName:
    def encode(self, obj: str) -> bytes:
        return obj.encode()

    def decode(self, data: memoryview) -> str:
        return str(data, "utf-8")


def messages(channel: Channel[int], sender: Sender[int], receiver: Receiver[int], latest: Latest[int]) -> None:
    channel.put("text")  # error: no int
    channel.put_many([1, "text"])  # error: one is no int
    text: str = channel.get()  # error: an int
    texts: list[str] = channel.get_many(3)  # error: a list of int
    for message in channel:
        text = message  # error: an int
    with channel.borrow() as borrow:
        text = borrow.value  # error: an int
    latest.publish(text)  # error: no int
    version, value = latest.read()
    text = value  # error: an int
    print(text, texts, version)


def roles(channel: Channel[int], sender: Sender[int], receiver: Receiver[int]) -> None:
    sender.get()  # error: it only sends
    receiver.put(1)  # error: it only receives
    ringshm.wait([sender])  # error: it only sends
    floats: Channel[float] = channel  # error: whoever may put a float may not put it here
    sends_more: Sender[object] = sender  # error: it sends int only
    receives_less: Receiver[bool] = receiver  # error: it receives any int
    print(floats, sends_more, receives_less)


def constructors() -> None:
    Channel(4)  # error: neither slot_size nor spec
    Channel(4, 64, spec={"x": float})  # error: both
    Channel(4, "1KiB", wait="blok")  # error: no such strategy
    Channel(4, "1KiB", codec="json")  # error: no such codec
    Channel(4, "1KiB", slots=3)  # error: no such option
    Channel[int](4, "1KiB", codec=Text())  # error: a codec for str
    Channel[str](4, "1KiB", codec=NoBuffer())  # error: it encodes to no buffer
    Channel[str](4, "1KiB", codec=NoName())  # error: it has no name
    codec: Codec[bytes] = Text()  # error: a codec for str
    channel: Channel[int] = Channel.attach("name", codec=Text())  # error: a codec for str
    Latest()  # error: neither slot_size nor spec
    print(codec, channel)


def fields(channel: Channel[Step], untold: Channel[dict[str, Any]]) -> None:
    untold.put(3)  # error: no dict
    channel.put({"reward": "much"})  # error: no float
    channel.get()["rewards"]  # error: no such field
    steps: Channel[Step] = Channel(4, spec={"reward": float})  # error: only Spec[Step](...) says so
    other: Channel[Step] = Channel(4, spec=Spec[dict[str, int]]({"reward": float}))  # error: of another type
    print(steps, other)


def queues(tasks: Queue[int]) -> None:
    tasks.put("text")  # error: no int
    text: str = tasks.get()  # error: an int
    tasks.task_done()  # error: that is JoinableQueue's
    more: JoinableQueue[int] = tasks  # error: the same
    print(text, more)


async def in_an_event_loop(channel: Channel[int]) -> None:
    await channel.aput("text")  # error: no int
    await channel.aput_many(["text"])  # error: no int
    text: str = await channel.aget()  # error: an int
    texts: list[str] = await channel.aget_many(3)  # error: a list of int
    async for message in channel:
        text = message  # error: an int
    async with channel.aborrow() as borrow:
        text = borrow.value  # error: an int
    print(text, texts)

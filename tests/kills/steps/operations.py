"""The calls that are killed at machine instructions: OPERATIONS, by name. A new operation is one entry. Each must run
compiled code.

A message bears a tag, a small number, all over its body, so that a torn one is told from a whole one (`tag_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ringshm import Channel, Latest

from .decoded import Mark

CAPACITY, PARTICIPANTS = 6, 6
_BODY, _LARGE = 300, 150_000  # bytes
SPEC = {"tag": np.int64, "body": (np.uint8, (_BODY,))}

#: Messages with that tag, by kind.
KINDS: dict[str, Callable[[int], Any]] = {
    "bytes": lambda tag: bytes([tag]) * _BODY,
    "array": lambda tag: np.full(_BODY // 8, tag, np.int64),
    "object": lambda tag: (tag, [tag] * _BODY, Mark()),  # which knows when it has been decoded to its end
    "arrays": lambda tag: {"tag": tag, "body": np.full(_BODY, tag, np.uint8), "mark": Mark()},  # beside a pickle
    "typed": lambda tag: {"tag": tag, "body": np.full(_BODY, tag, np.uint8)},
    # which are copied outside of the mutex
    "large": lambda tag: np.full(_LARGE, tag, np.uint8),
    "large arrays": lambda tag: {"tag": tag, "body": np.full(_LARGE, tag, np.uint8), "mark": Mark()},
}
SLOT_SIZES = dict.fromkeys(KINDS, 4096) | dict.fromkeys(("large", "large arrays"), 200_000)
UNTYPED = ("bytes", "array", "object", "arrays")
#: Kinds of which a process knows how many it has decoded to their ends.
MARKED = ("object", "arrays", "large arrays")


def tag_of(message: Any) -> Any:
    """The tag of a whole message; else what came instead."""
    if isinstance(message, dict):
        parts = [int(message["tag"]), *np.asarray(message["body"]).tolist()]
    elif isinstance(message, tuple):
        parts = [message[0], *message[1]]
    else:
        parts = list(message)
    whole = len(set(parts)) == 1 and len(parts) in (_BODY // 8, _BODY, _BODY + 1, _LARGE, _LARGE + 1)
    return int(parts[0]) if whole else f"TORN {message}"


@dataclass(frozen=True)
class Operation:
    """A call that a victim makes.

    Attributes:
        call: makes it, with the handle and the messages to send; gives the tags of what it has received.
        kinds: of messages.
        sends, takes: how many messages.
        waits: whether the ring is empty (or full) when it begins, and somebody helps once it waits.
        handle: the class of its handle.
    """

    call: Callable[[Any, Sequence[Any]], list[Any]]
    kinds: tuple[str, ...] = UNTYPED
    sends: int = 0
    takes: int = 0
    waits: bool = False
    handle: type[Any] = Channel


def _put_batch(channel: Any, messages: Sequence[Any]) -> list[Any]:
    channel.put_batch({name: np.stack([message[name] for message in messages]) for name in SPEC})
    return []


def _get_batch(channel: Any, _: Sequence[Any], n: int = 2) -> list[Any]:
    batch = channel.get_batch(n)
    return [tag_of({name: batch[name][row] for name in SPEC}) for row in range(n)]


def _loan(channel: Any, messages: Sequence[Any]) -> list[Any]:
    with channel.loan(nbytes=_BODY) as loan:
        loan.buffer[:_BODY] = messages[0]
    return []


def _loan_array(channel: Any, messages: Sequence[Any]) -> list[Any]:
    with channel.loan() as loan:
        loan.array(messages[0].shape, messages[0].dtype)[...] = messages[0]
    return []


def _loan_typed(channel: Any, messages: Sequence[Any]) -> list[Any]:
    with channel.loan() as loan:
        for name, value in messages[0].items():
            loan[name][...] = value
    return []


def _borrow(channel: Any, _: Sequence[Any]) -> list[Any]:
    with channel.borrow() as borrow:
        return [tag_of(borrow.value)]


def _put(channel: Any, messages: Sequence[Any]) -> list[Any]:
    channel.put(messages[0])
    return []


def _put_nowait(channel: Any, messages: Sequence[Any]) -> list[Any]:
    channel.put_nowait(messages[0])
    return []


def _put_many(channel: Any, messages: Sequence[Any]) -> list[Any]:
    channel.put_many(messages)
    return []


def _get(channel: Any, _: Sequence[Any]) -> list[Any]:
    return [tag_of(channel.get())]


def _get_nowait(channel: Any, _: Sequence[Any]) -> list[Any]:
    return [tag_of(channel.get_nowait())]


def _get_many(channel: Any, _: Sequence[Any]) -> list[Any]:
    return [tag_of(message) for message in channel.get_many(2)]


def _publish(latest: Any, messages: Sequence[Any]) -> list[Any]:
    latest.publish(messages[0])
    return []


def _read(latest: Any, _: Sequence[Any]) -> list[Any]:
    return [tag_of(latest.read()[1])]


OPERATIONS: dict[str, Operation] = {
    "put": Operation(_put, sends=1),
    "put nowait": Operation(_put_nowait, sends=1),
    "put typed": Operation(_put, ("typed",), sends=1),
    "put large": Operation(_put, ("large", "large arrays"), sends=1),
    "put many": Operation(_put_many, sends=2),
    "put batch": Operation(_put_batch, ("typed",), sends=2),
    "put that waits": Operation(_put, sends=1, waits=True),
    "loan": Operation(_loan, ("bytes",), sends=1),
    "loan an array": Operation(_loan_array, ("array",), sends=1),
    "loan typed": Operation(_loan_typed, ("typed",), sends=1),
    "get": Operation(_get, takes=1),
    "get nowait": Operation(_get_nowait, takes=1),
    "get typed": Operation(_get, ("typed",), takes=1),
    "get large": Operation(_get, ("large", "large arrays"), takes=1),
    "get many": Operation(_get_many, takes=2),
    "get batch": Operation(_get_batch, ("typed",), takes=2),
    "get that waits": Operation(_get, takes=1, waits=True),
    "get many that waits": Operation(_get_many, ("bytes",), takes=1, waits=True),
    "get batch that waits": Operation(partial(_get_batch, n=1), ("typed",), takes=1, waits=True),
    "borrow": Operation(_borrow, takes=1),
    "borrow typed": Operation(_borrow, ("typed",), takes=1),
    "publish": Operation(_publish, sends=1, handle=Latest),
    "publish typed": Operation(_publish, ("typed",), sends=1, handle=Latest),
    "read": Operation(_read, takes=1, handle=Latest),
    "read typed": Operation(_read, ("typed",), takes=1, handle=Latest),
    "borrow the newest": Operation(_borrow, ("bytes", "array", "arrays", "typed"), takes=1, handle=Latest),
}

"""Messages as bytes: encoded, copied into a slot, decoded again; and bytes that are no messages."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ringshm.messages import codecs, plain
from ringshm.messages.buffers import ALIGNMENT, Parts

OFFSET = mmap.PAGESIZE


class Point(NamedTuple):
    """A NamedTuple with a default, in this module."""

    x: Any
    y: Any = None


class Outer:
    """Something to nest a class in."""

    class Inner(NamedTuple):
        """A NamedTuple within a class."""

        z: Any


class Labelled(np.ndarray):
    """A subclass of ndarray."""


class Row(np.void):
    """A type of scalars, for dtypes that name it."""


class Unpickles:
    """An object that becomes the result of a call where it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def trap(act: Callable[[], None], value: str) -> Unpickles:
    """A message that becomes `value`; every process but this one acts in the middle of its `get`."""
    return Unpickles(_spring, act, value, os.getpid())


def _spring(act: Callable[[], None], value: str, spared: int) -> str:
    if os.getpid() != spared:
        act()
    return value


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


class Slot:
    """Memory as a segment has it: a page for descriptions, then one slot."""

    def __init__(self, nbytes: int) -> None:
        self.memory = mmap.mmap(-1, OFFSET + max(1, nbytes))

    def write(self, encoded: codecs.Encoded) -> tuple[Any, int, int, int]:
        """Copy an encoded message into the slot, as the ring does; the arguments for `decode`."""
        meta, data, description = encoded
        nbytes = meta >> 16
        if isinstance(data, Parts):
            assert data.nbytes == nbytes
            data.write(self.memory, OFFSET)
        else:
            self.memory[OFFSET : OFFSET + nbytes] = data
        assert meta >> 8 & 0xFF == len(description)
        self.memory[: len(description)] = description
        return self.memory, OFFSET, meta, 0

    def overwrite(self) -> None:
        """What the next message does."""
        self.memory[:] = b"\xa5" * len(self.memory)


def decode_plain(kind: int, payload: bytes, description: bytes = b"") -> Any:
    slot = Slot(len(payload))
    meta = len(payload) << 16 | len(description) << 8 | kind
    return plain.PlainCodec().decode(*slot.write((meta, payload, description)))


def encoded_bytes(obj: Any) -> tuple[int, bytes, bytes]:
    meta, _, description = encoded = plain.PlainCodec().encode(obj)
    slot = Slot(meta >> 16)
    slot.write(encoded)
    return meta & 0xFF, slot.memory[OFFSET : OFFSET + (meta >> 16)], description


def tagged(tag: int, raw: bytes) -> bytes:
    return bytes([tag]) + struct.pack("<I", len(raw)) + raw


def array_stream(dtype: str, shape: tuple[int, ...], flags: int = 0) -> bytes:
    head = bytes([plain._T_ARRAY]) + struct.pack(f"<BB{len(shape)}Q", flags, len(shape), *shape)
    return head + struct.pack("<I", len(dtype)) + dtype.encode()


def with_buffers(stream: bytes, *buffers: bytes) -> bytes:
    table = b"".join(struct.pack("<Q", len(buffer) << 1) for buffer in buffers)
    raw = struct.pack("<IQ", len(buffers), len(stream)) + table + stream
    for buffer in buffers:
        raw += bytes(-len(raw) % ALIGNMENT) + buffer
    return raw


HUGE = (1 << 62, 1 << 40, 1 << 20)
HOSTILE: dict[str, tuple[int, bytes]] = {
    "list of 4 billion": (codecs.CONTAINER, bytes([plain._T_LIST]) + b"\xff" * 4),
    "dict of 4 billion": (codecs.CONTAINER, bytes([plain._T_DICT]) + b"\xff" * 4),
    "str of 4 GB": (codecs.CONTAINER, bytes([plain._T_STR]) + b"\xff" * 4),
    "nested a million deep": (codecs.CONTAINER, (bytes([plain._T_LIST]) + struct.pack("<I", 1)) * 1_000_000),
    "buffer of 2**63 bytes": (codecs.CONTAINER_OOB, struct.pack("<IQQ", 1, 1, (1 << 64) - 1) + b"\0"),
    "4 billion buffers": (codecs.CONTAINER_OOB, struct.pack("<IQ", (1 << 32) - 1, 0)),
    "stream of 2**64 bytes": (codecs.CONTAINER_OOB, struct.pack("<IQ", 0, (1 << 64) - 1)),
    **{
        f"{count} items of no size": (codecs.CONTAINER_OOB, with_buffers(array_stream("|V0", (count,)), b""))
        for count in HUGE
    },
    "shape that overflows": (codecs.CONTAINER_OOB, with_buffers(array_stream("<f8", (1 << 33, 1 << 33, 0)), b"")),
    "255 dimensions": (codecs.CONTAINER_OOB, with_buffers(array_stream("|u1", (1,) * 255), b"x")),
    "item of 2 GB": (codecs.CONTAINER_OOB, with_buffers(array_stream("|V2147483647", (0,)), b"")),
    "dtype of brackets": (codecs.CONTAINER, tagged(plain._T_DTYPE, b"[" * 100_000)),
    "dtype of minus signs": (codecs.CONTAINER, tagged(plain._T_DTYPE, b"(" + b"-" * 100_000 + b"1")),
    "dtype of closed minus signs": (codecs.CONTAINER, tagged(plain._T_DTYPE, b"[" + b"-" * 3000 + b"1]")),
    "dtype of nested subarrays": (codecs.CONTAINER, tagged(plain._T_DTYPE, b"(" * 80 + b"'<f4'" + b",(9,))" * 80)),
    "dtype of objects": (codecs.CONTAINER, tagged(plain._T_DTYPE, b"|O")),
    "dtype of hidden objects": (codecs.CONTAINER, tagged(plain._T_DTYPE, b"[('a', '<f4'), ('b', '|O')]")),
    "scalar of objects": (codecs.CONTAINER, tagged(plain._T_SCALAR, b"|O") + struct.pack("<I", 8) + bytes(8)),
    "array of objects": (codecs.CONTAINER_OOB, with_buffers(array_stream("|O", (1,)), bytes(8))),
    "dtype that is code": (codecs.CONTAINER, tagged(plain._T_DTYPE, b"[__import__('os').abort()]")),
    "dict with unhashable key": (codecs.CONTAINER, bytes([plain._T_DICT, 1, 0, 0, 0, plain._T_LIST, 0, 0, 0, 0, 0])),
    "set of lists": (codecs.CONTAINER, bytes([plain._T_SET, 1, 0, 0, 0, plain._T_LIST, 0, 0, 0, 0])),
    "unknown tag": (codecs.CONTAINER, b"\xee"),
    "nothing": (codecs.CONTAINER, b""),
    "two messages": (codecs.CONTAINER, bytes([plain._T_NONE] * 2)),
    "unused buffer": (codecs.CONTAINER_OOB, with_buffers(bytes([plain._T_NONE]), b"abc")),
    "too few buffers": (codecs.CONTAINER_OOB, with_buffers(array_stream("<f8", (1,)))),
    "str of bad UTF-8": (codecs.STR, b"\xff\xfe"),
    "int of 3 bytes": (codecs.INT, b"abc"),
    "float of 9 bytes": (codecs.FLOAT, b"a" * 9),
    "custom kind": (codecs.CUSTOM, b"abc"),
    "unknown kind": (200, b"abc"),
}


NOT_NAMEDTUPLES = [
    "os:system", "builtins:tuple", "builtins:eval", "no_such_module_at_all:Point", "antigravity:Point",
    "xml.dom.minidom:Node", f"{__name__}:Labelled", f"{__name__}:Outer", f"{__name__}:Outer.Missing", f"{__name__}:",
    f"{__name__}:Point.x", f"{__name__}:__builtins__", "", ":", "::", "sys:modules", "time:struct_time",
]  # fmt: skip

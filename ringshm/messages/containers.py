"""Containers: a stream of bytes that describes an object, and behind it the large buffers that the stream refers to.

    CONTAINER        the stream, and nothing else
    CONTAINER_OOB    n, length of the stream (4 + 8 bytes); n times the length of a buffer << 1 | read-only (8 bytes);
                     the stream; the buffers, each aligned to 64 bytes

"pickle" and "plain" fill the stream differently; where the buffers lie, and whose memory they become, is the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .bare import adopt_bare, view_bare
from .buffers import Parts, aligned
from .codecs import CONTAINER, CONTAINER_OOB, CUSTOM, Encoded
from .pool import LEAST_NBYTES, Pool, owned_copy

#: (start, end, read-only) of each buffer.
Places: TypeAlias = list[tuple[int, int, bool]]

#: From this size on a `bytes` object travels as a buffer. Up to it a stream is copied out before it is decoded, which
#: is cheaper than a memoryview and its release.
LARGE_NBYTES = 64 * 1024
_HEAD = struct.Struct("<IQ")


def pack_container(stream: list[Any], buffers: list[tuple[Any, int, bool]]) -> Encoded:
    """The container of a stream, in bytes-like pieces, and of buffers.

    Of each buffer it takes (source, nbytes, readonly); a source is a buffer or an array.
    """
    length = sum(map(len, stream))
    if not buffers and len(stream) == 1:
        return length << 16 | CONTAINER, stream[0], b""
    parts, kind = Parts(), CONTAINER
    if buffers:
        kind = CONTAINER_OOB
        table = struct.pack(f"<{len(buffers)}Q", *(nbytes << 1 | readonly for _, nbytes, readonly in buffers))
        head = _HEAD.pack(len(buffers), length) + table
        parts.add(head, len(head))
    for piece in stream:
        parts.add(piece, len(piece))
    for source, nbytes, _ in buffers:
        parts.align()
        if not isinstance(source, np.ndarray):
            parts.add(source, nbytes)
        elif nbytes:
            parts.add(_flat(source) if source.flags.c_contiguous else source, nbytes)
    return parts.nbytes << 16 | kind, parts, b""


def _flat(array: NDArray[Any]) -> Any:
    """A C-contiguous array as a buffer of bytes; a dtype such as datetime64 does not export one itself."""
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


def unpack_container(memory: Any, offset: int, nbytes: int) -> tuple[tuple[int, int], Places]:
    """Where the stream (start, end) and the buffers of a CONTAINER_OOB lie; ValueError if they reach beyond its end."""
    end = offset + nbytes
    if nbytes < _HEAD.size:
        raise ValueError(f"container of {nbytes} bytes has no head")
    count, length = _HEAD.unpack(memory[offset : offset + _HEAD.size])
    start = offset + _HEAD.size
    if count * 8 + length > end - start:
        raise ValueError(f"container of {nbytes} bytes claims {count} buffers and a stream of {length} bytes")
    table = struct.unpack(f"<{count}Q", memory[start : start + 8 * count])
    start += 8 * count
    stream = (start, start + length)
    start += length
    buffers = []
    for entry in table:
        start = offset + aligned(start - offset)
        if entry >> 1 > end - start:
            raise ValueError(f"container of {nbytes} bytes claims a buffer of {entry >> 1} bytes")
        buffers.append((start, start + (entry >> 1), bool(entry & 1)))
        start += entry >> 1
    return stream, buffers


class ContainerCodec:
    """What "pickle" and "plain" share: bare objects need no container, and views of a payload are parts of it."""

    def __init__(self, pool: Pool | None = None, name: str = "") -> None:
        self._pool = pool
        self._name = name  # the channel's, for errors

    def view(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The object; arrays, and all else that lies beside the stream, are views of the payload."""
        kind = meta & 0xFF
        if kind > CUSTOM:
            return view_bare(payload, meta, description)
        return self._read(payload.data, kind, lambda view, places: [view[start:end] for start, end, _ in places])

    def adopt(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        """The object; arrays are views of the payload, which is the caller's own, and writable."""
        kind = meta & 0xFF
        if kind > CUSTOM:
            return adopt_bare(payload, meta, description)
        return self._read(payload.data, kind, lambda _, places: adopted_buffers(payload, places))

    def _read(self, view: memoryview, kind: int, buffers_of: Callable[[memoryview, Places], list[Any]]) -> Any:
        """The object of a container; `buffers_of` makes the stream's buffers of their places."""
        raise NotImplementedError


def owned_buffers(view: memoryview, buffers: Places, pool: Pool | None) -> list[Any]:
    """Copies of the buffers: `bytes` of read-only ones, writable memory of the others."""
    return [
        bytes(view[start:end])
        if readonly
        else bytearray(view[start:end])
        if pool is None or end - start < LEAST_NBYTES
        else owned_copy(np.frombuffer(view, np.uint8, end - start, start), pool)
        for start, end, readonly in buffers
    ]


def adopted_buffers(payload: NDArray[np.uint8], buffers: Places) -> list[Any]:
    """The buffers as parts of the payload, which is the caller's own; read-only ones are copied to `bytes`."""
    return [payload[start:end].tobytes() if readonly else payload[start:end] for start, end, readonly in buffers]

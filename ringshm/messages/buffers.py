"""Messages in several parts. Each part is copied once, from where it is straight to its place in a slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Arrays of a message start at multiples of this many bytes: a cache line, and the widest vector register.
ALIGNMENT = 64
#: Items of a strided array that are gathered at once: little enough to stay in the cache.
_CHUNK_ITEMS = 8192


def aligned(nbytes: int) -> int:
    """The least multiple of ALIGNMENT that is at least `nbytes`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Parts:
    """A message in parts: C-contiguous buffers, and strided arrays, which the copy itself makes contiguous."""

    __slots__ = ("_parts", "nbytes")

    def __init__(self) -> None:
        self._parts: list[tuple[int, Any]] = []
        self.nbytes = 0

    def add(self, source: Any, nbytes: int) -> None:
        """Append a part right behind the last one."""
        self._parts.append((self.nbytes, source))
        self.nbytes += nbytes

    def align(self) -> None:
        """Leave a gap, so that the next part is aligned."""
        self.nbytes = aligned(self.nbytes)

    def write_range(self, target: NDArray[np.uint8], begin: int) -> None:
        """Copy the message's bytes from byte `begin` on, as many as the target holds."""
        end = begin + len(target)
        for start, source in self._parts:
            nbytes = source.nbytes if isinstance(source, np.ndarray) else len(source)
            low, high = max(begin, start), min(end, start + nbytes)
            if low < high:
                _copy_range(target[low - begin : high - begin], source, low - start)

    def write(self, memory: Any, offset: int) -> None:
        """Copy all parts to that offset of the memory."""
        for start, source in self._parts:
            start += offset
            if isinstance(source, np.ndarray):
                target: NDArray[Any] = np.ndarray(source.shape, source.dtype, memory, start)
                np.copyto(target, source)
            else:
                memory[start : start + len(source)] = source


def write_range(target: NDArray[np.uint8], data: Any, begin: int) -> None:
    """Copy bytes of a message, a C-contiguous buffer or Parts, from byte `begin` on: as many as the target holds."""
    if data.__class__ is Parts:
        data.write_range(target, begin)
    else:
        _copy_range(target, data, begin)


def _copy_range(target: NDArray[np.uint8], source: Any, begin: int) -> None:
    """Copy bytes of one part: of a C-contiguous buffer, or of an array of any strides as if it lay in C order."""
    if not isinstance(source, np.ndarray):
        target[...] = np.frombuffer(source, np.uint8, len(target), begin)
    elif source.flags.c_contiguous:
        target[...] = source.reshape(-1).view(np.uint8)[begin : begin + len(target)]
    else:
        size = source.dtype.itemsize
        first, last = begin // size, -(-(begin + len(target)) // size)
        whole = first * size == begin and last * size == begin + len(target)
        if whole and target.ctypes.data % source.dtype.alignment == 0:
            items: NDArray[Any] = target.view(source.dtype)
            _copy_items(items, source, first)
        else:  # a piece begins or ends within an item
            items = np.zeros(last - first, source.dtype)  # no memory of this process may be sent as padding
            _copy_items(items, source, first)
            target[...] = items.view(np.uint8)[begin - first * size :][: len(target)]


def _copy_items(target: NDArray[Any], source: NDArray[Any], first: int) -> None:
    """Copy as many items as the target holds, in C order from item `first` on."""
    items: Any = np.nditer(source, ["external_loop", "buffered", "ranged"], order="C", buffersize=_CHUNK_ITEMS)
    items.iterrange = first, first + len(target)
    done = 0
    for chunk in items:
        target[done : done + len(chunk)] = chunk
        done += len(chunk)


@dataclass(slots=True, eq=False, repr=False)
class Row:
    """A message of fields. It writes each field into the slot's row of that field's column, an array over all slots.

    Attributes:
        columns: for each field its array of shape `(capacity, *shape)`.
        up_to: for each field whether its first dimension may be shorter, or None if none may.
        first, stride: the byte at which the slots start, and the bytes from one slot to the next.
        values: one for each field; they must fit.
    """

    columns: list[NDArray[Any]]
    up_to: list[bool] | None
    first: int
    stride: int
    values: list[Any]

    def write(self, memory: Any, offset: int) -> None:
        """Copy each field to its place in the slot that starts at `offset`; the columns lie over `memory`."""
        slot = (offset - self.first) // self.stride
        if self.up_to is None:
            for column, value in zip(self.columns, self.values):  # noqa: B905
                column[slot] = value
        else:
            for column, cut, value in zip(self.columns, self.up_to, self.values, strict=True):
                if cut:
                    column[slot, : len(value)] = value
                else:
                    column[slot] = value

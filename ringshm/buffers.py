"""Bytes that go to several places of one slot, each copied once, straight from where they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Arrays of a message start at multiples of this many bytes: a cache line, and the widest vector register.
ALIGNMENT = 64


class Parts:
    """A message in parts: C-contiguous buffers, or strided arrays, which are made contiguous by the copy itself."""

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
        self.nbytes = -(-self.nbytes // ALIGNMENT) * ALIGNMENT

    def write(self, memory: Any, offset: int) -> None:
        """Copy all parts to that offset of the memory."""
        for start, source in self._parts:
            start += offset
            if isinstance(source, np.ndarray):
                target: NDArray[Any] = np.ndarray(source.shape, source.dtype, memory, start)
                np.copyto(target, source)
            else:
                memory[start : start + len(source)] = source


class Row:
    """A message of fields, each of which has one array over all slots: it writes itself into a slot's row of those.

    Args:
        columns: for each field its array of shape `(capacity, *shape)`.
        up_to: for each field whether its first dimension may be shorter, or None if none may.
        first, stride: bytes at which the slots start, and from one to the next.
        values: what goes into each field; they must fit.
    """

    __slots__ = ("_columns", "_first", "_stride", "_up_to", "_values")

    def __init__(
        self, columns: list[NDArray[Any]], up_to: list[bool] | None, first: int, stride: int, values: list[Any]
    ) -> None:
        self._columns = columns
        self._up_to = up_to
        self._first = first
        self._stride = stride
        self._values = values

    def write(self, memory: Any, offset: int) -> None:
        """Copy each field to its place in the slot that starts at that offset; the memory is the columns'."""
        slot = (offset - self._first) // self._stride
        if self._up_to is None:
            for column, value in zip(self._columns, self._values):  # noqa: B905
                column[slot] = value
        else:
            for column, cut, value in zip(self._columns, self._up_to, self._values, strict=True):
                if cut:
                    column[slot, : len(value)] = value
                else:
                    column[slot] = value

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

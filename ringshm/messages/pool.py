"""Warm memory for large arrays that are received: a pool lends it again once nothing refers to it any more.

The first write to new memory costs a process a page fault for every 4 KiB, some ten times as much as the copy, and C's
allocator gives large blocks back to the kernel whenever they are freed. So large arrays that `get` and similar calls
return lie in blocks that a pool keeps.

1. A block is lent as an array. Everything made of that refers to it: views (as their `base`), memoryviews, tensors.
   So a block is free once that array has gone, by a weak reference. No finaliser is needed, and memory that a
   program can still see is never lent again.
2. There is one pool in a process. It holds at most `limit` bytes, in use or not; arrays beyond that lie in memory like
   any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from ..system import Lock
from .buffers import ALIGNMENT

#: Arrays from this size on come from the pool, which costs 2 us. Smaller blocks stay with C's allocator, mostly warm.
LEAST_NBYTES = 1024 * 1024
#: Bytes that a process keeps: two messages of 100 MB, since a loop of `get`s holds one while it gets the next.
LIMIT_NBYTES = 256 * 1024 * 1024


class _Memory(np.ndarray[Any, np.dtype[np.uint8]]):
    """The memory of a block. NumPy follows bases of one type: the base of views of what is lent is that, not this."""


class _Block:
    """Memory of a pool, and whether it is lent."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._memory = _Memory(nbytes + ALIGNMENT, np.uint8)
        self._start = -self._memory.__array_interface__["data"][0] % ALIGNMENT
        self._lent: Callable[[], object] = _nothing

    def is_free(self) -> bool:
        """Whether nothing refers to the memory but this object."""
        return self._lent() is None

    def lend(self, nbytes: int) -> NDArray[np.uint8]:
        """Its first bytes."""
        array: NDArray[np.uint8] = np.ndarray(nbytes, np.uint8, self._memory, self._start)
        self._lent = ref(array)
        return array


def _nothing() -> None:
    return None


class Pool:
    """Blocks of memory, up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks: list[_Block] = []
        self.begin_anew()

    def begin_anew(self) -> None:
        """Make the lock anew in a forked child: a thread of the parent may have held it. The blocks are copies."""
        self._lock = Lock()

    def empty(self, nbytes: int) -> NDArray[np.uint8]:
        """That many bytes, to which nothing else refers; their content is left over."""
        if not self._lock.acquire(blocking=False):  # held by another thread, or by this one, interrupted there
            return np.empty(nbytes, np.uint8)
        try:
            block = self._find(nbytes)
            return np.empty(nbytes, np.uint8) if block is None else block.lend(nbytes)
        finally:
            self._lock.release()

    def _find(self, nbytes: int) -> _Block | None:
        """A free block of that size to twice as much; or a new one, for which free ones may be dropped."""
        blocks = self._blocks
        for block in blocks:
            if nbytes <= block.nbytes <= 2 * nbytes and block.is_free():
                return block
        if nbytes > self._limit:
            return None
        held = sum(block.nbytes for block in blocks)
        for block in reversed(blocks.copy()):
            if held + nbytes <= self._limit:
                break
            if block.is_free():
                held -= block.nbytes
                blocks.remove(block)
        if held + nbytes > self._limit:
            return None
        blocks.append(_Block(nbytes))
        return blocks[-1]


#: The process's pool.
POOL = Pool(LIMIT_NBYTES)
os.register_at_fork(after_in_child=POOL.begin_anew)


def owned_copy(array: NDArray[Any], pool: Pool | None, order: Any = "C") -> NDArray[Any]:
    """A copy that the caller owns; a large one lies in a block of the pool, if there is one."""
    if pool is None or array.nbytes < LEAST_NBYTES:
        return array.copy(order)
    copy: NDArray[Any] = np.ndarray(array.shape, array.dtype, pool.empty(array.nbytes), 0, None, order)
    np.copyto(copy, array)
    return copy


def owned_bytes(nbytes: int, pool: Pool | None) -> NDArray[np.uint8]:
    """That many bytes that the caller owns, with any content; many of them come from the pool, if there is one."""
    if pool is None or nbytes < LEAST_NBYTES:
        return np.empty(nbytes, np.uint8)
    return pool.empty(nbytes)

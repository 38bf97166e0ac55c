"""Warm memory for large arrays that are received: used again once nothing refers to it any more.

Memory that a process writes for the first time costs it a page fault for every 4 KiB, some ten times what the copy
costs, and C's allocator gives large blocks back to the kernel whenever they are freed. So large arrays that `get` and
the like return lie in blocks that a pool keeps.

1. An array refers to its block, as its `base`, and so does everything that is made of it: views, memoryviews, tensors.
   So a block that nobody but the pool refers to, by its count of references, is free. No finaliser is needed, and none
   can come too early: what a process can still see is never handed out again.
2. The pool is the process's, and holds `limit` bytes at most, in use or not. What does not go into it is memory like
   any other.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .buffers import ALIGNMENT

#: Arrays from this size on come from the pool, which costs 2 us. Smaller blocks stay with C's allocator, mostly warm.
LEAST_NBYTES = 1024 * 1024
#: Bytes that a process keeps: two messages of 100 MB, of which a loop of `get`s holds one while it gets the next.
LIMIT_NBYTES = 256 * 1024 * 1024

_LIST = [object()]
#: References to a free block: the pool's list, and the call of `getrefcount`.
_FREE = sys.getrefcount(_LIST[0])


class Pool:
    """Blocks of memory, up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks: list[NDArray[np.uint8]] = []
        self.begin_anew()

    def begin_anew(self) -> None:
        """In a forked child, whose parent may have had another thread in here. The blocks are its own copies."""
        self._lock = threading.Lock()

    def empty(self, nbytes: int) -> NDArray[np.uint8]:
        """So many bytes that nobody else can see; they hold whatever they held."""
        if not self._lock.acquire(blocking=False):  # another thread's turn, or this one's, interrupted there
            return np.empty(nbytes, np.uint8)
        try:
            block = self._find(nbytes)
            if block is None:
                return np.empty(nbytes, np.uint8)
            start = -block.__array_interface__["data"][0] % ALIGNMENT
            return block[start : start + nbytes]
        finally:
            self._lock.release()

    def _find(self, nbytes: int) -> NDArray[np.uint8] | None:
        """A free block of that size to twice as much, or a new one, for which free ones may have to go."""
        blocks, size = self._blocks, nbytes + ALIGNMENT
        for index in range(len(blocks)):
            if sys.getrefcount(blocks[index]) == _FREE and size <= blocks[index].nbytes <= 2 * size:
                return blocks[index]
        if size > self._limit:
            return None
        held = sum(block.nbytes for block in blocks)
        block = None
        for index in reversed(range(len(blocks))):
            if held + size <= self._limit:
                break
            if sys.getrefcount(blocks[index]) == _FREE:
                held -= blocks[index].nbytes
                del blocks[index]
        if held + size > self._limit:
            return None
        block = np.empty(size, np.uint8)
        blocks.append(block)
        return block


#: The process's.
POOL = Pool(LIMIT_NBYTES)
os.register_at_fork(after_in_child=POOL.begin_anew)


def owned_copy(array: NDArray[Any], pool: Pool | None, order: Any = "C") -> NDArray[Any]:
    """A copy that the caller owns; large ones in a block of the pool, if there is one."""
    if pool is None or array.nbytes < LEAST_NBYTES:
        return array.copy(order)
    copy: NDArray[Any] = np.ndarray(array.shape, array.dtype, pool.empty(array.nbytes), 0, None, order)
    np.copyto(copy, array)
    return copy


def owned_bytes(nbytes: int, pool: Pool | None) -> NDArray[np.uint8]:
    """So many bytes that the caller owns, whatever they hold; large ones from the pool, if there is one."""
    if pool is None or nbytes < LEAST_NBYTES:
        return np.empty(nbytes, np.uint8)
    return pool.empty(nbytes)

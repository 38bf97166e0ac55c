"""Warm memory for large arrays: used again, and never while anything can see it."""

from __future__ import annotations

import gc
import queue
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from support.workers import Crew, exit_code, fork_off, in_threads, may_fork

from ringshm import Channel, Latest
from ringshm.messages.pool import LEAST_NBYTES, LIMIT_NBYTES, POOL, Pool, owned_copy

pytestmark = may_fork

MANY = LEAST_NBYTES + 1000


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def _lies_in(pool: Pool, array: Any) -> bool:
    """Whether an array, or what it is a view of, is lent by that pool."""
    return any(block._lent() is array or block._lent() is array.base for block in pool._blocks if not block.is_free())


def test_memory_that_nobody_refers_to_is_used_again() -> None:
    pool = Pool(10 * MANY)
    first = pool.empty(MANY)
    assert (first.shape, first.dtype, first.flags.writeable) == ((MANY,), np.uint8, True)
    address = _address(first)
    assert address % 64 == 0
    second = pool.empty(MANY)
    assert _address(second) != address
    del first
    assert _address(pool.empty(MANY)) == address
    assert _address(pool.empty(MANY - 500)) == address
    assert _address(pool.empty(MANY * 3)) != address
    assert _address(pool.empty(MANY // 3)) != address


class _Holder:
    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self.itself = self  # only the garbage collector finds it


DERIVED: dict[str, Callable[[Any], Any]] = {
    "slice": lambda array: array[5:10],
    "reshaped": lambda array: array[:100].reshape(10, 10).T[::2],
    "other dtype": lambda array: array[:80].view(np.float64),
    "memoryview": lambda array: memoryview(array)[3:],
    "from a buffer": lambda array: np.frombuffer(memoryview(array), np.uint8)[1:],
    "array over it": lambda array: np.ndarray((3, 4), np.uint8, array, 8),
    "in a cycle": lambda array: _Holder(array[7:]),
    "iterator": lambda array: iter(array),
}


@pytest.mark.parametrize("derived", DERIVED)
def test_memory_that_anything_refers_to_is_not_used_again(derived: str) -> None:
    pool = Pool(10 * MANY)
    array = pool.empty(MANY)
    address, seen = _address(array), DERIVED[derived](array)
    del array
    held = [pool.empty(MANY) for _ in range(5)]
    assert address not in map(_address, held)
    del seen
    gc.collect()
    assert _address(pool.empty(MANY)) == address


def test_a_pool_holds_no_more_than_its_limit() -> None:
    pool = Pool(10 * MANY)
    held = [pool.empty(MANY) for _ in range(30)]
    assert len(set(map(_address, held))) == 30
    assert sum(block.nbytes for block in pool._blocks) <= 10 * MANY
    held.clear()
    large = pool.empty(9 * MANY)  # for which free ones have to go
    assert _lies_in(pool, large)
    assert sum(block.nbytes for block in pool._blocks) <= 10 * MANY
    beyond = pool.empty(11 * MANY)
    assert sum(block.nbytes for block in pool._blocks) <= 10 * MANY
    assert len(beyond) == 11 * MANY


def test_a_random_walk_never_gives_memory_out_twice() -> None:
    pool, rng, seed = Pool(20 * MANY), random.Random(1), 1
    held: dict[int, Any] = {}
    for number in range(3000):
        if held and rng.random() < 0.55:
            key = rng.choice([*held])
            assert (held.pop(key) == key % 251).all(), f"{seed=}"
        else:
            array = pool.empty(rng.randrange(MANY // 8, MANY * 2) // 256)
            array[...] = number % 251
            held[number] = array[1:-1] if rng.random() < 0.5 else array
        assert sum(block.nbytes for block in pool._blocks) <= 20 * MANY


def test_threads_get_memory_of_their_own() -> None:
    pool, wrong = Pool(100 * 4096), queue.SimpleQueue[int]()

    def work(me: int) -> None:
        for _ in range(500):
            array = pool.empty(4096)
            array[...] = me
            if not (array == me).all():
                wrong.put(me)

    with in_threads(*(partial(work, k) for k in range(8))):
        pass
    assert wrong.empty()


def test_a_forked_child_has_a_pool_though_a_thread_of_its_parent_was_in_it() -> None:
    array = POOL.empty(MANY)
    array[...] = 7

    def child() -> None:
        mine = POOL.empty(MANY)
        assert _lies_in(POOL, mine)
        mine[...] = 9
        assert (array == 7).all()

    with POOL._lock:
        pid = fork_off(child)
    assert exit_code(pid) == 0
    assert (array == 7).all()


def test_a_copy_is_as_numpys_own() -> None:
    pool = Pool(LIMIT_NBYTES)
    for array in (np.arange(400_000.0).reshape(400, 1000), np.arange(200_000.0).reshape(2, -1)[:, ::2], np.zeros(0)):
        for order in ("C", "F"):
            copy, numpys = owned_copy(array, pool, order), array.copy(order)  # type: ignore[call-overload]
            assert (copy == numpys).all()
            assert (copy.dtype, copy.shape, copy.strides) == (numpys.dtype, numpys.shape, numpys.strides)
            assert copy.flags.writeable


# --- through a channel


def _ways(array: Any) -> dict[str, Callable[[Channel], Any]]:
    def put(message: Any) -> Callable[[Channel], Any]:
        return lambda channel: (channel.put(message), channel.get())[1]

    def lend(channel: Channel) -> Any:
        with channel.loan() as loan:
            loan.array(array.shape, array.dtype)[...] = array
            loan.array(3)[...] = 1
        return channel.get()[0]

    return {
        "bare": put(array),
        "in a dict": lambda channel: put({"a": [array]})(channel)["a"][0],
        "get_many": lambda channel: (channel.put(array), channel.get_many(1))[1][0],
        "loan": lend,
    }


@pytest.mark.parametrize("codec", ["pickle", "plain"])
@pytest.mark.parametrize("way", _ways(np.zeros(1)))
def test_large_arrays_are_received_into_memory_of_before(way: str, codec: str) -> None:
    array = np.arange(MANY, dtype=np.uint8)
    move = _ways(array)[way]
    with Channel(2, 2 * MANY, codec=codec) as channel:
        first = move(channel)
        assert (first == array).all()
        assert first.flags.writeable
        assert first.flags.aligned
        kept, address = first[3:], _address(first)
        first[...] = 0
        del first
        second = move(channel)
        assert (kept == 0).all()
        assert (second == array).all()
        assert _address(second) != address
        del kept
        assert _address(move(channel)) == address
    with Channel(2, 2 * MANY, codec=codec, reuse_memory=False) as channel:
        own = move(channel)
        assert (own == array).all()
        assert not _lies_in(POOL, own)


def test_typed_messages_batches_and_newest_values_are_received_into_memory_of_before() -> None:
    spec = {"a": (np.uint8, MANY), "n": np.int64}
    with Channel(2, spec=spec) as channel, Latest(spec=spec) as latest:
        for give in (
            lambda: (channel.put({"a": np.ones(MANY, np.uint8), "n": 1}), channel.get())[1]["a"],
            lambda: (channel.put({"a": np.ones(MANY, np.uint8), "n": 1}), channel.get_batch(1))[1]["a"][0],
            lambda: (latest.publish({"a": np.ones(MANY, np.uint8), "n": 1}), latest.read())[1][1]["a"],
        ):
            array = give()
            assert array.all()
            address = _address(array)
            del array
            assert _address(give()) == address


def test_a_process_that_attaches_reuses_memory_as_the_channel_was_made() -> None:
    for reuse in (True, False):
        with Channel(2, MANY, reuse_memory=reuse, keep_open=True) as channel, Crew("spawn") as crew:
            channel.put_many([np.zeros(MANY, np.uint8)] * 2)
            assert crew.start(_receive_twice, channel).result() is reuse


def _receive_twice(channel: Channel) -> bool:
    arrays = channel.get_many(2)
    return all(_lies_in(POOL, array) for array in arrays)

"""What only the compiled path promises; all else about it is tested with what it does (tests/kills has its deaths)."""

from __future__ import annotations

import math
import select
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support.checks import check_whole
from support.seams import count_as_dead, header_of, waiting_for_space
from support.workers import Interrupt

import ringshm
from ringshm.dropin.handle import QueueChannel
from ringshm.ring.acceleration import compiled
from ringshm.ring.participants import forking

pytestmark = pytest.mark.skipif(ringshm.accelerated != "", reason=ringshm.accelerated)

NBYTES = 16 * 1024 * 1024
CALLS = 500


@pytest.mark.skipif(not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="no thread keeps others from running")
@pytest.mark.parametrize(
    ("message", "lets_run"),
    [
        *((bytes(NBYTES), True), (np.zeros(NBYTES, np.uint8), True), (b"", False)),
        *(({"obs": np.zeros(NBYTES, np.uint8)}, True), ({"obs": np.zeros(4)}, False)),
    ],
    ids=["bytes", "array", "small", "container", "small container"],
)
def test_large_copies_let_other_threads_run(message: Any, lets_run: bool) -> None:
    """With an endless switch interval a thread runs only while another has let go of the interpreter."""
    turns, over = [0], threading.Event()

    def count() -> None:
        while not over.is_set():
            turns[0] += 1
            time.sleep(0)

    def run_during(call: Callable[[], Any], after: Callable[[], Any]) -> bool:
        """Whether the other thread ran in one of many calls: on a busy machine it may be late for the first."""
        for _ in range(CALLS):
            before = turns[0]
            call()
            if turns[0] != before:
                return True
            after()
        return False

    counting, interval = threading.Thread(target=count), sys.getswitchinterval()
    with ringshm.Channel(2, NBYTES + 4096) as channel:
        channel.put(message)
        channel.get()  # the roles are taken
        channel._look_at = math.inf  # a look for the dead lets others run, too
        sys.setswitchinterval(3600)
        try:
            counting.start()
            assert run_during(lambda: channel.put(message), channel.get) is lets_run
            if channel.empty():
                channel.put(message)
            assert run_during(channel.get, lambda: channel.put(message)) is lets_run
        finally:
            over.set()
            sys.setswitchinterval(interval)
            counting.join()


def test_first_pickles_in_two_threads_keep_apart() -> None:
    """A thread makes its pickler while another makes one, and is amid a message: each sends its own message."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow:
        def __reduce__(self) -> Any:
            inside.set()
            go_on.wait(30)
            return int, (2,)

    with ringshm.Channel(4, 4096) as channel:
        channel.put(0)
        channel.get()
        other = threading.Thread(target=channel.put, args=([Slow()],))

        def trace(frame: Any, event: str, arg: Any) -> None:
            if frame.f_code.co_name == "new_pickling" and other.ident is None:
                other.start()
                inside.wait(30)

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            channel.put([1])
        finally:
            sys.settrace(before)
            go_on.set()
            other.join()
        assert channel.get_many(4) == [[1], [2]]


def test_description_of_an_array_outlives_its_copy() -> None:
    """While a large array is copied, other threads send others by the same handle, which forgets that array's form."""
    message, over = np.ones(NBYTES, np.uint8), threading.Event()
    small = [np.ones(8 * length, np.uint8) for length in range(1, 9)]

    with QueueChannel(2, NBYTES, when_full="drop_oldest") as channel:
        channel.put_many([message, message])

        def send_others() -> None:
            while not over.is_set():
                for other in small:
                    channel.put(other)
                time.sleep(0)

        others = threading.Thread(target=send_others)
        others.start()
        try:
            for _ in range(50):
                channel.put(message)
                received = channel.get()
                assert received.shape in [sent.shape for sent in (message, *small)]
        finally:
            over.set()
            others.join()


def test_process_that_counts_as_dead_amid_a_copy_writes_into_no_header() -> None:
    """Another thread finds that out while the message is copied; the handle acts for no entry then."""
    interval, copying = sys.getswitchinterval(), threading.Event()
    with ringshm.Channel(2, NBYTES) as channel:
        channel.put(b"")
        channel.get()
        channel._look_at = math.inf
        header = header_of(channel)

        def count_as_dead_later() -> None:
            copying.wait()
            time.sleep(0)
            count_as_dead(channel)

        finding = threading.Thread(target=count_as_dead_later)
        finding.start()
        sys.setswitchinterval(3600)  # the other thread runs while this one copies
        try:
            copying.set()
            with suppress(ringshm.RingshmError):
                for _ in range(CALLS):
                    channel.put(bytes(NBYTES))
                    channel.get()
        finally:
            sys.setswitchinterval(interval)
            finding.join()
        assert header_of(channel) == header


def test_a_message_that_cannot_be_decoded_wakes_a_sender() -> None:
    """Its slot comes free as any other's does."""
    with ringshm.Channel(1, 4096) as channel:
        for receive in (channel.get, lambda: channel.get_many(1)):
            channel.put(0)
            channel.get()
            channel.put(Undecodable())
            with waiting_for_space(channel) as is_woken, pytest.raises(ringshm.UndecodableMessage):
                receive()
            assert is_woken()


class Undecodable:
    def __reduce__(self) -> Any:
        return int, ("no number",)


class Counted:
    """How often it was pickled."""

    times = 0

    def __reduce__(self) -> Any:
        Counted.times += 1
        return Counted, ()


def test_array_of_objects_is_pickled_once() -> None:
    """A handle in it, say, is on its way once."""
    message = np.array([Counted()], dtype=object)
    with ringshm.Channel(4, 4096) as channel:
        channel.put(0)
        Counted.times = 0
        channel.put(message)
        assert Counted.times == 1
        channel.put_many([message, message])
        assert Counted.times == 3


class Odd(np.ndarray[Any, Any]):
    """An array that gives and takes its elements in a way of its own."""

    taken = 0

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index) if index != slice(None) else [0]

    def __setitem__(self, index: Any, value: Any) -> None:
        type(self).taken += 1
        super().__setitem__(index, value)


def test_batches_of_arrays_of_a_users_class() -> None:
    """Their own methods are called where the Python code calls them, and what these give is not taken for an array."""
    with ringshm.Channel(4, spec={"x": ("i8", (2,))}) as channel:
        sent = np.arange(8).reshape(4, 2)
        assert channel.put_batch({"x": sent.view(Odd)}) == 4
        assert channel.get_batch(4)["x"].tolist() == sent.tolist()
        channel.put_batch({"x": sent})
        out = np.zeros((4, 2), np.int64).view(Odd)
        channel.get_batch(4, out={"x": out})
        assert np.asarray(out).tolist() == sent.tolist()
        assert Odd.taken


def test_descriptor_is_readable_when_an_interrupted_call_has_left_a_message() -> None:
    with ringshm.Channel(4, 4096) as channel:
        channel.put(1)
        fd = channel.fileno()
        assert channel.get() == 1
        assert not is_readable(fd)
        compiled.keep(channel, [1], None)  # what a call does at whose return a signal handler has raised
        assert is_readable(fd)
        assert channel.get(timeout=0) == 1
        assert not is_readable(fd)


def is_readable(fd: int) -> bool:
    return select.select([fd], [], [], 0)[0] == [fd]


class _Undecodable:
    """What cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


@pytest.mark.parametrize("many", [False, True], ids=["get", "get_many"])
def test_a_handler_that_raises_where_a_failed_message_is_looked_at_again_loses_nothing(many: bool) -> None:
    def trace(frame: FrameType, event: str, arg: object) -> None:
        if frame.f_code.co_name in ("consume_failed", "consume_failed_in"):
            sys.settrace(None)
            raise Interrupt

    with ringshm.Channel(4, 1024) as channel:
        channel.put("first")
        assert channel.get() == "first"  # the roles are taken
        channel.put_many(["before", _Undecodable(), "after"] if many else [_Undecodable(), "after"])
        sys.settrace(trace)
        try:
            with pytest.raises(Interrupt):
                channel.get_many(3) if many else channel.get()
        finally:
            sys.settrace(None)
        if many:
            assert channel.get_many(3) == ["before"]
        with pytest.raises(ringshm.UndecodableMessage):
            channel.get()
        assert channel.get() == "after"
        check_whole(channel)


def test_a_version_that_both_sides_have_pinned_counts_once_and_as_long_as_either_sees_it() -> None:
    def view() -> Any:
        with latest.borrow() as borrow:
            return borrow.value

    with ringshm.Latest(4096, borrows=1) as latest:
        latest.publish(np.full(100, 0))
        latest.read()  # the role is taken
        compiled_view, another = view(), view()
        assert [held.version for held in latest.stats().held] == [1]
        del another
        was_paused = compiled.pause(True)
        try:
            python_view = view()
        finally:
            compiled.pause(was_paused)
        assert python_view.base is not compiled_view.base
        assert [held.version for held in latest.stats().held] == [1]
        for number in (1, 2):
            latest.publish(np.full(100, number))
            with pytest.raises(ringshm.TooManyBorrows):
                view()
            if number == 1:
                assert (python_view == 0).all()
                del python_view
            else:
                assert (compiled_view == 0).all()
                del compiled_view
        assert not latest.stats().held
        assert (view() == 2).all()
        assert not latest.stats().held


@pytest.mark.parametrize("borrows", [30, 31, 60])
def test_as_many_versions_as_there_are_cells_are_pinned_on_whichever_side(borrows: int) -> None:
    with ringshm.Latest(64, borrows=borrows) as latest:
        views = []
        for number in range(borrows):
            latest.publish(bytes([number]))
            was_paused = compiled.pause(number % 3 == 0)
            with latest.borrow() as borrow:
                views.append(borrow.value)
            compiled.pause(was_paused)
        latest.publish(b"one more")
        with pytest.raises(ringshm.TooManyBorrows), latest.borrow():
            pass
        assert [bytes(view) for view in views] == [bytes([number]) for number in range(borrows)]
        assert latest.read() == (borrows + 1, b"one more")


@pytest.mark.parametrize("nbytes", [2**22 - 1, 2**22, 2**22 + 63, 5_000_011])
def test_messages_that_are_copied_past_the_caches_arrive_whole(nbytes: int) -> None:
    random = np.random.default_rng(nbytes)
    with ringshm.Channel(2, 2**23) as channel:
        for start in (0, 1, 33):
            sent = random.integers(0, 256, start + nbytes, np.uint8)[start:]
            channel.put(sent)
            assert np.array_equal(channel.get(), sent)
            channel.put(sent.tobytes())
            assert channel.get() == sent.tobytes()


def test_a_version_that_is_pinned_again_while_its_pin_ends_stays_pinned() -> None:
    """Other threads run within that end, while one of them forks."""
    with ringshm.Latest(4096, borrows=1) as latest:

        def view() -> Any:
            with latest.borrow() as borrow:
                return borrow.value

        latest.publish(np.zeros(100))
        latest.read()  # the role is taken
        first, views = view(), []
        participants = latest._attachment.participants  # type: ignore[union-attr]
        forking.add(-1)
        participants.in_fork = lambda: bool(views.append(view()))  # type: ignore[method-assign, func-returns-value]
        try:
            del first
        finally:
            del participants.in_fork
            forking.clear()
        for number in range(1, 5):
            latest.publish(np.full(100, number))
        assert (views[0] == 0).all()
        assert [held.version for held in latest.stats().held] == [1]


def test_what_a_handler_raises_amid_a_borrow_of_a_latest_arrives() -> None:
    with ringshm.Latest(4096) as latest:
        latest.publish({"x": _RaisesOnce()})
        for _ in range(2):
            _RaisesOnce.armed = True
            with pytest.raises(Interrupt), latest.borrow():
                pass
        with latest.borrow() as borrow:
            assert borrow.value == {"x": 42}


class _RaisesOnce:
    """Where it is unpickled something raises, as a signal handler would."""

    armed = False

    def __reduce__(self) -> Any:
        return _raise_once, ()


def _raise_once() -> int:
    if _RaisesOnce.armed:
        _RaisesOnce.armed = False
        raise Interrupt
    return 42


@pytest.mark.parametrize("kind", [lambda value: [value], lambda value: {"x": np.zeros(3), "y": value}])
def test_a_value_that_cannot_be_decoded_and_is_replaced_meanwhile_is_told_of(kind: Callable[[Any], Any]) -> None:
    with ringshm.Latest(4096) as latest:
        _Replaced.by = lambda: latest.publish("another")
        for look in (latest.read, lambda: latest.borrow().__enter__()):
            for _ in range(2):
                latest.publish(kind(_Replaced()))
                with pytest.raises(ringshm.UndecodableMessage):
                    look()
                assert latest.read()[1] == "another"


class _Replaced:
    """A value that another replaces while it is unpickled, in vain."""

    by: Callable[[], object]

    def __reduce__(self) -> Any:
        return _replaced, ()


def _replaced() -> None:
    _Replaced.by()
    raise ValueError("no value")


def test_borrows_leave_no_references_behind() -> None:
    with ringshm.Channel(1, 64) as channel:
        before = sys.getrefcount(None)
        for _ in range(CALLS):
            channel.put(b"borrowed")
            with channel.borrow() as borrow:
                assert borrow.value == b"borrowed"
        assert sys.getrefcount(None) < before + CALLS / 2  # other threads may have some

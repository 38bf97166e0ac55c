"""Latest: the newest value, whole, for many readers, whom its publisher never waits for."""

from __future__ import annotations

import gc
import os
import pickle
import queue
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support import workers
from support.checks import check_empty
from support.payloads import Unpickles

import ringshm
from ringshm import (
    Channel,
    ChannelClosed,
    ChannelCorrupted,
    ChannelExists,
    ChannelNotFound,
    EndOfChannel,
    IncompatibleChannel,
    Latest,
    PayloadTooLarge,
    SpecMismatch,
    TooManyBorrows,
    UndecodableMessage,
)
from ringshm.channel.raw import RawPublisher, RawReader, raw_of
from ringshm.messages.buffers import Parts
from ringshm.ring.waiters import Waiters
from ringshm.segment.layout import NEWEST, PIN_CELLS, R_META, R_SEQUENCE

pytestmark = workers.may_fork

SPEC = {"layer": {"w": (np.float32, (16, 8)), "b": (np.float32, (8,))}, "step": np.int64}


def _hold(latest: Latest, timeout: float | None = None) -> Any:
    """A view that has escaped its borrow."""
    with latest.borrow(timeout=timeout) as borrow:
        return borrow.value


def _held(latest: Latest) -> list[int]:
    return [held.version for held in latest.stats().held]


# --- one process


def test_a_read_gives_the_newest_value_and_owns_it() -> None:
    with Latest("64KiB") as latest:
        assert latest.version == 0
        for k in range(1, 20):
            assert latest.publish({"w": np.full(100, k), "k": k}) == k == latest.version
            version, value = latest.read()
            assert (version, value["k"]) == (k, k)
            np.testing.assert_array_equal(value["w"], np.full(100, k))
            value["w"][:] = -1  # its owner's
        version, value = latest.read()
        assert (version, value["w"].min()) == (19, 19)


@pytest.mark.parametrize("value", [b"", b"x" * 1000, None, "text", np.zeros(125), {"a": [np.arange(3), b"z" * 200]}])
def test_any_value_that_fits_arrives(value: Any) -> None:
    with Latest(1000) as latest:
        latest.publish(value)
        for got in (latest.read()[1], _hold(latest)):
            if isinstance(value, dict):
                assert bytes(got["a"][1]) == value["a"][1]
                np.testing.assert_array_equal(got["a"][0], value["a"][0])
            else:
                np.testing.assert_array_equal(bytes(got) if isinstance(value, bytes) else got, value)


def test_a_value_that_does_not_fit_is_refused_and_the_last_one_stays() -> None:
    with Latest(1000) as latest:
        latest.publish("first")
        with pytest.raises(PayloadTooLarge, match="slot holds 1000 bytes, message needs 1001"):
            latest.publish(b"x" * 1001)
        with pytest.raises(TypeError, match="pickle"):
            latest.publish(threading.Lock())
        assert latest.read() == (1, "first")
        assert latest.publish(b"x" * 1000) == 2


def test_borrows_view_the_newest_version_and_keep_it_while_others_are_published() -> None:
    with Latest("64KiB", borrows=3) as latest:
        latest.publish(np.full(1000, 0))
        with latest.borrow() as borrow:
            view = borrow.value
            assert borrow.version == 1
            assert not view.flags.writeable
            assert not view.flags.owndata
            for k in range(1, 50):
                latest.publish(np.full(1000, k))
                assert latest.read()[1][0] == k
                assert (view == 0).all()
        assert _held(latest) == [1]  # by `view`
        del view
        assert _held(latest) == []


def test_as_many_versions_can_be_held_as_were_promised() -> None:
    with Latest("4KiB", borrows=3) as latest:
        views = []
        for k in range(1, 4):
            latest.publish(np.full(100, k))
            views += [_hold(latest), _hold(latest)]  # the same version counts once
        assert _held(latest) == [1, 2, 3]
        again = _hold(latest)
        latest.publish(np.full(100, 4))
        with pytest.raises(TooManyBorrows, match=rf"version 1 by process {os.getpid()}.*borrows=3"), latest.borrow():
            raise AssertionError("a fourth version")
        for k in range(5, 50):  # neither publisher nor reader is in the way
            assert latest.publish(np.full(100, k)) == k
            assert latest.read()[1].min() == latest.read()[1].max() == k
        assert [view[0] for view in views] == [1, 1, 2, 2, 3, 3]
        del views[2:4], again
        with latest.borrow() as borrow:
            assert borrow.version == 49
        assert _held(latest) == [1, 3]


def test_versions_held_by_garbage_in_cycles_are_collected_by_who_borrows() -> None:
    with Latest(100, borrows=1) as latest:
        gc.disable()
        try:
            for k in range(1, 4):
                latest.publish(np.full(3, k))
                cycle: list[Any] = [_hold(latest)]
                assert cycle[0][0] == k
                cycle.append(cycle)
                del cycle
        finally:
            gc.enable()


@pytest.mark.parametrize("who", ["the next to borrow", "another process, after the next look"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_pin_held_can_be_held_again_though_its_end_was_interrupted(who: str) -> None:
    def trace(frame: FrameType, event: str, arg: Any) -> None:
        if frame.f_code.co_name == "_clear":
            raise workers.Interrupt  # as a signal handler may at the entry of a function

    with Latest(100, borrows=1) as latest, workers.Crew() as crew:
        latest.publish(1)
        latest.publish(np.full(3, 2))
        views = [_hold(latest)]
        sys.settrace(trace)
        try:
            views.clear()
        finally:
            sys.settrace(None)
        assert _held(latest) == [2]
        latest.publish(np.full(3, 3))
        if who == "the next to borrow":
            assert _hold(latest)[0] == 3
        else:
            workers.until(lambda: latest.publish(np.full(3, 4)) and not _held(latest))
            assert crew.start(_borrowed_version, latest).result() == latest.version


def _borrowed_version(latest: Latest) -> int:
    with latest.borrow() as borrow:
        return borrow.version


def test_a_version_that_is_held_can_be_borrowed_though_no_other_can() -> None:
    with Latest("4KiB", borrows=1) as latest:
        latest.publish(1)
        view = _hold(latest)
        assert _hold(latest) == view == 1
        with latest.borrow() as first, latest.borrow() as second:
            assert (first.version, second.version) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_reads_and_borrows_agree_with_a_model(seed: int) -> None:
    """Random calls against a dict of what was published; views are checked to the end."""
    rng = random.Random(seed)
    with Latest("8KiB", borrows=4) as latest:
        model: dict[int, int] = {}
        views: list[tuple[int, np.ndarray[Any, Any]]] = []
        for _ in range(1500):
            action = rng.choice(("publish", "read", "borrow", "drop", "fail"))
            if action == "publish":
                number = rng.randrange(1 << 30)
                model[latest.publish(np.full(rng.randrange(1, 800), number))] = number
                assert list(model) == list(range(1, len(model) + 1))
            elif action == "drop" and views:
                del views[rng.randrange(len(views))]
            elif action == "fail":
                with pytest.raises(PayloadTooLarge):
                    latest.publish(bytes(9000))
            elif not model:
                check_empty(latest.read, timeout=0)
            elif action == "read":
                version, value = latest.read()
                assert version == len(model)
                assert (value == model[version]).all()
            elif action == "borrow":
                distinct = {version for version, _ in views}
                if len(distinct) < 4 or len(model) in distinct:
                    views.append((len(model), _hold(latest)))
                else:
                    with pytest.raises(TooManyBorrows), latest.borrow():
                        pass
            assert sorted({version for version, _ in views}) == _held(latest)
            assert all((view == model[version]).all() for version, view in views)


def test_waiting_for_a_newer_version_times_out() -> None:
    with Latest(100) as latest:
        with pytest.raises(queue.Empty, match="no version 1 came in time"):
            latest.read(timeout=0.05)
        latest.publish("a")
        for call in (latest.read, lambda *given: latest.borrow(*given).__enter__()):
            began = time.monotonic()
            with pytest.raises(queue.Empty, match="no version 2 came in time, the newest is 1"):
                call(1, 0.12)
            assert time.monotonic() - began >= 0.12
        assert latest.read(newer_than=0, timeout=0) == (1, "a")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda latest: latest.read("1"), TypeError, "newer_than='1' must be a version or None, not str"),
        (lambda latest: latest.read(-1), ValueError, "newer_than=-1 must not be negative"),
        (lambda latest: latest.borrow(1.5), TypeError, "newer_than=1.5"),
        (lambda latest: latest.read(timeout=-1), ValueError, "timeout=-1 must not be negative"),
        (lambda latest: latest.read(timeout="soon"), TypeError, "timeout='soon'"),
        (lambda latest: latest.borrow(timeout=float("nan")), ValueError, "timeout=nan"),
        (lambda latest: latest.borrow().value, ValueError, "has not begun: write `with latest.borrow"),
        (lambda latest: latest.borrow()["w"], ValueError, "has not begun"),
        (lambda latest: Latest(), TypeError, "takes slot_size or spec, neither was given"),
        (lambda latest: Latest(10, spec=SPEC), TypeError, "takes slot_size or spec, both"),
        (lambda latest: Latest(0), ValueError, "slot_size=0"),
        (lambda latest: Latest(10, borrows=0), ValueError, "borrows=0"),
        (lambda latest: Latest(10, borrows=61), ValueError, "borrows=61"),
        (lambda latest: Latest(10, readers=0), ValueError, "readers=0"),
        (lambda latest: Latest(10, readers=2.5), TypeError, "readers=2.5"),
        (lambda latest: Latest(10, name="a/b"), ValueError, "name"),
        (lambda latest: Latest(10, name=latest.name), ChannelExists, "exists: attach to it, or use another name"),
        (lambda latest: Latest.attach("no such"), ChannelNotFound, "no such"),
        (lambda latest: Latest.attach(latest.name, spec=SPEC), SpecMismatch, "has no spec"),
        (lambda latest: Channel.attach(latest.name), IncompatibleChannel, "is a Latest, not a Channel"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_name(call: Any, error: type[Exception], text: str) -> None:
    with Latest(100) as latest:
        latest.publish("whole")
        with pytest.raises(error) as raised:
            call(latest)
        assert text in str(raised.value)
        assert latest.read() == (1, "whole")
        assert latest.stats().held == ()


def test_a_channel_is_no_latest() -> None:
    with Channel(2, 100) as channel, pytest.raises(IncompatibleChannel, match="is a Channel, not a Latest"):
        Latest.attach(channel.name)


def test_a_closed_handle_says_so_and_its_views_live_on() -> None:
    latest = Latest("4KiB")
    latest.publish(np.full(100, 7))
    view = _hold(latest)
    latest.close()
    latest.close()
    for call in (latest.read, lambda: latest.publish(1), latest.borrow().__enter__, lambda: latest.version):
        with pytest.raises(ChannelClosed, match="closed"):
            call()
    assert (view == 7).all()
    assert not [name for name in os.listdir("/dev/shm") if latest.name in name]


def test_a_value_that_cannot_be_decoded_is_no_end() -> None:
    with Latest(1000) as latest:
        latest.publish(Unpickles(_explode))
        for call in (latest.read, latest.borrow().__enter__):
            with pytest.raises(UndecodableMessage, match="boom") as raised:
                call()
            assert isinstance(raised.value.__cause__, RuntimeError)
            del raised
        assert latest.stats().held == ()
        latest.publish("fine")
        assert latest.read() == (2, "fine")


def _explode() -> None:
    raise RuntimeError("boom")


# --- a spec


def test_a_typed_latest_has_fields() -> None:
    rng = np.random.default_rng(1)
    with Latest(spec=SPEC) as latest, Latest.attach(latest.name, spec=SPEC) as other:
        value = {"layer": {"w": rng.random((16, 8)), "b": rng.random(8)}, "step": 3}
        with pytest.raises(SpecMismatch, match="b"):
            latest.publish({"layer": {"w": np.zeros((16, 8)), "b": np.zeros(9)}, "step": 3})
        assert latest.publish({**value, "layer": {k: v.astype(np.float32) for k, v in value["layer"].items()}}) == 1
        version, got = other.read()
        assert (version, got["step"]) == (1, 3)
        np.testing.assert_array_equal(got["layer"]["w"], value["layer"]["w"].astype(np.float32))
        with other.borrow() as borrow:
            view = borrow["layer"]["w"]
            assert not view.flags.owndata
            assert not view.flags.writeable
        for k in range(20):
            latest.publish({"layer": {"w": np.full((16, 8), k, "f4"), "b": np.zeros(8, "f4")}, "step": k})
        np.testing.assert_array_equal(view, value["layer"]["w"].astype(np.float32))
    with (
        Latest(spec=SPEC) as latest,
        pytest.raises(SpecMismatch, match=r"(?s)spec.*w.*float32.*given the spec.*float64"),
    ):
        Latest.attach(latest.name, spec={"w": (np.float64, (3,))})


# --- views


@pytest.mark.parametrize("derived", ["slice", "reshape", "memoryview", "cycle", "traceback", "dict", "field"])
def test_a_version_is_not_overwritten_while_anything_sees_it(derived: str) -> None:
    spec = SPEC if derived == "field" else None
    with Latest(None if spec else "4KiB", spec=spec, borrows=1) as latest:

        def publish(k: int) -> None:
            layer = {"w": np.full((16, 8), k, "f4"), "b": np.full(8, k, "f4")}
            latest.publish({"layer": layer, "step": k} if spec else np.full((16, 8), k))

        publish(1)
        array = _hold(latest)
        if spec:
            array = array["layer"]["b"]
        kept: Any = array
        if derived == "slice":
            kept = array[3:, ::2]
        elif derived == "reshape":
            kept = array.reshape(-1).view(np.uint8)[8:16].view(np.int64)
        elif derived == "memoryview":
            kept = memoryview(array)
        elif derived == "cycle":
            kept = [array]
            kept.append(kept)
        elif derived == "traceback":
            kept = _raise_with(array)
        elif derived == "dict":
            kept = {"array": array}
        del array
        for k in range(2, 12):
            publish(k)
        assert _held(latest) == [1]
        if derived == "cycle":
            assert (kept[0] == 1).all()
        elif derived == "dict":
            assert (kept["array"] == 1).all()
        elif derived == "traceback":
            assert (kept.__traceback__.tb_next.tb_frame.f_locals["array"] == 1).all()
        else:
            assert (np.asarray(kept) == 1).all()
        del kept
        gc.collect()
        assert _held(latest) == []
        with latest.borrow() as borrow:
            assert borrow.version == 11


def _raise_with(array: Any) -> Exception:
    try:
        _fail(array)
    except ValueError as error:
        return error
    raise AssertionError


def _fail(array: Any) -> None:
    raise ValueError


def test_a_finaliser_that_runs_within_a_cycle_sees_its_version_whole() -> None:
    """The collector may run the callbacks of all weak references first."""
    with Latest("4KiB", borrows=1) as latest:
        seen = []

        class Node:
            def __del__(self) -> None:
                for k in range(2, 10):
                    latest.publish(np.full(100, k))
                seen.append(np.asarray(self.view).tolist())

        for wrap in (lambda view: view, memoryview, lambda view: [view]):
            latest.publish(np.full(100, 1))
            node = Node()
            node.me = node  # type: ignore[attr-defined]
            view = _hold(latest)
            node.view = wrap(view)  # type: ignore[attr-defined]
            expected = [1] * 100
            del node, view
            gc.collect()
            assert np.ravel(seen.pop()).tolist() == expected


def test_the_last_view_may_go_in_any_thread() -> None:
    with Latest("4KiB", borrows=2) as latest:
        boxes: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def drop() -> None:
            while boxes.get() is not None:
                pass

        with workers.in_threads(drop):
            for k in range(500):
                latest.publish(np.full(50, k))
                workers.until(lambda: len(set(_held(latest))) < 2)
                boxes.put(_hold(latest))
            boxes.put(None)
        assert _held(latest) == []


def test_a_forked_childs_copies_of_views_are_its_parents() -> None:
    with Latest("4KiB", borrows=1) as latest:
        latest.publish(np.full(100, 1))
        view = _hold(latest)

        def child() -> None:
            nonlocal view
            assert (view == 1).all()
            assert _held(latest) == [1]
            del view
            gc.collect()
            assert _held(latest) == [1]
            latest.publish(np.full(100, 2))
            with pytest.raises(TooManyBorrows, match=f"version 1 by process {os.getppid()}"), latest.borrow():
                pass
            latest.close()

        assert workers.exit_code(workers.fork_off(child)) == 0
        assert (view == 1).all()
        assert _held(latest) == [1]
        del view
        assert _hold(latest)[0] == 2


@pytest.mark.parametrize("close", [True, False])
def test_a_forked_childs_copies_of_views_are_its_parents_also_once_that_has_closed(close: bool) -> None:
    with Latest("4KiB", borrows=1) as latest, workers.Crew() as crew:
        latest.publish(np.full(100, 1))
        barrier = crew.context.Barrier(2)
        publisher = crew.start(_publish_behind, latest, barrier, 6)
        barrier.wait()
        view = _hold(latest)
        if close:
            latest.close()

        def child() -> None:
            nonlocal view
            del view
            gc.collect()

        crew.start(child).result()
        barrier.wait()
        publisher.result()
        assert (view == 1).all()


def _publish_behind(latest: Latest, barrier: Any, last: int) -> None:
    assert latest.version == 1
    barrier.wait()
    barrier.wait()
    for k in range(2, last + 1):
        assert latest.publish(np.full(100, k)) == k


def test_a_process_that_has_closed_but_for_views_attaches_again_as_the_same_participant() -> None:
    with Latest("4KiB", readers=2) as latest, workers.Crew() as crew:
        latest.publish(np.full(100, 1))
        crew.start(_close_and_attach_again, latest.name).result()


def _close_and_attach_again(name: str) -> None:
    views = []
    for _ in range(5):
        with Latest.attach(name) as latest:
            views.append(_hold(latest))
            assert len(latest.stats().participants) == 2
    assert all((view == 1).all() for view in views)


def test_a_fork_within_a_borrow_leaves_the_borrow_to_the_parent() -> None:
    with Latest("4KiB", borrows=1) as latest:
        latest.publish(np.full(100, 1))
        with latest.borrow() as borrow:
            pid = os.fork()
            if not pid:
                with suppress(BaseException):
                    borrow.__exit__(None, None, None)
                    os._exit(0)
                os._exit(1)
            assert workers.exit_code(pid) == 0
            for k in range(2, 9):
                latest.publish(np.full(100, k))
            assert (borrow.value == 1).all()


# --- several processes


def _follow(latest: Latest, last: int, how: str) -> list[int]:
    """The versions that a reader sees, each checked to be whole, up to the last."""
    seen, version = [], 0
    while version < last:
        if how == "read":
            version, value = latest.read(newer_than=version)
            values = value
        else:
            with latest.borrow(newer_than=version) as borrow:
                version, values = borrow.version, borrow.value
                first = values.copy()
                assert (first == values).all()
        assert (values == version).all(), f"version {version} is torn: {np.unique(values)}"
        seen.append(version)
    latest.close()
    return seen


@pytest.mark.parametrize("method", workers.METHODS)
def test_readers_in_other_processes_see_versions_whole_and_in_order(method: str) -> None:
    last = 300 if method == "fork" else 50
    with Latest("256KiB", borrows=8) as latest, workers.Crew(method) as crew:
        readers = [crew.start(_follow, latest, last, how) for how in ("read", "borrow", "read", "borrow")]
        latest.wait_for_peers(receivers=4)
        for k in range(1, last + 1):
            assert latest.publish(np.full(30_000, k)) == k
        for reader in readers:
            seen = reader.result()
            assert seen == sorted(set(seen))
            assert seen[-1] == last


def _take_turns(latest: Latest, go: Latest, count: int) -> None:
    """Answer each version of one by one of the other."""
    for k in range(1, count + 1):
        version, _ = latest.read(newer_than=k - 1)
        assert version == k
        go.publish(k)


def test_no_version_is_missed_by_a_reader_that_keeps_up() -> None:
    with Latest(100) as latest, Latest(100) as answers, workers.Crew() as crew:
        member = crew.start(_take_turns, latest, answers, 500)
        for k in range(1, 501):
            latest.publish(k)
            assert answers.read(newer_than=k - 1) == (k, k)
        member.result()


def _count_vain_waits(latest: Latest, answers: Channel, last: int, step: int = 1) -> int:
    """Follow, tell each version; how many sleeps ended by their slice though the version was there."""
    vain, k, sleep = 0, 0, Waiters.sleep

    def count(waiters: Waiters, seconds: float) -> bool:
        nonlocal vain
        woken = sleep(waiters, seconds)
        vain += not woken and latest.stats().version >= k
        return woken

    Waiters.sleep = count  # type: ignore[method-assign]
    for k in range(step, last + 1, step):
        assert latest.read(newer_than=k - step)[0] == k
        answers.put(k)
    return vain


def test_every_waiting_reader_is_woken_by_each_version() -> None:
    """One that is quick to wait again does not take the wake-up of one that has not run yet, which then would wait for
    the end of its slice."""
    readers, last = 6, 100
    with Latest(100) as latest, Channel(readers, 100) as answers, workers.Crew() as crew:
        members = [crew.start(_count_vain_waits, latest, answers.sender(), last) for _ in range(readers)]
        latest.wait_for_peers(receivers=readers)
        for k in range(1, last + 1):
            workers.until(lambda: latest.stats().waiting_receivers == readers)
            latest.publish(k)
            assert [answers.get() for _ in range(readers)] == [k] * readers
        vain = [member.result() for member in members]
        assert sum(vain) < readers * last / 10, vain


def test_a_waiting_reader_is_woken_by_a_republished_version_that_skips_some() -> None:
    """Those that wait for the next version wait elsewhere than those of the one after it."""
    last = 200
    with Latest(100) as latest, Channel(1, 100) as answers, workers.Crew() as crew:
        member = crew.start(_count_vain_waits, latest, answers.sender(), last, 2)
        latest.wait_for_peers(receivers=1)
        publisher, raw = RawPublisher.of(latest._open()), raw_of(latest, "x")
        for k in range(2, last + 1, 2):
            workers.until(lambda: latest.stats().waiting_receivers == 1)
            assert publisher.republish(k, raw) == k
            assert answers.get() == k
        assert member.result() < last / 20
        publisher.close()


@pytest.mark.parametrize("typed", [False, True])
def test_values_are_republished_as_they_are_with_their_versions(typed: bool) -> None:
    made: dict[str, Any] = {"spec": SPEC} if typed else {"slot_size": "64KiB"}
    values = [
        {"layer": {"w": np.full((16, 8), k, np.float32), "b": np.zeros(8, np.float32)}, "step": k} for k in range(9)
    ]
    with Latest(**made) as first, Latest(**made) as second:
        reader, publisher = RawReader.of(first._open()), RawPublisher.of(second._open())
        late: Any = None
        for k in (1, 2, 5, 8):
            while first.version < k:
                first.publish(values[first.version + 1])
            with reader.borrow() as raw:
                assert publisher.republish(raw.version, raw.value) == k
            version, value = second.read(newer_than=k - 1, timeout=0)
            assert (version, value["step"]) == (k, k)
            assert (value["layer"]["w"] == values[k]["layer"]["w"]).all()
            late = late or (k, raw_of(first, values[0]))
        assert publisher.republish(*late) == 8, "a version that is not newer changes nothing"
        assert second.read()[1]["step"] == 8
        assert publisher.publish(late[1]) == 9, "it has the number that the next one has"
        assert second.read()[1]["step"] == 0
        reader.close()
        publisher.close()


def test_a_reader_attached_late_sees_the_newest_at_once() -> None:
    with Latest(1000) as latest:
        for k in range(10):
            latest.publish(("weights", k))
        source = """
import sys, ringshm
with ringshm.Latest.attach(sys.argv[1]) as latest:
    print(latest.read(timeout=0), latest.version)
    with latest.borrow(timeout=0) as borrow:
        print(borrow.version)
"""
        assert workers.finish(workers.script(source, latest.name)) == "(10, ('weights', 9)) 10\n10\n"


def test_a_handle_passes_through_a_channel() -> None:
    with Channel(2, "4KiB") as channel, Latest(1000) as latest:
        latest.publish("newest")
        channel.put(latest)
        with channel.get() as arrived:
            assert arrived.read() == (1, "newest")
            assert not arrived._seat.creator
        with pickle.loads(pickle.dumps(latest)) as arrived:
            assert arrived.publish("newer") == 2
        assert latest.read() == (2, "newer")


def _publish(latest: Latest, who: int, count: int) -> list[int]:
    return [latest.publish((who, k)) for k in range(count)]


def test_several_publishers_share_one_count_of_versions() -> None:
    with Latest(1000) as latest, workers.Crew() as crew:
        members = [crew.start(_publish, latest, who, 300) for who in range(3)]
        versions = [member.result() for member in members]
        assert all(numbers == sorted(numbers) for numbers in versions)
        assert sorted(version for some in versions for version in some) == list(range(1, 901))
        version, (who, k) = latest.read()
        assert versions[who][k] == version == 900


def test_threads_of_one_handle_read_borrow_and_publish() -> None:
    stop_at = 400
    # without the GIL each collection is of all objects, and stops all threads
    collects_each = 1 if getattr(sys, "_is_gil_enabled", lambda: True)() else 20
    errors: list[BaseException] = []
    with Latest("64KiB", borrows=12) as latest:  # a borrower's values keep the version before the one that it pins
        latest.publish(np.full(4000, 1))

        def follow(how: str) -> None:
            try:
                with Latest.attach(latest.name) as other:
                    seen = _follow(other if how == "read" else latest.__class__.attach(latest.name), stop_at, how)
                assert seen == sorted(set(seen))
            except BaseException as error:
                errors.append(error)

        with workers.switching_often(), workers.in_threads(*(partial(follow, how) for how in ("read", "borrow") * 4)):
            for k in range(2, stop_at + 1):
                latest.publish(np.full(4000, k))
                if k % collects_each == 0:
                    gc.collect(0)
        assert not errors
        assert _held(latest) == []


# --- who dies, stops, or goes


def test_what_a_dead_reader_held_can_be_held_again() -> None:
    with Latest("4KiB", borrows=2) as latest, workers.Crew() as crew:
        latest.publish(np.full(100, 1))
        reader = crew.start(lambda: (_hold(latest), signal.pause()))
        workers.until(lambda: _held(latest) == [1])
        latest.publish(np.full(100, 2))
        mine = [_hold(latest)]
        latest.publish(np.full(100, 3))
        with pytest.raises(TooManyBorrows, match=f"version 1 by process {reader.pid}"), latest.borrow():
            pass
        reader.kill()
        mine.append(_hold(latest))  # the borrow itself finds the dead
        assert [view[0] for view in mine] == [2, 3]
        assert _held(latest) == [2, 3]


def test_a_borrow_ends_in_time_where_a_stopped_process_keeps_the_dead_from_being_reaped() -> None:
    with Latest("4KiB", borrows=1) as latest, workers.Crew() as crew:
        latest.publish(np.full(100, 1))
        reader = crew.start(lambda: (_hold(latest), signal.pause()))
        workers.until(lambda: _held(latest) == [1])
        latest.publish(np.full(100, 2))
        stopped = crew.start(workers.stop_with_the_table, latest)
        assert stopped.wait_stopped()
        reader.kill()
        for timeout in (0, 0.1):
            with pytest.raises(queue.Empty, match="stopped"), latest.borrow(timeout=timeout):
                pass
        stopped.send_signal(signal.SIGCONT)
        stopped.result()
        with latest.borrow(timeout=10) as borrow:
            assert borrow.version == 2


def test_a_publisher_that_died_in_the_middle_has_published_nothing_and_another_takes_over() -> None:
    with Latest("64KiB") as latest:
        latest.publish(np.full(4000, 1))
        with workers.Crew() as crew:
            publisher = crew.start(_stop_while_publishing, latest)
            assert publisher.wait_stopped()
            assert latest.read()[0] == 1  # readers go on beside it
            assert _hold(latest)[0] == 1
            publisher.kill()
            assert latest.publish(np.full(4000, 2)) == 2
            version, value = latest.read()
            assert (version, value.min(), value.max()) == (2, 2, 2)
        assert latest.stats().recoveries == 1


class _Halfway(Parts):
    """A payload in whose copy the process stops."""

    __slots__ = ()

    def write(self, memory: Any, offset: int) -> None:
        memory[offset : offset + self.nbytes // 2] = b"\xff" * (self.nbytes // 2)
        workers.stop()
        super().write(memory, offset)


def _stop_while_publishing(latest: Latest) -> None:
    encode = latest._codec.encode

    def encode_halfway(obj: Any) -> Any:
        meta, data, description = encode(obj)
        halfway = _Halfway()
        halfway.add(data, len(data))
        return meta, halfway, description

    latest._codec.encode = encode_halfway  # type: ignore[method-assign]
    latest.publish(b"\xff" * 30_000)


def test_a_stopped_publisher_keeps_readers_from_nothing_and_another_publisher_waiting() -> None:
    with Latest("64KiB") as latest, workers.Crew() as crew:
        latest.publish(b"first")
        publisher = crew.start(_stop_while_publishing, latest)
        assert publisher.wait_stopped()
        second = crew.start(_publish, latest, 7, 1)
        workers.until(
            lambda: any(person.pid == second.pid and person.senders for person in latest.stats().participants)
        )
        for _ in range(20):
            assert latest.read() == (1, b"first")
            time.sleep(0.01)
        assert latest.version == 1  # nobody takes a living process's mutex
        publisher.send_signal(signal.SIGCONT)
        assert second.result() == [3]
        publisher.process.join()
        assert latest.read() == (3, (7, 0))


def test_a_stopped_reader_stops_nobody() -> None:
    """It is stopped inside the readers' mutex; others copy without it."""
    with Latest("64KiB", borrows=2) as latest, workers.Crew() as crew:
        latest.publish(np.full(4000, 1))
        reader = crew.start(_stop_while_pinning, latest)
        assert reader.wait_stopped()
        for k in range(2, 6):
            assert latest.publish(np.full(4000, k)) == k
            version, value = latest.read(timeout=5)
            assert (version, value.min(), value.max()) == (k, k, k)
        with pytest.raises(queue.Empty, match="another process holds the readers' mutex"), latest.borrow(timeout=0.1):
            pass
        reader.send_signal(signal.SIGCONT)
        assert reader.result() == 5
        assert _hold(latest)[0] == 5


def _stop_while_pinning(latest: Latest) -> int:
    versions = latest._attachment.versions  # type: ignore[union-attr]
    reclaim = versions._reclaim

    def stop_and_reclaim() -> None:
        versions._reclaim = reclaim
        workers.stop()
        reclaim()

    versions._reclaim = stop_and_reclaim
    return latest.read()[0]


def test_waiting_readers_are_told_that_no_publisher_is_left() -> None:
    with Latest(100) as latest, workers.Crew() as crew:
        publisher = crew.start(_publish, latest, 0, 3)
        publisher.result()
        reader = Latest.attach(latest.name)
        assert reader.read(newer_than=2) == (3, (0, 2))
        with pytest.raises(EndOfChannel, match=rf"no publisher any more: process {publisher.pid} closed.*version is 3"):
            reader.read(newer_than=3)
        check_empty(reader.read, newer_than=3, timeout=0.1)  # with a time-out one waits for somebody who takes over
        reader.close()


def test_a_reader_with_time_waits_for_a_publisher_that_takes_over() -> None:
    with Latest(100) as latest, workers.Crew() as crew:
        publisher = crew.start(_publish, latest, 0, 1)
        publisher.result()
        source = """
import sys, time, ringshm
with ringshm.Latest.attach(sys.argv[1]) as latest:
    sys.stdin.readline()
    print(latest.publish("taken over"))
"""
        successor = workers.script(source, latest.name, stdin=-1)
        reader = crew.start(latest.read, 1, 50.0)
        workers.until(lambda: latest.stats().waiting_receivers == 1)
        assert successor.communicate("go\n")[0] == "2\n"
        assert successor.returncode == 0
        assert reader.result() == (2, "taken over")


def test_a_reader_waits_in_the_kernel() -> None:
    """While nothing is published, a waiting reader takes next to no time of the processor."""
    with Latest(100) as latest, workers.Crew() as crew:
        latest.publish(0)
        reader = crew.start(_cpu_of_a_wait, latest)
        workers.until(lambda: latest.stats().waiting_receivers == 1)
        time.sleep(1.0)
        latest.publish(1)
        assert reader.result() < 0.1


def _cpu_of_a_wait(latest: Latest) -> float:
    before = time.process_time()
    latest.read(newer_than=1, timeout=50.0)
    return time.process_time() - before


def test_no_more_readers_than_were_promised_can_attach() -> None:
    with Latest(100, readers=1) as latest, workers.Crew() as crew:
        latest.publish("x")
        members = [crew.start(_attach_and_wait, latest.name) for _ in range(2)]  # a reader and a publisher
        latest.wait_for_peers(receivers=2)
        with pytest.raises(workers.Failed, match="TooManyParticipants"):
            crew.start(_attach_and_wait, latest.name).result()
        latest.publish("end")
        assert [member.result() for member in members] == [2, 2]


def _attach_and_wait(name: str) -> int:
    with Latest.attach(name) as latest:
        return latest.read(newer_than=1)[0]


def test_nothing_is_left_when_everybody_was_killed() -> None:
    source = """
import os, signal, sys, ringshm
latest = ringshm.Latest(1000, name=sys.argv[1])
latest.publish(1)
with latest.borrow():
    if not os.fork():
        latest.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    name = f"latest-{os.getpid()}"
    workers.script(source, name).communicate()
    with Latest(1000, name=name) as latest:  # reclaims the name
        assert latest.version == 0
    assert not [file for file in os.listdir("/dev/shm") if name in file]


# --- without a pin


def _crowd_out(latest: Latest) -> list[Any]:
    """Hold as many versions as may be held; the newest is none of them."""
    views = []
    for k in range(latest.borrows):
        latest.publish(np.full(4000, k + 1))
        views.append(_hold(latest))
    latest.publish(np.full(4000, latest.borrows + 1))
    return views


def test_a_read_needs_no_pin() -> None:
    with Latest("64KiB", borrows=2) as latest:
        views = _crowd_out(latest)
        version, value = latest.read()
        assert (version, value.min(), value.max()) == (3, 3, 3)
        value[:] = 0
        assert latest.read()[1].min() == 3
        assert [view[0] for view in views] == [1, 2]


def test_a_read_without_a_pin_is_never_torn() -> None:
    last = 1500
    with Latest("256KiB", borrows=1) as latest, workers.Crew() as crew:
        views = _crowd_out(latest)
        members = [crew.start(_follow, latest, last, "read") for _ in range(2)]
        latest.wait_for_peers(receivers=2)
        for k in range(3, last + 1):
            latest.publish(np.full(30_000, k))
        for member in members:
            seen = member.result()
            assert seen[-1] == last
            assert seen == sorted(set(seen))
        assert (views[0] == 1).all()


def test_a_typed_read_needs_no_pin() -> None:
    with Latest(spec=SPEC, borrows=1) as latest:

        def publish(k: int) -> None:
            latest.publish({"layer": {"w": np.full((16, 8), k, "f4"), "b": np.full(8, k, "f4")}, "step": k})

        publish(1)
        view = _hold(latest)
        publish(2)
        version, value = latest.read()
        assert (version, value["step"], value["layer"]["w"].max(), value["layer"]["b"].min()) == (2, 2, 2, 2)
        assert view["layer"]["w"].max() == 1


# --- damage


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_segment_gives_results_or_errors_and_nothing_else(seed: int) -> None:
    """NEWEST, the pins and the records hold arbitrary words: every call ends, in a result or an error of ringshm."""
    rng = random.Random(seed)
    with Latest(1000, borrows=2) as latest:
        segment = latest._attachment.segment  # type: ignore[union-attr]
        words, layout = segment.words, segment.layout
        for k in range(3):
            latest.publish(np.full(100, k))
        sound = bytes(segment.memory[: layout.slots])
        for _ in range(15):
            for _ in range(rng.randrange(1, 4)):
                of_a_record = layout.record(rng.randrange(layout.capacity)) + rng.choice((R_META, R_SEQUENCE))
                pin = layout.pins // 8 + rng.randrange(4 * PIN_CELLS // 8)
                values = [0, 1, 5, 1 << 16, (1 << 16) + 4, 3 << 16 | 3, (1 << 64) - 1, rng.getrandbits(64)]
                words[rng.choice([NEWEST, of_a_record, pin])] = rng.choice(values)
            for call in (
                lambda: latest.read(timeout=0), lambda: latest.publish(np.arange(100)), lambda: _hold(latest, 0),
                lambda: latest.stats(), lambda: latest.version,
            ):  # fmt: skip
                with suppress(ringshm.RingshmError, queue.Empty):
                    call()
            segment.memory[: layout.slots] = sound
        assert latest.read(timeout=0)[0] == 3


def test_a_newest_version_that_names_no_slot_is_damage() -> None:
    with Latest(1000) as latest:
        latest.publish(1)
        words = latest._attachment.segment.words  # type: ignore[union-attr]
        good = words[NEWEST]
        for newest in (1 << 16, 1 << 16 | 7, (1 << 64) - 1):
            words[NEWEST] = newest
            for call in (latest.read, latest.borrow().__enter__, lambda: latest.publish(2)):
                with pytest.raises(ChannelCorrupted):
                    call()
        words[NEWEST] = good
        assert latest.publish(2) == 2

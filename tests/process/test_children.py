"""Who may still come: children that are lost while they start, or end before they have sent; the libraries that start
them; and handles that are for nobody in particular.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import pytest
from support import seams, workers
from support.checks import check_empty
from support.payloads import Unpickles
from support.tracer import Tracer, count_bytecodes

from ringshm import BrokenChannel, Channel, EndOfChannel, Receiver, Sender, TooManyParticipants
from ringshm.process import children

pytestmark = workers.may_fork

PICKLING = ("spawn", "forkserver")


def _leave(how: str) -> None:
    """End this process in that way."""
    if how == "killed":
        workers.die()
    elif how == "raises":
        raise SystemExit(3)


def _work(_: None, handle: Any, how: str) -> None:
    _leave(how)


def _put(_: None, handle: Any, *messages: Any) -> None:
    workers.put_each(handle, *messages)


def _start(method: str, function: Callable[..., None], *args: Any) -> Any:
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=function, args=args, daemon=True)  # a test that fails leaves none to wait for
    process.start()
    return process


END = {"returns": "exit code 0", "raises": "exit code 3", "killed": "killed by SIGKILL"}


# --- lost, or of no use


@pytest.mark.parametrize("how", ["raises", "killed"])
@pytest.mark.parametrize("handle", ["channel", "sender"])
@pytest.mark.parametrize("method", PICKLING)
def test_a_child_that_is_lost_before_it_attaches_ends_the_stream(
    method: str, handle: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "_PATIENCE", 60.0)  # on a busy machine a forkserver may tell late how it has ended
    with Channel(2, 64) as channel:
        given = channel.sender() if handle == "sender" else channel
        lost = _start(method, _work, Unpickles(_leave, how), given, "never")
        if handle == "sender":
            given.close()
        end = "killed by SIGKILL" if how == "killed" else "exit code [13]"  # a forkserver's children exit with 1
        with pytest.raises(EndOfChannel, match=rf"1 process .*without sending: process {lost.pid} \({end}\)"):
            channel.get()
        lost.join()


@pytest.mark.parametrize("how", END)
@pytest.mark.parametrize("method", workers.METHODS)
def test_the_stream_ends_if_all_actors_end_before_their_first_put(method: str, how: str) -> None:
    with Channel(2, 64) as channel:
        actors = [_start(method, _work, None, channel, how) for _ in range(2)]
        with pytest.raises(EndOfChannel) as ended:
            channel.get()
        assert "2 processes that were started as senders ended without sending" in str(ended.value)
        for actor in actors:
            # it may just be exiting
            assert re.search(rf"process {actor.pid} \(({END[how]}|exited)\)", str(ended.value))
            actor.join()


@pytest.mark.parametrize("method", workers.METHODS)
def test_a_sender_is_not_left_alone_with_receivers_that_never_received(method: str) -> None:
    with Channel(1, 64) as channel:
        lost = _start(method, _work, None, channel.receiver(), "killed")
        lost.join()
        with pytest.raises(BrokenChannel):
            for number in range(3):
                channel.put(number)


@pytest.mark.parametrize("method", PICKLING)
def test_a_receiver_that_starts_slowly_is_waited_for(method: str) -> None:
    with Channel(1, 64) as channel, workers.Crew(method) as crew:
        crew.start(workers.get_some, channel, 1, method="fork")
        begin, wait = crew.context.Pipe()
        crew.start(_get_all, Unpickles(Connection.recv, begin), channel.receiver())
        channel.put("the first receiver's")
        assert channel.flush()
        crew.members[0].result()
        channel.put("waits")
        assert not channel.flush(timeout=0.3)
        wait.send(None)
        assert channel.flush()
        channel.close()
        assert crew.members[1].result() == ["waits"]


def _get_all(_: None, receiver: Receiver[Any]) -> list[Any]:
    return workers.get_all(receiver)


def _leave_a_child(writing: Connection) -> None:
    """Fork a child, which inherits all descriptors, and die."""
    if not os.fork():
        writing.send(os.getpid())
        signal.pause()
    workers.die()


@pytest.mark.parametrize("method", PICKLING)
def test_a_lost_childs_own_child_keeps_no_stream_open(method: str) -> None:
    with Channel(2, 64) as channel:
        context = multiprocessing.get_context(method)
        reading, writing = context.Pipe(duplex=False)  # type: ignore[attr-defined]
        lost = _start(method, _work, Unpickles(_leave_a_child, writing), channel, "never")
        grandchild = reading.recv()
        try:
            with pytest.raises(EndOfChannel, match=rf"ended without sending: process {lost.pid} "):
                channel.get()
        finally:
            os.kill(grandchild, signal.SIGKILL)
        lost.join()


def test_a_child_that_has_only_received_has_not_failed_to_send() -> None:
    with Channel(2, 64) as channel, workers.Crew() as crew:
        channel.put("message")
        assert crew.start(workers.get_some, channel, 1).result() == ["message"]
        crew.start(workers.put_each, channel, "other").result()
        with channel.receiver() as receiver:
            channel.close()
            with pytest.raises(EndOfChannel) as ended:
                workers.get_some(receiver, 2)
        assert "without sending" not in str(ended.value)


def test_a_start_that_fails_counts_for_nothing() -> None:
    program = """
import contextlib, multiprocessing, os, queue, resource
from multiprocessing.popen_fork import Popen  # loaded before this process may read nothing any more
from ringshm import Channel

if not os.getuid():  # whom no limit holds
    with contextlib.suppress(OSError):  # it may be root here alone, and another user to the kernel
        os.setresuid(65534, 65534, 65534)
receiver = Channel(4, 64).receiver()
channel = Channel.attach(receiver.name)
sender = channel.sender()

def get():
    try:
        return receiver.get(timeout=0.12)
    except queue.Empty as error:
        return str(error)

def start():
    process = multiprocessing.get_context("fork").Process(target=sender.put, args=("message",))
    process.start()
    return process

limit = resource.getrlimit(resource.RLIMIT_NPROC)
resource.setrlimit(resource.RLIMIT_NPROC, (0, limit[1]))
try:
    start()
except BlockingIOError:
    print(get())
try:
    multiprocessing.get_context("fork").Process(target=print).start()  # which would inherit all handles
except BlockingIOError as error:
    kept = error
print(get())
resource.setrlimit(resource.RLIMIT_NPROC, limit)
process = start()
sender.close()
channel.close()
print(list(receiver))
process.join()
"""
    *empty, received = workers.finish(workers.script(program)).splitlines()
    assert len(empty) == 2
    for text in empty:
        assert "no message came in time" in text
    assert received == "['message']"


def test_a_start_that_fails_amid_a_look_is_no_end() -> None:
    with Channel(4, 64) as channel:
        fail, over = seams.start_of_a_child(channel)
        count = count_bytecodes(over)
        fail()
        for at in range(1, count + 1):
            fail, over = seams.start_of_a_child(channel)
            with Tracer(fail, at):
                ended = over()
            assert not ended, f"the start failed at bytecode {at}"
        assert not over()


class _Refuses:
    """What cannot be pickled, and keeps the Popen for which it should have been."""

    popens: ClassVar[list[Any]] = []

    def __reduce__(self) -> Any:
        self.popens.append(children.spawning_popen())
        raise ValueError("it stays here")


@pytest.mark.parametrize("method", PICKLING)
def test_names_that_wait_for_a_start_go_when_it_has_failed(method: str) -> None:
    before = workers.ringshm_files()
    with Channel(4, 64) as channel:
        try:
            _start(method, _put, channel.sender(), _Refuses())
        except ValueError:
            pass
    assert workers.ringshm_files() > before  # as far as anybody knows the child may still come
    assert _Refuses.popens.pop() is not None
    assert workers.ringshm_files() == before


# --- killed before anybody used it


def _create_and_wait(sending: Connection, keep_open: bool, role: str) -> None:
    workers.die_with_parent()
    channel = Channel(1, 64, keep_open=keep_open)
    child = multiprocessing.get_context("fork").Process(
        target=_use, args=(channel.receiver() if role == "receiver" else channel.sender(), sending)
    )
    child.start()
    signal.pause()


def _use(handle: Any, sending: Connection) -> None:
    sending.send("attached")
    try:
        if isinstance(handle, Receiver):
            handle.get()
        else:
            workers.put_each(handle, 1, 2)
    except (EndOfChannel, BrokenChannel) as error:
        sending.send(str(error))


@pytest.mark.parametrize("role", ["receiver", "sender"])
@pytest.mark.parametrize("keep_open", [False, True])
def test_the_death_of_a_creator_that_never_used_its_channel_ends_it(keep_open: bool, role: str) -> None:
    reading, sending = multiprocessing.Pipe(duplex=False)
    creator = multiprocessing.get_context("fork").Process(target=_create_and_wait, args=(sending, keep_open, role))
    creator.start()
    sending.close()
    try:
        assert reading.recv() == "attached"
    finally:
        creator.kill()
        creator.join()
    assert f"no {'sender' if role == 'receiver' else 'receiver'} any more" in reading.recv()


# --- the libraries that start children


def _initialise(sender: Sender[Any]) -> None:
    global _kept
    _kept = sender


def _send_kept(message: Any) -> None:
    _kept.put(message)


_kept: Sender[Any]


@pytest.mark.parametrize("method", workers.METHODS)
@pytest.mark.parametrize("kind", ["Pool", "ProcessPoolExecutor"])
def test_workers_of_a_pool_count_until_it_is_closed(kind: str, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    with Channel(4, 64) as channel:
        sender = channel.sender()
        if kind == "Pool":
            with context.Pool(1, _initialise, (sender,)) as pool:
                sender.close()
                pool.map(_send_kept, [1, 2])
                assert [channel.get(), channel.get()] == [1, 2]
                check_empty(channel.get, timeout=0.2)
                pool.close()
                pool.join()
        else:
            with ProcessPoolExecutor(1, context, _initialise, (sender,)) as executor:
                list(executor.map(_send_kept, [1, 2]))
                sender.close()
                assert [channel.get(), channel.get()] == [1, 2]
                check_empty(channel.get, timeout=0.2)
        with pytest.raises(EndOfChannel):
            channel.get()


# billiard's forkserver outlives the program
@pytest.mark.parametrize(
    ("library", "method"),
    [*(("multiprocess", method) for method in workers.METHODS), ("billiard", "fork"), ("billiard", "spawn")],
)
def test_children_of_libraries_like_multiprocessing_count_as_its_own(library: str, method: str) -> None:
    context = pytest.importorskip(library).get_context(method)
    with Channel(4, 64) as channel, Channel(4, 64) as other:
        stays = context.Process(target=_work_until, args=(other.receiver(),), daemon=True)
        stays.start()  # under fork it inherits `channel`, which it was not given
        quits = context.Process(target=_work, args=(None, channel, "returns"), daemon=True)
        quits.start()
        puts = context.Process(target=_put, args=(None, channel, "message"), daemon=True)
        puts.start()
        assert channel.get() == "message"
        with pytest.raises(EndOfChannel, match=r"1 process .*without sending"):
            channel.get()
        quits.join()
        puts.join()
        assert channel.stats().deaths == (), "children that exit well are no deaths"
        lost = context.Process(target=_work, args=(Unpickles(_leave, "killed"), channel, "killed"), daemon=True)
        lost.start()
        lost.join()
        with pytest.raises(EndOfChannel, match=rf"2 processes .*process {lost.pid} .killed by SIGKILL"):
            channel.get()
        other.put("leave")
        stays.join()


def _put_through_children(sender: Sender[Any], number: int, depth: int) -> None:
    sender.put((depth, number))
    if depth:
        child = multiprocessing.get_context("fork").Process(
            target=_put_through_children, args=(sender, number, depth - 1)
        )
        child.start()
        child.join()


def test_threads_that_fork_at_once_leave_no_deaths_behind() -> None:
    """A forked child has the frames of its parent's other threads, which never go on, and keep what they hold."""
    for _ in range(3):
        with Channel(32, 64) as channel:
            sender = channel.sender()
            threads = [threading.Thread(target=_put_through_children, args=(sender, number, 2)) for number in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            sender.close()
            with channel.receiver() as receiver:
                channel.close()
                assert sorted(receiver) == [(depth, number) for depth in range(3) for number in range(5)]
                assert receiver.stats().deaths == ()


def _work_until(receiver: Receiver[Any]) -> None:
    receiver.get()


# --- handles that are for nobody in particular


def test_more_handles_may_be_on_their_way_than_there_are_records() -> None:
    with Channel(2, 64, max_participants=3) as channel:
        pickled = [pickle.dumps(channel.sender()) for _ in range(20)]
        with workers.Crew() as crew:
            crew.start(workers.put_each, channel, "message").result()
        assert channel.get() == "message"
        check_empty(channel.get, timeout=0.1)
        assert len(channel.stats().on_their_way) == 3
        for parcel in pickled:
            pickle.loads(parcel).close()
        assert 1 <= len(channel.stats().on_their_way) <= 3, "the shared one counts until its maker has closed"


def test_a_child_finds_no_room_among_handles_that_others_have_pickled() -> None:
    with Channel(2, 64, max_participants=2) as channel:
        for _ in range(2):
            pickle.dumps(channel)
        with pytest.raises(TooManyParticipants, match="2 handles on their way"):
            _start("spawn", _put, None, channel, "message")


def test_where_and_for_whom_a_handle_was_pickled_is_in_the_stats() -> None:
    with Channel(2, 64) as channel, workers.Crew("spawn") as crew:
        begin, wait = crew.context.Pipe()
        member = crew.start(_put, Unpickles(Connection.recv, begin), channel.sender(), "message")
        (coming,) = channel.stats().on_their_way
        assert (coming.role, coming.pid, coming.maker, coming.started) == ("sender", member.pid, os.getpid(), True)
        assert "workers.py:" in coming.place  # where the crew starts its processes
        wait.send(None)
        assert channel.get() == "message"
        assert channel.stats().on_their_way == ()
        member.result()


def test_a_handle_given_to_a_child_keeps_the_names_though_the_creator_has_closed(name: str) -> None:
    with Channel(2, 64, name=name).receiver() as receiver, workers.Crew("spawn") as crew:
        feeder = crew.start(workers.put_each, Channel.attach(name), "message", method="fork")
        feeder.result()
        assert crew.start(workers.get_some, receiver, 1).result() == ["message"]


ELSEWHERE: list[Channel[Any]] = []  # which nothing that a child is started with leads to


def _use_elsewhere(told: Connection, go: Connection, _: Any) -> None:
    told.send("started")
    go.recv()
    (channel,) = vars(sys.modules[__name__])["ELSEWHERE"]
    assert channel.get(timeout=60) == "to the child"
    channel.put("from the child")
    told.send(os.getpid())
    go.recv()


def test_a_child_joins_a_channel_that_it_was_not_started_with_when_it_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (told, tell), (listen, go) = multiprocessing.Pipe(), multiprocessing.Pipe()
    with Channel(2, 64) as channel, Channel(2, 64) as own:

        def attached() -> set[int]:
            return {person.pid for person in channel.stats().participants}

        monkeypatch.setitem(globals(), "ELSEWHERE", [channel])
        with workers.Crew("fork") as crew:
            member = crew.start(_use_elsewhere, tell, listen, own)
            assert told.recv() == "started"
            assert attached() == {os.getpid()}
            channel.put("to the child")
            go.send(None)
            assert told.recv() == member.pid
            assert channel.get(timeout=60) == "from the child"
            assert attached() == {os.getpid(), member.pid}
            go.send(None)
            member.result()


def test_the_libraries_still_have_what_a_start_relies_on() -> None:
    """Where they have not, a child would be missed that starts slowly."""
    for library in ("multiprocessing", "multiprocess", "billiard"):
        try:
            spawn = importlib.import_module(f"{library}.popen_spawn_posix").Popen
        except ImportError:
            assert library != "multiprocessing", sys.version
            continue
        assert callable(spawn.duplicate_for_child)
        assert callable(spawn.DupFd(0).detach)

"""Queue, JoinableQueue, SimpleQueue: what programs for multiprocessing's, or for faster-fifo's, do with them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
import multiprocessing
import multiprocessing.queues
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
from support.checks import check_empty, check_full
from support.payloads import Unpickles, read_only
from support.tracer import Tracer
from support.workers import METHODS, Crew, die, each_step, get_some, in_threads, may_fork, script, until

import ringshm
from ringshm import BrokenChannel, EndOfChannel, JoinableQueue, PayloadTooLarge, Queue, QueueClosed, SimpleQueue
from ringshm.dropin.queues import DEFAULT_CAPACITY, default_slot_size

pytestmark = may_fork
methods = pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])


@contextlib.contextmanager
def made(*queues: Any) -> Iterator[Any]:
    """Close queues at the end."""
    try:
        yield queues if len(queues) > 1 else queues[0]
    finally:
        for q in queues:
            q.close()


# --- what runs in other processes


def square(tasks: Any, results: Any) -> None:
    """A worker as programs for multiprocessing write it."""
    for task in iter(tasks.get, None):
        results.put((task, task * task))


def put_all(q: Any, items: list[Any]) -> None:
    for item in items:
        q.put(item)


def do_tasks(q: Any, done: Any) -> None:
    for task in iter(q.get, None):
        done.put(task)
        q.task_done()
    q.task_done()


def take_and_die(q: Any) -> None:
    q.get()
    die()


def take_and_leave(q: Any) -> None:
    q.get()


def wait_for_one(q: Any) -> str:
    """How a get ends that may wait for ever."""
    try:
        return str(q.get())
    except Exception as error:
        return type(error).__name__


_inherited: dict[str, Any] = {}


def initialize(q: Any) -> None:
    _inherited["queue"] = q


def put_in_inherited(number: int) -> int:
    _inherited["queue"].put((os.getpid(), number))
    return number


def put_in_argument(q: Any, number: int) -> None:
    q.put(number)


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("this is not to be pickled")


# --- a program that changes an import


@pytest.mark.parametrize("name", ["multiprocessing", "ringshm"])
@methods
def test_one_program_does_the_same_with_either_module(name: str, method: str) -> None:
    module: Any = ringshm if name == "ringshm" else multiprocessing.get_context(method)
    tasks, results = module.Queue(), module.Queue(50)
    with Crew(method) as crew:
        for _ in range(3):
            crew.start(square, tasks, results)
        for number in range(40):
            tasks.put(number)
        assert dict(results.get() for _ in range(40)) == {number: number**2 for number in range(40)}
        for _ in range(3):
            tasks.put(None)
        crew.results()
    check_empty(results.get_nowait)
    assert results.empty() and not results.full()
    for q in (tasks, results):
        q.close()
        q.join_thread()
        with pytest.raises(ValueError, match="is closed"):
            q.put(1)


@pytest.mark.parametrize("name", ["Queue", "JoinableQueue", "SimpleQueue"])
def test_every_call_of_multiprocessings_is_there_with_its_arguments(name: str) -> None:
    theirs, ours = getattr(multiprocessing.queues, name), getattr(ringshm, name)
    for method in ("__init__", *(call for call in vars(theirs) | vars(multiprocessing.queues.Queue) if call[0] != "_")):
        if not hasattr(theirs, method):
            continue
        expected = list(inspect.signature(getattr(theirs, method)).parameters.values())
        found = inspect.signature(getattr(ours, method)).parameters
        assert [p.name for p in expected] == list(found)[: len(expected)]
        for parameter in expected:
            if parameter.name != "ctx":  # which nobody need give here
                assert found[parameter.name].default == parameter.default
            assert found[parameter.name].kind == parameter.kind


@pytest.mark.parametrize("make", [Queue, JoinableQueue, SimpleQueue])
@pytest.mark.parametrize("method", METHODS)
def test_a_context_is_taken_as_ctx(make: Any, method: str) -> None:
    with made(make(ctx=multiprocessing.get_context(method))) as q:
        q.put([1, "two"])
        assert q.get() == [1, "two"]


def test_a_child_class_may_add_what_it_needs() -> None:
    class Named(Queue[int]):
        def __init__(self, label: str) -> None:
            super().__init__(3)
            self.label = label

    with made(Named("numbers")) as q, Crew() as crew:
        crew.start(put_all, q, [1, 2])
        crew.results()
        assert (q.label, q.maxsize, [q.get(), q.get()]) == ("numbers", 3, [1, 2])


# --- sizes


def test_without_a_size_it_holds_the_default_capacity() -> None:
    with made(Queue(), Queue(maxsize=-1), SimpleQueue()) as queues:
        for q in queues[:2]:
            assert q.maxsize == DEFAULT_CAPACITY
        for q in queues:
            assert (q.stats().capacity, q.slot_size) == (DEFAULT_CAPACITY, 16 << 10)


def test_put_waits_beyond_the_default_capacity() -> None:
    with made(Queue(slot_size=64)) as q:
        for number in range(DEFAULT_CAPACITY):
            q.put_nowait(number)
        assert q.full() and q.qsize() == DEFAULT_CAPACITY
        with in_threads(partial(q.put, "waits")):
            until(lambda: q.stats().waiting_senders == 1)
            assert q.get() == 0
        assert q.full()


@pytest.mark.parametrize(
    ("capacity", "nbytes"), [(1, 1 << 20), (16, 1 << 20), (17, 983040), (1000, 16384), (4096, 4096), (10**6, 4096)]
)
def test_messages_share_16_mib_between_a_page_and_1_mib_each(capacity: int, nbytes: int) -> None:
    assert default_slot_size(capacity) == nbytes


def test_slot_size_says_how_large_messages_are() -> None:
    with made(Queue(2, slot_size="256KiB")) as q:
        array = np.arange(256 << 7).astype(np.float64)
        q.put(array)
        assert np.array_equal(q.get(), array)
        with pytest.raises(PayloadTooLarge, match="message needs"):
            q.put_nowait(np.zeros((256 << 10) + 1, np.uint8))
        assert q.empty()


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Queue("4"), TypeError, "maxsize='4'"),  # type: ignore[arg-type]
    (lambda: Queue(2.5), TypeError, "maxsize=2.5"),  # type: ignore[arg-type]
    (lambda: Queue(4, slot_size=0), ValueError, "slot_size=0"),
    (lambda: SimpleQueue(slot_size="8 bits"), ValueError, "unknown unit"),
    (lambda: Queue(1 << 20, slot_size="1TiB"), ringshm.InsufficientSharedMemory, "--shm-size"),
]


@pytest.mark.parametrize(("make", "error", "says"), BAD, ids=[says for _, _, says in BAD])
def test_a_queue_that_cannot_be_is_refused(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


# --- put and get


def _read_only_arrays() -> dict[str, Any]:
    array = np.arange(12.0).reshape(3, 4)
    records = np.rec.array([(1, 2.0)], dtype=[("a", int), ("b", float)])
    records.flags.writeable = False
    return {
        "bare": read_only(array.copy()), "Fortran": read_only(np.asfortranarray(array)),
        "strided": read_only(np.arange(24.0)[::2]), "broadcast": np.broadcast_to(np.float32(2), (3, 3)),
        "over bytes": np.frombuffer(bytes(range(8)), np.uint8), "in a dict": {"a": [read_only(array.copy()), b"x"]},
        "of a subclass": records, "large": read_only(np.zeros(300_000)),
        "of objects": read_only(np.array([1, "two", None], object)), "of no size": read_only(np.zeros((0, 3))),
    }  # fmt: skip


@pytest.mark.parametrize("make", [Queue, JoinableQueue, SimpleQueue])
@pytest.mark.parametrize("what", _read_only_arrays())
def test_arrays_arrive_writable_as_by_multiprocessing(what: str, make: Any) -> None:
    def array_of(message: Any) -> Any:
        return message["a"][0] if isinstance(message, dict) else message

    sent = _read_only_arrays()[what]
    # what multiprocessing's queues do before Python 3.14, whose default protocol is 5 and keeps read-only ones so
    modelled = array_of(pickle.loads(ForkingPickler.dumps(sent, 4)))
    assert modelled.flags.writeable
    with made(make()) as q, made(pickle.loads(pickle.dumps(q))) as again:
        for sender in (q, again):
            sender.put(sent)
            arrived = array_of(q.get())
            assert arrived.flags.writeable
            assert arrived.flags.f_contiguous == modelled.flags.f_contiguous
            assert type(arrived) is type(modelled) and arrived.dtype == modelled.dtype
            assert arrived.tolist() == modelled.tolist() == array_of(sent).tolist()
            arrived[...] = arrived.copy()
    assert not array_of(sent).flags.writeable


@pytest.mark.parametrize("timeout", [0, 0.01, -1])
def test_a_time_out_that_is_over_is_none_at_all(timeout: float) -> None:
    """Programs compute `deadline - now`."""
    with made(Queue(1)) as q:
        check_empty(q.get, True, timeout)
        check_empty(q.get_many, timeout=timeout)
        q.put("here", True, timeout)
        for put in (q.put, lambda x, block, t: q.put_many([x], block, t)):
            check_full(put, "too many", True, timeout)
        assert q.get(True, timeout) == "here"


def test_put_raises_at_once_what_pickling_raises() -> None:
    with made(Queue(), JoinableQueue(), SimpleQueue()) as queues:
        for q in queues:
            with pytest.raises(TypeError, match="not to be pickled"):
                q.put(Unpicklable())
            assert q.empty()
        assert queues[1].join(0)  # no task was put


def test_get_raises_what_cannot_be_unpickled_and_goes_on() -> None:
    with made(JoinableQueue()) as q:
        q.put(Unpickles(int, "no number"))
        q.put(2)
        with pytest.raises(ringshm.UndecodableMessage):
            q.get()
        assert q.get() == 2
        q.task_done()
        assert not q.join(0)  # that was one of two
        q.task_done()
        assert q.join(0)


def test_a_connection_goes_through_a_queue() -> None:
    with made(Queue()) as q, Crew() as crew:
        ours, theirs = multiprocessing.Pipe()
        q.put(theirs)
        crew.start(send_over, q)
        assert ours.recv() == "through the pipe"
        crew.results()
        ours.close()
        theirs.close()


def send_over(q: Any) -> None:
    connection = q.get()
    connection.send("through the pipe")
    connection.close()


def test_what_was_put_stays_when_the_process_that_put_it_is_killed() -> None:
    with made(Queue()) as q, Crew() as crew:
        child = crew.start(lambda: (put_all(q, list(range(100))), die()))
        child.process.join()
        assert [q.get(timeout=30) for _ in range(100)] == list(range(100))


# --- ending


def test_after_close_each_call_says_so() -> None:
    calls: dict[Any, list[Callable[[Any], Any]]] = {
        Queue: [
            lambda q: q.put(1), lambda q: q.get(timeout=1), lambda q: q.put_many([1]),
            lambda q: q.put_many([1], timeout=1), lambda q: q.get_many(), lambda q: q.qsize(), lambda q: q.full(),
            lambda q: q.empty(),
        ],
        JoinableQueue: [lambda q: q.task_done(), lambda q: q.join()],
        SimpleQueue: [lambda q: q.put(1), lambda q: q.get(), lambda q: q.empty()],
    }  # fmt: skip
    for make, of_it in calls.items():
        q = make()
        q.put(1)
        q.close()
        q.close()
        for call in of_it:
            with pytest.raises(QueueClosed, match=f"ringshm.{make.__name__} .* is closed") as caught:
                call(q)
            assert isinstance(caught.value, ValueError) and isinstance(caught.value, OSError)


def test_a_queue_that_was_closed_unused_is_empty() -> None:
    q: Queue[int] = Queue()
    assert not q.is_closed()
    q.close()
    assert q.is_closed() and q.empty()


def test_join_thread_has_nothing_to_wait_for() -> None:
    with made(Queue(), Queue()) as (q, other):
        with pytest.raises(ValueError, match="close"):
            q.join_thread()
        q.put(1)
        q.cancel_join_thread()
        q.put(2)
        assert [q.get(), q.get()] == [1, 2]
        q.close()
        assert q.join_thread() is None
        assert other.cancel_join_thread() is None


def test_get_waits_while_the_process_that_made_the_queue_lives() -> None:
    with made(Queue()) as q, Crew() as crew:
        crew.start(put_all, q, [1])
        assert crew.results() == [None]  # the only sender has gone
        assert q.get() == 1
        waits = crew.start(wait_for_one, q)
        until(lambda: q.stats().waiting_receivers == 1)
        check_empty(q.get, timeout=0.3)  # more than it takes to see that nobody is left who would send
        q.put("at last")
        assert waits.result() == "at last"


def test_others_do_not_wait_for_a_process_that_has_gone() -> None:
    with made(Queue()) as q, Crew() as crew:
        child = crew.start(wait_for_one, q)
        q.put("first")
        assert child.result() == "first"
        child = crew.start(wait_for_one, q)
        until(lambda: q.stats().waiting_receivers == 1)
        q.close()
        assert child.result() == EndOfChannel.__name__


def test_a_script_that_ends_leaves_nothing() -> None:
    source = "import ringshm; q = ringshm.Queue(); s = ringshm.SimpleQueue(); q.put(1); s.put(2); print(q.name)"
    process = script(source)
    name = process.communicate()[0].strip()
    assert process.returncode == 0
    with pytest.raises(ringshm.ChannelNotFound):
        ringshm.Channel.attach(name)


def test_a_queue_that_arrives_too_late_says_so() -> None:
    q: Queue[int] = Queue()
    pickled = pickle.dumps(q)
    with made(pickle.loads(pickled)) as same:
        q.put(1)
        assert same.get() == 1
    q.close()
    late = pickle.loads(pickled)
    with pytest.raises(ringshm.ChannelNotFound):
        late.get()


# --- killed workers


@methods
def test_workers_are_killed_and_replaced(method: str) -> None:
    """A worker that is killed while it waits, or anywhere, leaves no lock behind."""
    tasks: Queue[Any] = Queue()
    results: Queue[Any] = Queue()
    with made(tasks, results), Crew(method) as crew:
        for round_ in range(3):
            workers = [crew.start(square, tasks, results) for _ in range(2)]
            tasks.put(round_)
            assert results.get(timeout=30) == (round_, round_ * round_)
            until(lambda: tasks.stats().waiting_receivers == 2)
            for worker in workers:
                worker.kill()
        crew.start(square, tasks, results)
        tasks.put(7)
        assert results.get(timeout=30) == (7, 49)
        tasks.put(None)


# --- pools


@methods
def test_a_pool_whose_initializer_is_given_a_queue(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    with made(Queue()) as q, context.Pool(2, initialize, (q,)) as pool:
        assert pool.map(put_in_inherited, range(20)) == list(range(20))
        assert sorted(number for _, number in q.get_many()) == list(range(20))
        pool.starmap(put_in_argument, [(q, number) for number in range(5)])  # multiprocessing's cannot
        assert sorted(q.get() for _ in range(5)) == list(range(5))
        pool.close()
        pool.join()


@methods
def test_an_executor_whose_initializer_is_given_a_queue(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    with made(Queue()) as q, concurrent.futures.ProcessPoolExecutor(2, context, initialize, (q,)) as executor:
        assert list(executor.map(put_in_inherited, range(20))) == list(range(20))
        assert sorted(number for _, number in q.get_many()) == list(range(20))
        assert executor.submit(put_in_argument, q, 5).result() is None
        assert q.get() == 5


# --- tasks


@methods
def test_join_waits_until_each_task_is_done(method: str) -> None:
    tasks: JoinableQueue[Any] = JoinableQueue()
    done: Queue[int] = Queue()
    with made(tasks, done), Crew(method) as crew:
        for _ in range(3):
            crew.start(do_tasks, tasks, done)
        for number in range(30):
            tasks.put(number)
        assert tasks.join()
        assert sorted(done.get_many_nowait()) == list(range(30))
        tasks.put_many([None] * 3)
        assert tasks.join(30)
        crew.results()


def test_join_is_over_at_once_where_nothing_was_put() -> None:
    with made(JoinableQueue()) as q:
        assert q.join(0) and q.join()


def test_task_done_too_often_is_an_error() -> None:
    with made(JoinableQueue()) as q:
        with pytest.raises(ValueError, match="too many times"):
            q.task_done()
        q.put(1)
        q.task_done()  # as in multiprocessing, it need not have been got
        with pytest.raises(ValueError, match="too many times"):
            q.task_done()
        assert q.join(0)


def test_a_wait_in_join_ends_with_the_last_task() -> None:
    with made(JoinableQueue()) as q:
        q.put(1)
        q.put(2)
        assert not q.join(timeout=0.01)
        over = threading.Event()

        def wait() -> None:
            q.join()
            over.set()

        with in_threads(wait):
            q.get()
            q.get()
            q.task_done()
            assert not over.is_set()
            q.task_done()
        assert over.is_set()


@pytest.mark.parametrize("end", [take_and_die, take_and_leave])
def test_join_says_which_tasks_were_lost(end: Callable[[Any], None]) -> None:
    with made(JoinableQueue()) as q, Crew() as crew:
        for number in range(3):
            q.put(number)
        for _ in range(2):
            crew.start(end, q).process.join()
        assert q.get() == 2
        lost = 0
        while lost < 2:  # deaths may be found one by one
            with pytest.raises(
                BrokenChannel, match=r"tasks? will not be done, taken by a process that ended"
            ) as caught:
                q.join()
            lost += int(str(caught.value).split(": ")[1].split()[0])
        assert lost == 2
        q.put("again")
        assert not q.join(0.1)  # one waits to be got, and one is this process's
        q.task_done()
        assert not q.join(0.1)
        assert q.get() == "again"
        q.task_done()
        assert q.join()


def test_another_process_may_finish_what_one_holds() -> None:
    with made(JoinableQueue()) as q, Crew() as crew:
        for number in range(5):
            q.put(number)
        assert q.get_many() == list(range(5))
        assert not q.join(0.1)
        crew.start(lambda: [q.task_done() for _ in range(5)])
        assert q.join()
        crew.results()


def test_every_join_that_waits_hears_of_a_lost_task() -> None:
    with made(JoinableQueue()) as q, Crew() as crew:
        heard: list[BaseException] = []

        def wait() -> None:
            try:
                q.join()
            except BrokenChannel as error:
                heard.append(error)

        q.put(1)
        with in_threads(wait, wait, wait):
            until(lambda: q._channel._open().events.count() == 3)
            crew.start(take_and_die, q)
        assert len(heard) == 3
        assert q.join()  # who comes later does not


def test_a_forked_child_does_not_hold_what_its_parent_does() -> None:
    with made(JoinableQueue()) as q, Crew() as crew:
        q.put(1)
        q.put(2)
        assert q.get() == 1
        crew.start(take_and_leave, q).process.join()
        with pytest.raises(BrokenChannel, match="1 task will not be done"):
            q.join()
        q.task_done()
        assert q.join()


def kill_at(step: int, q: Any, call: str) -> None:
    """Die at that line of ringshm's in a get or a task_done; the task is done if both return."""
    if call == "task_done":
        q.get()
    with Tracer(die, step, folders=("ring", "dropin"), lines=True):
        q.get() if call == "get" else q.task_done()


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("call", ["get", "task_done"])
def test_the_count_is_right_wherever_a_worker_is_killed(call: str) -> None:
    """At each line of the call: then the task is there, done, or known to be lost; and all go on."""
    with made(JoinableQueue(2, slot_size=64)) as q:
        for step in each_step(500):
            q.put(step)
            with Crew() as crew:
                child = crew.start(kill_at, step, q, call)
                child.process.join()
                killed = child.process.exitcode == -signal.SIGKILL
            outcome = "done"
            if call == "get":
                with contextlib.suppress(queue.Empty):
                    assert q.get(timeout=0.5) == step
                    outcome = "there"
                    q.task_done()
            try:
                assert q.join()
            except BrokenChannel:
                outcome = "lost"
            assert q.join(0)
            with pytest.raises(ValueError, match="too many times"):
                q.task_done()
            if call == "task_done":
                assert outcome in ("done", "lost")
            if not killed:
                assert outcome == ("lost" if call == "get" else "done")
                break
        assert step > 5


class Interrupted(BaseException):
    """As KeyboardInterrupt."""


_interrupt: list[bool] = []


def arrive() -> str:
    """What a task becomes where it is unpickled."""
    if _interrupt:
        raise Interrupted
    return "task"


@pytest.mark.parametrize("call", ["get", "get_many"])
def test_an_interrupted_get_holds_nothing(call: str) -> None:
    with made(JoinableQueue()) as q, Crew() as crew:
        q.put(Unpickles(arrive))
        _interrupt.append(True)
        with pytest.raises(Interrupted):
            getattr(q, call)()
        _interrupt.clear()
        assert q.qsize() == 1 and not q.join(0)
        crew.start(take_and_leave, q).process.join()
        with pytest.raises(BrokenChannel, match="1 task will not be done"):
            q.join()


# --- as faster-fifo


def test_the_calls_of_faster_fifo_are_there() -> None:
    with made(Queue(8)) as q:
        q.put_many([1, 2, 3])
        q.put_many((x for x in (4, 5)), block=True, timeout=1.0)
        q.put_many_nowait([6])
        assert q.qsize() == 6
        assert q.get_many(block=True, timeout=1.0, max_messages_to_get=2) == [1, 2]
        assert q.get_many_nowait(max_messages_to_get=1) == [3]
        assert q.get_many(max_messages_to_get=int(1e9)) == [4, 5, 6]
        check_empty(q.get_many_nowait)
        check_empty(q.get_many, False)
        assert not q.is_closed()


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_a_batch_that_does_not_fit_in_time_is_not_put_at_all(timeout: float) -> None:
    with made(JoinableQueue(4)) as q:
        q.put_many(["a", "b"])
        check_full(q.put_many, range(3), timeout=timeout)
        check_full(q.put_many_nowait, range(3))
        with pytest.raises(queue.Full, match="5 messages never fit into 4 slots"):
            q.put_many(range(5), timeout=timeout)
        with pytest.raises(TypeError):
            q.put_many([1, Unpicklable()], timeout=timeout)
        assert q.get_many() == ["a", "b"]
        q.task_done()
        q.task_done()
        assert q.join(0)
        q.put_many(range(4), timeout=timeout)
        assert q.get_many() == [0, 1, 2, 3]


def test_a_batch_waits_for_space_for_all_of_it() -> None:
    with made(Queue(4)) as q:
        q.put_many(["a", "b", "c"])
        with in_threads(partial(q.put_many, range(3), True, 30)):
            assert q.get() == "a"
            assert q.get() == "b"
        assert q.get_many() == ["c", 0, 1, 2]


def test_a_batch_without_a_time_limit_may_be_larger_than_the_queue() -> None:
    with made(Queue(4)) as q, Crew() as crew:
        child = crew.start(get_some, q, 50)
        q.put_many(range(50))
        assert child.result() == list(range(50))


def test_two_batches_that_wait_do_not_wait_for_each_other() -> None:
    with made(Queue(4)) as q, in_threads(*(partial(q.put_many, [name] * 3, True, 30) for name in "ab" * 5)):
        assert sorted(q.get(timeout=30) for _ in range(30)) == ["a"] * 15 + ["b"] * 15


def test_one_program_does_the_same_with_faster_fifo() -> None:
    faster_fifo = pytest.importorskip("faster_fifo")
    for make in (lambda: faster_fifo.Queue(100_000), lambda: Queue(64)):
        q = make()
        q.put({"obs": [1.0] * 10})
        q.put_many([{"n": n} for n in range(5)], timeout=1.0)
        assert q.get(timeout=1.0) == {"obs": [1.0] * 10}
        got: list[Any] = []
        while len(got) < 5:
            got += q.get_many(timeout=1.0, max_messages_to_get=2)
        assert got == [{"n": n} for n in range(5)]
        for empty in (q.get_nowait, q.get_many_nowait):
            check_empty(empty)
        q.close()


def test_tasks_larger_than_a_slot() -> None:
    """Whole ones, such as need a receiver meanwhile, and one that was taken back, which is no task."""
    tasks: JoinableQueue[bytes] = JoinableQueue(4, slot_size=100)
    check_full(tasks.put, bytes(5000), timeout=0.05)
    assert tasks.join(timeout=0)
    tasks.put(bytes(300))
    assert not tasks.join(timeout=0)
    assert tasks.get() == bytes(300)
    assert not tasks.join(timeout=0)
    tasks.task_done()
    assert tasks.join()
    with in_threads(partial(tasks.put, bytes(5000))):
        assert tasks.get() == bytes(5000)
    assert not tasks.join(timeout=0)
    tasks.task_done()
    assert tasks.join()
    tasks.close()

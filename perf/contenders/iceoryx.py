"""Adapter: iceoryx2's publish-subscribe service, whose subscriber polls; objects are pickled into its slices.

Each subscriber gets every message, so several do not share a queue: see `Contender.shared`. Its subscriber has no
call that waits: the receiver asks again and again, which keeps a core busy. The publisher waits while the subscriber's
buffer is full. Everything it leaves on disk lies under a prefix of its own and is removed at the end.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkContext
from pathlib import Path
from typing import Any

from ..workers import CONTEXT
from . import Contender, Pair, Receiver, Sender

_SENDERS = 32


class _Service:
    """One service of iceoryx2, as the processes that open it share it."""

    def __init__(self, capacity: int, largest_nbytes: int, context: ForkContext) -> None:
        self._api: Any = importlib.import_module("iceoryx2")
        self._capacity, self._nbytes = capacity, largest_nbytes
        self._folder = tempfile.mkdtemp(prefix="perf-iceoryx2-")
        self._prefix = f"{Path(self._folder).name}_"
        self._polled, self._done = context.Event(), context.Event()
        self._receive: Callable[[], Any] | None = None  # In the receiver's process.
        self._keep: list[Any] = []  # What must live as long as this process's ends do.

    def open(self, payload_type: Any = None) -> Any:
        """The service, as this process opens it; messages are slices of bytes or of that ctypes type."""
        api = self._api
        api.set_log_level(api.LogLevel.Error)
        config = api.config.default()
        config.global_cfg.prefix = api.FileName.new(self._prefix)
        config.global_cfg.root_path = api.Path.new(f"{self._folder}/")
        builder = api.NodeBuilder.new().config(config).signal_handling_mode(api.SignalHandlingMode.Disabled)
        node = builder.create(api.ServiceType.Ipc)
        service = node.service_builder(api.ServiceName.new("perf")).publish_subscribe(
            payload_type or api.Slice[ctypes.c_uint8]
        )
        service = service.max_publishers(_SENDERS).max_subscribers(1).enable_safe_overflow(False)
        service = service.subscriber_max_buffer_size(self._capacity).subscriber_max_borrowed_samples(2).open_or_create()
        self._keep += [node, service]
        return service

    def publisher(self, write: Callable[[Any, Any], Any]) -> Sender:
        """Its publishing end: `write` makes a sample of a publisher and a message.

        A subscriber connects when it polls; a publisher that it does not know yet waits for nobody, it drops. So the
        first message waits for the first poll, before which everybody has opened their ends.
        """
        builder = self.open().publisher_builder().initial_max_slice_len(self._nbytes)
        strategy = self._api.BackpressureStrategy.RetryUntilDelivered
        publisher = builder.backpressure_strategy(strategy).create()
        connected = False
        if self._receive:
            self._receive()
            connected = True

        def put(message: Any) -> None:
            nonlocal connected
            if not connected:
                connected = self._polled.wait()
            write(publisher, message).send()

        def finish() -> None:
            self._done.wait()  # What has not been received goes with its publisher.
            publisher.delete()

        return Sender(put, finish)

    def subscriber(self, read: Callable[[Any], Any]) -> Receiver:
        """Its receiving end: `read` makes a message of a sample."""
        subscriber = self.open().subscriber_builder().buffer_size(self._capacity).create()
        self._receive = receive = subscriber.receive
        polled = False

        def get() -> Any:
            nonlocal polled
            while (sample := receive()) is None:
                if not polled:
                    self._polled.set()
                    polled = True
            return read(sample)

        def finish() -> None:
            self._done.set()
            subscriber.delete()

        return Receiver(get, finish=finish)

    def close(self) -> None:
        """Remove what is left of it, also by processes that were killed."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in os.listdir("/dev/shm"):
            if name.startswith(self._prefix):
                os.unlink(f"/dev/shm/{name}")


def _pickled(publisher: Any, message: Any) -> Any:
    data = pickle.dumps(message, 5)
    sample = publisher.loan_slice_uninit(len(data))
    ctypes.memmove(sample.payload_ptr, data, len(data))
    return sample.assume_init()


def _unpickled(sample: Any) -> Any:
    return pickle.loads(sample.payload().as_memory_view())


def _bytes(publisher: Any, message: bytes) -> Any:
    sample = publisher.loan_slice_uninit(len(message))
    ctypes.memmove(sample.payload_ptr, message, len(message))
    return sample.assume_init()


def _words(address: int, nbytes: int) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64.from_address(address), ctypes.c_int64.from_address(address + nbytes - 8)


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    service = _Service(capacity, largest_nbytes, context)
    return Pair(lambda: service.publisher(_pickled), lambda: service.subscriber(_unpickled), service.close)


def _make_bytes(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    service = _Service(capacity, largest_nbytes, context)

    def read(sample: Any) -> bytes:
        return bytes(sample.payload().as_memory_view())

    return Pair(lambda: service.publisher(_bytes), lambda: service.subscriber(read), service.close)


def _make_in_place(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    """Messages are numbers, the first and the last word of a slice of the largest size."""

    def write(publisher: Any, number: int | None) -> Any:
        sample = publisher.loan_slice_uninit(largest_nbytes)
        first, last = _words(sample.payload_ptr, largest_nbytes)
        first.value = last.value = -1 if number is None else number
        return sample.assume_init()

    def read(sample: Any) -> int | None:
        first, last = _words(sample.payload_ptr, largest_nbytes)
        if first.value != last.value:
            raise ValueError(f"the slice begins with {first.value} and ends with {last.value}")
        return None if first.value < 0 else first.value

    service = _Service(capacity, largest_nbytes, context)
    return Pair(lambda: service.publisher(write), lambda: service.subscriber(read), service.close)


@contextmanager
def in_place(nbytes: int, typed: bool) -> Iterator[Callable[[], None]]:
    """What moves one message without a copy in this process, its first and last byte written and read."""
    block = ctypes.c_uint8 * nbytes

    class Message(ctypes.Structure):
        _fields_ = (("obs", block), ("action", ctypes.c_int64))

    handles = _Service(4, nbytes, CONTEXT)
    service = handles.open(Message if typed else None)
    publishers = service.publisher_builder()
    publisher = (publishers if typed else publishers.initial_max_slice_len(nbytes)).create()
    subscriber = service.subscriber_builder().create()

    def once() -> None:
        loan = publisher.loan_slice_uninit(nbytes)
        written = block.from_address(loan.payload_ptr)
        written[0] = written[-1] = 1
        loan.assume_init().send()
        sample = subscriber.receive()
        read = block.from_address(sample.payload_ptr)
        assert read[0] == read[-1] == 1

    def once_typed() -> None:
        loan = publisher.loan_uninit()
        written = loan.payload().contents
        array = written.obs
        array[0] = array[-1] = 1
        written.action = 1
        loan.assume_init().send()
        sample = subscriber.receive()
        read = sample.payload().contents
        array = read.obs
        assert array[0] == array[-1] == read.action == 1

    try:
        yield once_typed if typed else once
    finally:
        handles.close()


CONTENDERS = [
    Contender("iceoryx2", "iceoryx2", "iceoryx2", make=_make, bounded="capacity; its receiver polls"),
    Contender("iceoryx2 (bytes)", "iceoryx2", "iceoryx2", make=_make_bytes, bounded="the same", variant=True),
]
IN_PLACE = Contender("iceoryx2", "iceoryx2", "iceoryx2", make=_make_in_place)

"""Adapter: pyzmq's PUSH and PULL sockets over ipc (a Unix socket), by `send_pyobj` and `recv_pyobj`.

One PULL socket serves any number of senders. Several receivers would each have a queue of their own, into which PUSH
deals the messages in turn, so several of them share nothing: see `Contender.shared`. The capacity is that of each
side; what lies in the Unix socket comes on top.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from functools import partial
from multiprocessing.context import ForkContext
from typing import Any

from . import Contender, Pair, Receiver, Sender


def _make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
    zmq: Any = importlib.import_module("zmq")
    folder = tempfile.mkdtemp(prefix="perf-zmq-")
    address = f"ipc://{folder}/socket"
    bound, done = context.Event(), context.Event()

    def sender() -> Sender:
        zmq_context = zmq.Context()
        socket = zmq_context.socket(zmq.PUSH)
        socket.set_hwm(capacity)
        bound.wait()  # It would try again after 100 ms.
        socket.connect(address)

        def finish() -> None:
            done.wait()  # What lies in the sockets may go with the connection.
            zmq_context.destroy(linger=0)

        return Sender(partial(socket.send_pyobj, protocol=5, copy=False), finish)

    def receiver() -> Receiver:
        zmq_context = zmq.Context()
        socket = zmq_context.socket(zmq.PULL)
        socket.set_hwm(capacity)
        socket.bind(address)
        bound.set()

        def finish() -> None:
            done.set()
            zmq_context.destroy(linger=0)

        return Receiver(socket.recv_pyobj, finish=finish)

    return Pair(sender, receiver, partial(shutil.rmtree, folder))


CONTENDER = Contender("pyzmq", "pyzmq", "zmq", make=_make, bounded="capacity at each side, and the socket")

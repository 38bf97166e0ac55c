"""The processes that go on: each makes calls on a channel of its own, one at a time, when the arena says so.

The arena (arena.py) starts a call, looks whether it has ended, and takes its result. A call that does not end within
PATIENCE raises Hang here, and the survivor dumps its stack; a call that raises comes back as Refused.
"""

from __future__ import annotations

import copy
import faulthandler
import os
import pickle
import signal
import traceback
import warnings
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

from support.seams import exit_as_python_does
from support.workers import die_with_parent

from ringshm import Channel

from .victim import recognisable_nonces

#: Seconds after which a call of a survivor counts as hanging: hundreds of times what the contract allows it.
PATIENCE = 40.0


class Hang(AssertionError):
    """A survivor's call did not end."""


class Refused(AssertionError):
    """A survivor's call raised an error."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Survivor:
    """A process that makes calls on a channel of its own, one at a time."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.call_made = ""
        self._pipe, pipe = Pipe()
        self.pid = os.fork()
        if not self.pid:
            self._pipe.close()
            try:
                self._serve(pipe)
            finally:
                os._exit(1)
        pipe.close()

    def _serve(self, pipe: Any) -> None:
        die_with_parent()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        warnings.simplefilter("ignore")
        recognisable_nonces()
        channel: Any = None
        role: Any = None  # by which it counts as a receiver before it has received
        held: list[Any] = []
        while True:
            method, args, kwargs = pipe.recv()
            try:
                if method == "create":
                    channel = args[0](**kwargs)
                    value = None
                elif method == "attach":
                    channel = args[0].attach(args[1])
                    role = channel.receiver() if self.role == "receiver" and isinstance(channel, Channel) else None
                    value = None
                elif method == "hold":  # the newest version of a Latest, by a view
                    with channel.borrow() as borrow:
                        held.append(borrow.value)
                        value = borrow.version
                elif method == "let go":
                    value, held = copy.deepcopy(held), []
                elif method == "take all":  # by borrows, which know how often a message was delivered
                    value = []
                    while channel.qsize():
                        with channel.borrow(timeout=PATIENCE / 4) as borrow:
                            value.append((copy.deepcopy(borrow.value), borrow.delivery_count))
                elif method == "each":
                    value = [getattr(channel, name)(*args) for name, *args in args]
                elif method == "pickle":
                    value = pickle.dumps(channel)
                elif method == "exit":
                    channel = role = None
                    exit_as_python_does()
                    os._exit(0)
                else:
                    if method == "close" and role is not None:
                        role.close()
                    value = getattr(channel, method)(*args, **kwargs)
                pipe.send((True, value, ""))
            except Exception as error:
                pipe.send((False, type(error).__name__, traceback.format_exc()))

    def start(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Begin a call."""
        assert not self.call_made
        self.call_made = method
        self._pipe.send((method, args, kwargs))

    def has_result(self) -> bool:
        """Whether the call has ended."""
        return bool(self._pipe.poll())

    def result(self) -> Any:
        """What the call returned; Refused if it raised."""
        if not self._pipe.poll(PATIENCE):
            os.kill(self.pid, signal.SIGUSR1)
            raise Hang(f"the {self.role}'s {self.call_made} did not end")
        done, value, text = self._pipe.recv()
        self.call_made = ""
        if not done:
            raise Refused(value, text)
        return value

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self.start(method, *args, **kwargs)
        return self.result()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._pipe.close()

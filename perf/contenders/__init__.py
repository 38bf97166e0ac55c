"""What a contender must offer, and the list of all of them.

A contender is a function that makes a channel; each process then opens its own end of it. The ends carry bound methods
of the library measured, not wrappers around them, wherever the library has a method that takes or gives an object: so
no adapter adds a Python call to what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing.context import ForkContext
from typing import Any, TypeVar

BATCH = 100  # Messages that one get_many may return.


def _nothing() -> None:
    """Stand in for a step that a contender does not need."""


@dataclass(frozen=True)
class Sender:
    """The sending end: ``finish`` returns once this process may exit without losing a message."""

    put: Callable[[Any], object]
    finish: Callable[[], object] = _nothing


@dataclass(frozen=True)
class Receiver:
    """The receiving end: ``get_many`` waits for one message and takes up to `BATCH`."""

    get: Callable[[], Any]
    get_many: Callable[[], list[Any]] | None = None
    get_nowait: Callable[[], Any] | None = None
    finish: Callable[[], object] = _nothing


@dataclass(frozen=True)
class Pair:
    """What opens each end, in the process that will use it, and what frees both in the process that made them."""

    sender: Callable[[], Sender]
    receiver: Callable[[], Receiver]
    close: Callable[[], object] = _nothing


@dataclass(frozen=True)
class Entrant:
    """Who is measured. A question that must know more of those that it measures has a kind of its own."""

    name: str
    distribution: str | None = None  # On PyPI; None: the standard library.
    module: str | None = None
    heavy: bool = False  # Whether its import takes seconds: each process of its own then pays them.

    def version(self) -> str:
        """Its version; raises ImportError with the reason where it is not installed."""
        if self.module is not None and find_spec(self.module) is None:
            raise ImportError(f"No module named {self.module!r}")
        if self.distribution is None:
            return "standard library"
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return "from source"


E = TypeVar("E", bound=Entrant)


def installed(entrants: Iterable[E]) -> tuple[list[E], dict[str, str]]:
    """Those that are there; and those that are not, by their names, with the reason."""
    present: list[E] = []
    missing: dict[str, str] = {}
    for entrant in entrants:
        try:
            entrant.version()
        except ImportError as error:
            missing[entrant.name] = str(error)
        else:
            present.append(entrant)
    return present, missing


@dataclass(frozen=True, kw_only=True)
class Contender(Entrant):
    """One way to send objects between processes.

    ``make(capacity, largest_nbytes, context)`` makes room for `capacity` messages whose pickles are at most
    `largest_nbytes` bytes, and for no more. Where `bounded` says otherwise, the capacity is what the operating system
    gives.
    """

    make: Callable[[int, int, ForkContext], Pair]
    bounded: str = "capacity"
    batches: bool = False  # Whether it has get_many.
    variant: bool = False  # The same library again, set differently.
    shared: bool = False  # Whether several senders and receivers may share it, each message going to one of these.
    lossy: bool = False  # Whether a full one loses a message, where others let the sender wait: it is no queue.
    deferred: bool = False  # Whether its put returns before the message has been read: it must not be changed then.
    floor: bool = False  # No channel: what its questions could cost at the least.

    @property
    def is_queue(self) -> bool:
        """Whether questions about queues in general are for it: it is a library's usual one, and loses nothing."""
        return not (self.variant or self.lossy or self.floor)


def everyone() -> list[Contender]:
    """All contenders, ringshm first: the order in which reports list them."""
    from . import (
        cloudtoid,
        fasterfifo,
        floor,
        iceoryx,
        kickmsg,
        mp_pipe,
        mp_queue,
        mp_simple_queue,
        py_sharedmemory,
        pyzmq,
        ringshm_channel,
        torch_queue,
    )

    return [
        *ringshm_channel.CONTENDERS,
        fasterfifo.CONTENDER,
        py_sharedmemory.CONTENDER,
        *cloudtoid.CONTENDERS,
        *iceoryx.CONTENDERS,
        kickmsg.CONTENDER,
        pyzmq.CONTENDER,
        mp_queue.CONTENDER,
        mp_simple_queue.CONTENDER,
        *mp_pipe.CONTENDERS,
        torch_queue.CONTENDER,
        *floor.CONTENDERS,
    ]

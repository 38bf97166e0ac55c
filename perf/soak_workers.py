"""What the soak's workers do: send and receive numbered messages, and write down what they are about to do and did."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import queue
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns
from types import FrameType
from typing import Any

import numpy as np

from ringshm import Channel
from ringshm.ring.acceleration import compiled

from . import ledger
from .ledger import record

SIGNALS = {signal.SIGINT, signal.SIGTERM}
SLOT_SIZE = 320 * 1024
_SIZES = (
    (16, 0.6),
    (3000, 0.2),
    (40_000, 0.12),
    (150_000, 0.05),
    (300_000, 0.02),
    (1_000_000, 0.008),
    (6_000_000, 0.002),
)  # Bytes, how often; the last two are larger than a slot.
_PATTERN = random.Random(0).randbytes(8 << 20)
_BATCH = 6
_SLOW_DECODES = 0.01  # So many messages take some milliseconds to decode, in which the slot is held.

# --- messages


def _draw_size(chance: random.Random) -> int:
    (size,) = chance.choices([size for size, _ in _SIZES], [weight for _, weight in _SIZES])
    return size


def is_large(sender: int, number: int) -> bool:
    """Whether that message is larger than a slot."""
    return _draw_size(random.Random(sender << 32 | number)) > SLOT_SIZE


def _payload(sender: int, number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What that message carries: bytes that no other message near it has in the same place."""
    chance = random.Random(sender << 32 | number)
    size = _draw_size(chance)
    return np.frombuffer(_PATTERN, np.uint8, size, chance.randrange(len(_PATTERN) - size))


class _Numbered:
    """A message; the receiver notes in its log that it is being decoded."""

    def __init__(self, sender: int, number: int) -> None:
        self._parts = sender, number, monotonic_ns(), _payload(sender, number)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _arrived, self._parts


_Arrived = tuple[int, int, int, Any]


def _arrived(sender: int, number: int, sent_at: int, payload: Any) -> _Arrived:
    _log.note(ledger.TAKEN, sender, number)
    if random.random() < _SLOW_DECODES:
        time.sleep(random.uniform(0.001, 0.01))
    return sender, number, sent_at, payload


# --- what a worker does


class Log:
    """A worker's log."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, kind: int, sender: int = 0, number: int = 0, extra: int = 0) -> None:
        """Add a record."""
        os.write(self._file, record(kind, sender, number, monotonic_ns(), extra))

    def note_got(self, messages: Sequence[_Arrived]) -> None:
        """Note what a get returned, at once; then look whether it is whole."""
        now = monotonic_ns()
        records = [record(ledger.GOT, sender, number, now, at) for sender, number, at, _ in messages]
        os.write(self._file, b"".join([*records, record(ledger.END, 0, 0, now, len(messages))]))
        for sender, number, _, payload in messages:
            if not np.array_equal(payload, _payload(sender, number)):
                self.note(ledger.TORN, sender, number)


_log: Log


def log_to(path: Path) -> Log:
    """Make the log of this process."""
    global _log
    _log = Log(path)
    return _log


class _Interruptible:
    """Lets SIGTERM raise SystemExit inside a call of the channel, and nowhere else."""

    def __init__(self) -> None:
        self.inside = False
        self.leaving = False

    def enter(self) -> None:
        """From here to the end of the call SIGTERM raises; one that has come since the last look does so now."""
        self.inside = True
        if self.leaving:
            self.inside = False
            raise SystemExit

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self.leaving = True
        if self.inside:
            self.inside = False
            raise SystemExit


@dataclass(frozen=True)
class Orders:
    """What a worker is told at its birth. Byte 0 of `shared`: whether senders shall end."""

    number: int
    sends: bool
    traps: bool  # Handles SIGTERM.
    pure: bool  # Runs no compiled code.
    folder: Path
    seed: int
    shared: mmap.mmap

    @property
    def log(self) -> Path:
        """Its log."""
        return self.folder / f"{self.number}.log"

    @property
    def errors(self) -> Path:
        """Where its traceback goes if it fails, and its stacks if it hangs."""
        return self.folder / f"{self.number}.err"


def work(orders: Orders, channel: Channel, parent: int) -> None:
    """Be a worker, until a signal or, for senders, the supervisor ends it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # It died before we asked to die with it.
    warnings.simplefilter("error")
    if compiled is not None:
        compiled.pause(orders.pure)
    errors = orders.errors.open("w")
    faulthandler.register(signal.SIGUSR1, errors)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor.
    state = _Interruptible()
    signal.signal(signal.SIGTERM, state.handle if orders.traps else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # Blocked since before the fork: none meets a parent's handler.
    log_to(orders.log)
    try:
        _log.note(ledger.STARTED)
        (_send if orders.sends else _receive)(orders, channel, state)
        _log.note(ledger.LEAVING)
        channel.close()
    except BaseException:
        traceback.print_exc(file=errors)
        errors.flush()
        raise


def _send(orders: Orders, channel: Channel, state: _Interruptible) -> None:
    chance, me = random.Random(orders.seed), orders.number
    sender = channel.sender() if chance.random() < 0.5 else channel
    number = 0
    pending: list[_Numbered] = []
    while not (state.leaving or orders.shared[0]):
        if not pending:
            count = chance.randint(2, _BATCH) if chance.random() < 0.2 else 1
            pending = [_Numbered(me, number + index) for index in range(count)]
        timeout = chance.choice([None, 0.0, 0.02, 1.0])
        if timeout == 0 and any(is_large(me, number + index) for index in range(len(pending))):
            timeout = None  # Such a message cannot but wait.
        sent = 0
        _log.note(ledger.CALL, me, number, len(pending))
        try:
            state.enter()
            try:
                if len(pending) == 1:
                    sender.put(pending[0], timeout=timeout)
                    sent = 1
                else:
                    sent = sender.put_many(pending, timeout)
            except queue.Full:
                pass
            state.inside = False
        except SystemExit:
            _log.note(ledger.INTERRUPTED)
            return
        _log.note(ledger.END, me, number, sent)
        number += sent
        del pending[:sent]


def _receive(orders: Orders, channel: Channel, state: _Interruptible) -> None:
    chance = random.Random(orders.seed)
    receiver = channel.receiver() if chance.random() < 0.5 else channel
    while not state.leaving:
        many = chance.random() < 0.3
        limit = chance.randint(2, _BATCH) if many else 1
        timeout = chance.choice([None, 0.0, 0.02, 1.0])
        _log.note(ledger.CALL, 0, 0, limit)
        try:
            state.enter()
            try:
                messages = receiver.get_many(limit, timeout) if many else [receiver.get(timeout=timeout)]
            except queue.Empty:
                messages = []
            state.inside = False
        except SystemExit:
            _log.note(ledger.INTERRUPTED)
            _log.note(ledger.CALL, 0, 0, _BATCH)
            with contextlib.suppress(queue.Empty):  # What was given back already and could not be returned is here.
                messages = receiver.get_many(_BATCH, 0)
                _log.note_got(messages)
            return
        _log.note_got(messages)

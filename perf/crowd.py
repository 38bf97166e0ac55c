"""Several senders and receivers at one channel, who count what they send and receive where all can see it.

Each process adds to a word of its own on a board. What is sent must be received: when the senders have sent all that
they had and as much has been received, the first of them ends the receivers by messages of None, one after another
until each has had one. A contender that loses a message, or delivers one twice, is found out by these counts; `check`
also looks at every message, and at the order of each sender's messages within a receiver.

`window` samples the board while everybody works: from when each has sent or received a first message, and a while after
that, until the senders are told to stop. So neither the start nor the end of the processes counts. The clock is read
where the board is, in one of the workers.
"""

from __future__ import annotations

import mmap
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Protocol

from .contenders import Contender, Pair
from .measure import Payload
from .workers import CONTEXT, Failed, place, run_workers

_PAUSE = 0.002  # Seconds between two looks of who waits for the board.
_FIRST = 2.0  # Seconds that the window waits for somebody's first message: somebody may starve.
_INSTANT = 0.0005  # Seconds: a look at the board that takes longer was interrupted, and is made again.
_NUDGE = 0.1  # Seconds until a receiver that has not ended is sent another None: another one may have had its.


class Board:
    """Words that all processes see: whether to stop; of each sender and receiver, how many, and whether it ended."""

    def __init__(self, senders: int, receivers: int) -> None:
        self._senders = senders
        self._words = memoryview(mmap.mmap(-1, 8 * (1 + 2 * senders + 2 * receivers))).cast("q")
        self.stopped = self._words[:1]
        self.sent = self._words[1 : 1 + senders]
        self.received = self._words[1 + senders : 1 + senders + receivers]
        self.sender_ended = self._words[1 + senders + receivers : 1 + 2 * senders + receivers]
        self.receiver_ended = self._words[1 + 2 * senders + receivers :]

    def until_stopped(self, message: Any) -> Iterator[Any]:
        """This message again and again, until the board says stop."""
        stopped = self.stopped
        while not stopped[0]:
            yield message


#: Makes, in the sender's process and before the clock starts, what it will send.
Source = Callable[[], Iterator[Any]]


class Look(Protocol):
    """What a receiver does with each message, and what it says in the end."""

    def __call__(self, message: Any, /) -> object:
        """Look at one."""

    def result(self) -> Any:
        """Called after the last message."""


def _await(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True


def _send(board: Board, index: int, pair: Pair, source: Source, barrier: Any, limit: float, pin: bool) -> None:
    place(index, pin)
    sender, messages = pair.sender(), source()
    put, count = sender.put, 0
    barrier.wait()
    for message in islice(messages, 1):
        put(message)
        board.sent[index] = count = 1
    for message in messages:
        put(message)
        count += 1
    board.sent[index] = count
    board.sender_ended[index] = 1
    if index == 0 and len(board.received):
        all_received = _await(lambda: all(board.sender_ended) and sum(board.received) >= sum(board.sent), limit)
        if not all_received or sum(board.received) != sum(board.sent):
            raise Failed(f"{sum(board.sent)} messages sent, {sum(board.received)} received")
        while not all(board.receiver_ended):
            for _ in range(len(board.receiver_ended) - sum(board.receiver_ended)):
                put(None)
            _await(lambda: all(board.receiver_ended), _NUDGE)
    sender.finish()


def _receive(board: Board, index: int, pair: Pair, batches: bool, look: Look | None, barrier: Any, pin: bool) -> Any:
    place(index + len(board.sent), pin)
    receiver = pair.receiver()
    get, get_many, received, count = receiver.get, receiver.get_many, board.received, 0
    barrier.wait()
    if batches and get_many:
        while (messages := get_many())[0] is not None:
            if look:
                for message in messages:
                    look(message)
            count += len(messages)
            received[index] = count
    else:
        while (message := get()) is not None:
            if look:
                look(message)
            count += 1
            received[index] = count
    board.receiver_ended[index] = 1
    receiver.finish()
    return look.result() if look else None


def _sample(board: Board, barrier: Any, warm_up: float, seconds: float) -> float:
    """Messages per second, received (or sent, where nobody receives) in a window; then stop the senders."""
    counts = board.received if len(board.received) else board.sent

    def look() -> tuple[int, float]:
        while True:
            began = time.perf_counter()
            count = sum(counts)
            if (now := time.perf_counter()) - began < _INSTANT:
                return count, now

    barrier.wait()
    _await(lambda: all(board.sent) and all(board.received), _FIRST)
    time.sleep(warm_up)
    before, began = look()
    time.sleep(seconds)
    after, ended = look()
    board.stopped[0] = 1
    return (after - before) / (ended - began)


def window(
    board: Board,
    pair: Pair,
    sources: Sequence[Source],
    seconds: float,
    limit: float,
    batches: bool = False,
    look: Look | None = None,
    pin: bool = False,
) -> float:
    """Let everybody work for some time; the messages per second. The board then has who sent and received how many.

    Args:
        sources: What each sender sends; it ends when the board says stop.

    Raises:
        Failed: Not all that was sent was received, or somebody failed.
    """
    barrier = CONTEXT.Barrier(1 + len(board.sent) + len(board.received))
    sample = partial(_sample, board, barrier, seconds / 2, seconds)
    workers: list[Callable[[], Any]] = [sample, *_workers(board, pair, sources, barrier, limit, batches, look, pin)]
    return float(run_workers(workers, limit)[0])


def _workers(
    board: Board,
    pair: Pair,
    sources: Sequence[Source],
    barrier: Any,
    limit: float,
    batches: bool,
    look: Look | None,
    pin: bool,
) -> list[Callable[[], Any]]:
    return [
        *(partial(_send, board, index, pair, source, barrier, limit / 2, pin) for index, source in enumerate(sources)),
        *(partial(_receive, board, index, pair, batches, look, barrier, pin) for index in range(len(board.received))),
    ]


class Inspector:
    """Looks whether messages are what they claim; late, when one that still points into a slot is overwritten."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._late: deque[Any] = deque()
        self._numbers: list[int] = []

    def __call__(self, message: Any) -> None:
        """Take it, and look at one that came a while ago."""
        self._late.append(message)
        if len(self._late) > self._payload.capacity + 1:
            self._inspect(self._late.popleft())

    def result(self) -> list[int]:
        """The numbers of all messages, in the order in which they came."""
        while self._late:
            self._inspect(self._late.popleft())
        return self._numbers

    def _inspect(self, message: Any) -> None:
        number = self._payload.number_of(message)
        if not self._payload.matches(message, number):
            raise Failed(f"message {len(self._numbers)} arrived wrong: {str(message)[:80]}")
        self._numbers.append(number)


def check(
    contender: Contender, payload: Payload, batches: bool, limit: float, senders: int = 1, receivers: int = 1
) -> None:
    """Send numbered messages, more than fit; raise Failed unless each arrives once, whole and in its sender's order."""
    count = 2 * payload.capacity + 3 if payload.nbytes is None else max(payload.capacity + 1, 20)
    if (payload.nbytes or 0) >= 10_000_000:
        count = payload.capacity + 1
    each = -(-count // senders)
    board, barrier, pair = Board(senders, receivers), CONTEXT.Barrier(senders + receivers), payload.pair(contender)
    sources = [partial(map, payload.make, range(index * each, (index + 1) * each)) for index in range(senders)]
    try:
        workers = _workers(board, pair, sources, barrier, limit / 2, batches, Inspector(payload), pin=False)
        numbers: list[list[int]] = run_workers(workers, limit)[senders:]
    finally:
        pair.close()
    arrived = Counter(number for received in numbers for number in received)
    if wrong := {number: times for number, times in arrived.items() if times > 1 or number >= senders * each}:
        raise Failed(f"messages that arrived too often: {str(wrong)[:80]}")
    if len(arrived) != senders * each:
        raise Failed(f"{len(arrived)} of {senders * each} messages arrived")
    for received in numbers:
        for index in range(senders):
            own = [number for number in received if number // each == index]
            if own != sorted(own):
                raise Failed(f"messages of sender {index} arrived out of order: {str(own)[:80]}")

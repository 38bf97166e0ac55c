"""A channel in a known state, to be damaged, called and restored, some ten thousand times a second.

Everything is real: the segment, its semaphores, the kernel's record locks. Only slices are short, so that a recovery
takes a millisecond, and the limits beyond which a message counts as large are low. Run it in a process of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import itertools
import json
import math
import os
import pickle
import queue
import random
import resource
import signal
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ringshm import Channel, Latest, RingshmError, UpTo
from ringshm.channel import steps
from ringshm.process import registry
from ringshm.ring import mutex, reaper, spin
from ringshm.ring import slots as ring
from ringshm.ring import waiters as waiting
from ringshm.segment import layout as at
from ringshm.segment.files import path_of
from ringshm.tools import cli, top
from ringshm.tools.pages import Page
from ringshm.tools.sampler import Sampler

_SLICE = 1e-4
_LARGE = 300
SLOT_SIZE = 1000
_HEADER_WORDS = [*range(80), *range(at.DEATHS, at.DEATHS + 4)]
_ENTRY_WORDS: list[int] = [value for name, value in vars(at).items() if name.startswith("P_")]
VALUES = (0, 1, 2, 3, 5, 7, 1 << 31, (1 << 32) - 1, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1)
#: What a call with a time-out may end in, besides a value.
ALLOWED = (queue.Full, queue.Empty, RingshmError, MemoryError)

MESSAGES: list[Any] = [
    {"action": 3, "obs": np.arange(20, dtype=np.float32), "done": False}, np.arange(60).reshape(3, 20).T,
    ["a list", (1, 2.5, None), {"of": {"some", "things"}}, b"bytes" * 10, 10**30], b"a large one" * 50,
    np.zeros((2, 3), [("x", "<f4"), ("y", "<i8", (2,))]), "text",
    [np.ones(50, np.uint8), np.float32(3), np.dtype("<M8[ns]")],
]  # fmt: skip

#: Messages of fields, of fixed and of varying length.
SPEC = {"obs": (np.uint8, (20,)), "steps": (np.float32, UpTo(30)), "n": np.int64, "more": (np.float64, UpTo(5))}
TYPED_MESSAGES: list[Any] = [
    {"obs": np.full(20, k, np.uint8), "steps": np.ones(4 * k, np.float32), "n": k, "more": np.zeros(k % 5)}
    for k in range(7)
]


def hurry() -> None:
    """Shorten what takes time in this process."""
    mutex.SLICE = steps.SLICE = steps.SHORT_SLICE = waiting.SHORT_SLICE = _SLICE
    reaper._SLICE_NS = int(_SLICE * 1e9)
    spin.SPIN_LOOKS = 4
    ring.SMALL_NBYTES, ring.SMALL_PARTS_NBYTES = _LARGE, _LARGE // 2


def stranger(own: Channel) -> Channel:
    """Another participant, in this process: the kernel tells record locks apart by descriptors, not by processes."""
    mine = own._open()
    identity = mine.segment.file.identity
    del registry.attachments[identity]
    try:
        return Channel.attach(own.name)
    finally:
        registry.attachments[identity] = mine


def used_words(layout: at.Layout) -> list[int]:
    """Words that mean something; those of the ring and of the slots more than once."""
    starts = [layout.entry(index) for index in range(layout.max_participants + 1)]
    entries = [start + word for start in starts for word in _ENTRY_WORDS]
    invitations = list(range(layout.invitations, layout.ring))
    ready = list(range(layout.ring, layout.ring + layout.ring_mask + 1))
    records = [layout.record(slot) + word for slot in range(layout.capacity) for word in range(12)]
    return _HEADER_WORDS + entries + invitations + 4 * ready + 2 * records


class Victim:
    """A channel, one stranger on it, and how both were at the start.

    States:
        empty: nothing is there.
        full: every slot is READY.
        mixed: the stranger is reading one message and writing another; the rest is READY.
        left by the dead: as mixed, but the stranger is dead, and died in the senders' mutex.
    """

    def __init__(
        self, state: str, capacity: int = 3, when_full: str = "wait", typed: bool = False, seed: int = 0
    ) -> None:
        self._made_with = state, capacity, when_full
        self.typed = typed
        self.messages = TYPED_MESSAGES if typed else MESSAGES
        self.what = f"state {state!r}, capacity {capacity}, when_full {when_full!r}, {typed=}, seed {seed}"
        self.random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self._make(*self._made_with)

    def _make(self, state: str, capacity: int, when_full: str) -> None:
        kind: dict[str, Any] = {"spec": SPEC} if self.typed else {"slot_size": SLOT_SIZE, "codec": "plain"}
        self.channel = Channel(capacity, **kind, when_full=when_full, max_participants=4)
        self.slot_size = self.channel.slot_size
        self.stranger = stranger(self.channel)
        self.path = path_of(self.channel.name)
        self.attachment = self.channel._open()
        self.segment = self.attachment.segment
        self.words, self.memory, self.layout = self.segment.words, self.segment.memory, self.segment.layout
        self.ring = self.attachment.ring
        self.stranger.put(self.messages[0], timeout=5)
        self.stranger.get(timeout=5)
        self.channel.put(self.messages[1], timeout=5)
        self.channel.get(timeout=5)
        self._fill(state)
        self.used = used_words(self.layout)
        self._bytes = self.memory[:]
        self._values = [semaphore._get_value() for semaphore in self.segment.semaphores]
        self._seen = self.ring._tail_seen, self.ring._head_seen
        self._gaps = [
            slice(self.layout.slot(slot) + self.slot_size, self.layout.slot(slot) + self.layout.slot_stride)
            for slot in range(capacity)
        ]
        self._gap = bytes(self.layout.slot_stride - self.slot_size)

    def _fill(self, state: str) -> None:
        if state == "empty":
            return
        for k in range(self.layout.capacity):
            self.channel.put(self.messages[k % len(self.messages)], timeout=5)
        if state == "full":
            return
        words, other = self.words, self.stranger._open()
        owner = other.participants.owner
        slots = [words[self.layout.ring + (k & self.layout.ring_mask)] for k in range(words[at.HEAD], words[at.TAIL])]
        records = [self.layout.record(slot) for slot in slots[:2]]
        for record in records:  # taken by the stranger
            words[record] += at.TAKE + owner
            words[at.HEAD] += 1
            words[at.TAKEN_NBYTES] += words[record + at.R_META] >> 16
        for record in records[1:]:  # and of one of them it has begun to write another message there
            words[record] = at.WRITING | owner
            words[record + at.R_SINCE] = 1
        if state == "left by the dead":
            words[other.participants.entry + at.P_SENDER_HOLD] = words[at.GEN]
            self.segment.semaphores[0].acquire(False)
            other.segment.file.close_locks()

    # --- damage

    def restore(self) -> None:
        """As it was at the start."""
        ring = self.ring
        self.memory[:] = self._bytes
        for semaphore, value in zip(self.segment.semaphores, self._values, strict=True):
            for _ in range(value - semaphore._get_value()):
                semaphore.release()
            for _ in range(semaphore._get_value() - value):
                semaphore.acquire(False)
        for one in (ring.senders, ring.receivers):
            one._suspicion = ()
        if ring.compiled is not None:  # which has seen a head and a tail of its own
            participants = self.attachment.participants
            ring.compiled.rebind(participants.entry, participants.owner, participants.sender)
        ring._tail_seen, ring._head_seen = self._seen
        ring._unreturned.clear()
        ring.overdue.clear()
        self.channel._look_at = self.random.choice((0.0, 0.0, math.inf, math.inf, math.inf))  # whether to reap the dead
        seat = self.channel._seat
        seat.sent = seat.received = seat.sends = seat.receives = True

    def set_word(self, word: int, value: int) -> str:
        self.words[word] = value
        return f"word {word} := {value:#x}"

    def damage(self) -> str:
        """One random damage; what it was."""
        rng = self.random
        where = rng.random()
        if where < 0.1:  # a payload
            place = self.layout.slot(rng.randrange(self.layout.capacity)) + int(rng.paretovariate(1)) % self.slot_size
            self.memory[place] = byte = rng.choice((0, 1, 255, self.memory[place] ^ 1 << rng.randrange(8)))
            return f"byte {place} := {byte}"
        word = rng.choice(self.used) if where < 0.8 else rng.randrange(self.layout.words_end)
        old = self.words[word]
        what = rng.randrange(9)
        if what == 0:
            value = old ^ 1 << rng.randrange(64)
        elif what == 1:
            value = old ^ rng.randrange(1, 256) << 8 * rng.randrange(8)
        elif what == 2:
            value = self.words[rng.choice(self.used)]
        elif what == 3:
            value = rng.getrandbits(64)
        elif what == 4:
            value = rng.randrange(12)
        elif what == 5:
            value = max(0, min(at.MAX_WORD, old + rng.choice((-1, 1, -8, 8, 1 << 11, 1 << 24, 1 << 32))))
        else:
            value = rng.choice(VALUES)
        return self.set_word(word, value)

    # --- calls

    def call(self, name: str) -> None:
        """Make a call; what it may not end in is an AssertionError."""
        try:
            CALLS[name](self.channel, self)
            outcome = "value"
        except ALLOWED as error:
            outcome = type(error).__name__
        self.outcomes[outcome] += 1
        ring, participants = self.ring, self.attachment.participants
        assert not ring.senders.owned() and not ring.receivers.owned(), "a call left its local lock held"
        assert not participants._table_held, "a call left the table locked"

    def check_gaps(self) -> None:
        """Nothing was written behind a slot."""
        assert all(self.memory[gap] == self._gap for gap in self._gaps), "written behind a slot"

    @property
    def others_hold(self) -> bool:
        """Whether it seems that someone else is inside a mutex: a call without a time-out waits for him."""
        entries = [self.layout.entry(index) for index in range(self.layout.max_participants + 1)]
        return any(self.words[entry + word] for entry in entries for word in (at.P_SENDER_HOLD, at.P_RECEIVER_HOLD))

    def renew(self) -> None:
        """Close it, damaged as it is, and make another one."""
        self.close()
        self._make(*self._made_with)

    def close(self) -> None:
        other = self.stranger._open().participants
        if self.stranger._open().segment.file.lock_fd < 0:  # it is dead
            other.index = -1
        self.stranger.close()
        self.channel.close()


def _put(channel: Channel, victim: Victim) -> None:
    channel.put(victim.random.choice(victim.messages), timeout=0)


def _put_waiting(channel: Channel, victim: Victim) -> None:
    channel.put(victim.random.choice(victim.messages), timeout=3 * _SLICE)


def _shutdown(channel: Channel, victim: Victim) -> None:
    if not victim.others_hold:
        channel.shutdown(immediate=victim.random.random() < 0.5)


def _role(channel: Channel, victim: Victim) -> None:
    channel.sender().close()
    channel.receiver().close()


def _take_role(channel: Channel, victim: Victim) -> None:
    with channel.receiver() as receiver:
        receiver.get(timeout=0)


def _pickled(channel: Channel, victim: Victim) -> None:
    pickle.loads(pickle.dumps(channel.sender())).close()


def _attach(channel: Channel, victim: Victim) -> None:
    Channel.attach(channel.name).close()


def _join(channel: Channel, victim: Victim) -> None:
    with stranger(channel) as other:
        other.put(victim.messages[0], timeout=0)


def _touch(value: Any) -> None:
    """Read all that a message refers to: it must lie within the mapping."""
    if isinstance(value, (np.ndarray, memoryview)):
        assert value.nbytes <= 2 * SLOT_SIZE, f"a view of {value.nbytes} bytes"
        value.tobytes()
    elif isinstance(value, dict):
        for item in value.values():
            _touch(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _touch(item)


def _loan(channel: Channel, victim: Victim) -> None:
    if victim.others_hold:
        return  # the end of its block has no time-out
    with channel.loan(timeout=0) as loan:
        if victim.typed:
            loan["obs"][...] = 1
            loan["n"], loan["more"] = 3, np.ones(2)
            loan["steps"] = np.ones(victim.random.randrange(31))
        elif victim.random.random() < 0.5:
            loan.array((10,), np.float32)[...] = 1
        else:
            loan.buffer[:5] = b"hello"
            loan.nbytes = 5
        if victim.random.random() < 0.2:
            loan.discard()


def _borrow(channel: Channel, victim: Victim) -> None:
    what = victim.random.choice(("keep", "requeue", "read"))
    with channel.borrow(timeout=0) as borrow:
        value = borrow.value
        _touch(value)
        if what == "requeue":
            del value
            borrow.requeue()
    if what == "keep":
        _touch(value)


def _get_into(channel: Channel, victim: Victim) -> None:
    channel.get(timeout=0, out={"obs": np.empty(20, np.uint8)} if victim.typed else np.empty(20, np.float32))


def _get_batch(channel: Channel, victim: Victim) -> None:
    if victim.typed:
        n = victim.random.randrange(1, channel.capacity + 1)
        batch = channel.get_batch(n, min=victim.random.choice([None, 1]), timeout=0)
        assert len(batch["n"]) <= n
        assert all(0 <= length <= 30 for length in batch.lengths["steps"])
        _touch(dict(batch))


def _put_batch(channel: Channel, victim: Victim) -> None:
    if victim.typed:
        n = victim.random.randrange(1, 4)
        shapes: dict[str, tuple[int, ...]] = {"obs": (n, 20), "steps": (n, 30), "n": (n,), "more": (n, 5)}
        channel.put_batch({name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}, timeout=0)


CALLS: dict[str, Callable[[Channel, Victim], object]] = {
    "put": _put, "put_waiting": _put_waiting, "get": lambda channel, _: channel.get(timeout=0),
    "get_nowait": lambda channel, _: channel.get_nowait(),
    "get_waiting": lambda channel, _: channel.get(timeout=3 * _SLICE),
    "put_many": lambda channel, victim: channel.put_many(victim.messages[:4], timeout=0),
    "get_many": lambda channel, _: channel.get_many(10**9, timeout=0), "loan": _loan, "borrow": _borrow,
    "get_into": _get_into, "get_batch": _get_batch, "put_batch": _put_batch,
    "flush": lambda channel, _: channel.flush(timeout=0),
    "wait_for_peers": lambda channel, _: channel.wait_for_peers(9, 9, timeout=0),
    "qsize": lambda channel, _: channel.qsize(), "full": lambda channel, _: (channel.full(), channel.empty()),
    "stats": lambda channel, _: channel.stats(), "roles": _role, "take_role": _take_role, "pickled": _pickled,
    "shutdown": _shutdown, "attach": _attach, "join": _join,
}  # fmt: skip
CHEAP = [name for name in CALLS if name not in ("attach", "join", "pickled")]
#: Calls by how often they are made: those of the last two lines take some hundred microseconds.
EVERY = [
    *["put", "get", "get_nowait", "put_many", "get_many"] * 20,
    *["loan", "borrow", "get_into", "get_batch", "put_batch"] * 10,
    *["flush", "wait_for_peers", "qsize", "full", "shutdown"] * 10,
    *["put_waiting", "get_waiting", "stats", "roles", "take_role"] * 4,
    *["attach", "join", "pickled"],
]


# --- running


def no_more_memory(nbytes: int) -> None:
    """Let this process take only so much more address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes,) * 2)


#: Inflicts damages on a victim; gives them, and the calls to make.
Round: TypeAlias = Callable[[Victim], tuple[list[str], list[str]]]
#: Which victims there are: state, capacity, when_full, typed.
VICTIMS: list[tuple[Any, ...]] = [
    ("empty", 3, "wait"), ("full", 3, "wait"), ("mixed", 3, "wait"), ("left by the dead", 3, "wait"),
    ("full", 3, "drop_oldest"), ("mixed", 5, "drop_oldest"), ("full", 1, "wait"), ("full", 3, "wait", True),
    ("mixed", 4, "wait", True), ("left by the dead", 3, "wait", True),
]  # fmt: skip
_RENEWED = 200  # rounds
_SECONDS = 20  # for so many rounds at most: else a call does not end


def batter(
    rounds: Iterable[Round], victims: Sequence[tuple[Any, ...]], seed: int, progress: Any, traced: bool = False
) -> tuple[int, dict[str, int]]:
    """Damage victims and call them, one round after the other; how many damages, and outcomes of each kind.

    Args:
        rounds: what to do to a victim; gives the damages done, and the calls to make.
        progress: a list, or shared memory, whose first item tells the round.
        traced: look what memory each call takes.
    """
    hurry()
    faulthandler.enable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.register(signal.SIGALRM, chain=True)  # shows where it hangs, and then it dies
    warnings.simplefilter("ignore", RuntimeWarning)  # a message that was dropped after too many deliveries
    targets = [Victim(*victim, seed=seed + k) for k, victim in enumerate(victims)]
    no_more_memory(64 << 20)
    damages = 0
    if traced:
        tracemalloc.start()
    for number, inflict in enumerate(rounds):
        progress[0] = number
        if number % _RENEWED == 0:
            signal.alarm(_SECONDS)
        victim = targets[number % len(targets)]
        victim.restore()
        damage, calls = inflict(victim)
        made = []
        try:
            for name in calls:
                made.append(name)
                taken = memory_taken(victim, name) if traced else victim.call(name)
                assert taken is None or taken <= victim.layout.total_size + (64 << 10), f"took {taken} bytes"
            made.append("close")
            victim.check_gaps()
            if number % _RENEWED < len(targets) or not os.path.exists(victim.path):
                victim.renew()
        except BaseException as error:
            raise AssertionError(f"{victim.what}, round {number}: {damage}, then {made}: {error!r}") from error
        damages += len(damage)
    signal.alarm(0)
    outcomes: Counter[str] = Counter()
    for victim in targets:
        outcomes += victim.outcomes
        victim.close()
    return damages, dict(outcomes)


def memory_taken(victim: Victim, name: str) -> int:
    """The most that a call had allocated at any time, in bytes."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    victim.call(name)
    return tracemalloc.get_traced_memory()[1] - before


def at_random(count: int, calls: int = 3) -> Iterator[Round]:
    """Rounds of one to three random damages, and random calls."""

    def inflict(victim: Victim) -> tuple[list[str], list[str]]:
        damages = [victim.damage() for _ in range(victim.random.randrange(1, 4))]
        return damages, victim.random.choices(EVERY, k=calls)

    return itertools.repeat(inflict, count)


def each_word(words: Iterable[int], states: int) -> Iterator[Round]:
    """Rounds that set each word to each of VALUES, in each of so many victims, and then make many calls."""

    def inflict(word: int, value: int, victim: Victim) -> tuple[list[str], list[str]]:
        return [victim.set_word(word, value)], victim.random.sample(CHEAP, k=6)

    for word in words:
        for value in VALUES:
            yield from itertools.repeat(partial(inflict, word, value), states)


# --- a Latest, and the command line


def batter_latest(rounds: int, seed: int) -> tuple[int, dict[str, int]]:
    """Damage a Latest at random and call it, so many times; how many damages, and outcomes of each kind."""
    hurry()
    warnings.simplefilter("ignore", RuntimeWarning)
    rng, outcomes, damages = random.Random(seed), Counter[str](), 0
    no_more_memory(64 << 20)
    for start in range(0, rounds, _RENEWED):
        signal.alarm(_SECONDS)
        with Latest(SLOT_SIZE, borrows=2, readers=4) as latest:
            for number in range(3):
                latest.publish(np.full(100, number))
            segment = latest._open().segment
            words, layout = segment.words, segment.layout
            sound, end = segment.memory[: layout.slots], layout.slots // 8
            values = [semaphore._get_value() for semaphore in segment.semaphores]
            calls: list[Callable[[], object]] = [
                lambda latest=latest: _touch(latest.read(timeout=0)[1]),
                lambda latest=latest: latest.read(newer_than=3, timeout=3 * _SLICE),
                lambda latest=latest: latest.publish(np.arange(100)),
                lambda latest=latest: _borrow_newest(latest),
                lambda latest=latest: (latest.version, latest.stats()),
                lambda latest=latest: Latest.attach(latest.name).close(),
            ]
            for number in range(start, min(start + _RENEWED, rounds)):
                told = []
                for _ in range(rng.randrange(1, 4)):
                    record = layout.record(rng.randrange(layout.capacity)) + rng.randrange(12)
                    pin = layout.pins // 8 + rng.randrange(20)
                    place = rng.choice([rng.choice(_HEADER_WORDS), pin, record, rng.randrange(end)])
                    flipped = words[place] ^ 1 << rng.randrange(64)
                    words[place] = value = rng.choice([*VALUES, rng.getrandbits(64), flipped])
                    told.append((place, value))
                damages += len(told)
                for call in rng.choices(calls, k=3):
                    try:
                        call()
                        outcomes["value"] += 1
                    except ALLOWED as error:
                        outcomes[type(error).__name__] += 1
                    except BaseException as error:
                        raise AssertionError(f"{seed=}, round {number}: {told}: {error!r}") from error
                segment.memory[: layout.slots] = sound
                for semaphore, count in zip(segment.semaphores, values, strict=True):
                    for _ in range(count - semaphore._get_value()):
                        semaphore.release()
                    for _ in range(semaphore._get_value() - count):
                        semaphore.acquire(False)
            assert latest.read(timeout=5)[0] == 3
    signal.alarm(0)
    return damages, dict(outcomes)


def _borrow_newest(latest: Latest) -> None:
    with latest.borrow(timeout=0) as borrow:
        value = borrow.value
        _touch(value)
    _touch(value)


def _watch(victim: Victim) -> None:
    """What `ringshm top` does, with more damage between its looks."""
    sampler = Sampler()
    for _ in range(3):
        sampler.look()
        victim.damage()
    channels = sampler.in_order()
    json.dumps(top.as_document(channels))
    top.show_overview(Page(), channels)
    for watched in channels:
        top.show_detail(Page(), watched, "_#")


def batter_command_line(rounds: int, seed: int) -> int:
    """Damage channels at random and look at them by the command line; how many damages."""
    hurry()
    cli._BETWEEN_LOOKS = 0
    rng, damages = random.Random(seed), 0
    victims = [Victim(*victim, seed=seed + k) for k, victim in enumerate(VICTIMS)]
    for number in range(rounds):
        victim = victims[number % len(victims)]
        victim.restore()
        told = [victim.damage() for _ in range(rng.randrange(1, 4))]
        damages += len(told)
        name = victim.channel.name
        for argv in (["stats", name], ["stats", name, "--json"], ["ls"], ["ls", "--json"]):
            shown = io.StringIO()
            try:
                with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
                    assert cli.main(argv) in (0, 1)
                assert name in shown.getvalue()
                if argv[-1] == "--json" and shown.getvalue().startswith(("{", "[")):
                    json.loads(shown.getvalue())
            except BaseException as error:
                raise AssertionError(f"{victim.what}, round {number}: {told}, then {argv}: {error!r}") from error
        try:
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                _watch(victim)
            assert name in shown.getvalue()
        except BaseException as error:
            raise AssertionError(f"{victim.what}, round {number}: {told}, then top: {error!r}") from error
    for victim in victims:
        victim.restore()
        victim.close()
    return damages

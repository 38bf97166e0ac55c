"""Nothing in a segment is trusted: whatever its bytes are, a call with a time-out ends in a result, an error of
ringshm's or the time-out; it takes no memory beyond the segment's size, and writes nothing outside of its slots.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import json
import mmap
import os
import random
import socket
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fakes import Machine, patiently
from support.foreign import FOREIGN, SEMAPHORES, foreign, semaphores_of
from support.hostile import (
    CHEAP,
    SLOT_SIZE,
    VALUES,
    VICTIMS,
    Round,
    Victim,
    at_random,
    batter,
    batter_command_line,
    batter_latest,
    each_word,
    hurry,
    used_words,
)
from support.payloads import decode_plain, encoded_bytes
from support.tracer import Interrupt
from support.workers import Crew, Failed, finish, line_of, may_fork, script

import ringshm
from ringshm import Channel, ChannelNotFound
from ringshm.messages import codecs, plain
from ringshm.ring.outcomes import CONTENDED
from ringshm.segment import layout as at
from ringshm.segment.files import path_of
from ringshm.segment.semaphores import STEM

# --- damage to everything


def batter_in_children(jobs: Sequence[tuple[Callable[[], Iterator[Round]], Sequence[Any], int, bool]]) -> Counter[str]:
    """Run `batter` in a child for each (rounds, victims, seed, traced), two at a time; the outcomes of all."""
    outcomes: Counter[str] = Counter()
    waiting = list(jobs)
    with Crew("fork") as crew:
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < 2:
                rounds, victims, seed, traced = waiting.pop(0)
                progress = memoryview(mmap.mmap(-1, 8)).cast("Q")
                child = crew.start(lambda *job: batter(job[0](), *job[1:]), rounds, victims, seed, progress, traced)
                running.append((child, progress, seed))
            child, progress, seed = running.pop(0)
            try:
                damages, ends = child.result()
            except Failed as error:
                raise AssertionError(f"seed {seed}, round {progress[0]} (its stack is on stderr): {error}") from None
            outcomes.update(ends, damages=damages)
    print(dict(outcomes))
    return outcomes


@may_fork
@pytest.mark.parametrize("seed", [1, 3, *(pytest.param(seed, marks=pytest.mark.slow(seconds=60)) for seed in (5, 7))])
def test_random_damage_ends_calls_in_a_result_or_an_error(seed: int) -> None:
    outcomes = batter_in_children([(lambda: at_random(6500), VICTIMS, seed + k, False) for k in (0, 1)])
    assert outcomes["damages"] > 25_000
    errors = {"Empty", "Full", "ChannelCorrupted", "UndecodableMessage", "ChannelClosed", "EndOfChannel"}
    assert all(outcomes[error] > 20 for error in errors), "damage that does nothing tests nothing"


@may_fork
@pytest.mark.slow(seconds=300)
@pytest.mark.parametrize("seed", [10, 12, 14])
def test_much_random_damage_ends_calls_in_a_result_or_an_error(seed: int) -> None:
    jobs = [(lambda: at_random(25_000), VICTIMS, seed + k, False) for k in (0, 1)]
    assert batter_in_children(jobs)["damages"] > 96_000


@may_fork
def test_each_word_that_means_something_may_hold_anything() -> None:
    words = sorted(set(used_words(at.Layout(3, SLOT_SIZE, 4))))
    halves = words[::2], words[1::2]
    victims = VICTIMS[1:3]
    jobs = [(lambda half=half: each_word(half, len(victims)), victims, 20, False) for half in halves]
    assert batter_in_children(jobs)["damages"] == len(words) * 13 * 2


@may_fork
@pytest.mark.slow(seconds=300)
def test_each_word_may_hold_anything() -> None:
    words = range(at.Layout(3, SLOT_SIZE, 4).words_end)
    parts = [words[start::4] for start in range(4)]
    victims = VICTIMS[:5]
    jobs = [(lambda part=part: each_word(part, len(victims)), victims, 30, False) for part in parts]
    assert batter_in_children(jobs)["damages"] == len(words) * 13 * 5


@may_fork
def test_no_call_allocates_more_than_the_segment() -> None:
    batter_in_children([(lambda: at_random(500), VICTIMS, seed, True) for seed in (40, 41)])


@pytest.mark.slow(seconds=120)
@may_fork
@pytest.mark.parametrize("seed", [50, 51, 52, 53])
def test_random_damage_to_a_latest_ends_calls_in_a_result_or_an_error(seed: int) -> None:
    with Crew("fork") as crew:
        damages, outcomes = crew.start(batter_latest, 5_000, seed).result()
    print(outcomes)
    assert damages > 9_500
    assert all(outcomes[error] > 20 for error in ("value", "Empty", "ChannelCorrupted"))


@pytest.mark.slow(seconds=180)
@may_fork
def test_the_command_line_shows_what_is_damaged_or_says_so() -> None:
    with Crew("fork") as crew:
        assert crew.start(batter_command_line, 300, 60).result() > 500


SCRIBBLE = """
import mmap, os, random, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
words = memoryview(memory).cast("Q")
places, values, rng = eval(sys.argv[2]), eval(sys.argv[3]), random.Random(5)
print("at it", flush=True)
while os.getppid() == int(sys.argv[4]):
    words[rng.choice(places)] = rng.choice(values) if rng.random() < 0.7 else rng.getrandbits(64)
"""


def call_under_fire() -> int:
    """Calls on a channel while another process writes nonsense all over it."""
    victim = Victim("full", seed=50)
    hurry()
    warnings.simplefilter("ignore", RuntimeWarning)
    places = [word for word in victim.used if word >= at.GEN]
    with script(SCRIBBLE, victim.path, repr(places), repr(VALUES), str(os.getpid())) as scribbler:
        assert line_of(scribbler) == "at it"
        calls = victim.random.choices([name for name in CHEAP if name not in ("shutdown", "loan")], k=10_000)
        for number, name in enumerate(calls):
            if number % 3 == 0:
                victim.restore()
            victim.call(name)
        scribbler.kill()
    victim.restore()
    victim.close()
    return len(calls)


@may_fork
def test_damage_done_during_a_call_does_no_other_harm() -> None:
    with Crew("fork") as crew:
        assert crew.start(call_under_fire).result() == 10_000


# --- what damage must not do, one by one


HEALED: dict[str, tuple[int, int]] = {
    "generation 0": (at.GEN, 0), "an odd generation": (at.GEN, 7), "the other semaphore's generation": (at.GEN, 6),
    "the last generation": (at.GEN, at.MAX_WORD), "the last even generation": (at.GEN, at.MAX_WORD - 1),
    "recoveries at their most": (at.RECOVERIES, at.MAX_WORD), "a head before all": (at.HEAD, 0),
    "a head behind the tail": (at.HEAD, 1000), "a tail before the head": (at.TAIL, 0),
    "a tail far ahead": (at.TAIL, 1 << 60), "a slot that is none": (at.Layout(3, 64, 8).ring, 3),
    "a slot far away": (at.Layout(3, 64, 8).ring, at.MAX_WORD), "another slot": (at.Layout(3, 64, 8).ring + 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("what", HEALED)
def test_damage_to_what_is_derived_from_the_slots_is_healed(what: str) -> None:
    """The slots' words are the truth: whoever finds that the ring leads astray, or no token, rebuilds the rest."""
    word, value = HEALED[what]
    machine = Machine.of(3)
    process = machine.start()
    payloads = process.fill()
    assert process.receive() == payloads[0]
    machine.words[word] = value
    other = machine.start()
    other.settle()
    assert other.drain() == payloads[1:]
    again = other.fill()
    assert process.drain() == again
    machine.check_at_rest()


@pytest.mark.parametrize("word", [at.P_SENDER_HOLD, at.P_RECEIVER_HOLD])
def test_a_hold_word_that_was_damaged_does_not_hold_up_its_own_process(word: int) -> None:
    machine = Machine.of(3)
    process = machine.start()
    for tokens in machine.semaphores:
        tokens.tokens = 0
    machine.words[process.participants.entry + word] = at.MAX_WORD
    mutex = process.ring.senders if word == at.P_SENDER_HOLD else process.ring.receivers
    mutex.leave(patiently(lambda: mutex.enter() or CONTENDED))
    machine.check_at_rest()


def test_a_tail_at_its_end_is_an_error_and_not_a_hang() -> None:
    machine = Machine.of(3)
    process = machine.start()
    machine.words[at.TAIL] = at.MAX_WORD
    for _ in range(3):
        with pytest.raises(ringshm.ChannelCorrupted, match="make a new channel"):
            process.send(b"more")
        assert not process.ring.senders.owned()
    with pytest.raises(ringshm.ChannelCorrupted, match="make a new channel"):
        process.receive()


def test_counters_of_bytes_at_their_end_are_mended_by_a_recovery() -> None:
    machine = Machine.of(3)
    process = machine.start()
    machine.words[at.SENT_NBYTES] = at.MAX_WORD
    with pytest.raises(ringshm.ChannelCorrupted):  # but it was sent: what comes after the slot's word is derived
        process.send(b"one")
    process.settle()
    machine.words[at.TAKEN_NBYTES] = at.MAX_WORD - 1
    with pytest.raises(ringshm.ChannelCorrupted):
        process.receive()
    process.settle()
    assert process.drain() == [b"one"]
    payloads = process.fill()
    assert process.drain() == payloads


def test_a_look_for_the_dead_in_the_time_to_come_hides_no_dead() -> None:
    machine = Machine.of(3)
    survivor, dead = machine.start(), machine.start()
    dead.die()
    machine.words[at.LAST_CHECK] = at.MAX_WORD
    assert survivor.reaper.look()
    assert survivor.participants.dead() == []
    assert not survivor.reaper.look(), "twice within a slice"


def test_waiters_that_do_not_exist_do_not_overflow_a_semaphore() -> None:
    machine = Machine.of(3)
    process = machine.start()
    machine.words[process.participants.entry + at.P_WAITING_MESSAGE] = at.MAX_WORD
    for _ in range(5):
        process.ring.messages.wake_all()
    assert machine.semaphores[4].tokens == at.MAX_ENTRIES


def test_a_count_of_waits_at_its_end_does_not_end_waits() -> None:
    machine = Machine.of(3)
    process = machine.start()
    word = process.participants.entry + at.P_WAITS
    machine.words[word] = at.MAX_WORD
    process.ring.messages.announce()
    process.ring.messages.withdraw()
    assert machine.words[word] == 0


def test_an_error_of_the_users_is_not_taken_for_damage() -> None:
    machine = Machine.of(3)
    process = machine.start()
    process.send(b"message")
    calls = []

    def consume(*_: object) -> bytes:
        """Fails the first time only, as if a signal handler had raised."""
        calls.append(1)
        if len(calls) % 2:
            raise ValueError("the user's")
        return b"message"

    for receive in (process.ring.receive, lambda consume: process.ring.receive_many(5, consume)):
        with pytest.raises(ValueError, match="the user's") as caught:
            receive(consume)
        assert not isinstance(caught.value, ringshm.RingshmError)
    process.settle()
    assert process.drain() == [b"message"]
    machine.check_at_rest()


def test_a_message_that_could_not_be_given_back_is_given_back_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringshm.ring.returns.RETURN_SLICES", 3)
    machine = Machine.of(3)
    process, other = machine.start(), machine.start()
    process.send(b"message")
    tokens = machine.semaphores[2]

    def consume(*_: object) -> bytes:
        tokens.tokens = 0  # another process takes the mutex and is stopped
        machine.words[other.participants.entry + at.P_RECEIVER_HOLD] = machine.words[at.GEN]
        raise Interrupt

    with pytest.raises(Interrupt):
        process.ring.receive(consume)
    assert at.READY not in machine.states()
    machine.words[other.participants.entry + at.P_RECEIVER_HOLD] = 0  # it goes on
    tokens.tokens = 1
    process.settle()
    process.reaper.look()
    assert other.drain() == [b"message"]
    machine.check_at_rest()


# --- bytes for the plain codec


AUDITED = """
import random, struct, sys
import numpy as np
from support.hostile import MESSAGES
from ringshm.messages import codecs, plain
from support.payloads import HOSTILE, NOT_NAMEDTUPLES, decode_plain, encoded_bytes, tagged

seen = []
codec = plain.PlainCodec()
rng = random.Random(60)
sound = [encoded_bytes(message) for message in MESSAGES]
crafted = [(kind, payload, b"") for kind, payload in HOSTILE.values()]
for name in [*NOT_NAMEDTUPLES, "os:system", "this:Point", "numpy.f2py:Point"]:
    stream = tagged(plain._T_NAMED_TUPLE, name.encode()) + struct.pack("<I", 1) + tagged(plain._T_STR, b"touch x")
    crafted.append((codecs.CONTAINER, stream, b""))
pickles = [
    b"cos\\nsystem\\n(S'touch /dev/shm/ringshm.was.here'\\ntR.",
    b"\\x80\\x04\\x8c\\x04this\\x8c\\x01s\\x93.",
    b"cantigravity\\nx\\n.",
]
for pickled in pickles:
    crafted += [(kind, pickled, pickled) for kind in range(16)]
fields = "{'names': ['a'], 'formats': ['<f8'], "
texts = [
    *("|O", "O,f8", "[('a', '|O')]", "{'names': ['a'], 'formats': ['|O']}", "('<f8', '|O')", "('|O', (2,))", "object"),
    *("(2,3)O", "[__import__('this')]", "{'a': __import__('this')}", "[lambda: 0]", "T", "|T16", "[('a', '|T16')]"),
    *(fields + "'offsets': [-8]}", fields + "'offsets': [2147483640]}", fields + "'itemsize': 1}", fields + "'x': 1}"),
    *("<M8[ns/0]", "M8[ns/0]", "('<f8', '<M8[ns/0]')", "[('a', '<f8', '<M8[s/0]')]", "<M8[0s]", "<M8[999999999Y]"),
    *("<M8[99999999999999999999D]", "|V99999999999999", "|V2147483647", "<U2147483647", "|S-1", "<f9999999999"),
    *("(2147483647,2147483647)f8", "f8" * 500, "('<f8', (2147483647, 2147483647))", "('<f8', (-1,))"),
]
for text in texts:
    crafted.append((codecs.CONTAINER, tagged(plain._T_DTYPE, text.encode()), b""))
    for shape in [(), (0,), (1,), (1 << 63,), (1 << 40, 1 << 40)]:
        described = struct.pack(f"<BB{len(shape)}Q", 0, len(shape), *shape) + text.encode()
        crafted += [(codecs.ARRAY, bytes(n), described[:255]) for n in (0, 1, 8, 16)]


def decode(kind, payload, description):
    try:
        decode_plain(kind, payload, description)
    except MemoryError:
        raise
    except Exception:
        return 0
    return 1


def attempts():
    yield from crafted
    for _ in range(int(sys.argv[1])):
        kind, payload, description = rng.choice(sound)
        raw = bytearray(description if rng.random() < 0.3 and description else payload)
        for _ in range(rng.randrange(1, 4)):
            if raw:
                raw[rng.randrange(len(raw))] = rng.choice((0, 1, 3, 16, 127, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            del raw[rng.randrange(len(raw) + 1):]
        if raw and description and len(raw) <= 255 and rng.random() < 0.5:
            description = bytes(raw)
        else:
            payload = bytes(raw)
        yield rng.choice((kind, kind, kind, rng.randrange(16))), payload, description


for attempt in sound + crafted + sound:  # what NumPy imports at its first use of something
    decode(*attempt)
listening = True


def hook(event, args):
    if listening and event not in ALLOWED:
        seen.append((event, args))


# ast.literal_eval compiles to a tree, which is never run; the mapping is the test's own
ALLOWED = {"compile", "mmap.__new__"}
sys.addaudithook(hook)
count = decoded = 0
for attempt in attempts():
    decoded += decode(*attempt)
    count += 1
    if seen:
        break
listening = False
if seen:
    raise SystemExit(f"{attempt} did {seen}")
print(count, decoded)
"""


def test_plain_bytes_import_open_and_run_nothing() -> None:
    """Asked of the interpreter itself, which tells of each import, open, exec and system call by an audit event."""
    count, decoded = map(int, finish(script(AUDITED, "30000")).split())
    assert count > 30_000
    assert 1000 < decoded < count - 10_000, "some must be sound, some not"


def alike(count: int) -> bytes:
    """Numbers with one hash between them, each as a "plain" stream."""
    numbers = [(sys.hash_info.modulus * k).to_bytes(12, "little") for k in range(1 << 30, (1 << 30) + count)]
    return b"".join(bytes([plain._T_BIG_INT]) + struct.pack("<I", len(raw)) + raw for raw in numbers)


@pytest.mark.parametrize("kind", ["set", "dict", "dict in a tuple"])
def test_keys_made_to_collide_take_no_hours(kind: str) -> None:
    """A megabyte of them would be compared with each other for minutes."""
    count = 60_000
    numbers = alike(count)
    if kind == "set":
        stream = bytes([plain._T_SET]) + struct.pack("<I", count) + numbers
    else:
        stream = bytes([plain._T_DICT]) + struct.pack("<I", count // 2) + numbers
    if kind == "dict in a tuple":
        stream = bytes([plain._T_TUPLE]) + struct.pack("<I", 1) + stream
    with pytest.raises(ValueError, match="same hash"):
        decode_plain(codecs.CONTAINER, stream)


def test_a_few_keys_may_have_the_same_hash() -> None:
    message = {*(sys.hash_info.modulus * k for k in range(1, 100)), *range(1000)}
    assert decode_plain(*encoded_bytes(message)) == message
    assert decode_plain(*encoded_bytes(dict.fromkeys(message))) == dict.fromkeys(message)


@pytest.mark.parametrize("dtype", ["|S0", "<U0", "|V0"])
def test_countless_empty_items_take_no_memory(dtype: str) -> None:
    """`numpy.empty` makes items of one byte of "S0"; a terabyte of them would be had."""
    description = struct.pack("<BBQ", 0, 1, 1 << 40) + dtype.encode()
    array = decode_plain(codecs.ARRAY, b"", description)
    assert (array.shape, array.nbytes, array.dtype) == ((1 << 40,), 0, np.dtype(dtype))


def test_a_description_longer_than_its_place_is_refused() -> None:
    description = struct.pack("<BB", 0, 0) + b"|V1".ljust(at.DESCRIPTION_NBYTES)
    with pytest.raises(ValueError, match=f"longer than {at.DESCRIPTION_NBYTES}"):
        decode_plain(codecs.ARRAY, b"x", description)


# --- files for attach

SHM = "/dev/shm/"


def holdings() -> tuple[list[str], list[str]]:
    """What this process has open, and mapped, of shared memory."""
    gc.collect()
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    maps = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if SHM in line]
    return sorted(links), sorted(maps)


def _is_open(fd: str) -> bool:
    try:
        return not os.readlink(f"/proc/self/fd/{fd}").startswith("/proc/")  # but for the listing's own
    except OSError:
        return False


@contextlib.contextmanager
def copy_of(channel: Channel, name: str) -> Iterator[Path]:
    """A copy of a channel's file which counts as live: somebody holds the lock of an entry."""
    path = Path(path_of(name))
    path.write_bytes(Path(path_of(channel.name)).read_bytes())
    with open(path, "r+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, at.LOCK_ENTRIES, 1, 0))
        try:
            yield path
        finally:
            path.unlink()


def test_a_file_of_any_other_size_is_refused_and_nothing_of_it_is_kept() -> None:
    with Channel(2, 64) as channel, copy_of(channel, "copy") as path:
        total = path.stat().st_size
        before = holdings()
        edges = {size + k for size in range(0, 2 * total, 4096) for k in (-1, 0, 1)}
        for size in sorted({*range(0, total, 37), *edges} - {-1, total}, reverse=True):
            os.truncate(path, size)
            with pytest.raises(ringshm.ChannelCorrupted, match=f"{path} is .* {size} bytes|{path} .* begins with"):
                Channel.attach("copy")
        assert holdings() == before


def test_a_header_of_any_words_is_refused_or_does_no_harm() -> None:
    rng = random.Random(70)
    attached = refused = 0
    with Channel(2, 64) as channel, copy_of(channel, "copy") as path:
        sound = path.read_bytes()
        before = holdings()
        used = [*range(at.CODEC_NAME + 6), at.GEN, at.NAME_GONE, at.HIGH_WATER, at.HIGH_INVITATION]
        hostile = [(word, value) for word in used for value in VALUES]
        hostile += [(rng.randrange(at.HEADER_NBYTES // 8), rng.getrandbits(64)) for _ in range(200)]
        for word, value in hostile:
            path.write_bytes(sound)
            with open(path, "r+b") as file:
                os.pwrite(file.fileno(), value.to_bytes(8, sys.byteorder), word * 8)
            try:
                with Channel.attach("copy") as other:
                    assert at.Layout(other.capacity, other.slot_size, 256).total_size == len(sound)
                    other.stats()
                attached += 1
            except ringshm.RingshmError as error:
                assert "copy" in str(error)
                refused += 1
        assert holdings() == before
        assert attached > 100 and refused > 100
        channel.put("still works")
        assert channel.get(timeout=5) == "still works"


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def test_what_is_no_segment_is_refused_and_nothing_of_it_is_kept() -> None:
    with Channel(2, 64) as channel:
        kinds = {what: (make, error) for what, (make, error, _, _) in FOREIGN.items() if error is not ChannelNotFound}
        kinds["a socket"] = socket_file, ringshm.ChannelCorrupted
        kinds["a link to a channel"] = (lambda path: path.symlink_to(path_of(channel.name)), ringshm.ChannelCorrupted)
        before = holdings()
        for what, (make, error) in kinds.items():
            with foreign("foreign", make) as path:
                for _ in range(3):
                    with pytest.raises(error, match=str(path)):
                        Channel.attach("foreign")
            assert holdings() == before, what


def test_semaphores_that_are_none_are_refused_and_nothing_is_kept() -> None:
    with Channel(2, 64) as channel, copy_of(channel, "copy"):
        semaphore = semaphores_of(channel)[3]
        kinds = {**{what: make for what, (make, _) in SEMAPHORES.items()}, "a pipe": os.mkfifo, "a socket": socket_file}
        kinds["a link to a semaphore"] = lambda path: path.symlink_to(semaphores_of(channel)[0])
        kinds["one byte too few"] = lambda path: path.write_bytes(bytes(31))
        if os.geteuid() == 0:
            kinds["another user's"] = lambda path: (path.write_bytes(bytes(32)), os.chown(path, 65534, 65534))
        aside = semaphore.with_name(semaphore.name + ".aside")
        before = holdings()
        for what, make in kinds.items():
            semaphore.rename(aside)
            try:
                make(semaphore)
                for _ in range(3):
                    with pytest.raises((ringshm.ChannelCorrupted, ChannelNotFound)) as caught:
                        Channel.attach("copy")
                    assert str(semaphore) in str(caught.value) or what == "missing"
                    del caught  # its traceback holds what attach held
            finally:
                if semaphore.is_dir() and not semaphore.is_symlink():
                    semaphore.rmdir()
                aside.rename(semaphore)
            assert holdings() == before, what


ATTACH_OFTEN = """
import collections, json, ringshm
outcomes = collections.Counter()
for _ in range(2000):
    try:
        with ringshm.Channel.attach("target") as found:
            assert found.slot_size in (64, 65)
            outcomes["attached"] += 1
    except ringshm.RingshmError as error:
        outcomes[type(error).__name__] += 1
print(json.dumps(outcomes))
"""


def test_a_name_that_keeps_changing_hands_leads_to_a_channel_or_to_an_error() -> None:
    """Another process replaces what is there, between any two system calls of attach."""
    target, spare = Path(path_of("target")), Path(path_of("spare"))
    with Channel(2, 64) as one, Channel(2, 65) as other:
        kinds: list[Callable[[], object]] = [
            lambda: os.link(path_of(one.name), spare), lambda: spare.write_bytes(b""),
            lambda: os.link(path_of(other.name), spare), lambda: spare.write_bytes(bytes(50_000)),
            lambda: os.link(path_of(one.name), spare), lambda: spare.symlink_to(path_of(one.name)),
        ]  # fmt: skip
        try:
            attaching = script(ATTACH_OFTEN)
            for make in itertools.cycle(kinds):
                make()
                os.rename(spare, target)
                if attaching.poll() is not None:
                    break
            outcomes = json.loads(finish(attaching))
        finally:
            target.unlink()
        assert set(outcomes) <= {"attached", "ChannelCorrupted", "ChannelNotFound"}
        print(outcomes)
        assert outcomes["attached"] and outcomes["ChannelCorrupted"]
        for channel in (one, other):
            channel.put("still works")
            assert channel.get(timeout=5) == "still works"


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_no_file_is_for_anybody_else_whatever_the_umask(umask: int) -> None:
    before = os.umask(umask)
    try:
        channel = Channel(2, 64)
    finally:
        os.umask(before)
    with channel, Channel.attach(channel.name):
        paths = list(Path("/dev/shm").glob(f"*{STEM}*.{channel.name}*"))  # without a name of its own, it has its nonce
        assert len(paths) == 10
        assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}

"""Bad arguments, bad names, bad files, bad objects: each is refused by name, and the channel goes on working."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checks import check_empty
from support.foreign import FOREIGN, SEMAPHORES, foreign, header, semaphores_of, write
from support.payloads import Unpickles
from support.workers import Crew, finish, line_of, may_fork, ringshm_files, script

import ringshm
from ringshm import Channel, arguments, errors
from ringshm.segment import layout
from ringshm.segment.files import path_of
from ringshm.segment.limits import FILES

SHM = Path("/dev/shm")
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")


def assert_works(channel: Channel) -> None:
    """Nothing is in it, and all of it can be used."""
    assert channel.empty()
    messages = [f"still works {n}" for n in range(channel.capacity)]
    assert channel.put_many(messages, timeout=5) == channel.capacity
    assert channel.full()
    assert channel.get_many(channel.capacity, timeout=5) == messages
    stats = channel.stats()
    assert stats.free == channel.capacity
    assert stats.slots == ()


@pytest.fixture
def channel() -> Iterator[Channel]:
    with Channel(3, 1024) as channel:
        yield channel
        if not channel.closed:
            assert_works(channel)


# --- arguments of Channel


class NoCodec:
    """Has a name and nothing else."""

    name = "none"


class BadName:
    """A codec but for its name."""

    def __init__(self, name: Any) -> None:
        self.name = name

    def encode(self, obj: Any) -> bytes:
        return b""

    def decode(self, data: memoryview) -> Any:
        return None


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"capacity": 0}, ValueError, "capacity=0 must be at least 1"),
    ({"capacity": -3}, ValueError, "capacity=-3 must be at least 1"),
    ({"capacity": 2.0}, TypeError, "capacity=2.0 must be an int, not float"),
    ({"capacity": "2"}, TypeError, "capacity='2' must be an int, not str"),
    ({"capacity": None}, TypeError, "capacity=None must be an int"),
    ({"capacity": True}, TypeError, "capacity=True must be an int, not a bool"),
    ({"slot_size": 0}, ValueError, "slot_size=0 must be at least 1"),
    ({"slot_size": -1}, ValueError, "slot_size=-1 must be at least 1"),
    ({"slot_size": "0KiB"}, ValueError, "slot_size=0 must be at least 1"),
    ({"slot_size": "64 potatoes"}, ValueError, "slot_size='64 potatoes' has an unknown unit 'potatoes': use B, kB"),
    ({"slot_size": "lots"}, ValueError, "slot_size='lots' is no size"),
    ({"slot_size": "-4KiB"}, ValueError, "slot_size='-4KiB' is no size"),
    ({"slot_size": "1.5"}, ValueError, "slot_size='1.5' is not a whole number of bytes"),
    ({"slot_size": 1.5}, TypeError, "slot_size=1.5 must be an int, not float"),
    ({"slot_size": math.nan}, TypeError, "slot_size=nan must be an int"),
    ({"slot_size": None}, TypeError, "takes slot_size or spec, neither was given"),
    ({"name": ""}, ValueError, "name='' is empty"),
    ({"name": "a/b"}, ValueError, "name='a/b' must hold no slash"),
    ({"name": "/abs"}, ValueError, "name='/abs' must hold no slash"),
    ({"name": "nul\0"}, ValueError, "must hold no slash and no NUL"),
    ({"name": "x" * 201}, ValueError, "name of 201 bytes is too long: at most 200"),
    ({"name": "ä" * 101}, ValueError, "name of 202 bytes is too long: at most 200"),
    ({"name": b"bytes"}, TypeError, "name=b'bytes' must be a str, not bytes"),
    ({"name": 3}, TypeError, "name=3 must be a str, not int"),
    ({"codec": "json"}, ValueError, "codec='json' must be one of 'pickle', 'plain'"),
    ({"codec": "custom"}, ValueError, "codec='custom' must be one of 'pickle', 'plain'"),
    ({"codec": None}, TypeError, "codec=None must be 'pickle', 'plain' or an object with name, encode and decode"),
    ({"codec": NoCodec()}, TypeError, "an object with name, encode and decode"),
    ({"codec": BadName("")}, TypeError, "an object with name, encode and decode"),
    ({"codec": BadName(3)}, TypeError, "an object with name, encode and decode"),
    ({"codec": BadName("x" * 49)}, ValueError, "longer than 48 bytes"),
    ({"wait": "sleep"}, ValueError, "wait='sleep' must be one of 'adaptive', 'block', 'spin'"),
    ({"wait": None}, ValueError, "wait=None must be one of"),
    ({"when_full": "drop"}, ValueError, "when_full='drop' must be one of 'wait', 'drop_oldest'"),
    ({"oversize": "split"}, ValueError, "oversize='split' must be one of 'stream', 'error'"),
    ({"max_deliveries": 0}, ValueError, "max_deliveries=0 must be at least 1"),
    ({"max_deliveries": 256}, ValueError, "max_deliveries=256 must be at most 255"),
    ({"max_deliveries": "3"}, TypeError, "max_deliveries='3' must be an int"),
    ({"max_participants": 0}, ValueError, "max_participants=0 must be at least 1"),
    ({"max_participants": 1 << 20}, ValueError, "max_participants=1048576 must be at most"),
]


@pytest.mark.parametrize(("arguments", "error", "says"), ARGUMENTS, ids=[says[:40] for _, _, says in ARGUMENTS])
def test_an_argument_that_makes_no_sense_is_refused_by_its_name(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    before = ringshm_files()
    with pytest.raises(error, match=re.escape(says)):
        Channel(**{"capacity": 2, "slot_size": 64, **arguments})
    assert ringshm_files() == before


def test_integers_of_any_kind_are_taken() -> None:
    with Channel(np.int64(2), np.uint16(100)) as channel:  # type: ignore[arg-type]
        assert (channel.capacity, channel.slot_size) == (2, 100)
        assert type(channel.capacity) is type(channel.slot_size) is int
        assert_works(channel)


# --- more than there is

TOO_MUCH = [(1, "1000TB"), (1 << 20, "1GiB"), (1, (1 << 63) - 4096), (1 << 62, 1), (10**30, 10**30)]


@pytest.mark.parametrize(("capacity", "slot_size"), TOO_MUCH, ids=repr)
def test_more_than_shared_memory_holds_is_refused_with_what_to_do(capacity: int, slot_size: Any) -> None:
    before = ringshm_files()
    with pytest.raises(ringshm.InsufficientSharedMemory) as caught:
        Channel(capacity, slot_size, name="too-much")
    assert caught.value.errno == errno.ENOSPC
    says = str(caught.value)
    needed = layout.Layout(capacity, arguments.parse_size(slot_size, ""), 256).total_size
    space = os.statvfs(SHM)
    assert f"'too-much' needs {needed} bytes" in says
    free = re.search(r"/dev/shm has (\d+) free", says)
    assert free is not None
    assert int(free[1]) <= space.f_blocks * space.f_frsize
    assert "docker run --shm-size" in says
    assert ringshm_files() == before


FILLED = """
import os, sys, errno, ringshm
def left(): return sorted(name for name in os.listdir("/dev/shm") if "ringshm" in name)
channel = ringshm.Channel(4, "64KiB", name="fits")
before = left()
space = os.statvfs("/dev/shm")
free = space.f_bavail * space.f_frsize
for slot_size in (free // 4, free, free // 2 + 4096, 10 * free):
    try:
        ringshm.Channel(4, slot_size)
    except ringshm.InsufficientSharedMemory as error:
        assert error.errno == errno.ENOSPC and str(free) in str(error), error
    else:
        raise AssertionError("there is no room for it")
    assert left() == before
with open("/dev/shm/filler", "wb", buffering=0) as filler:  # something else takes all that is left
    try:
        while True:
            filler.write(bytes(65536))
    except OSError as error:
        assert error.errno == errno.ENOSPC
try:
    ringshm.Channel(1, 1)
except ringshm.InsufficientSharedMemory:
    pass
else:
    raise AssertionError("there is no room for it")
for _ in range(3):  # every page of every slot, and no SIGBUS
    for _ in range(4):
        channel.put(os.urandom(65536))
    assert sum(len(channel.get()) for _ in range(4)) == 4 * 65536
other = ringshm.Channel.attach("fits")
assert other.stats().free == 4
other.close()
channel.close()
assert left() == []
print("held")
"""


def test_a_small_file_system_is_never_overdrawn_at_construction_or_later() -> None:
    """In a mount namespace of its own, with a /dev/shm of 2 MiB."""
    unshare = shutil.which("unshare")
    mount = 'mount -t tmpfs -o size=2m ringshm-test /dev/shm && exec "$0" "$@"'
    prefix = [unshare or "", "-m", "--propagation", "private", "sh", "-c", mount]
    if unshare is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mounting a file system in a namespace of one's own is not permitted here")
    environment = dict(os.environ, PYTHONPATH=str(Path(ringshm.__file__).parents[1]))
    done = subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", FILLED], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "held\n", "")


# --- names and files


def test_a_name_in_use_is_refused_and_what_uses_it_goes_on(channel: Channel) -> None:
    with pytest.raises(ringshm.ChannelExists, match=f"channel '{channel.name}' exists: attach to it, or use another"):
        Channel(2, 64, name=channel.name)
    with Channel.attach(channel.name) as attached:
        attached.put("through the name")
        assert channel.get(timeout=5) == "through the name"


NAMES = ["x", "with spaces and ünïcode", "-n", "..", ".hidden", "a" * 200, "new\nline", "sem.x", "%s{}"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_any_other_file_name_will_do(name: str) -> None:
    with Channel(2, 64, name=name) as channel, Channel.attach(name) as attached:
        assert attached.name == name
        attached.put(1)
        assert channel.get(timeout=5) == 1


@pytest.mark.parametrize("timeout", [None, 0, 0.05])
def test_a_missing_channel_is_not_found(timeout: float | None) -> None:
    with pytest.raises(ringshm.ChannelNotFound, match=r"'is-not-there': `ringshm ls`.*timeout=") as caught:
        Channel.attach("is-not-there", timeout=timeout)
    assert caught.value.errno == errno.ENOENT


def test_attach_waits_for_a_channel_to_appear() -> None:
    made: list[Channel] = []
    timer = threading.Timer(0.1, lambda: made.append(Channel(2, 64, name="appears-later")))
    timer.start()
    with Channel.attach("appears-later", timeout=30) as attached:
        timer.join()
        attached.put("x")
        assert made[0].get(timeout=5) == "x"
    made[0].close()


def identity(path: Path) -> tuple[int, ...]:
    """What an attempt must leave as it was; it may read, which moves the time of the last access."""
    found = os.lstat(path)
    return found.st_mode, found.st_ino, found.st_dev, found.st_nlink, found.st_uid, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_segment_is_not_attached_to_and_not_overwritten(what: str) -> None:
    make, error, says, refuses = FOREIGN[what]
    with foreign("foreign", make) as path:
        before = identity(path)
        with pytest.raises(error, match=says) as caught:
            Channel.attach("foreign")
        assert "foreign" in str(caught.value)
        if refuses is None:
            with Channel(2, 64, name="foreign") as channel:
                assert_works(channel)
            return
        with pytest.raises(ringshm.ChannelExists, match=refuses):
            Channel(2, 64, name="foreign")
        assert identity(path) == before


@root
@pytest.mark.parametrize("own", [True, False], ids=["a channel", "another file"])
def test_another_users_file_is_forbidden(own: bool) -> None:
    with contextlib.ExitStack() as stack:
        if own:
            stack.enter_context(Channel(2, 64, name="anothers"))
            path = Path(path_of("anothers"))
        else:
            path = stack.enter_context(foreign("anothers", write(header())))
        os.chown(path, 65534, 65534)
        with pytest.raises(ringshm.ChannelForbidden, match=r"'anothers'.*belongs to user 65534") as caught:
            Channel.attach("anothers")
        assert caught.value.errno == errno.EACCES
        with pytest.raises(ringshm.ChannelExists, match="use another name"):
            Channel(2, 64, name="anothers")
        os.chown(path, 0, 0)


def patched(channel: Channel, offset: int, raw: bytes) -> contextlib.AbstractContextManager[None]:
    """Bytes of a live segment's file, changed for a while."""

    @contextlib.contextmanager
    def change() -> Iterator[None]:
        with open(path_of(channel.name), "r+b") as file:
            file.seek(offset)
            before = file.read(len(raw))
            file.seek(offset)
            file.write(raw)
        try:
            yield
        finally:
            with open(path_of(channel.name), "r+b") as file:
                file.seek(offset)
                file.write(before)

    return change()


ATTACH = "import ringshm, sys\ntry:\n ringshm.Channel.attach(sys.argv[1])\nexcept Exception as e:\n print(repr(e))\n"


def attach_elsewhere(name: str) -> str:
    """What another process gets: this one is attached already."""
    return finish(script(ATTACH, name))


WORDS: dict[str, tuple[int, int, str]] = {
    "a newer layout": (
        layout.VERSION,
        99,
        f"Incompatible.*99, this ringshm reads {layout.LAYOUT_VERSION}: use the same",
    ),
    "an older layout": (layout.VERSION, 0, "IncompatibleChannel.*layout version 0"),
    "another capacity": (layout.CAPACITY, 4, "ChannelCorrupted.*capacity 4"),
    "no capacity": (layout.CAPACITY, 0, "ChannelCorrupted.*capacity 0"),
    "an enormous capacity": (layout.CAPACITY, (1 << 64) - 1, "ChannelCorrupted.*damaged"),
    "another slot size": (layout.SLOT_SIZE, 1 << 20, "ChannelCorrupted.*slot_size 1048576"),
    "other participants": (layout.MAX_PARTICIPANTS, 1 << 40, "ChannelCorrupted.*participants"),
    "another total": (layout.TOTAL_SIZE, 4096, "ChannelCorrupted.*damaged"),
    "options that mean nothing": (layout.OPTIONS, (1 << 64) - 1, "ChannelCorrupted.*mean nothing"),
    "no magic": (layout.MAGIC, 0, "ChannelCorrupted.*it begins with"),
    "a bad nonce": (layout.NONCE, 0, "ChannelCorrupted.*nonce"),
}


@pytest.mark.parametrize("what", list(WORDS))
def test_a_header_that_does_not_agree_with_its_file_is_not_mapped(what: str, channel: Channel) -> None:
    word, value, says = WORDS[what]
    with patched(channel, word * 8, value.to_bytes(8, sys.byteorder)):
        output = attach_elsewhere(channel.name)
    assert re.search(says, output), output
    assert channel.name in output


@pytest.mark.parametrize("change", [-4096, -1, 1, 4096])
def test_a_file_of_another_size_is_not_mapped(change: int) -> None:
    with Channel(2, 64) as channel:
        path = path_of(channel.name)
        size = os.stat(path).st_size
        copy = Path(path_of("copy"))
        # a truncated live segment would end its users with SIGBUS: look at a copy, kept alive by the same lock bytes
        copy.write_bytes(Path(path).read_bytes()[: size + change] + bytes(max(0, change)))
        try:
            holder = script(HOLD, str(copy), str(layout.LOCK_ENTRIES), stdin=subprocess.PIPE)
            assert line_of(holder) == "locked"
            assert re.search(f"ChannelCorrupted.*damaged.*{size + change} bytes", attach_elsewhere("copy"))
            with pytest.raises(ringshm.ChannelExists):
                Channel(2, 64, name="copy")
            holder.communicate("")
        finally:
            copy.unlink()
        assert_works(channel)


HOLD = """
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, int(sys.argv[2]), 1, 0))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("what", "index"), [*((what, 0) for what in SEMAPHORES), ("no bytes", 6)])
def test_a_semaphore_that_is_none_is_not_opened(what: str, index: int, channel: Channel) -> None:
    make, says = SEMAPHORES[what]
    path = semaphores_of(channel)[index]
    aside = path.with_name(path.name + ".aside")
    path.rename(aside)
    try:
        make(path)
        output = attach_elsewhere(channel.name)
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        aside.rename(path)
    assert re.search(says, output), output


def test_what_was_damaged_and_mended_can_be_attached_to(channel: Channel) -> None:
    with patched(channel, layout.VERSION * 8, bytes(8)):
        assert attach_elsewhere(channel.name) != ""
    assert attach_elsewhere(channel.name) == ""


def test_all_files_are_for_this_user_alone(channel: Channel) -> None:
    paths = list(SHM.glob(f"*{channel._open().segment.nonce}*"))
    assert Path(path_of(channel.name)) in paths
    assert len(paths) == FILES - 1
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}


# --- objects


class Trouble(Exception):
    """What pickling or unpickling raises."""


class FailsToPickle:
    """Raises half-way."""

    def __reduce__(self) -> Any:
        raise Trouble("cannot be pickled")


def fail(text: str) -> Any:
    raise Trouble(text)


UNSENDABLE: list[tuple[Any, tuple[type[Exception], ...], str]] = [
    (lambda: 0, (pickle.PicklingError, AttributeError), "lambda"),
    ([1, FailsToPickle()], (Trouble,), "cannot be pickled"),
    ({"first": np.arange(100), "then": [b"x" * 70_000, FailsToPickle()]}, (Trouble,), "cannot be pickled"),
    (threading.Lock(), (TypeError,), "cannot pickle"),
    ((n for n in range(3)), (TypeError,), "cannot pickle"),
    (bytes(1025), (ringshm.PayloadTooLarge,), "slot holds 1024 bytes, message needs 1025"),
    (np.zeros(1025, np.uint8), (ringshm.PayloadTooLarge,), "slot holds 1024 bytes, message needs 1025"),
    ([bytes(2000)], (ringshm.PayloadTooLarge,), "slot holds 1024 bytes, message needs 20"),
    (10**5000, (ringshm.PayloadTooLarge,), "slot holds 1024 bytes"),
]


@pytest.mark.parametrize(("obj", "kinds", "says"), UNSENDABLE, ids=[says for _, _, says in UNSENDABLE])
@pytest.mark.parametrize("call", ["put", "put_nowait", "put_many"])
def test_what_cannot_be_sent_leaves_the_channel_as_it_was(
    obj: Any, kinds: tuple[type[Exception], ...], says: str, call: str
) -> None:
    with Channel(3, 1024, oversize="error") as channel:
        channel.put("before")
        for _ in range(channel.capacity + 1):
            with pytest.raises(kinds, match=says) as caught:
                channel.put_many(["not sent either", obj]) if call == "put_many" else getattr(channel, call)(obj)
        if isinstance(caught.value, ringshm.PayloadTooLarge):
            assert channel.name in str(caught.value)
            assert "larger slot_size" in str(caught.value)
        channel.put("after")
        assert channel.get_many(9, timeout=5) == ["before", "after"]


def test_a_message_of_exactly_the_slots_size_fits(channel: Channel) -> None:
    for message in (bytes(range(256)) * 4, bytearray(1024), np.arange(128)):
        channel.put(message)
        assert bytes(channel.get(timeout=5)) == bytes(message)


@may_fork
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_cannot_be_unpickled_at_the_other_end_says_so_there(method: str) -> None:
    with Channel(3, 1024) as channel, Crew(method) as crew:
        receiver = channel.receiver()
        child = crew.start(receive_two, receiver)
        receiver.close()
        channel.put([Unpickles(fail, "cannot be unpickled")])
        channel.put("next")
        assert child.result() == ("UndecodableMessage", "Trouble('cannot be unpickled')", "next")


def receive_two(receiver: ringshm.Receiver) -> tuple[str, str, Any]:
    try:
        receiver.get(timeout=30)
    except ringshm.UndecodableMessage as error:
        return type(error).__name__, repr(error.__cause__), receiver.get(timeout=30)
    finally:
        receiver.close()
    return "", "", None


def test_a_module_that_the_receiver_has_not_got_is_the_messages_fault(channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "only_there.py").write_text("class Thing:\n    pass\n")
    source = "import sys, ringshm\nsys.path.insert(0, sys.argv[2])\nimport only_there\n"
    source += "with ringshm.Channel.attach(sys.argv[1]) as c:\n c.put(only_there.Thing()); c.put('next')\n"
    finish(script(source, channel.name, str(tmp_path)))
    with pytest.raises(ringshm.UndecodableMessage, match="only_there") as caught:
        channel.get(timeout=30)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert channel.get(timeout=30) == "next"


# --- arguments of calls

BAD_TIMEOUTS: list[tuple[Any, type[Exception], str]] = [
    (-1, ValueError, "timeout=-1 must not be negative or NaN"),
    (-0.001, ValueError, "timeout=-0.001 must not be negative"),
    (math.nan, ValueError, "timeout=nan must not be negative or NaN"),
    (-math.inf, ValueError, "must not be negative"),
    ("1", TypeError, "timeout='1' must be seconds or None, not str"),
    (1j, TypeError, "must be seconds or None, not complex"),
    ([], TypeError, "must be seconds or None, not list"),
]
TIMED: dict[str, Callable[[Channel, Any], Any]] = {
    "put": lambda c, t: c.put(1, timeout=t),
    "put_many": lambda c, t: c.put_many([1], timeout=t),
    "get": lambda c, t: c.get(timeout=t),
    "get_many": lambda c, t: c.get_many(1, timeout=t),
    "flush": lambda c, t: c.flush(timeout=t),
    "wait_for_all_ack": lambda c, t: c.wait_for_all_ack(timeout=t),
    "wait_for_peers": lambda c, t: c.wait_for_peers(1, 1, timeout=t),
    "attach": lambda c, t: Channel.attach(c.name, timeout=t),
}


@pytest.mark.parametrize("call", list(TIMED))
@pytest.mark.parametrize(("timeout", "error", "says"), BAD_TIMEOUTS, ids=[repr(t) for t, _, _ in BAD_TIMEOUTS])
def test_a_bad_timeout_is_refused_before_anything_is_done(
    timeout: Any, error: type[Exception], says: str, call: str, channel: Channel
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        TIMED[call](channel, timeout)


@pytest.mark.parametrize("call", ["put", "get"])
def test_a_timeout_does_not_matter_where_nothing_waits(call: str, channel: Channel) -> None:
    """As with queue.Queue."""
    if call == "get":
        check_empty(channel.get, False, -1)
    else:
        channel.put(1, False, -1)
        assert channel.get() == 1


def test_infinite_and_numpy_timeouts_are_taken(channel: Channel) -> None:
    channel.put(1, timeout=math.inf)
    assert channel.get(timeout=np.float32(5)) == 1  # type: ignore[arg-type]
    check_empty(channel.get, timeout=np.float64(0.001))


NUMBERS = [
    (0, ValueError, "at least 1"), (-1, ValueError, "at least 1"), (1.0, TypeError, "float"), (None, TypeError, "None"),
]  # fmt: skip


@pytest.mark.parametrize(("limit", "error", "says"), NUMBERS)
def test_a_bad_number_of_messages_is_refused_by_name(
    limit: Any, error: type[Exception], says: str, channel: Channel
) -> None:
    channel.put("stays")
    with pytest.raises(error, match=f"max_messages.*{says}"):
        channel.get_many(limit)
    assert channel.get() == "stays"


def test_put_many_takes_what_can_be_iterated_over_and_no_more(channel: Channel) -> None:
    with pytest.raises(TypeError):
        channel.put_many(3)  # type: ignore[arg-type]

    def broken() -> Iterator[int]:
        yield 1
        raise Trouble("half-way")

    with pytest.raises(Trouble):
        channel.put_many(broken())
    assert channel.put_many([]) == 0
    assert channel.empty()


# --- after close

CALLS: dict[str, Callable[[Any], Any]] = {
    "put": lambda c: c.put(1), "put_nowait": lambda c: c.put_nowait(1), "put_many": lambda c: c.put_many([1]),
    "flush": lambda c: c.flush(), "wait_for_all_ack": lambda c: c.wait_for_all_ack(), "get": lambda c: c.get(),
    "get with a timeout": lambda c: c.get(timeout=0.01), "get_nowait": lambda c: c.get_nowait(),
    "get_many": lambda c: c.get_many(2), "iteration": lambda c: next(iter(c)), "qsize": lambda c: c.qsize(),
    "empty": lambda c: c.empty(), "full": lambda c: c.full(), "has_space": lambda c: c.has_space(),
    "stats": lambda c: c.stats(), "shutdown": lambda c: c.shutdown(), "sender": lambda c: c.sender(),
    "receiver": lambda c: c.receiver(), "wait_for_peers": lambda c: c.wait_for_peers(1),
    "with": lambda c: c.__enter__(), "pickling": pickle.dumps,
}  # fmt: skip


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("call", list(CALLS))
def test_every_call_after_close_says_that_the_handle_is_closed(call: str, used: bool) -> None:
    channel = Channel(2, 64, name="closed-one")
    if used:
        channel.put(1)
        assert channel.get() == 1
    channel.close()
    for _ in range(2):
        with pytest.raises(ringshm.ChannelClosed, match="handle on channel 'closed-one' is closed"):
            CALLS[call](channel)
    channel.close()  # no error
    assert channel.closed
    assert (channel.name, channel.capacity, channel.slot_size) == ("closed-one", 2, 64)
    assert "closed" in repr(channel)


def test_closing_one_handle_leaves_the_others_open() -> None:
    with Channel(3, 1024) as channel:
        sender, receiver = channel.sender(), channel.receiver()
        sender.put(1)
        sender.close()
        with pytest.raises(ringshm.ChannelClosed):
            sender.put(2)
        channel.put(2)
        assert receiver.get_many(3, timeout=5) == [1, 2]
        receiver.close()
        assert channel.empty()


ROLES = [
    ("sender", "get", "receiver"), ("sender", "get_nowait", "receiver"), ("sender", "get_many", "receiver"),
    ("receiver", "put", "sender"), ("receiver", "put_nowait", "sender"), ("receiver", "put_many", "sender"),
    ("receiver", "flush", "sender"),
]  # fmt: skip


@pytest.mark.parametrize(("role", "attribute", "other"), ROLES)
def test_the_other_roles_methods_are_not_there_and_the_error_says_where(
    role: str, attribute: str, other: str, channel: Channel
) -> None:
    with getattr(channel, role)() as handle:
        assert not hasattr(handle, attribute)
        with pytest.raises(AttributeError, match=rf"no attribute '{attribute}': .* channel\.{other}\(\)"):
            getattr(handle, attribute)
        with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
            _ = handle.nonsense


# --- errors

DERIVED: dict[type[Exception], type[Exception]] = {
    ringshm.ChannelClosed: ValueError, ringshm.EndOfChannel: EOFError, ringshm.BrokenChannel: BrokenPipeError,
    ringshm.PayloadTooLarge: ValueError, ringshm.SpecMismatch: ValueError, ringshm.ChannelCorrupted: OSError,
    ringshm.ChannelExists: FileExistsError, ringshm.ChannelNotFound: FileNotFoundError,
    ringshm.ChannelForbidden: PermissionError, ringshm.IncompatibleChannel: OSError,
    ringshm.ChannelUnavailable: OSError,
    ringshm.TooManyBorrows: RuntimeError, ringshm.TooManyParticipants: OSError,
    ringshm.InsufficientSharedMemory: OSError, ringshm.UndecodableMessage: Exception,
    ringshm.ReentrantCall: RuntimeError, ringshm.InterruptedCall: RuntimeError, ringshm.ChannelDeadlock: RuntimeError,
}  # fmt: skip


def test_every_error_derives_from_what_callers_already_catch() -> None:
    for error, builtin in DERIVED.items():
        assert issubclass(error, ringshm.RingshmError)
        assert issubclass(error, builtin)
        assert error.__doc__
    assert {*DERIVED, ringshm.RingshmError} == {
        error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, Exception)
    }
    assert all(getattr(ringshm, error.__name__) is error for error in DERIVED)


@pytest.mark.parametrize("error", list(DERIVED), ids=lambda error: error.__name__)
def test_errors_pass_between_processes(error: type[Exception]) -> None:
    arguments: tuple[Any, ...] = ("a message",)
    if issubclass(error, OSError) and error is not ringshm.InsufficientSharedMemory:
        arguments = (errno.EIO, "a message")
    original = error(*arguments)
    arrived = pickle.loads(pickle.dumps(original))
    assert type(arrived) is error
    assert str(arrived) == str(original)
    assert getattr(arrived, "errno", None) == getattr(original, "errno", None)


def test_a_codec_that_the_channel_was_not_made_with_is_refused(channel: Channel) -> None:
    with pytest.raises(ringshm.IncompatibleChannel, match="built-in codec 'pickle', 'mine' was given: pass the same"):
        Channel.attach(channel.name, codec=BadName("mine"))
    with pytest.raises(TypeError, match="must be 'pickle', 'plain' or an object"):
        Channel.attach(channel.name, codec=NoCodec())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a/b", "x" * 201, None, 3], ids=repr)
def test_a_name_that_no_channel_can_have_is_refused_by_attach(name: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="name"):
        Channel.attach(name)

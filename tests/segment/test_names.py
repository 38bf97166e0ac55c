"""Names in /dev/shm: whole when they appear, gone with their channel however it ends, never in the way of the next."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.rooms import may_mount
from support.workers import METHODS, Crew, finish, fork_off, may_fork, ringshm_files, script, started, until
from support.workers import exit_code as exit_code_of

from ringshm import Channel, ChannelExists, ChannelNotFound, TooManyParticipants
from ringshm.process.registry import attach

pytestmark = may_fork

CREATE = "import os, signal, sys, threading, ringshm\nchannel = ringshm.Channel(1, 64, name=sys.argv[1])\n"
TERMINATED = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))\nos.kill(os.getpid(), signal.SIGTERM)"
INTERRUPTED_LATER = "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()"
ENDINGS = {
    "close": ("channel.close(); print(os.listdir('/dev/shm')); os._exit(0)", 0),
    "normal exit": ("", 0),
    "exception": ("raise RuntimeError('as a user would see it')", 1),
    "exception of a call": ("channel.put(threading.Lock())", 1),
    "sys.exit": ("sys.exit(3)", 3),
    "SIGTERM with a handler": (TERMINATED + "\nchannel.get()", 4),
    "Ctrl-C while it waits": (INTERRUPTED_LATER + "\nchannel.get()", -signal.SIGINT),
    "exit while a thread waits": ("threading.Thread(target=channel.get, daemon=True).start()", 0),
    "exit with a child that never attached": ("import pickle; pickle.dumps(channel)", 0),
}


def _named(name: str) -> set[str]:
    """What there is for a channel of that name; all but the segment itself bear its nonce only."""
    return {file for file in ringshm_files() if name in file}


@pytest.mark.parametrize("ending", ENDINGS)
def test_names_go_with_their_creator(ending: str, name: str) -> None:
    source, status = ENDINGS[ending]
    before = ringshm_files()
    process = script(CREATE + source, name, stderr=subprocess.DEVNULL)
    output, _ = process.communicate()
    assert process.returncode == status
    assert name not in output
    assert ringshm_files() == before


def _create_and_end(name: str, how: str) -> None:
    channel = Channel(1, 64, name=name)
    globals()["kept"] = channel
    if how == "exception":
        raise RuntimeError("as a user would see it")
    if how == "sys.exit":
        sys.exit(3)
    if how == "SIGTERM with a handler":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
        os.kill(os.getpid(), signal.SIGTERM)
        channel.get()


@pytest.mark.parametrize("how", ["return", "exception", "sys.exit", "SIGTERM with a handler"])
@pytest.mark.parametrize("method", METHODS)
def test_names_go_with_a_creator_that_is_a_child(method: str, how: str, name: str) -> None:
    before = ringshm_files()
    with Crew(method) as crew:
        child = crew.start(_create_and_end, name, how)
        child.process.join()
        assert child.process.exitcode == {"return": 0, "exception": 0, "sys.exit": 3}.get(how, 4)
    assert ringshm_files() == before


def test_names_go_with_a_creator_that_was_forked_by_hand(name: str) -> None:
    before = ringshm_files()
    assert exit_code_of(fork_off(lambda: _create_and_end(name, "return"))) == 0
    assert ringshm_files() == before


def test_a_creators_close_removes_the_names_and_leaves_those_attached_alone(name: str) -> None:
    with Channel(1, 64, name=name) as channel, Channel.attach(name) as attached, Crew("fork") as crew:
        child = crew.start(attached.get)
        until(lambda: channel.stats().waiting_receivers)
        channel.close()
        assert not _named(name)
        with pytest.raises(ChannelNotFound):
            Channel.attach(name)
        attached.put("still here")
        assert child.result() == "still here"


def test_a_dropped_handle_is_a_closed_one(name: str) -> None:
    channel = Channel(1, 64, name=name)
    assert _named(name)
    del channel
    gc.collect()
    assert not _named(name)


# --- creators that could not clean up


def _corpse(name: str, number: int = signal.SIGKILL) -> None:
    """Have a process make a channel of that name and be killed."""
    process = script(
        CREATE + "channel.put('left behind')\nos.kill(os.getpid(), int(sys.argv[2]))", name, str(int(number))
    )
    process.communicate()
    assert process.returncode == -number


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_last_participant_to_leave_removes_a_killed_creators_names(number: int, name: str) -> None:
    before = ringshm_files()
    process = started(CREATE + "print(flush=True)\nchannel.get()", name)
    with Channel.attach(name) as first, Channel.attach(name) as second:
        process.send_signal(number)
        process.communicate()
        first.close()
        assert _named(name)
        assert second.empty()
        with Channel.attach(name) as third:
            assert third.empty()
    assert ringshm_files() == before


@pytest.mark.parametrize("what", ["nothing", "messages that nobody comes for", "messages"])
def test_the_last_to_leave_leaves_the_names_to_an_heir_of_what_waits(what: str, name: str) -> None:
    def child() -> None:
        with Channel(2, 64, name=name) as channel:
            attachment = channel._open()
            attachment.owns_names = False
            attachment.participants.heir = lambda: what == "messages"
            if what != "nothing":
                channel.put("x")

    before = ringshm_files()
    assert exit_code_of(fork_off(child)) == 0
    assert bool(_named(name)) == (what == "messages")
    if what == "messages":
        attachment = attach(name, even_if_dead=True)
        assert attachment.ring.ready() == 1
        del attachment
    assert ringshm_files() == before


def test_the_last_of_several_processes_to_leave_removes_the_names(name: str) -> None:
    before = ringshm_files()
    process = started(CREATE + "print(flush=True)\nchannel.get()", name)
    stay = "import sys, ringshm\nchannel = ringshm.Channel.attach(sys.argv[1])\nprint(flush=True)\nsys.stdin.read()"
    staying = [started(stay, name, stdin=subprocess.PIPE) for _ in range(2)]
    process.kill()
    process.communicate()
    finish(staying[0])
    assert _named(name)
    finish(staying[1])
    assert ringshm_files() == before


def test_a_child_that_was_started_with_another_channel_removes_a_killed_creators_names(name: str) -> None:
    before = ringshm_files()
    text = """
import multiprocessing, os, signal, sys, time, ringshm
def wait(own, parent):
    while os.getppid() == parent:
        time.sleep(0.01)
with ringshm.Channel(2, 64, name=sys.argv[1]), ringshm.Channel(2, 64) as own:
    multiprocessing.get_context("fork").Process(target=wait, args=(own, os.getpid())).start()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = script(text, name)
    process.communicate()  # ends when the child has let go of the pipe
    assert process.returncode == -signal.SIGKILL
    assert not _named(name)
    assert ringshm_files() == before


LAST = {
    "normal exit": "",
    "exception of a call": "channel.put(threading.Lock())",
    "exit while a thread waits": "threading.Thread(target=channel.get, daemon=True).start()\ntime.sleep(0.1)",
}


@pytest.mark.parametrize("ending", LAST)
def test_the_last_participant_removes_the_names_however_it_ends(ending: str, name: str) -> None:
    before = ringshm_files()
    process = started(CREATE + "print(flush=True)\nchannel.get()", name)
    stay = "import sys, threading, time, ringshm\nchannel = ringshm.Channel.attach(sys.argv[1])\nprint(flush=True)\n"
    last = started(stay + "sys.stdin.read()\n" + LAST[ending], name, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.kill()
    process.communicate()
    last.communicate()
    assert ringshm_files() == before


def test_a_corpse_is_not_found_and_its_name_is_reclaimed(name: str) -> None:
    before = ringshm_files()
    _corpse(name)
    assert len(ringshm_files() - before) == 10
    with pytest.raises(ChannelNotFound, match="died"):
        Channel.attach(name)
    with Channel(1, 64, name=name) as channel:
        assert len(ringshm_files() - before) == 10
        assert channel.empty()
    assert ringshm_files() == before


def test_a_live_name_is_taken(name: str) -> None:
    with Channel(1, 64, name=name) as channel:
        channel.put("unharmed")
        with pytest.raises(ChannelExists, match=name):
            Channel(1, 64, name=name)
        with Crew("spawn") as crew:
            assert crew.start(_try_to_create, name).result() is False
        assert Channel.attach(name).get() == "unharmed"


def test_a_stopped_creator_lives(name: str) -> None:
    process = started(CREATE + "print(flush=True)\nos.kill(os.getpid(), signal.SIGSTOP)\nprint(channel.get())", name)
    os.waitpid(process.pid, os.WUNTRACED)
    with pytest.raises(ChannelExists):
        Channel(1, 64, name=name)
    with Channel.attach(name) as channel:
        channel.put("on you go")
        process.send_signal(signal.SIGCONT)
        assert finish(process).split() == ["on", "you", "go"]


def _try_to_create(name: str) -> bool:
    try:
        Channel(1, 64, name=name).close()
    except ChannelExists:
        return False
    return True


def _race(name: str, rounds: int, barrier: Any) -> list[bool]:
    won = []
    for k in range(rounds):
        barrier.wait()
        try:
            channel = Channel(1, 64, name=f"{name}-{k}")
        except ChannelExists:
            won.append(False)
            barrier.wait()
            continue
        won.append(True)
        barrier.wait()
        channel.close()
    return won


@pytest.mark.parametrize("left", ["nothing", "a corpse"])
def test_of_those_who_race_to_create_a_name_exactly_one_wins(left: str, name: str) -> None:
    rounds = 50 if left == "nothing" else 5
    if left == "a corpse":
        for k in range(rounds):
            _corpse(f"{name}-{k}")
    before = {file for file in ringshm_files() if name not in file}
    with Crew("fork") as crew:
        barrier = crew.context.Barrier(4)
        for _ in range(4):
            crew.start(_race, name, rounds, barrier)
        results = crew.results()
    assert [sum(won) for won in zip(*results, strict=True)] == [1] * rounds
    if left == "nothing":
        assert ringshm_files() == before
    assert not _named(name)


def _attach_again_and_again(name: str, until_gone: Any) -> int:
    found = 0
    while not until_gone.is_set():
        try:
            with Channel.attach(name) as channel:
                assert (channel.capacity, channel.slot_size) == (3, 77)
                found += 1
        except ChannelNotFound:
            pass
    return found


def test_a_name_appears_whole_and_goes_whole(name: str) -> None:
    before = ringshm_files()
    with Crew("fork") as crew:
        gone = crew.context.Event()
        attaching = [crew.start(_attach_again_and_again, name, gone) for _ in range(2)]
        found = 0
        while found < 100:
            with Channel(3, 77, name=name) as channel:
                until(lambda channel=channel: len(channel.stats().participants) > 1)
                found += 1
        gone.set()
        assert all(member.result() for member in attaching)
    assert ringshm_files() == before


def test_a_handle_whose_channel_has_gone_says_so_when_used(name: str) -> None:
    pickled = finish(script(CREATE + "import pickle\nprint(pickle.dumps(channel).hex())", name))
    handle = pickle.loads(bytes.fromhex(pickled))
    for call in (handle.get, handle.qsize, lambda: handle.put(1), handle.sender):
        with pytest.raises(ChannelNotFound, match=name):
            call()
    assert name in repr(handle)
    assert (handle.closed, handle.capacity, handle.slot_size) == (True, 1, 64)
    handle.close()


# --- participants


def _hold(name: str, attached: Any, leave: Any) -> str:
    try:
        with Channel.attach(name):
            attached.set()
            leave.wait()
            return "attached"
    except TooManyParticipants as error:
        return str(error)


def test_too_many_participants_are_refused_and_the_deads_entries_used_again(name: str) -> None:
    with Channel(1, 64, name=name, max_participants=2) as channel, Crew("spawn") as crew:
        attached, never = crew.context.Event(), crew.context.Event()
        first = crew.start(_hold, name, attached, never)
        attached.wait()
        assert "max_participants=2" in crew.start(_hold, name, crew.context.Event(), never).result()
        first.kill()
        attached, leave = crew.context.Event(), crew.context.Event()
        third = crew.start(_hold, name, attached, leave)
        attached.wait()
        assert channel.stats().reaped == 1
        assert {person.pid for person in channel.stats().participants} == {os.getpid(), third.pid}
        leave.set()
        assert third.result() == "attached"


def test_a_forked_child_beyond_the_limit_is_refused_when_it_calls() -> None:
    with Channel(1, 64, max_participants=1) as channel, Crew("fork") as crew:
        assert crew.start(_refused, channel).result() is TooManyParticipants
        channel.put("the parent goes on")
        assert channel.get() == "the parent goes on"


def _refused(channel: Channel) -> type[Exception] | None:
    try:
        channel.put("more")
    except Exception as error:
        return type(error)
    return None


def test_entries_are_used_again_for_ever(name: str) -> None:
    with Channel(4, 64, name=name, max_participants=3) as channel:
        for k in range(20):
            killed = k % 2

            def child(k: int = k, killed: int = killed) -> None:
                with Channel.attach(name) as own:
                    own.put(k)
                    if killed:
                        os.kill(os.getpid(), signal.SIGKILL)

            assert exit_code_of(fork_off(child)) == (-signal.SIGKILL if killed else 0)
            assert channel.get() == k
        assert len(channel.stats().participants) <= 3


# --- too little shared memory

CHANNEL_SIZE = """
import errno, os, signal, sys, ringshm
from ringshm.segment.layout import Layout
files = lambda: sorted(os.listdir("/dev/shm"))
def free():
    space = os.statvfs("/dev/shm")
    return space.f_bavail * space.f_frsize
def size(slot_size): return Layout(4, slot_size, 256).total_size
semaphores = 9 * 4096  # a page each
"""
AROUND_THE_LIMIT = """
slot_size = 4096
while size(slot_size + 4096) + semaphores <= free():
    slot_size += 4096
for slot_size, fits in [(slot_size - 4096, 1), (slot_size, 1), (slot_size + 1, 0), (slot_size + 4096, 0)]:
    before = free()
    try:
        with ringshm.Channel(4, slot_size) as channel:
            channel.put(bytes(slot_size))
            assert len(channel.get()) == slot_size
        made = 1
    except ringshm.InsufficientSharedMemory as error:
        assert error.errno == errno.ENOSPC
        assert all(text in str(error) for text in (str(size(slot_size)), str(before), "--shm-size", "remount"))
        made = 0
    assert made == fits, (slot_size, free())
    assert (files(), free()) == ([], before)
"""
FILLED_LATER = """
channel = ringshm.Channel(4, 65536, name="full", prefault=bool(int(sys.argv[1])))
with open("/dev/shm/filler", "wb", buffering=0) as filler:
    try:
        while filler.write(bytes(4096)):
            pass
    except OSError as error:
        assert error.errno == errno.ENOSPC
assert free() == 0

def use(channel):
    for _ in range(2):
        for k in range(4):
            channel.put_nowait(bytes([k]) * 65536)
        assert [channel.get_nowait()[:1] for _ in range(4)] == [bytes([k]) for k in range(4)]
    assert channel.stats().free == 4

use(channel)
for attach in (lambda: channel, lambda: ringshm.Channel.attach("full")):
    pid = os.fork()
    if not pid:
        use(attach())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
use(channel)
channel.close()
assert files() == ["filler"]
"""
FEW_FILES = """
before = files(), free()
made = 0
for k in range(20):
    left = os.statvfs("/dev/shm").f_ffree
    try:
        ringshm.Channel(1, 2_000_000).close()
        made += 1
    except ringshm.InsufficientSharedMemory as error:
        assert error.errno == errno.ENOSPC
        assert "files" in str(error) and "nr_inodes" in str(error), error
    assert (files(), os.statvfs("/dev/shm").f_ffree) == (before[0], left)
    try:
        open(f"/dev/shm/{k}", "w").close()
    except OSError as error:
        assert error.errno == errno.ENOSPC
    before = files(), free()
assert 0 < made < 20
"""


def _with_shared_memory_of(options: str, source: str, *argv: str) -> None:
    """Run a script that sees a /dev/shm of its own."""
    mount = f'mount -t tmpfs -o {options} ringshm-test /dev/shm && exec "$@"'
    for user in ([], ["--map-root-user"]):
        command = ["unshare", "-m", *user, "sh", "-c", mount, "sh"]
        if subprocess.run([*command, "true"], stderr=subprocess.DEVNULL).returncode == 0:
            break
    else:
        pytest.skip("no permission to mount a file system in a namespace of one's own")
    start = "import os, sys\nos.execvp(sys.argv[2], sys.argv[2:])"
    inner = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", CHANNEL_SIZE + source, *argv]
    finish(script(start, "--", *command, *inner))


def test_channels_of_sizes_around_the_limit_fit_or_are_refused_whole() -> None:
    _with_shared_memory_of("size=3m", AROUND_THE_LIMIT)


@pytest.mark.parametrize("prefault", [True, False])
def test_what_fills_shared_memory_later_takes_nothing_from_a_channel(prefault: bool) -> None:
    _with_shared_memory_of("size=3m", FILLED_LATER, str(int(prefault)))


def test_too_few_files_are_told_from_too_little_memory() -> None:
    _with_shared_memory_of("size=3m,nr_inodes=20", FEW_FILES)


# --- what a handle says that does not find its channel

UNPICKLE = """
import ctypes, pickle, sys, ringshm
if sys.argv[2] == "another /dev/shm":
    libc = ctypes.CDLL(None)
    assert libc.unshare(0x20000) == 0 and libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None) == 0
    assert libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, None) == 0
handle = pickle.loads(bytes.fromhex(sys.argv[1]))
calls = lambda: handle.put(1), lambda: handle.get(), handle.stats, handle.sender, lambda: pickle.dumps(handle)
for call in calls:
    try:
        call()
    except ringshm.ChannelNotFound as error:
        print(error.strerror)
if sys.argv[2] != "closed":
    print(pickle.dumps(handle).hex())
"""
NOT_THERE = {
    "closed": "has gone: its maker closed it",
    "another machine": "was made on another machine",
    "another /dev/shm": "was made in another /dev/shm",
}


@pytest.mark.parametrize("why", NOT_THERE)
def test_a_handle_that_does_not_find_its_channel_says_why(why: str) -> None:
    if why == "another /dev/shm" and not may_mount():
        pytest.skip("this process may not mount file systems for itself")
    with Channel(4, 64) as channel:
        pickled = pickle.dumps(channel)
        if why == "another machine":
            boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
            assert boot in pickled
            pickled = pickled.replace(boot, b"0" * len(boot))
        if why != "another /dev/shm":
            channel.close()
        told = finish(script(UNPICKLE, pickled.hex(), why)).splitlines()
        assert len(told) == 5
        passed_on = None if why == "closed" else bytes.fromhex(told.pop())
        assert all(line.startswith(f"channel {channel.name!r} {NOT_THERE[why]}") for line in told)
        assert passed_on is None or "use ringshm.ray" in told[0]
        if why == "another /dev/shm":  # it is back where it belongs
            with pickle.loads(passed_on) as back:
                back.put("by another way")
            assert channel.get() == "by another way"

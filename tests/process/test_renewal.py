"""What a process has of a channel is its own: a forked child renews it, or is told why it cannot. So is a process whose
descriptors other code has closed, or that has dropped its privileges.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.rooms import may_mount
from support.workers import finish, may_fork, ringshm_files, script

pytestmark = may_fork

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
mounting = pytest.mark.skipif(not may_mount(), reason="this process may not mount file systems for itself")

#: A channel that a forked child cannot renew, and another that it can; `spoil` is what comes before the fork.
PREPARE = """
import ctypes, fcntl, os, resource, signal, sys, time
import ringshm
from ringshm.segment.files import path_of
from support import seams
from support.checks import check_whole, reap

libc = ctypes.CDLL(None)

def lose_proc():
    assert libc.unshare(0x20000) == 0 and libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None) == 0
    assert libc.umount2(b"/proc", 2) == 0

table = None

def lock_table(name):
    global table
    table = file = open(path_of(name), "r+b")
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, __import__("struct").pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0))

def leave_one_descriptor():  # the child closes its copies of the locks, and opens its own from the lowest number on
    below = seams.lock_descriptor(tasks) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (below, below))
"""

FORK = """
for n in range(4):
    tasks.put(n)
pid = os.fork()
if not pid:
    try:
        if table is None:  # else the call would wait for it for ten seconds
            lost.put("never")
    except ringshm.RingshmError as error:
        assert lost.name in str(error)
        print(type(error).__name__, type(error.__cause__).__name__, flush=True)
    with tasks.borrow(timeout=3) as task:
        assert task.value == 0
        os.kill(os.getpid(), signal.SIGKILL)
assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
reap(tasks, 1)
assert tasks.stats().redelivered == 1
check_whole(tasks, 0, 1, 2, 3)
"""

MAKE = "ringshm.Channel(4, 64, keep_open=True)"
REASONS = {
    "privileges were dropped": (
        f"lost = {MAKE}; os.setgid(65534); os.setuid(65534); tasks = {MAKE}",
        "ChannelUnavailable PermissionError",
    ),
    "no /proc, and no name": (
        f"first = {MAKE}; lost = ringshm.Channel.attach(first.name); first.close(); tasks = {MAKE}; lose_proc()",
        "ChannelUnavailable FileNotFoundError",
    ),
    "no descriptor is left": (f"tasks = {MAKE}; lost = {MAKE}; leave_one_descriptor()", "ChannelUnavailable OSError"),
    "no entry is left": (
        f"lost = ringshm.Channel(4, 64, keep_open=True, max_participants=1); tasks = {MAKE}",
        "TooManyParticipants NoneType",
    ),
    "a stopped process has the table": (
        f"lost = {MAKE}; tasks = {MAKE}; lock_table(lost.name)",
        "",
    ),
}
NEED = {"privileges were dropped": [as_root], "no /proc, and no name": [mounting]}


@pytest.mark.parametrize("reason", [pytest.param(one, marks=NEED.get(one, [])) for one in REASONS])
def test_a_child_that_cannot_renew_a_channel_is_told_and_acts_for_itself_on_the_others(reason: str) -> None:
    prepare, expected = REASONS[reason]
    process = script(PREPARE + prepare + FORK + "table = None; check_whole(lost)")
    assert finish(process).split("\n")[0] == expected
    _clean()


def _clean() -> None:
    """Remove what a process has left that was not allowed to remove it."""
    subprocess.run([sys.executable, "-m", "ringshm", "clean"], check=True, capture_output=True)


@mounting
def test_a_child_without_proc_opens_a_channel_by_its_name() -> None:
    source = f"lost = {MAKE}; tasks = {MAKE}; lose_proc()" + FORK + "check_whole(lost, 'never')"
    assert finish(script(PREPARE + source)) == ""


def test_a_child_that_could_not_renew_a_channel_can_once_the_limit_is_raised() -> None:
    source = f"""
channel = {MAKE}
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
pid = os.fork()
if not pid:
    try:
        channel.put("too early")
    except ringshm.ChannelUnavailable as error:
        print(error.errno, "RLIMIT_NOFILE" in str(error), flush=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    channel.put("in time")
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
reap(channel, 1)
check_whole(channel, "in time")
"""
    assert finish(script(PREPARE + source)) == "24 True\n"


def test_a_child_forked_amid_a_call_does_not_go_on_with_it_as_its_parent() -> None:
    source = f"""
class Forks:
    def __reduce__(self):
        global pid
        pid = os.fork()
        return str, ("once",)

channel = {MAKE}
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 4096))
try:
    channel.put(Forks())
except ringshm.ChannelUnavailable as error:
    assert not pid, "the child's"
    print("the child's", flush=True)
    os._exit(0)
assert pid and os.waitpid(pid, 0)[1] == 0
check_whole(channel, "once")
"""
    assert finish(script(PREPARE + source)) == "the child's\n"


# --- other code closes the descriptors

CLOSE = """
import gc, mmap, threading, warnings
from support.workers import until

flags = mmap.mmap(-1, 4)  # shared with children, without a descriptor
files = []

def close_all():
    os.closerange(3, 256)

def use_numbers_again():
    file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    files.append(file)
    while file < 60:
        file = os.dup(file)
        files.append(file)

def told(function, *args):
    try:
        function(*args)
    except ringshm.ChannelUnavailable as error:
        assert error.errno == 9 and "closerange" in str(error)
        return True
    return False

def check_files():
    gc.collect()
    assert all(os.path.samestat(os.fstat(file), os.stat(sys.argv[1])) for file in files), "closed another's file"
    assert os.path.getsize(sys.argv[1]) == 0, "wrote into another's file"
"""


def _closed(source: str, *argv: str) -> str:
    return finish(script(PREPARE + CLOSE + source, *argv))


def test_a_process_whose_descriptors_are_closed_is_told_and_its_message_comes_again() -> None:
    source = """
tasks = ringshm.Channel(4, 64, keep_open=True)
tasks.put("task")
pid = os.fork()
if not pid:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tasks.borrow() as task:
            close_all()
            flags[0] = 1
            until(lambda: flags[1])
    assert ["went to others" in str(warning.message) for warning in caught] == [True]
    assert told(tasks.put, "more") and told(tasks.get) and told(tasks.stats) and told(tasks.sender)
    os._exit(7)
until(lambda: flags[0])
with tasks.borrow(timeout=10) as task:
    assert (task.value, task.delivery_count) == ("task", 2)
flags[1] = 1
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert tasks.stats().reaped == 1
check_whole(tasks)
"""
    assert _closed(source) == ""


def test_a_get_that_is_reaped_while_it_decodes_is_told() -> None:
    source = """
class Slow:
    def __reduce__(self):
        return slow, ()

def slow():
    if os.getpid() != parent:
        close_all()
        flags[0] = 1
        until(lambda: flags[1])
    return "slow"

parent = os.getpid()
tasks = ringshm.Channel(4, 64, keep_open=True)
tasks.put(Slow())
pid = os.fork()
if not pid:
    assert told(tasks.get)
    os._exit(7)
until(lambda: flags[0])
assert tasks.get(timeout=10) == "slow"
flags[1] = 1
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
check_whole(tasks)
"""
    assert _closed(source) == ""


def test_nothing_is_believed_written_or_closed_through_a_number_that_is_another_files(tmp_path: Path) -> None:
    source = """
tasks = ringshm.Channel(4, 64, keep_open=True)
watched = tasks.fileno()
pid = os.fork()
if not pid:
    tasks.fileno()
    tasks.put("first")  # opens the parent's FIFO to wake it
    seams.warm_up(tasks, sends=True)  # it does not look for a while
    close_all()
    use_numbers_again()
    tasks.put("second")
    tasks.get(), tasks.get()
    tasks.put("third")
    tasks._look_at = 0.0
    until(lambda: told(tasks.put, "fourth"))
    tasks.close()
    del tasks
    check_files()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert tasks.get(timeout=10) == "third"
assert all(tasks.get() == "fourth" for _ in range(tasks.qsize()))
reap(tasks, 1)
assert tasks.stats().reaped == 1, "it took the living for dead"
check_whole(tasks)
"""
    assert _closed(source, str(tmp_path / "file")) == ""


def test_a_process_may_attach_again_and_what_it_had_before_does_not_close_that() -> None:
    source = """
tasks = ringshm.Channel(4, 64, keep_open=True)
pid = os.fork()
if not pid:
    os.closerange(3, 256)
    again = ringshm.Channel.attach(tasks.name)
    again.put("first")
    assert told(tasks.put, "never")
    tasks.close()
    del tasks
    gc.collect()
    seams.look(again)
    again.put("second")
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
reap(tasks, 2)
check_whole(tasks, "first", "second")
"""
    assert _closed(source) == ""


def test_a_child_of_a_process_whose_descriptors_are_closed_opens_its_own() -> None:
    source = """
tasks = ringshm.Channel(4, 64, keep_open=True)
pid = os.fork()
if not pid:
    close_all()
    if not os.fork():
        tasks.put("grandchild's")
        os._exit(0)
    assert os.wait()[1] == 0
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
reap(tasks, 2)
check_whole(tasks, "grandchild's")
"""
    assert _closed(source) == ""


@pytest.mark.parametrize("wait", ["get", "wait", "aget", "put", "Latest.read"])
def test_a_call_that_waits_while_descriptors_are_closed_is_told(wait: str) -> None:
    source = f"""
import asyncio
calls = {{
    "get": lambda: channel.get(),
    "wait": lambda: ringshm.wait([channel]),
    "aget": lambda: asyncio.run(channel.aget()),
    "put": lambda: [channel.put(n) for n in range(5)],
    "Latest.read": lambda: latest.read(),
}}
channel, latest = {MAKE}, ringshm.Latest(64)
waited_on = latest if sys.argv[1] == "Latest.read" else channel
def close_when_it_waits():
    until(lambda: any(person.waiting_for for person in waited_on.stats().participants))
    os.close(seams.lock_descriptor(waited_on))
thread = threading.Thread(target=close_when_it_waits)
thread.start()
assert told(calls[sys.argv[1]])
thread.join()
"""
    assert _closed(source, wait) == ""


def test_a_creator_whose_descriptors_are_closed_still_removes_the_names(name: str) -> None:
    for end in ("channel.close()", ""):
        source = f"channel = ringshm.Channel(4, 64, name=sys.argv[1])\nother = {MAKE}\nclose_all()\n"
        assert _closed(source + end, name) == ""
        assert not any(name in file for file in ringshm_files())


# --- privileges are dropped


@as_root
def test_a_process_that_dropped_its_privileges_goes_on_and_is_told_once_that_the_names_stay(name: str) -> None:
    source = """
import asyncio
warnings.simplefilter("always")  # and not as errors
channel = ringshm.Channel(4, 64, name=sys.argv[1], keep_open=True)
answers = ringshm.Channel(4, 64)
worker = os.fork()
if not worker:
    while (message := channel.get()) != "stop":
        answers.put(message + 1)
    os._exit(0)
answers.fileno()  # makes a FIFO
channel.put(1)
os.setgid(65534), os.setuid(65534)
forked_later = os.fork()
if not forked_later:
    try:
        channel.put("never")
    except ringshm.ChannelUnavailable as error:
        assert isinstance(error.__cause__, PermissionError) and "65534" in str(error)
        raise SystemExit(7)  # and no word out of a finaliser
assert os.waitstatus_to_exitcode(os.waitpid(forked_later, 0)[1]) == 7
assert answers.get(timeout=10) == 2
channel.put(2)
assert asyncio.run(answers.aget(timeout=10)) == 3
channel.put("stop")
assert os.waitpid(worker, 0)[1] == 0
reap(channel, 1)
with warnings.catch_warnings(record=True) as caught:
    channel.close()
    channel.close()
    del channel
    gc.collect()
    answers.close()
assert ["`ringshm clean` as user 0" in str(warning.message) for warning in caught] == [True, True]
assert sys.argv[1] in str(caught[0].message)
"""
    process = script(PREPARE + CLOSE + source, name, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    assert (process.returncode, output, errors) == (0, "", "")
    assert any(name in file for file in ringshm_files())
    _clean()
    assert not ringshm_files()


@as_root
@pytest.mark.parametrize("end", ["", "del channel", "channel.close()", "with channel: pass"])
def test_a_process_that_dropped_its_privileges_ends_without_a_traceback(end: str) -> None:
    source = f"import os, ringshm\nchannel = {MAKE}\nchannel.fileno()\nos.setgid(65534), os.setuid(65534)\n{end}"
    process = script("import warnings; warnings.simplefilter('always')\n" + source, stderr=subprocess.PIPE)
    _, errors = process.communicate()
    assert process.returncode == 0
    assert errors.count("RuntimeWarning") == errors.count("ringshm clean") == 1
    assert "Traceback" not in errors
    _clean()


def test_a_process_that_was_reaped_changes_nothing_of_the_one_that_has_its_entry_now() -> None:
    source = """
tasks, latest = ringshm.Channel(4, 64, keep_open=True), ringshm.Latest(64)
latest.publish(b"1" * 64)
first = os.fork()
if not first:
    sender = tasks.sender()
    tasks.put("first")
    borrow, pinned = tasks.borrow(), latest.borrow()
    borrow.__enter__(), pinned.__enter__()
    close_all()
    flags[0] = 1
    until(lambda: flags[1])
    warnings.simplefilter("ignore")
    borrow.__exit__(None, None, None)
    sender.close(), tasks.close(), latest.close()
    del sender, tasks, latest, borrow, pinned
    gc.collect()
    os._exit(7)
until(lambda: flags[0])
reap(tasks, 1)
until(lambda: latest.wait_for_peers(senders=99, timeout=0.01) or latest.stats().reaped)
second = os.fork()
if not second:
    sender = tasks.sender()
    with tasks.borrow() as task, latest.borrow() as value:
        flags[2] = 1
        until(lambda: flags[3])
        assert value.value == b"1" * 64, "overwritten under its reader"
    assert task.delivery_count == 2
    os._exit(7)
until(lambda: flags[2])
before = [(one.pid, one.senders, one.receivers) for one in tasks.stats().participants]
flags[1] = 1
assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 7
assert [(one.pid, one.senders, one.receivers) for one in tasks.stats().participants] == before
assert [slot.state for slot in tasks.stats().slots] == ["reading"]
for n in range(9):
    latest.publish(b"%d" % n * 64)
flags[3] = 1
assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == 7
reap(tasks, 1)
check_whole(tasks)
"""
    assert _closed(source) == ""


FORK_AMID_A_CALL = """
import os, sys
import ringshm
from ringshm.ring.acceleration import compiled
from support.checks import check_whole

class Forks:
    def __reduce__(self):
        return fork, (sys.argv[2] == "fails",)

pid = None

def fork(fails):
    global pid
    if pid is None:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)  # the child's call ends first
    if fails and not pid:
        raise ValueError("only in the child")
    return "whole"

def borrowed(channel):
    with channel.borrow() as borrow:
        return borrow.value

call = {"get": lambda: channel.get(), "get_many": lambda: channel.get_many(2), "borrow": lambda: borrowed(channel)}
compiled and compiled.pause(sys.argv[3] == "pure")
with ringshm.Channel(3, 4096) as channel:
    channel.put(0)
    channel.get()
    channel.put_many([Forks(), "next"] if sys.argv[1] == "get_many" else [Forks()])
    try:
        got = call[sys.argv[1]]()
    except Exception as error:
        print(type(error).__name__, flush=True)
    else:
        print(got, flush=True)
    if not pid:
        os._exit(0)
    check_whole(channel)
"""


@pytest.mark.parametrize("side", ["compiled", "pure"])
@pytest.mark.parametrize("child", ["returns", "fails"])
@pytest.mark.parametrize("call", ["get", "get_many", "borrow"])
def test_a_child_that_is_forked_while_a_message_is_unpickled_leaves_it_to_its_parent(
    call: str, child: str, side: str
) -> None:
    in_child, in_parent = finish(script(FORK_AMID_A_CALL, call, child, side)).splitlines()
    assert in_child in (
        "ChannelUnavailable",
        "UndecodableMessage",
        "whole",
    )  # a borrow's view is a copy of the parent's
    assert in_child == "ChannelUnavailable" or call == "borrow" or child == "fails"
    assert in_parent == ("['whole', 'next']" if call == "get_many" else "whole")

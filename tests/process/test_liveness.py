"""Alive is what the kernel says: no zombie, reused pid, fork, namespace, close or stop makes it appear otherwise."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import pickle
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import workers
from support.checks import check_empty, check_full, check_whole, reap
from support.payloads import trap
from support.tracer import Tracer

from ringshm import Channel, EndOfChannel, TooManyParticipants
from ringshm.segment.files import PREFIX, path_of
from ringshm.segment.layout import LOCK_RECOVERY, LOCK_TABLE, P_PID

pytestmark = workers.may_fork

LARGE = bytes(200_000)  # copied outside of the critical sections


def _state(pid: int) -> str:
    """The kernel's letter for a process: R, S, T, Z, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _pids(channel: Channel) -> list[int]:
    """The pids of the other participants, all of whom must be alive."""
    people = channel.stats().participants
    assert all(person.alive for person in people)
    return sorted(person.pid for person in people if person.pid != os.getpid())


def _wait_for_ever() -> None:
    while True:
        signal.pause()


# --- dead, though something of it is still there


def test_a_killed_child_that_nobody_joined_is_dead() -> None:
    with Channel(2, 200) as channel:
        channel.put(trap(workers.die, "first"))
        pid = workers.fork_off(channel.get)
        workers.until(lambda: _state(pid) == "Z")
        reap(channel, 1)
        assert _pids(channel) == []
        assert channel.stats().redelivered == 1
        check_whole(channel, "first")
        assert _state(pid) == "Z"
        assert workers.exit_code(pid) == -signal.SIGKILL


def test_a_dead_process_is_dead_whoever_has_its_pid_now() -> None:
    with Channel(2, 200) as channel, workers.Crew("fork") as crew:
        bystander = crew.start(_wait_for_ever)  # inherits a handle: it is a participant of its own
        workers.until(lambda: _pids(channel) == [bystander.pid])
        channel.put(trap(workers.stop, "first"))
        victim = crew.start(channel.get)
        assert victim.wait_stopped()
        attachment = channel._attachment
        assert attachment is not None
        entries = [attachment.segment.layout.entry(index) for index in attachment.participants.in_use()]
        (entry,) = [entry for entry in entries if attachment.words[entry + P_PID] == victim.pid]
        attachment.words[entry + P_PID] = bystander.pid
        victim.kill()
        reap(channel, 1)
        assert _pids(channel) == [bystander.pid]
        check_whole(channel, "first")


# --- pid namespaces


def _contained() -> list[str]:
    """The command that runs another in a pid namespace of its own, as its pid 1."""
    for user in ([], ["--map-root-user"]):
        command = ["unshare", *user, "--pid", "--fork", "--kill-child"]
        try:
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
                return command
        except FileNotFoundError:
            pytest.skip("there is no `unshare`")
    pytest.skip("no permission to make a pid namespace")


def _in_container(source: str, *argv: str) -> subprocess.Popen[str]:
    """A script whose pid is 1, attached to the channel of the name argv[0]."""
    start = f"import os\nos.execvp('unshare', {_contained()!r} + [sys.executable, '-c', sys.argv[1], *sys.argv[2:]])"
    attach = (
        f"import os, sys, ringshm\nsys.path.append({os.path.dirname(__file__)!r})\n"
        "channel = ringshm.Channel.attach(sys.argv[1])\nassert os.getpid() == 1\n"
    )
    return workers.script("import sys\n" + start, attach + source, *argv, stdin=subprocess.PIPE)


_PUT_AND_STAY = """
channel.put(sys.argv[2])
print("put", flush=True)
channel.flush()
print("flushed", flush=True)
sys.stdin.read()
"""


def test_processes_of_the_same_pid_number_are_told_apart(name: str) -> None:
    with Channel(4, 64, name=name) as channel:
        first, second = (_in_container(_PUT_AND_STAY, name, who) for who in ("first", "second"))
        assert (workers.line_of(first), workers.line_of(second)) == ("put", "put")
        assert _pids(channel) == [1, 1]
        processes = {"first": first, "second": second}
        received = channel.get()
        dying, staying = processes.pop(received), *processes.values()
        assert workers.line_of(dying) == "flushed"
        dying.kill()
        reap(channel, 1)
        assert _pids(channel) == [1]
        assert channel.get() == {"first": "second", "second": "first"}[received]
        assert workers.line_of(staying) == "flushed"
        workers.finish(staying)
        with pytest.raises(EndOfChannel, match="process 1 closed"):
            channel.get()
        dying.communicate()


def test_what_a_process_was_receiving_when_it_died_comes_back_from_another_namespace(name: str) -> None:
    with Channel(2, 200, name=name) as channel:
        staying = _in_container("print(channel.empty(), flush=True)\nsys.stdin.read()", name)
        assert workers.line_of(staying) == "True"
        channel.put(trap(_wait_for_ever, "first"))
        dying = _in_container("channel.get()", name)
        workers.until(lambda: [(slot.state, slot.pid) for slot in channel.stats().slots] == [("reading", 1)])
        assert _pids(channel) == [1, 1]
        dying.kill()
        reap(channel, 1)
        assert _pids(channel) == [1]
        check_whole(channel, "first")
        workers.finish(staying)
        dying.communicate()


_FORK_INTO_PID_1 = """
import ctypes
channel.put("parent")
assert ctypes.CDLL(None).unshare(0x20000000) == 0  # CLONE_NEWPID: of the children
child = os.fork()
channel.put(("child" if not child else "parent", os.getpid() if not child else 1))
if not child:
    sys.exit()
os.waitpid(child, 0)
channel.put("parent still")
sys.stdin.read()
"""


def test_a_forked_child_may_have_its_parents_pid_number(name: str) -> None:
    with Channel(4, 64, name=name) as channel:
        parent = _in_container(_FORK_INTO_PID_1, name)
        received = [channel.get() for _ in range(4)]
        assert sorted(received[1:3]) == [("child", 1), ("parent", 1)]
        assert [received[0], received[3]] == ["parent", "parent still"]
        assert _pids(channel) == [1]
        assert channel.stats().reaped == 0, "the child has left, and its parent has not"
        workers.finish(parent)


_REUSE = """
import signal, subprocess
from support.checks import check_whole, reap
from support.payloads import trap
from support.workers import fork_off, stop, until

channel = ringshm.Channel(2, 300)
channel.put(trap(stop, "first"))
victim = fork_off(channel.get)
os.waitpid(victim, os.WUNTRACED)
os.kill(victim, signal.SIGKILL)
os.waitpid(victim, 0)
try:
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(victim - 1))
except OSError as error:
    print("skip", error)
    sys.exit()
participates = sys.argv[2] == "another participant"
successor = fork_off(signal.pause) if participates else subprocess.Popen(["sleep", "99"]).pid
assert successor == victim
lives = [False, True] if participates else [False]
until(lambda: sorted(person.alive for person in channel.stats().participants if person.pid == victim) == lives)
reap(channel, 1)
people = channel.stats().participants
assert all(person.alive for person in people)
assert sorted(person.pid for person in people) == ([1, successor] if participates else [1])
check_whole(channel, "first")
"""


@pytest.mark.parametrize("who", ["a stranger", "another participant"])
def test_a_process_is_dead_though_its_pid_is_used_again(who: str, name: str) -> None:
    with Channel(1, 64, name=name):
        output = workers.finish(_in_container(_REUSE, name, who))
    if output.startswith("skip"):
        pytest.skip(f"no permission to choose the next pid: {output[5:]}")


# --- forks


@pytest.mark.parametrize("how", ["forked by Python", "by exec"])
def test_a_child_that_lives_on_does_not_keep_its_dead_parent_alive(how: str) -> None:
    reading, writing = os.pipe()

    def child() -> None:
        os.close(writing)
        os.read(reading, 1)  # until the test has closed its end, or has died
        channel.put(("child", os.getpid()))

    def parent() -> None:
        if how == "by exec":
            subprocess.Popen(["cat"], stdin=reading, close_fds=False)
        else:
            workers.fork_off(child)
        channel.get()

    with Channel(2, 200) as channel:
        channel.put(trap(workers.stop, "first"))
        victim = workers.fork_off(parent)
        os.waitpid(victim, os.WUNTRACED)
        workers.until(lambda: len(_pids(channel)) == (2 if how == "forked by Python" else 1))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        reap(channel, 1)
        living = _pids(channel)
        assert victim not in living
        check_whole(channel, "first")
        os.close(writing)
        if how == "forked by Python":
            assert channel.get() == ("child", *living)
            workers.until(lambda: not _pids(channel))
    os.close(reading)


def test_a_fork_behind_pythons_back_keeps_its_parent_alive_until_it_ends() -> None:
    """The limit of record locks: such a child shares its parent's, and nobody can tell whose they are."""
    reading, writing = os.pipe()

    def parent() -> None:
        if ctypes.PyDLL(None).fork() == 0:  # no at-fork hook of Python's runs
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        channel.get()

    with Channel(2, 200) as channel:
        channel.put(trap(workers.stop, "first"))
        victim = workers.fork_off(parent)
        os.waitpid(victim, os.WUNTRACED)
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        check_empty(channel.get, timeout=0.2)
        assert _pids(channel) == [victim]
        os.close(writing)
        reap(channel, 1)
        check_whole(channel, "first")
    os.close(reading)


# --- handles, descriptors and mappings that come and go


def _close_by_turns(name: str, turn: Any) -> None:
    first = Channel.attach(name, timeout=30)
    second = Channel.attach(name)
    for handle in (first.sender(), first, second.receiver(), second):
        turn.wait()
        turn.wait()
        handle.close()
    turn.wait()
    turn.wait()


def test_a_process_lives_while_one_of_its_handles_is_open(name: str) -> None:
    with workers.Crew("fork") as crew:
        turn = crew.context.Barrier(2)
        member = crew.start(_close_by_turns, name, turn)  # before there is a handle to inherit
        with Channel(1, 64, name=name) as channel:
            for roles in ((1, 1, 2), (0, 1, 2), (0, 1, 1), (0, 0, 1), None):
                turn.wait()
                assert not channel.wait_for_peers(senders=99, timeout=0.06)  # looks for the dead
                theirs = [person for person in channel.stats().participants if person.pid == member.pid]
                assert [(p.alive, p.senders, p.receivers, p.undecided) for p in theirs] == (
                    [(True, *roles)] if roles else []
                )
                if roles:
                    assert channel.wait_for_peers(*roles[:2], timeout=0)
                    assert not channel.wait_for_peers(roles[0] + 1, timeout=0)
                    assert not channel.wait_for_peers(0, roles[1] + 1, timeout=0)
                turn.wait()
            assert channel.stats().reaped == 0
            member.result()


def _map(path: str) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping.read(1)


def _lock(path: str) -> None:
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # the whole of it: refused, since ringshm has its locks there, but released all the same
        with pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(file, fcntl.LOCK_UN)


UNRELATED: dict[str, Callable[[str], Any]] = {
    "open and close": lambda path: open(path, "rb").close(),
    "open to write and close": lambda path: os.close(os.open(path, os.O_RDWR)),
    "map and unmap": _map,
    "lock and unlock": _lock,
    "attach and close": lambda path: Channel.attach(path.partition(PREFIX)[2]).close(),
    "remove": os.unlink,
}


@pytest.mark.parametrize("what", UNRELATED)
def test_what_else_a_process_does_with_the_file_leaves_it_alive(what: str, name: str) -> None:
    with Channel(1, 64, name=name) as channel, workers.Crew("fork") as crew:
        UNRELATED[what](path_of(name))
        assert crew.start(_sees_alive, channel, os.getpid()).result()
        channel.put("message")
        assert channel.get() == "message"


def _sees_alive(channel: Channel, pid: int) -> bool:
    assert not channel.wait_for_peers(senders=99, timeout=0.06)  # looks for the dead
    stats = channel.stats()
    return stats.reaped == 0 and pid in _pids(channel)


# --- a full table


def _attach_and_stay(name: str, start: Any, attached: Any) -> str:
    start.wait()
    try:
        with Channel.attach(name):
            attached.release()
            _wait_for_ever()
    except TooManyParticipants:
        attached.release()
    return "refused"


def _fill_and_kill(channel: Channel, dying: list[workers.Member], start: Any, attached: Any) -> None:
    start.set()
    for _ in dying:
        attached.acquire()
    assert _pids(channel) == sorted(member.pid for member in dying)
    for member in dying:
        member.kill()


def test_all_entries_of_the_dead_serve_newcomers_that_come_at_once(name: str) -> None:
    with workers.Crew("fork") as crew:
        start, again, attached = crew.context.Event(), crew.context.Barrier(5), crew.context.Semaphore(0)
        # all of them before there is a handle to inherit
        dying = [crew.start(_attach_and_stay, name, start, attached) for _ in range(4)]
        coming = [crew.start(_attach_and_stay, name, again, attached) for _ in range(4)]
        with Channel(1, 64, name=name, max_participants=5) as channel:
            _fill_and_kill(channel, dying, start, attached)
            again.wait()
            for _ in coming:
                attached.acquire()
            assert _pids(channel) == sorted(member.pid for member in coming)
            assert channel.stats().reaped == 4


def _stop_before_reaping(name: str, start: Any, attached: Any) -> str:
    start.wait()
    with Tracer(workers.stop, folders=("ring",), functions=("reap",)):
        return _attach_and_stay(name, start, attached)


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGKILL], ids=["goes on", "dies"])
def test_a_newcomer_waits_for_another_that_is_reaping(number: int, name: str) -> None:
    with workers.Crew("fork") as crew:
        starts, attached = [crew.context.Event() for _ in range(3)], crew.context.Semaphore(0)
        dying = [crew.start(_attach_and_stay, name, starts[0], attached) for _ in range(2)]
        first = crew.start(_stop_before_reaping, name, starts[1], attached)
        second = crew.start(_attach_and_stay, name, starts[2], attached)
        with Channel(1, 64, name=name, max_participants=3) as channel:
            _fill_and_kill(channel, dying, starts[0], attached)
            starts[1].set()
            assert first.wait_stopped()
            starts[2].set()
            assert not attached.acquire(timeout=0.2), "refused"
            first.send_signal(number)
            expected = [first.pid, second.pid] if number == signal.SIGCONT else [second.pid]
            for _ in expected:
                attached.acquire()
            assert {person.pid for person in channel.stats().participants if person.alive} == {os.getpid(), *expected}


# --- stopped, not dead


def _put_stopping(channel: Channel) -> None:
    def writing() -> bool:
        return any(slot.state == "writing" for slot in channel.stats().slots)

    channel.full()
    holds = workers.holding(channel, "senders")
    with Tracer(workers.stop, folders=("ring",), when=lambda: writing() and not holds()):
        channel.put(LARGE)


@pytest.mark.parametrize("state", ["reading", "writing"])
def test_a_process_that_is_stopped_while_it_decodes_or_writes_keeps_its_slot(state: str) -> None:
    reads = state == "reading"
    with Channel(2, len(LARGE)) as channel, workers.Crew("fork") as crew:
        if reads:
            channel.put(trap(workers.stop, "first"))
        member = crew.start(channel.get) if reads else crew.start(_put_stopping, channel)
        assert member.wait_stopped()
        channel.put("second")
        for timeout in (0, 0.3):
            check_full(channel.put, "third", timeout=timeout)
        assert channel.get(timeout=0.3) == "second"
        check_empty(channel.get, timeout=0.3)
        assert [(slot.state, slot.pid) for slot in channel.stats().slots] == [(state, member.pid)]
        assert not reads or not channel.flush(timeout=0.2)
        member.send_signal(signal.SIGCONT)
        assert member.result() == ("first" if reads else None)
        assert not reads or channel.flush()
        assert (channel.stats().reaped, channel.stats().redelivered) == (0, 0)
        check_whole(channel, *([] if reads else [LARGE]))


def _locked(channel: Channel, byte: int) -> bool:
    """Whether another process holds that lock: what the kernel says."""
    attachment = channel._attachment
    assert attachment is not None
    return attachment.segment.file.locked_elsewhere(byte)


def _pickle_stopping(channel: Channel) -> None:
    channel.full()
    # the first line takes the table lock
    with Tracer(workers.stop, 2, folders=("process",), functions=("_issue",), lines=True):
        pickle.dumps(channel)


def test_others_go_on_while_a_process_is_stopped_with_the_table_locked(name: str) -> None:
    with Channel(2, 64, name=name) as channel, workers.Crew("fork") as crew:
        getting = crew.start(workers.get_some, channel, 20)
        workers.until(lambda: channel.stats().waiting_receivers)
        member = crew.start(_pickle_stopping, channel)
        assert member.wait_stopped()
        assert _locked(channel, LOCK_TABLE)
        newcomer = workers.script(
            "import sys, ringshm\nprint(ringshm.Channel.attach(sys.argv[1]).stats().reaped)", name
        )
        for k in range(20):
            channel.put(k)
        assert getting.result() == list(range(20))
        check_empty(channel.get, timeout=0.3)
        assert newcomer.poll() is None, "who comes waits"
        member.send_signal(signal.SIGCONT)
        member.result()
        assert workers.finish(newcomer) == "0\n"
        check_whole(channel)


def _recover_stopping(channel: Channel) -> None:
    channel.full()
    with Tracer(workers.stop, functions=("_recover",), when=lambda: channel.stats().recovering):
        channel.put("theirs")


def test_others_time_out_while_a_process_is_stopped_that_recovers() -> None:
    with Channel(4, 64) as channel, workers.Crew("fork") as crew:
        channel.put("first")
        crew.start(workers.act_holding, workers.die, channel, "put", "never").process.join()
        member = crew.start(_recover_stopping, channel)
        assert member.wait_stopped()
        assert _locked(channel, LOCK_RECOVERY)
        for timeout in (0, 0.3):
            check_full(channel.put, "second", timeout=timeout)
            check_empty(channel.get, timeout=timeout)
        assert not channel.flush(timeout=0.1)
        assert channel.qsize() == 1
        waiting = crew.start(channel.put, "mine", method="thread")
        member.send_signal(signal.SIGCONT)
        member.result()
        waiting.result()
        reap(channel, 1)
        assert channel.get() == "first"
        assert sorted(channel.get() for _ in range(2)) == ["mine", "theirs"]
        check_whole(channel)


def test_a_stopped_process_keeps_its_place_in_a_full_table(name: str) -> None:
    with workers.Crew("fork") as crew:
        attached = crew.context.Semaphore(0)
        starts = [crew.context.Event() for _ in range(2)]
        staying, refused = (crew.start(_attach_and_stay, name, start, attached) for start in starts)
        with Channel(1, 64, name=name, max_participants=2) as channel:
            starts[0].set()
            attached.acquire()
            staying.send_signal(signal.SIGSTOP)
            assert staying.wait_stopped()
            starts[1].set()
            assert refused.result() == "refused"
            assert _pids(channel) == [staying.pid]
            staying.send_signal(signal.SIGCONT)

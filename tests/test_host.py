"""Without what macOS lacks: each thing switched off alone, in processes of its own, and beside those that have it.

The whole suite passes with all of them switched off: `RINGSHM_WITHOUT=all python -m pytest`, as `.ci/run --long` does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator

import pytest
from workers import finish, may_fork, ringshm_files, script, until

from ringshm import Channel, host, semaphores
from ringshm.leftovers import clean
from ringshm.segment import path_of

pytestmark = may_fork

SWITCHES = ("timed-waits", "semaphore-values", "long-names", "record-locks")

HOLD = """
import sys, ringshm
channel = ringshm.Channel(2, 64, name=sys.argv[1])
channel.put("first")
channel.put("second")
print(flush=True)
sys.stdin.read()
"""

TAKE_AND_DIE = """
import os, signal, sys, ringshm
channel = ringshm.Channel.attach(sys.argv[1], timeout=30)
with channel.borrow() as message:
    assert message.value == "first"
    os.kill(os.getpid(), signal.SIGKILL)
"""

TAKE = """
import queue, sys, time, ringshm
with ringshm.Channel.attach(sys.argv[1], timeout=30) as channel:
    with channel.borrow(timeout=30) as message:
        assert (message.value, message.delivery_count) == ("first", 2), (message.value, message.delivery_count)
    assert channel.get(timeout=30) == "second"
    begin = time.monotonic()
    try:
        channel.get(timeout=0.3)
    except queue.Empty:
        assert time.monotonic() - begin >= 0.3
        print(ringshm.host.TIMED_WAITS, ringshm.host.SEMAPHORE_VALUES, ringshm.host.LONG_NAMES,
              ringshm.host.RECORD_LOCKS)
"""


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv(host.WITHOUT, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("holder", "taker"),
    [*((switch, "") for switch in SWITCHES), *(("", switch) for switch in SWITCHES), ("all", ""), ("all", "all")],
)
def test_processes_that_differ_share_a_channel(holder: str, taker: str, name: str, without: pytest.MonkeyPatch) -> None:
    before = ringshm_files()
    without.setenv(host.WITHOUT, holder)
    creator = script(HOLD, name, stdin=subprocess.PIPE)
    assert creator.stdout is not None
    creator.stdout.readline()
    without.setenv(host.WITHOUT, taker)
    assert clean() == ((), ())  # this process has its own switches
    died = script(TAKE_AND_DIE, name)
    died.communicate()
    assert died.returncode == -signal.SIGKILL
    off = SWITCHES if taker == "all" else taker
    assert finish(script(TAKE, name)).split() == [str(switch not in off) for switch in SWITCHES]
    creator.communicate()
    assert creator.returncode == 0
    assert ringshm_files() == before


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_dead_creators_name_is_taken_over(switch: str, name: str, without: pytest.MonkeyPatch) -> None:
    before = ringshm_files()
    without.setenv(host.WITHOUT, switch)
    for _ in range(2):
        creator = script(HOLD, name, stdin=subprocess.PIPE)
        assert creator.stdout is not None
        creator.stdout.readline()
        creator.kill()
        creator.communicate()
    assert path_of(name) in {segment.path for segment in clean()[0]}
    assert ringshm_files() == before


def test_a_long_name_becomes_a_short_one_by_which_the_channel_is_found_too(
    name: str, without: pytest.MonkeyPatch
) -> None:
    without.setenv(host.WITHOUT, "long-names")
    source = """
import os, sys, ringshm
name = sys.argv[1] * 10
with ringshm.Channel(1, 64, name=name) as channel, ringshm.Channel(1, 64, name=name + "x"):
    files = [file for file in os.listdir("/dev/shm") if file.startswith("ringshm.~")]
    assert len(files) == 2
    assert max(map(len, os.listdir("/dev/shm"))) <= 33  # four of which are the "sem." of the file system
    channel.put(1)
    waiting = []
    for file in files:
        with ringshm.Channel.attach(file[len("ringshm."):]) as found:
            waiting.append(found.qsize())
    assert sorted(waiting) == [0, 1]
    with ringshm.Channel.attach(name) as same:
        assert (same.name, same.get()) == (name, 1)
"""
    finish(script(source, name))


def test_without_long_names_a_channel_that_has_one_stays(name: str, without: pytest.MonkeyPatch) -> None:
    name *= 10
    creator = script(HOLD, name, stdin=subprocess.PIPE)
    assert creator.stdout is not None
    creator.stdout.readline()
    before = ringshm_files()
    without.setenv(host.WITHOUT, "long-names")
    source = "from ringshm.leftovers import clean, look; print([one.name for one in look().segments], *clean())"
    assert finish(script(source)) == f"['{name}'] () ()\n"
    assert ringshm_files() == before
    creator.kill()
    creator.communicate()
    assert finish(script(source)).startswith(f"['{name}'] (SegmentFile(")
    assert not before & ringshm_files()


def test_a_wait_without_a_time_limit_of_the_kernels_lets_a_handlers_exception_through(
    name: str, without: pytest.MonkeyPatch
) -> None:
    without.setenv(host.WITHOUT, "timed-waits")
    process = script(
        """
import sys, ringshm
with ringshm.Channel(1, 64, name=sys.argv[1]) as channel:
    try:
        print(flush=True)
        channel.get()
    except KeyboardInterrupt:
        print("interrupted")
""",
        name,
    )
    assert process.stdout is not None
    process.stdout.readline()
    with Channel.attach(name) as channel:
        until(lambda: channel.stats().waiting_receivers)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == "interrupted\n"


@pytest.fixture
def semaphore(name: str) -> Iterator[str]:
    """The name of a semaphore without a token."""
    semaphores.create(f"/ringshm.{name}", 0)
    yield f"/ringshm.{name}"
    semaphores.remove(f"/ringshm.{name}")


@pytest.mark.parametrize("switch", ["", "semaphore-values"])
def test_a_semaphore_is_filled_up_to_the_tokens_that_are_asked_for(
    switch: str, semaphore: str, without: pytest.MonkeyPatch
) -> None:
    without.setenv(host.WITHOUT, switch)
    source = """
import sys
from ringshm import semaphores
name = sys.argv[1]
for semaphore in (semaphores.open_existing(name), semaphores._PosixSemaphore(name)):
    for found, asked, expected in [(0, 3, 3), (3, 3, 3), (3, 1, 3), (3, 0, 3), (2, 4, 4)]:
        while semaphore._get_value() > found:
            semaphore.acquire(False)
        semaphore.fill(asked)
        assert semaphore._get_value() == expected, (found, asked)
    while semaphore.wait(0.001):
        pass
    assert semaphore._get_value() == 0
"""
    finish(script(source, semaphore))


@pytest.mark.parametrize("switch", ["", "semaphore-values"])
def test_a_damaged_value_of_a_semaphore_does_not_hold_up_who_wakes(
    switch: str, semaphore: str, without: pytest.MonkeyPatch
) -> None:
    without.setenv(host.WITHOUT, switch)
    source = """
import sys
from ringshm import semaphores
name = sys.argv[1]
semaphore, most = semaphores.open_existing(name), 2**31 - 1
with open("/dev/shm/sem." + name[1:], "r+b") as file:
    file.write(most.to_bytes(4, sys.byteorder))
semaphore.fill(3)
assert semaphore._get_value() == most
"""
    finish(script(source, semaphore))


def test_what_no_host_lacks_is_refused_at_import(without: pytest.MonkeyPatch) -> None:
    without.setenv(host.WITHOUT, "long-names, threads")
    process = script("import ringshm", stderr=subprocess.PIPE)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "RINGSHM_WITHOUT='long-names, threads' names 'threads': give some of timed-waits," in errors

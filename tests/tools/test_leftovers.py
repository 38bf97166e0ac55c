"""What the dead leave in /dev/shm is told from what the living use, and `clean` removes the one and never the other."""

from __future__ import annotations

import os
import queue
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import workers
from support.checks import check_empty
from support.tracer import Tracer

from ringshm import BrokenChannel, Channel, ChannelExists, ChannelNotFound, EndOfChannel, IncompatibleChannel
from ringshm.segment.files import PREFIX, path_of
from ringshm.segment.layout import LAYOUT_VERSION, VERSION, WORD_SIZE
from ringshm.segment.semaphores import STEM
from ringshm.tools import leftovers
from ringshm.tools.leftovers import Leftovers, SegmentFile, clean, look

pytestmark = workers.may_fork

SHM = Path("/dev/shm")
SEMAPHORES = 9  # of one channel
FILES = 1 + SEMAPHORES


@pytest.fixture
def name() -> Iterator[str]:
    """A fresh name; what a failed test leaves under it goes."""
    clean()  # so that a test sees its own leftovers only
    name = f"test-{uuid.uuid4().hex[:8]}"
    yield name
    for path in SHM.glob(f"{PREFIX}{name}*"):
        path.unlink()
    clean()


def _found(name: str) -> SegmentFile:
    (segment,) = [segment for segment in look().segments if segment.path == path_of(name)]
    return segment


def _corpse(name: str) -> None:
    """Leave a channel of that name whose processes have all died."""

    def child() -> None:
        channel = Channel(1, 64, name=name)
        channel.put("left behind")
        workers.die()

    assert workers.exit_code(workers.fork_off(child)) == -signal.SIGKILL


USE = """
import os, sys, ringshm
from ringshm.segment.files import path_of
channel = ringshm.Channel(2, 64, name=sys.argv[1])
version = int(sys.argv[2])
file = os.open(path_of(sys.argv[1]), os.O_RDWR)
os.pwrite(file, version.to_bytes(8, sys.byteorder), int(sys.argv[3]))
os.close(file)
print(flush=True)
sys.stdin.read()
"""


def _live(name: str, version: int = LAYOUT_VERSION) -> subprocess.Popen[str]:
    """A process that uses a channel of that name, and of that layout version, until it is killed."""
    process = workers.started(USE, name, str(version), str(VERSION * WORD_SIZE), stdin=subprocess.PIPE)
    return process


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# --- what is there


def test_a_live_channel_is_listed_and_left_alone(name: str) -> None:
    process = _live(name)
    files = workers.ringshm_files()
    found = _found(name)
    assert (found.live, found.named, found.removable, found.version) == (True, True, False, LAYOUT_VERSION)
    assert found.size == os.stat(found.path).st_size
    assert 0 <= found.age < 3600
    assert clean() == ((), ())
    assert workers.ringshm_files() == files
    with Channel.attach(name) as channel:
        channel.put("unharmed")
    _kill(process)


def test_ones_own_channel_is_live(name: str) -> None:
    with Channel(1, 64, name=name) as channel:
        channel.put("unharmed")
        assert _found(name).live
        clean()
        assert Channel.attach(name).get() == "unharmed"


def test_a_stopped_process_lives(name: str) -> None:
    process = _live(name)
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    assert _found(name).live
    assert clean() == ((), ())
    _kill(process)


def test_a_channel_is_live_while_anyone_uses_it(name: str) -> None:
    process = _live(name)
    with Channel.attach(name) as channel:
        _kill(process)
        assert _found(name).live
        assert clean() == ((), ())
        with Channel.attach(name) as another:
            check_empty(another.get_nowait)  # which makes it a receiver; the creator, which was to be one, is dead
            channel.put("unharmed")
            assert another.get() == "unharmed"


def test_what_is_left_when_everybody_was_killed_is_removed_by_clean(name: str) -> None:
    before = workers.ringshm_files()
    attach = "import sys, ringshm\nchannel = ringshm.Channel.attach(sys.argv[1])\nprint(flush=True)\nchannel.get()"
    processes = [_live(name), workers.started(attach, name), workers.started(attach, name)]
    for process in processes:  # at once: when its creator has died, the stream ends for the others
        process.kill()
    for process in processes:
        _kill(process)
    assert len(workers.ringshm_files() - before) == FILES
    found = _found(name)
    assert found.removable
    removed, orphans = clean()
    assert ([segment.path for segment in removed], orphans) == ([found.path], ())
    assert workers.ringshm_files() == before
    assert clean() == ((), ())


@pytest.mark.parametrize("how", ["clean", "creation"])
def test_another_layout_versions_channel_stays_while_it_lives_and_goes_when_it_is_dead(how: str, name: str) -> None:
    before = workers.ringshm_files()
    process = _live(name, LAYOUT_VERSION + 1)
    files = workers.ringshm_files()
    assert (_found(name).live, _found(name).version) == (True, LAYOUT_VERSION + 1)
    assert clean() == ((), ())
    with pytest.raises(ChannelExists):
        Channel(1, 64, name=name)
    with pytest.raises(IncompatibleChannel):
        Channel.attach(name)
    assert workers.ringshm_files() == files
    _kill(process)
    one_more = SHM / f"sem.{PREFIX}{_found(name).nonce}.9"  # which this version does not know
    one_more.write_bytes(bytes(32))
    if how == "creation":
        Channel(1, 64, name=name).close()
        assert look().orphans == (str(one_more),)
    clean()
    assert workers.ringshm_files() == before


def test_files_that_are_no_segments_are_told_of_and_not_touched(name: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(bytes(8192))
    (SHM / f"{PREFIX}{name}-empty").touch()
    (SHM / f"{PREFIX}{name}-text").write_text("somebody's notes" * 1000)
    (SHM / f"{PREFIX}{name}-link").symlink_to(target)
    os.mkfifo(SHM / f"{PREFIX}{name}-fifo")
    files = workers.ringshm_files()
    found = {segment.path: segment for segment in look().segments}
    assert len(found) == 4
    assert all(path in segment.wrong and "Remove it" in segment.wrong for path, segment in found.items())
    assert clean() == ((), ())
    assert workers.ringshm_files() == files
    assert target.read_bytes() == bytes(8192)


def test_a_links_target_is_not_removed_though_it_is_a_dead_channel(name: str) -> None:
    _corpse(name)
    path = SHM / f"{PREFIX}{name}"
    elsewhere = path.rename(SHM / f"not-of-{name}")
    try:
        path.symlink_to(elsewhere)
        clean()
        assert path.is_symlink()
        assert elsewhere.exists()
    finally:
        elsewhere.unlink()


def test_a_copy_of_a_live_channel_does_not_take_its_semaphores_along(name: str) -> None:
    with Channel(1, 64, name=name):
        copy = SHM / f"{PREFIX}{name}-copy"
        shutil.copy(SHM / f"{PREFIX}{name}", copy)
        files = workers.ringshm_files()
        found = _found(f"{name}-copy")
        assert name in found.wrong
        assert clean() == ((), ())
        assert workers.ringshm_files() == files
        Channel.attach(name).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_other_users_files_are_counted_and_not_opened(name: str) -> None:
    _corpse(name)
    path = SHM / f"{PREFIX}{name}"
    beside = list(SHM.glob(f"*{_found(name).nonce}*"))
    for file in (path, *beside):
        os.chown(file, 12345, 12345)
    files = workers.ringshm_files()
    found = look()
    assert (found.segments, found.orphans, found.foreign) == ((), (), FILES)
    assert clean() == ((), ())
    assert workers.ringshm_files() == files
    for file in (path, *beside):
        os.chown(file, 0, 0)


def test_a_name_of_any_bytes_is_listed_and_removed(name: str) -> None:
    strange = name + os.fsdecode(b"-\xff \n\x1b[31m")
    _corpse(strange)
    assert _found(strange).removable
    clean()
    assert not os.path.lexists(path_of(strange))


# --- semaphores


def test_semaphores_whose_segment_was_removed_by_hand_are_orphans(name: str) -> None:
    before = workers.ringshm_files()
    _corpse(name)
    nonce = _found(name).nonce
    os.unlink(SHM / f"{PREFIX}{name}")
    paths = tuple(sorted(map(str, SHM.glob(f"*{nonce}*"))))
    assert len(paths) == FILES - 1
    assert look().orphans == paths
    assert clean() == ((), paths)
    assert workers.ringshm_files() == before


def test_those_attached_to_a_segment_that_was_removed_by_hand_go_on(name: str) -> None:
    with Channel(2, 64, name=name) as channel, workers.Crew("fork") as crew:
        attached = Channel.attach(name)
        os.unlink(SHM / f"{PREFIX}{name}")
        assert len(clean()[1]) == SEMAPHORES
        child = crew.start(attached.get)
        workers.until(lambda: channel.stats().waiting_receivers)
        channel.put("still here")
        assert child.result() == "still here"


def test_a_listing_that_misses_a_creator_on_the_move_makes_no_orphans(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listings = 0
    listdir = os.listdir

    def missing(path: Any) -> list[str]:
        nonlocal listings
        listings += 1
        return [file for file in listdir(path) if listings != 2 or not file.startswith(STEM)]

    with Channel(1, 64, name=name):
        monkeypatch.setattr(leftovers.os, "listdir", missing)
        assert look().orphans == ()
        assert listings > 2


# --- creators

CREATION = ("create", "_reserve", "_link", "_link_reclaiming", "reclaim", "_remove", "_remove_semaphores", "remove")


def _create_stepwise(name: str, at: int, act: Any) -> bool:
    """Make a channel and use it, and `act` at a step of its creation; whether it works."""
    with Tracer(act, at, folders=("segment",), functions=CREATION, lines=True):
        channel = Channel(1, 64, name=name)
    channel.put("whole")
    with Channel.attach(name) as attached:
        whole = attached.get() == "whole"
    channel.close()
    return whole


@pytest.mark.slow(seconds=60)
def test_a_creator_killed_at_any_step_leaves_nothing_that_clean_does_not_remove(name: str) -> None:
    before = workers.ringshm_files()
    left = set()
    for at in range(1, 1000):
        if not workers.exit_code(workers.fork_off(lambda at=at: _create_stepwise(name, at, workers.die))):
            break
        left.add(len(workers.ringshm_files() - before))
        assert all(segment.removable for segment in look().segments)
        clean()
        assert workers.ringshm_files() == before
    assert left >= {0, 1, FILES, FILES + 1}  # killed without a name, with one, with all, and with both names
    assert workers.ringshm_files() == before


@pytest.mark.slow(seconds=60)
def test_one_killed_while_it_reclaims_a_corpse_leaves_nothing_that_clean_does_not_remove(name: str) -> None:
    before = workers.ringshm_files()
    for at in range(30, 1000, 4):  # the steps before are those of a creator that meets no corpse
        _corpse(name)
        if not workers.exit_code(workers.fork_off(lambda at=at: _create_stepwise(name, at, workers.die))):
            break
        clean()
        assert workers.ringshm_files() == before
    assert at > 60
    assert workers.ringshm_files() == before


@pytest.mark.slow(seconds=60)
def test_what_a_creator_stopped_at_any_step_has_made_is_left_alone(name: str) -> None:
    before = workers.ringshm_files()
    made = set()
    with workers.Crew("fork") as crew:
        for at in range(1, 1000, 2):
            creator = crew.start(_create_stepwise, name, at, workers.stop)
            if not creator.wait_stopped():
                break
            files = workers.ringshm_files()
            made.add(len(files - before))
            assert clean() == ((), ())
            assert workers.ringshm_files() == files
            creator.send_signal(signal.SIGCONT)
            assert creator.result()
    assert made >= {0, 1, FILES, FILES + 1}
    assert workers.ringshm_files() == before


@pytest.mark.slow(seconds=120)
def test_a_creator_stopped_while_it_reclaims_a_corpse_gets_its_channel_though_others_clean(name: str) -> None:
    before = workers.ringshm_files()
    with workers.Crew("fork") as crew:
        for at in range(1, 1000, 5):
            _corpse(name)
            creator = crew.start(_create_stepwise, name, at, workers.stop)
            if not creator.wait_stopped():
                break
            clean()
            creator.send_signal(signal.SIGCONT)
            assert creator.result()
    clean()
    assert workers.ringshm_files() == before


# --- all at once


def _live_and_die(names: list[str], seed: int) -> None:
    """Make or attach to one of these channels, use it, and close it, or be killed at some step."""
    choose = random.Random(seed)
    name = choose.choice(names)
    with Tracer(workers.die, choose.randrange(1, 500), folders=("segment", "process", "ring"), lines=True):
        try:
            channel = Channel(2, 64, name=name) if choose.random() < 0.5 else Channel.attach(name)
        except (ChannelExists, ChannelNotFound):
            return
        try:
            if choose.random() < 0.5:
                channel.put(seed, timeout=0.01)
            else:
                channel.get(timeout=0.01)
        except (queue.Full, queue.Empty, BrokenChannel, EndOfChannel, ChannelNotFound):
            pass
        if choose.random() < 0.5:
            channel.close()


def _many_lives(names: list[str], seed: int, seconds: float) -> tuple[int, int]:
    end = time.monotonic() + seconds
    lives = killed = 0
    while time.monotonic() < end:
        lives += 1
        code = workers.exit_code(workers.fork_off(lambda lives=lives: _live_and_die(names, seed + lives)))
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
    return lives, killed


@pytest.mark.slow(seconds=120)
@pytest.mark.filterwarnings("ignore:channel .* dropped:RuntimeWarning")
def test_cleaning_disturbs_nobody_who_creates_attaches_closes_or_dies(name: str) -> None:
    before = workers.ringshm_files()
    names = [f"{name}-{k}" for k in range(3)]
    cleaned = 0
    with workers.Crew("fork") as crew:
        members: list[workers.Member] = [crew.start(_many_lives, names, 10_000 * k, 8.0) for k in range(4)]
        while any(member.process.is_alive() for member in members):
            cleaned += len(clean()[0])
        lives, killed = (sum(counts) for counts in zip(*crew.results(), strict=True))
    assert 0 < killed < lives
    assert cleaned
    clean()
    assert workers.ringshm_files() == before
    assert look() == Leftovers((), (), 0)


# --- without a descriptor to spare


_AT_THE_LIMIT = """
import os, resource, sys, ringshm
from contextlib import contextmanager
from ringshm.tools.leftovers import clean

@contextmanager
def descriptors(spare):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)  # all below it are in use
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

name = sys.argv[1]
"""


def test_without_a_descriptor_to_spare_all_names_go(name: str) -> None:
    before = workers.ringshm_files()
    closing = """
channel = ringshm.Channel(1, 64, name=name)
with descriptors(0):
    channel.close()
"""
    workers.finish(workers.script(_AT_THE_LIMIT + closing, name))
    assert workers.ringshm_files() == before
    making = """
made = False
for spare in range(16):
    try:
        with descriptors(spare):
            ringshm.Channel(1, 64, name=name).close()
            made = True
    except ringshm.ChannelUnavailable as error:
        assert error.errno == 24, error
        assert not made
assert made
"""
    workers.finish(workers.script(_AT_THE_LIMIT + making, name))
    assert workers.ringshm_files() == before


def test_without_a_descriptor_to_spare_no_channel_is_called_corrupted(name: str) -> None:
    with Channel(1, 64, name=name) as channel:
        opening = """
opened = False
for spare in range(16):
    for call in (lambda: ringshm.Channel.attach(name), clean):
        try:
            with descriptors(spare):
                call()
                opened = True
        except OSError as error:
            assert error.errno == 24 and (call is clean or type(error) is ringshm.ChannelUnavailable), error
assert opened
"""
        workers.finish(workers.script(_AT_THE_LIMIT + opening, name))
        channel.put(1)
        assert channel.get() == 1


# --- beside files with another stem


def test_processes_with_another_stem_are_neither_seen_nor_cleaned_up_after(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, found = workers.ringshm_files(), look()
    with monkeypatch.context() as patch:
        patch.setenv("RINGSHM_STEM", f"{STEM}-of-{name}")
        living = _live(name)
        dead = _live(f"{name}-dead")
        cleaning = "from ringshm.tools.leftovers import clean\nprint(*(segment.name for segment in clean()[0]))"
        _kill(dead)
        assert len(workers.ringshm_files() - before) == 2 * FILES
        assert (look(), clean()) == (found, ((), ()))
        with pytest.raises(ChannelNotFound):
            Channel.attach(name)
        assert workers.finish(workers.script(cleaning)) == f"{name}-dead\n"
        _kill(living)
        assert workers.finish(workers.script(cleaning)) == f"{name}\n"
    assert workers.ringshm_files() == before

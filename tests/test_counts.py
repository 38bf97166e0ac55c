"""Counts that do not wobble: what a message costs in the steady state, uncontended, as the kernel counts it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from ringshm import Channel, Latest

WAY, MESSAGES, NBYTES = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def copy(channel, array):
    channel.put(array)
    channel.get_nowait()

def in_place(channel, array):
    with channel.loan() as loan:
        written = loan.array(array.shape, array.dtype)
        written[0] = written[-1] = 1
    with channel.borrow() as message:
        assert message.value[0] == message.value[-1] == 1

def typed(channel, array):
    with channel.loan() as loan:
        loan["array"][::len(array) - 1] = 1
    with channel.borrow() as message:
        assert message["array"][0] == message["array"][-1] == 1

def copy_in_dict(channel, array):
    channel.put({"array": array})
    channel.get_nowait()

def copy_held(channel, array):
    global held  # as a loop does, that gets the next message while it has the last one
    channel.put(array)
    held = channel.get()

def newest(latest, array):
    latest.publish(array)
    with latest.borrow() as borrow:
        assert borrow.value[0] == borrow.value[-1] == 0

def newest_copied(latest, array):
    latest.publish(array)
    latest.read()

size = {"spec": {"array": (np.uint8, NBYTES)}} if WAY == "typed" else {"slot_size": NBYTES + 4096}
with Latest(NBYTES) if WAY.startswith("newest") else Channel(3, **size) as channel:
    array, once = np.zeros(NBYTES, np.uint8), globals()[WAY]
    for _ in range(min(2000, 4 + MESSAGES)):
        once(channel, array)
    channel._look_at = float("inf")  # the look for the dead, once in 50 ms, makes lists, and is not per message
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(MESSAGES):
        once(channel, array)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

#: What a message is sent by, and how large it is.
WAYS = [
    *(("copy", 1024), ("in_place", 1024), ("in_place", 100_000_000), ("typed", 100_000_000)),
    *(("newest", 1024), ("newest_copied", 1024)),
]


def _page_faults(way: str, messages: int, nbytes: int) -> int:
    command = [sys.executable, "-c", PROGRAM, way, str(messages), str(nbytes)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(("way", "nbytes"), WAYS)
def test_a_message_takes_no_page_fault(way: str, nbytes: int) -> None:
    assert _page_faults(way, 5000, nbytes) == 0


@pytest.mark.parametrize("way", ["copy", "copy_in_dict", "copy_held", "newest_copied"])
@pytest.mark.parametrize("nbytes", [10_000_000, 100_000_000])
def test_a_large_owned_copy_takes_no_page_fault(way: str, nbytes: int) -> None:
    assert _page_faults(way, 20, nbytes) == 0


def _system_calls(way: str, messages: int, nbytes: int, log: Path) -> int:
    """System calls that a process makes in its life, with so many messages in it."""
    command = ["strace", "-f", "-c", "-U", "calls,name", "-o", str(log)]
    command += [sys.executable, "-c", PROGRAM, way, str(messages), str(nbytes)]
    # the bytecode cache and the look for the dead, once in 50 ms, are not per message
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "0"})
    total = re.search(r"^\s*(\d+)\s+total$", log.read_text(), re.MULTILINE)
    assert total is not None
    return int(total[1])


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which counts system calls, is not installed")
@pytest.mark.parametrize(("way", "nbytes"), WAYS)
def test_a_message_makes_no_system_call(way: str, nbytes: int, tmp_path: Path) -> None:
    _system_calls(way, 0, nbytes, tmp_path / "warm-up")
    few, many = (_system_calls(way, messages, nbytes, tmp_path / str(messages)) for messages in (0, 5000))
    # a hundred calls of chance (memory, the clock) are 0.02 a message; one call a message would be 5000
    assert abs(many - few) < 100

"""Counts that do not wobble: what a message costs in the steady state, uncontended, and what a process's first call
costs, as the kernel counts it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from support.tracer import folder_of

import ringshm
from ringshm import Channel

PROGRAM = """
import resource, sys
import numpy as np
from ringshm import Channel, Latest

WAY, MESSAGES, NBYTES, WINDOWS = sys.argv[1], *map(int, sys.argv[2:])

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
    once(channel, array)
    channel._look_at = float("inf")  # the look for the dead, once in 50 ms, makes lists, and is not per message
    for _ in range(min(2000, 60 + MESSAGES)):
        once(channel, array)
    counts = []
    for _ in range(WINDOWS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(MESSAGES):
            once(channel, array)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(min(counts))
"""

#: What a message is sent by, and how large it is.
WAYS = [
    *(("copy", 1024), ("in_place", 1024), ("in_place", 100_000_000), ("typed", 100_000_000)),
    *(("newest", 1024), ("newest_copied", 1024)),
]


def _page_faults(way: str, messages: int, nbytes: int) -> int:
    """Page faults of so many messages, in that of three windows which has the fewest: what messages cause comes in each
    window; what comes by chance (the heap touches a new page, the kernel moves one) does not.
    """
    command = [sys.executable, "-c", PROGRAM, way, str(messages), str(nbytes), "3"]
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
    command += [sys.executable, "-c", PROGRAM, way, str(messages), str(nbytes), "1"]
    # the bytecode cache is not per message
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "0"})
    total = re.search(r"^\s*(\d+)\s+total$", log.read_text(), re.MULTILINE)
    assert total is not None
    # CPython 3.13t yields some twenty thousand times before it has imported NumPy, a few hundred more or less
    yields = re.search(r"^\s*(\d+)\s+sched_yield$", log.read_text(), re.MULTILINE)
    return int(total[1]) - (int(yields[1]) if yields else 0)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which counts system calls, is not installed")
@pytest.mark.parametrize(("way", "nbytes"), WAYS)
def test_a_message_makes_no_system_call(way: str, nbytes: int, tmp_path: Path) -> None:
    _system_calls(way, 0, nbytes, tmp_path / "warm-up")
    few, many = (_system_calls(way, messages, nbytes, tmp_path / str(messages)) for messages in (0, 5000))
    # a hundred calls of chance (memory, the clock) are 0.02 a message; one call a message would be 5000
    assert abs(many - few) < 100


FIRST_CALL = """
import os, resource, sys
from ringshm import Channel

HOW, CAPACITY, SLOT_SIZE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def first_put(channel, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    (channel or Channel.attach(name)).put(1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)

if HOW == "attached":
    first_put(None, sys.argv[4])
else:
    with Channel(CAPACITY, SLOT_SIZE) as channel:
        channel.put(1)  # what a fork copies is not the first put's
        for _ in range(3):
            if HOW == "forked":
                if not os.fork():
                    first_put(channel, None)
                    os._exit(0)
                os.wait()
            else:
                os.spawnv(os.P_WAIT, sys.executable, [sys.executable, __file__, "attached", "0", "0", channel.name])
"""


@pytest.mark.parametrize("how", ["forked", "spawned"])
def test_the_first_call_of_a_process_takes_few_page_faults_however_large_the_ring(how: str, tmp_path: Path) -> None:
    """What it takes beside the segment's pages (the heap's after a fork) it takes for the smallest ring, too."""
    program = tmp_path / "first_call.py"
    program.write_text(FIRST_CALL)

    def faults(capacity: int, slot_size: int) -> int:
        command = [sys.executable, str(program), how, str(capacity), str(slot_size)]
        return min(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))

    least = faults(5, 64)
    for capacity, slot_size in ((1024, 1200), (64, 65536), (64, 1 << 20)):
        assert faults(capacity, slot_size) - least < 100


# --- instructions, and what of ringshm is Python's

compiled_only = pytest.mark.skipif(bool(ringshm.accelerated), reason=ringshm.accelerated)

INSTRUCTIONS = """
import os, subprocess, sys
from ringshm import Channel

def count(on):
    subprocess.run(["callgrind_control", "-i", on, str(os.getpid())], check=True, capture_output=True)

message, messages = eval(sys.argv[1]), int(sys.argv[2])
with Channel(8, 1024) as channel:
    for k in range(200 + messages):
        if k == 200:
            channel._look_at = float("inf")  # the look for the dead is not per message
            count("on")
        channel.put(message)
        channel.get()
    count("off")
"""


@compiled_only
@pytest.mark.skipif(shutil.which("callgrind_control") is None, reason="valgrind, which counts, is not installed")
@pytest.mark.parametrize(
    ("message", "most"),
    [
        ("bytes(64)", 5_000),  # in Python 40,000, and
        ("{'action': 3, 'reward': 0.5, 'done': False}", 25_000),  # 65,000
        ("{'obs': __import__('numpy').zeros(4, 'f4'), 'reward': 0.5}", 60_000),  # 120,000 where only this is in Python
    ],
    ids=["bytes", "dict", "observation"],
)
def test_a_message_takes_few_instructions(message: str, most: int) -> None:
    """A `put` and a `get` of a small one, with the loop around them, in the steady state."""
    counts = []
    for messages in (100, 1100):
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null"]
        command += [sys.executable, "-c", INSTRUCTIONS, message, str(messages)]
        ran = subprocess.run(command, capture_output=True, text=True)
        collected = re.search(r"Collected : (\d+)", ran.stderr)
        assert not ran.returncode and collected, ran.stderr
        counts.append(int(collected[1]))
    each = (counts[1] - counts[0]) / 1000
    print(f"{each:.0f} instructions")
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # whose locks and counts of references cost more
    assert 1000 < each < most * (1.5 if free_threaded else 1)


def _python_calls(call: Callable[[], object]) -> list[str]:
    """Which functions of ringshm a call enters that are Python's."""
    entered: list[str] = []

    def enter(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and folder_of(frame.f_code) is not None:
            entered.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)

    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


@compiled_only
@pytest.mark.parametrize(
    "message",
    [bytes(64), "text", 3, 0.5, None, np.zeros(100), {"action": 3}, [1, (2, 3)], {"obs": np.zeros(2)}],
    ids=str,
)
def test_a_call_that_succeeds_at_once_is_compiled(message: object) -> None:
    """Of Python there are the methods that only pass on their arguments, or that write down what was received."""
    with Channel(8, 2048) as channel:
        for _ in range(3):  # the first takes a role, and learns of a form
            channel._look_at = float("inf")
            calls = {
                "put": _python_calls(lambda: channel.put(message)),
                "put_nowait": _python_calls(lambda: channel.put_nowait(message)),
                "get": _python_calls(channel.get),
                "get_nowait": _python_calls(channel.get_nowait),
            }
        # what a pickle names is called by whoever unpickles it
        assert {name: len([one for one in entered if one != "array_over"]) for name, entered in calls.items()} == {
            "put": 0, "put_nowait": 1, "get": 1, "get_nowait": 2,
        }, calls  # fmt: skip

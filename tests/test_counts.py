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
from ringshm import Channel

with Channel(8, "4KiB") as channel:
    array = np.zeros(1024, np.uint8)
    for _ in range(2000):
        channel.put(array)
        channel.get_nowait()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(int(sys.argv[1])):
        channel.put(array)
        channel.get_nowait()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_put_and_get_nowait_take_no_page_fault() -> None:
    faults = subprocess.run([sys.executable, "-c", PROGRAM, "5000"], capture_output=True, text=True, check=True).stdout
    assert int(faults) == 0


def _system_calls(messages: int, log: Path) -> int:
    """System calls that a process makes in its life, with so many messages in it."""
    command = ["strace", "-f", "-c", "-U", "calls,name", "-o", str(log), sys.executable, "-c", PROGRAM, str(messages)]
    # the bytecode cache and the look for the dead, once in 50 ms, are not per message
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "0"})
    total = re.search(r"^\s*(\d+)\s+total$", log.read_text(), re.MULTILINE)
    assert total is not None
    return int(total[1])


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which counts system calls, is not installed")
def test_put_and_get_nowait_make_no_system_call(tmp_path: Path) -> None:
    _system_calls(0, tmp_path / "warm-up")
    few, many = (_system_calls(messages, tmp_path / str(messages)) for messages in (0, 5000))
    # a hundred calls of chance (memory, the clock) are 0.02 a message; one call a message would be 5000
    assert abs(many - few) < 100

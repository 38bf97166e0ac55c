"""What all tests share: a watchdog, and the rule that `/dev/shm` is left as it was found."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import time
from collections.abc import Iterator

import pytest

WATCHDOG_SECONDS = 60.0
STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The complete sweeps."""
    text = "kill and interrupt each operation at every bytecode (an hour or two): see tests/test_kills.py"
    parser.addoption("--every-bytecode", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Prepare for hangs and for Ctrl-C."""
    # as it is while pytest does not capture it: a dump of stacks must be seen
    config.stash[STDERR] = os.dup(2)
    # a shell's background job ignores Ctrl-C, and so would all children of the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)


def shared_memory() -> set[str]:
    """Names of ringshm's files in shared memory."""
    return {name for name in os.listdir("/dev/shm") if "ringshm" in name}


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    """Dump all stacks and end the run if a test hangs; slow ones say how long they may take."""
    marker = request.node.get_closest_marker("slow")
    seconds = marker.kwargs.get("seconds", 600.0) if marker else WATCHDOG_SECONDS
    faulthandler.dump_traceback_later(seconds, exit=True, file=request.config.stash[STDERR])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def shm_unchanged() -> Iterator[None]:
    """Fail a test that leaves something in `/dev/shm`; children get a moment to go."""
    before = shared_memory()
    yield
    give_up = time.monotonic() + 5
    while (left := shared_memory() - before) and time.monotonic() < give_up:
        gc.collect()
        time.sleep(0.02)
    assert not left

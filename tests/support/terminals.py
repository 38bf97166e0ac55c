"""A terminal of its own for the command line, with a size and keys to press, and what a person sees on it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from ringshm import Channel, Receiver
from support import workers

MAIN = "import sys\nfrom ringshm.tools.cli import main\nsys.exit(main(sys.argv[1:]))"
_START = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that it gets Ctrl-C
fcntl.ioctl(0, termios.TIOCSWINSZ, bytes.fromhex(sys.argv[1]))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
_HOME = "\x1b[H"  # each screen begins so


class Terminal:
    """`ringshm` on a terminal of its own."""

    def __init__(self, *argv: str, rows: int = 24, columns: int = 80, main: str = MAIN, **environment: str) -> None:
        self._controller, terminal = pty.openpty()
        size = struct.pack("HHHH", rows, columns, 0, 0).hex()
        unset = ("NO_COLOR", "FORCE_COLOR", "PYTHONPATH", "COLUMNS", "LINES")
        base = {key: value for key, value in os.environ.items() if key not in unset}
        base |= {"PYTHONPATH": str(workers.TESTS.parent), "TERM": "xterm", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, size, "-c", main, *argv],
            env=base | environment, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        )  # fmt: skip
        os.close(terminal)
        self.shown = ""

    def read_until(self, condition: Callable[[str], Any]) -> str:
        """Read until what is shown fulfils a condition; "" is a process that has ended."""
        while not condition(self.shown):
            if not self._read():
                raise AssertionError(f"it ended with {self.process.wait()}, and has shown {self.shown}")
        return self.shown

    def screen(self, condition: Callable[[list[str]], Any]) -> list[str]:
        """The lines of the first whole screen from now on that fulfils a condition, as a person sees them."""
        self.shown = ""
        found: list[list[str]] = []

        def look(shown: str) -> bool:
            *screens, _ = shown.split(_HOME)[1:] or [""]
            found[:] = [lines for each in screens if condition(lines := seen(each))]
            return bool(found)

        self.read_until(look)
        return found[0]

    def press(self, keys: str) -> None:
        os.write(self._controller, keys.encode())

    def end(self, keys: str = "") -> int:
        """Press keys, and read the rest; the status."""
        self.press(keys)
        while self._read():
            pass
        os.close(self._controller)
        return self.process.wait()

    def _read(self) -> bool:
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            if data := os.read(self._controller, 65536):
                self.shown += data.decode()
                return True
        return False


def seen(shown: str) -> list[str]:
    """The lines that a person sees of what was written to a terminal, without those at the end that are empty."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r\n", "\n").rstrip().split("\n")


@contextlib.contextmanager
def four_participants(name: str) -> Iterator[list[int]]:
    """A full channel: two senders wait for space, its receiver does nothing. The pids: ours, those two, that one."""
    with Channel(8, "64KiB", name=name) as channel, workers.Crew("fork") as crew:
        for k in range(8):
            channel.put(k)
        members = [crew.start(channel.sender().put, "waits") for _ in range(2)]
        members.append(crew.start(_do_nothing, channel.receiver()))
        workers.until(lambda: channel.stats().waiting_senders == 2 and len(channel.stats().participants) == 4)
        yield [os.getpid(), *(member.pid for member in members)]


def _do_nothing(_: Receiver[object]) -> None:
    time.sleep(600)

"""A terminal's other screen, as full-screen programs use it: pages are drawn on it, and keys are read.

The terminal is left as it was, however the program ends but by SIGKILL, and while Ctrl-Z stops it. Only the thread that
calls `show` and `pause` draws.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..system import monotonic
from .pages import Line, Page, styled
from .text import broken

# The other screen, no cursor; and back. Written past sys.stdout, which a signal handler may have interrupted.
_ON = b"\x1b[?1049h\x1b[?25l"
_OFF = b"\x1b[?25h\x1b[?1049l"
# While the terminal is put back. SIGTTOU stops a background process that sets a terminal's modes.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGTTOU)


class _Screenful(Page):
    """A page of one screen; the last line says if there is more."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []

    def pieces(self, line: str) -> Sequence[str]:
        """The lines that a line takes."""
        return broken(line, self.width) if self.width else [line]

    def put(self, lines: Iterable[Line]) -> None:
        """Add lines that are folded already."""
        self.lines += lines

    def drawn(self) -> str:
        """What draws it, over what was there."""
        lines, height = self.lines, self.height or 1
        if len(lines) > height:
            left = len(lines) - height + 1
            lines = [*lines[: height - 1], (f"{left} more lines: a taller terminal", "warn")]
        lines = lines + [("", "note")] * (height - len(lines))
        return "\x1b[H" + "\n".join("\x1b[K" + styled(line) for line in lines)


class Screen:
    """The other screen, from the first `show` on. `?` shows what `explain` puts on a page, any other key goes back.

    Attributes:
        keys: whether keys are read: the terminal is also where the input comes from, and this process's to read.
    """

    def __init__(self, explain: Callable[[Page], None]) -> None:
        self.keys = False
        self._explain = explain
        self._explains = False
        self._draw: Callable[[Page], None] | None = None
        self._modes: list[Any] | None = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        # a second Ctrl-C, whichever thread it meets, would leave the terminal on the other screen
        before = [signal.signal(number, signal.SIG_IGN) for number in _IGNORED]
        try:
            if self._draw is not None:
                signal.signal(signal.SIGTSTP, signal.SIG_DFL)
                self._leave()
        finally:
            for number, handler in zip(_IGNORED, before, strict=True):
                signal.signal(number, handler)

    def show(self, draw: Callable[[Page], None]) -> None:
        """Show what `draw` puts on a page."""
        if self._draw is None:  # not before: errors of the first look go to the usual screen
            self._draw = draw
            with contextlib.suppress(OSError, termios.error):
                if os.tcgetpgrp(0) == os.getpgrp():
                    self._modes = termios.tcgetattr(0)
                    self.keys = True
                    signal.signal(signal.SIGTSTP, self._stop)
            self._begin()
        self._draw = draw
        self._refresh()

    def pause(self, seconds: float) -> bool:
        """Wait for so long, and do meanwhile what keys say; whether it is to end."""
        until = monotonic() + seconds
        while (left := until - monotonic()) > 0:
            if not self.keys:
                time.sleep(left)
            elif select.select([0], [], [], left)[0]:
                pressed = os.read(0, 1024)
                if b"q" in pressed or not pressed:  # nothing: the terminal has gone
                    return True
                self._explains = b"?" in pressed and not self._explains
                self._refresh()
        return False

    def _begin(self) -> None:
        if self.keys:
            tty.setcbreak(0, termios.TCSANOW)
        os.write(sys.stdout.fileno(), _ON)

    def _leave(self) -> None:
        if self._modes is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, self._modes)
        os.write(sys.stdout.fileno(), _OFF)

    def _stop(self, *_: object) -> None:
        """Stop, as Ctrl-Z says. Who is sent on in the background stops again where it sets the terminal's modes."""
        self._leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._stop)
        self._begin()

    def _refresh(self) -> None:
        page, draw = _Screenful(), self._explain if self._explains else self._draw
        if draw is not None:
            draw(page)
        sys.stdout.write(page.drawn())
        sys.stdout.flush()

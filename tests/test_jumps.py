"""No `try` or `with` of ringshm has a loop whose jumps backward its handler does not guard: see support/jumps.py.

The first tests show that support/jumps.py knows what the interpreter does; the last, that ringshm has no such loop.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.jumps import unguarded_jumps

import ringshm

LOOPS = {
    "while True": "while True: x = 1",
    "while with a condition": "while items: x = 1",
    "for": "for item in items: x = 1",
    "for that ends with an if": "for item in items:\n            if not item: x = 1",
    "for with continue": "for item in items:\n            if item: continue\n            x = 1",
    "comprehension": "[item for item in items]",
    "comprehension with a condition": "[item for item in items if not item]",
    "any": "any(not item for item in items)",
}
GUARDS = {
    "except": "try:\n        {}\n    except BaseException: end()",
    "finally": "try:\n        {}\n    finally: end()",
    "with": "with Block():\n        {}",
    "except around another": "try:\n      try:\n        {}\n      except KeyError: pass\n    except Hit: end()",
    "finally of a generator": "try:\n        {}\n    finally: end()\n    yield",
}


class Hit(BaseException):
    """What the signal handler raises."""


class Hits:
    """A signal handler that raises in a loop, again and again: does that arrive at the loop's guard?"""

    def __init__(self) -> None:
        self.armed = self.arrived = False

    def handle(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            raise Hit

    def arm(self) -> None:
        """The loop begins, within the guard."""
        self.armed = True

    def end(self) -> None:
        """It has arrived."""
        self.arrived = True

    def __enter__(self) -> None:
        """The guard is a `with`."""

    def __exit__(self, *_: object) -> None:
        self.arrived = True

    def pass_by(self, function: Callable[[list[int]], Any]) -> bool:
        """Whether one of many passes the guard by."""
        items = [1] * 3_000_000
        for _ in range(25):
            self.arrived = False
            with contextlib.suppress(Hit):
                list(function(items) or ())
            if not self.arrived:
                return True
        return False


@pytest.fixture
def hits() -> Iterator[Hits]:
    hits = Hits()
    old = signal.signal(signal.SIGALRM, hits.handle)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.00217)
    yield hits
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_handler_raises_passes_a_guard_by_where_the_list_says_so(loop: str, guard: str, hits: Hits) -> None:
    source = "def function(items):\n    " + GUARDS[guard].format("arm()\n        " + LOOPS[loop])
    scope: dict[str, Any] = {"Block": lambda: hits, "Hit": Hit, "arm": hits.arm, "end": hits.end}
    exec(compile(source, "loops", "exec"), scope)
    assert hits.pass_by(scope["function"]) == bool(unguarded_jumps(source, "loops"))


def test_a_jump_that_leaves_its_try_is_not_listed() -> None:
    loop = "for item in items:\n    try:\n      if item: continue\n      print()\n    finally:\n      end()"
    assert not unguarded_jumps(f"def function(items):\n  {loop}", "loops")


def test_every_loop_of_ringshm_jumps_back_where_its_guards_guard_it() -> None:
    folder = Path(ringshm.__file__).parent
    files = [*folder.rglob("*.py")]
    assert len(files) > 50
    found = [gap for path in files for gap in unguarded_jumps(path.read_text(), str(path))]
    assert not found, "have a function of its own loop: " + "\n".join(map(str, found))

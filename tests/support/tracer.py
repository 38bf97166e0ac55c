"""One tracer for all tests: it counts what this thread executes inside ringshm, and acts before the n-th step.

A step is a bytecode, or with `lines` the begin of a line, which is coarser and faster. Before it a process may be
killed, be stopped, raise as a signal handler would, or let another process run.

What is counted is named by what it is, not by a file, so that a function may move to another file of its folder:

    folders     of the package: "ring", "channel", ...
    functions   by name
    fragment    of the source line
    when        a condition, asked before each step

A tracer that counted nothing has tested nothing: it fails when its block ends, and says what it looked for. While it
traces, the compiled path stands aside in this process: the tests of its instructions are in tests/kills/steps.

What CPython needs, from 3.10 to 3.15:

1. 3.12 traces bytecodes only if some frame had `f_trace_opcodes` set before `sys.settrace`.
2. 3.13 reads `f_trace` when `f_trace_opcodes` is set, so `f_trace` comes first.
3. At NOP, SETUP_FINALLY, SETUP_WITH and NOT_TAKEN no version runs a signal handler, and they raise nothing: they stand
   where a `try` begins, or (the last) where a branch goes on, in no range of the exception table. They are not counted.
4. Nor are, from 3.11 on, PUSH_EXC_INFO and POP_EXCEPT, where no handler runs either: an exception there would leave the
   thread with one that it seems to handle for ever, and that with all frames which it has passed through.
5. Nor where a `with` block has ended and `__exit__` is about to be called: no handler runs between the two, and an
   exception there would leave for ever locked what the block had locked.
"""

from __future__ import annotations

import dis
import gc
import linecache
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import ringshm
from ringshm.ring.acceleration import compiled

PACKAGE = os.path.dirname(ringshm.__file__)
_UNINTERRUPTED = {dis.opmap[name] for name in ("NOP", "SETUP_FINALLY", "SETUP_WITH", "NOT_TAKEN") if name in dis.opmap}
_CORRUPTING = {dis.opmap["PUSH_EXC_INFO"], dis.opmap["POP_EXCEPT"]} if "PUSH_EXC_INFO" in dis.opmap else set()
#: By the id of a code (its hash takes longer) and the kind of step: the code, so that it stays alive, and `_uncounted`.
_known: dict[tuple[int, str], tuple[CodeType, set[int]]] = {}


def _leaving_blocks(code: CodeType) -> set[int]:
    """The offsets of the instructions that end `with` blocks: `exit(None, None, None)`, see above, 5."""
    found: set[int] = set()
    instructions = list(dis.get_instructions(code))
    names = ["None" if (one.opname[:5], one.argrepr) == ("LOAD_", "None") else one.opname for one in instructions]
    for at in range(len(names) - 4):
        if names[at : at + 3] in (["None"] * 3, ["None", "DUP_TOP", "DUP_TOP"]):
            call = at + 3 + (names[at + 3] == "PRECALL")
            if names[call] in ("CALL", "CALL_FUNCTION"):
                begin = at
                while names[begin - 1] in ("NOP", "ROT_TWO", "SWAP"):
                    begin -= 1
                found |= {one.offset for one in instructions[begin : call + 1]}
    return found


def _uncounted(code: CodeType, kind: str) -> set[int]:
    """The offsets of what is no step of that kind: see above, 3 to 5."""
    known = _known.get((id(code), kind))
    if known is None:
        names = _CORRUPTING | (_UNINTERRUPTED if kind == "opcode" else set())
        found = {at for at in range(0, len(code.co_code), 2) if code.co_code[at] in names} | _leaving_blocks(code)
        known = _known[id(code), kind] = code, found
    return known[1]


def read_sources() -> None:
    """Have the package's sources in memory, for processes that are forked later and say where they are."""
    for folder, _, files in os.walk(PACKAGE):
        for file in files:
            if file.endswith(".py"):
                linecache.getlines(os.path.join(folder, file))


def folder_of(code: CodeType) -> str | None:
    """The folder of the package that the code is in, "" for the top; None if it is no code of the package."""
    directory = os.path.dirname(code.co_filename)
    if directory == PACKAGE:
        return ""
    return directory[len(PACKAGE) + 1 :] if directory.startswith(PACKAGE + os.sep) else None


@contextmanager
def in_python(aside: bool = True) -> Iterator[None]:
    """The compiled path stands aside in this process: all calls are Python's. Or, with False, it does not."""
    if compiled is None:
        yield
        return
    before = compiled.pause(aside)
    try:
        yield
    finally:
        compiled.pause(before)


class Tracer:
    """Count the steps of this thread, within a `with` block, and act before one of them.

    Args:
        act: called before the step; it may raise. `frame` is the step's frame meanwhile.
        at: which step, from 1; 0 for none, None for each.
        folders, functions, fragment, when: which steps count; see above. All do that are left out.
        lines: count lines, not bytecodes.
        may_miss: do not fail if nothing was counted.

    Attributes:
        count: steps so far; the one that `act` is called before is the last of them.
    """

    def __init__(
        self,
        act: Callable[[], object] = lambda: None,
        at: int | None = 1,
        *,
        folders: Sequence[str] = (),
        functions: Sequence[str] = (),
        fragment: str = "",
        when: Callable[[], bool] | None = None,
        lines: bool = False,
        may_miss: bool = False,
    ) -> None:
        for folder in folders:
            assert os.path.isdir(os.path.join(PACKAGE, folder)), f"ringshm has no folder {folder!r}"
        self.count = 0
        self.frame: FrameType | None = None
        self._act, self._at, self._when = act, at, when
        self._folders, self._functions, self._fragment = folders, functions, fragment
        self._event = "line" if lines else "opcode"
        self._may_miss = may_miss
        #: By the id of a code: the code, so that it stays alive, and what traces its frames, if they are counted.
        self._steps: dict[int, tuple[CodeType, Any]] = {}

    def __str__(self) -> str:
        functions = f" of {' or '.join(self._functions)}" if self._functions else ""
        folders = " or ".join(f"ringshm/{folder}" for folder in self._folders) or "ringshm"
        fragment = f" on a line with {self._fragment!r}" if self._fragment else ""
        condition = " while the condition holds" if self._when else ""
        return f"{'line' if self._event == 'line' else 'bytecode'}{functions} in {folders}{fragment}{condition}"

    def _counts(self, code: CodeType) -> bool:
        folder = folder_of(code)
        counts = folder is not None and (not self._folders or folder in self._folders)
        return counts and (not self._functions or code.co_name in self._functions)

    def _in_call(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        known = self._steps.get(id(code))  # not by the code, whose hash takes longer than all else here
        if known is None:
            known = self._steps[id(code)] = code, self._step_in(code) if self._counts(code) else None
        _, step = known
        if step is not None and self._event == "opcode":
            frame.f_trace = step  # before f_trace_opcodes: see above, 2
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        return step

    def _step_in(self, code: CodeType) -> Any:
        """What traces the frames of that code: most of what a trial costs, so it calls nothing that it need not."""
        kind, at, when, fragment = self._event, self._at, self._when, self._fragment
        uncounted = _uncounted(code, kind)

        def step(frame: FrameType, event: str, arg: object) -> Any:
            if event != kind or frame.f_lasti in uncounted:
                return step
            if fragment and fragment not in linecache.getline(code.co_filename, frame.f_lineno or 0):
                return step
            if when is None or when():
                self.count += 1
                if at is None or self.count == at:
                    self.frame = frame
                    try:
                        self._act()
                    finally:
                        self.frame = None
            return step

        return step

    def place(self) -> str:
        """Where the step is that is acted before: for people."""
        frame = self.frame
        assert frame is not None
        code, line = frame.f_code, frame.f_lineno or 0
        source = linecache.getline(code.co_filename, line).strip()
        opcode = dis.opname[code.co_code[frame.f_lasti]]
        return f"{os.path.relpath(code.co_filename, PACKAGE)}:{line} {code.co_name}: {source} [{opcode}]"

    def is_in(self, folder: str) -> bool:
        """Whether a call into that folder of the package is under way at the step that is acted before."""
        frame = self.frame
        while frame is not None:
            if folder_of(frame.f_code) == folder:
                return True
            frame = frame.f_back
        return False

    def __enter__(self) -> Tracer:
        self._collecting = gc.isenabled()
        self._in_python = in_python()
        self._in_python.__enter__()
        self._before = sys.gettrace()
        gc.disable()  # finalisers of earlier objects are no part of what is traced
        if self._event == "opcode":
            sys._getframe().f_trace_opcodes = True  # see above, 1
        sys.settrace(self._in_call)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        sys.settrace(self._before)
        self._in_python.__exit__(None, None, None)
        if self._collecting:
            gc.enable()
        if kind is None and not self.count and not self._may_miss:
            raise AssertionError(f"nothing came by a {self}: was it renamed?")


def bytecodes(call: Callable[[], Any], before: Callable[[int], None], folders: Sequence[str] = ()) -> Any:
    """Make a call, with `before(n)` run before its n-th bytecode inside ringshm (or those folders of it), from 0."""
    with Tracer(lambda: before(tracer.count - 1), None, folders=folders) as tracer:
        return call()


def count_bytecodes(call: Callable[[], Any], folders: Sequence[str] = ()) -> int:
    """How many bytecodes a call takes inside ringshm."""
    with Tracer(at=0, folders=folders) as tracer:
        call()
    return tracer.count


class Interrupt(KeyboardInterrupt):
    """What a signal handler raises."""


def interrupt_at(call: Callable[[], Any], at: int, folders: Sequence[str] = ()) -> tuple[bool, Any]:
    """Make a call that is interrupted before its bytecode number `at`, from 0: (whether it was, what it returned)."""

    def interrupt() -> None:
        raise Interrupt(f"at bytecode {at}")

    try:
        with Tracer(interrupt, at + 1, folders=folders):
            return False, call()
    except Interrupt:
        return True, None

"""The children of this process, as the libraries that start them know them: multiprocessing and those made after it.

A handle that goes to a child counts from the child's start until its end. So the process that starts the child has to
know, before that, which handles the child is given; and, right after it, the child's pid.

1. Under `spawn` and `forkserver` a library pickles the child's arguments inside its Popen object, which it names
   meanwhile (`get_spawning_popen`). The Popen passes descriptors to the child, and gets its attribute `pid` once the
   child is there: `when_started` waits for that.
2. Under `fork` a Popen calls `os.fork`, with the Process object in a local variable: so a hook that runs before the
   fork finds the Process on the stack, and with it the handles that its target and arguments lead to.

multiprocess (for dill) and billiard (of Celery) are copies of multiprocessing with modules of their own. Pools,
executors and DataLoaders start their processes by one of these.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.util  # noqa: F401 - in any case loaded: this process exits by it
import signal
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from ..living import Living

_LIBRARIES = ("multiprocessing", "multiprocess", "billiard")
#: Objects among which a fork looks for the handles that its child is given; beyond, all that it inherits count.
_MOST_ARGUMENTS = 10_000
#: Seconds to wait for the exit code of a child that has just ended: under `forkserver` another process reports it.
_PATIENCE = 0.1
#: Frames between `os.fork` in a Popen and the hook that runs before the fork.
_MOST_FRAMES = 5
_seen: Living[Any] = Living()


def _modules(name: str) -> list[Any]:
    """That module of each library that is in use here."""
    return [sys.modules[f"{library}.{name}"] for library in _LIBRARIES if f"{library}.{name}" in sys.modules]


def utilities() -> list[Any]:
    """The `util` of each library that is in use here: its finalizers run when a child of it exits."""
    return _modules("util")


# --- started by pickling


def spawning_popen() -> Any:
    """The Popen for whose child an object is being pickled; None if for nobody in particular."""
    popens = (module.get_spawning_popen() for module in _modules("context"))
    return next((popen for popen in popens if popen is not None), None)


def when_started(popen: Any, call: Callable[[int], object]) -> None:
    """Have `call(pid)` called once the Popen has started its child. It must not raise.

    No library tells of that moment, so the Popen's class is replaced until then by one that sees `pid` being set.
    """
    kind = type(popen)
    _seen.add(popen)

    class Starting(kind):  # type: ignore[misc, valid-type]
        @property
        def pid(self) -> int:
            raise AttributeError("pid")

        @pid.setter
        def pid(self, pid: int) -> None:
            self.__class__ = kind
            self.pid = pid  # which another `Starting` may see, if several handles go to the child
            call(pid)

    Starting.__name__, Starting.__qualname__, Starting.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    popen.__class__ = Starting


# --- started by fork


def process_being_forked() -> tuple[Any, Any]:
    """The Process that this thread is about to fork, and its Popen; None and None if a program calls `os.fork`."""
    frame: types.FrameType | None = sys._getframe(1)
    for _ in range(_MOST_FRAMES):
        if frame is None:
            break
        if frame.f_code.co_name == "_launch" and "process_obj" in frame.f_locals:
            process = frame.f_locals["process_obj"]
            with contextlib.suppress(TypeError):
                _seen.add(process)
            return process, frame.f_locals.get("self")
        frame = frame.f_back
    return None, None


def handles_given(process: Any, handles: Iterable[int]) -> set[int] | None:
    """Which of these handles (by `id`) the target and arguments of a Process lead to.

    Returns:
        None if that is not known: they lead to more than 10,000 objects.
    """
    wanted, given, seen, todo = set(handles), set[int](), set[int](), [process]
    while todo:
        obj = todo.pop()
        if id(obj) in wanted:
            given.add(id(obj))
        elif id(obj) not in seen and not isinstance(obj, (type, types.ModuleType, types.BuiltinFunctionType)):
            seen.add(id(obj))
            if isinstance(obj, types.FunctionType):  # of its globals only the ones that it names
                todo += [obj.__defaults__, obj.__kwdefaults__, obj.__closure__]
                todo += [obj.__globals__.get(name) for name in obj.__code__.co_names]
            else:
                todo += gc.get_referents(obj)
        if len(seen) > _MOST_ARGUMENTS:
            return None
    return given


# --- ended


def end_of(pid: int) -> str:
    """How a child of this process has ended, "exit code 3" or "killed by SIGKILL"; "" if that is not known here."""
    children = {
        *_seen.all(),
        *(child for module in _modules("process") for child in [*getattr(module, "_children", ())]),
    }
    for child in children:
        with contextlib.suppress(Exception):  # of another library, closed, or of a parent
            popen = getattr(child, "_popen", child)
            if popen.pid == pid and (code := popen.wait(_PATIENCE)) is not None:
                return f"exit code {code}" if code >= 0 else f"killed by {_signal(-code)}"
    return ""


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

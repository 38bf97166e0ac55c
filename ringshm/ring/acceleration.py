"""Whether the compiled path (compiled.pyx) is in use, and if not, why.

It is not where it was not built, since that is optional, or on a Python that it does not fit, or where the
environment variable RINGSHM_PURE is set. Then the Python code does everything, on the same segments.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..segment.semaphores import HAS_ADDRESSES
from ..system import RLock


def _load() -> tuple[Any, str]:
    """The module, or None and a sentence that says why not."""
    if os.environ.get("RINGSHM_PURE", "0") not in ("", "0"):
        return None, "RINGSHM_PURE is set: unset it to use the compiled path."
    if not HAS_ADDRESSES:
        return None, "This Python was built without the semaphores of multiprocessing, which the compiled path needs."
    try:
        module = import_module(".compiled", __package__)  # `from . import` would not say that it is missing
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        reason = "was not built: install ringshm where there is a C compiler" if missing else f"does not load: {error}"
        return None, f"The compiled path {reason}."
    return module, ""


#: The module; None where all is Python. And why that is so: "" where the compiled path is in use, else a sentence.
compiled, accelerated = _load()
#: Makes what keeps this process's threads apart at a mutex. Where they run at once the compiled path takes it, too.
LocalLock: Callable[[], Any] = compiled.LocalLock if compiled is not None and compiled.threads_at_once else RLock


class Uncompiled:
    """What a handle has of the compiled path: where there is none, nothing."""

    #: When a call looks for the dead next.
    _look_at: float
    #: Whether a `put` into a full ring drops the oldest message.
    _drops_oldest: bool

    def _bind_compiled(self, attachment: Any, codec: Any) -> None:
        """Use the ring of that attachment, and that codec."""

    def _unbind_compiled(self) -> None:
        """The handle is closed."""

    def _role_taken(self, sends: bool) -> None:
        """The handle counts in that role, for the participant that this process is now."""

    def _wait_compiled(self, space: bool, until: float, endless: bool, need: int) -> bool:
        """Wait for so many messages, or a slot: whether they may be there. If not, go on in Python, or time is up."""
        return False


class UncompiledBorrow:
    """The state of a borrow's block."""

    #: While the block lasts; None for `__del__`, should an exception end `__init__`.
    _hold: Any = None


class UncompiledLoan:
    """The state of a loan's block."""

    __slots__ = (
        "_arrays",
        "_attachment",
        "_buffer",
        "_channel",
        "_claimed",
        "_discarded",
        "_end",
        "_fields",
        "_nbytes",
        "_timeout",
    )


if TYPE_CHECKING or compiled is None:  # mypy knows a base class from a statement
    CompiledHandle = Uncompiled
    CompiledBorrow = UncompiledBorrow
    CompiledLoan = UncompiledLoan
else:
    CompiledHandle = compiled.CompiledHandle
    CompiledBorrow = compiled.CompiledBorrow
    CompiledLoan = compiled.CompiledLoan

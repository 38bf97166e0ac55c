"""Has the public calls begin in the compiled path, where that is in use (ring/compiled.pyx).

The methods of `Sends` and `Receives` are the reference: they are replaced by ones that make the first attempt in the
compiled path, which calls the reference for all that does not succeed at once.

CPython runs signal handlers when a C function has returned to a Python one, and if a handler raises then, what the C
function returned is lost. So a call that receives is a Python function around the compiled one, which writes down what
it has received: an interrupted call leaves that to the next one, as `Ring.receive` does.
"""

from __future__ import annotations

from functools import update_wrapper
from typing import Any

from ..ring.acceleration import compiled
from ..ring.slots import NEW_BATCH
from .latest import Latest
from .loans import Borrow, Loan
from .receiver import Receives
from .sender import Sends
from .sending import Sending


def _get(self: Any, block: bool = True, timeout: float | None = None, out: Any = None) -> Any:
    received: list[Any] = []
    try:
        return compiled.take(self, received, block, timeout, out)
    except BaseException:
        compiled.keep(self, received, out)  # a function in C, so that no other handler runs before it has
        raise


def _get_many(self: Any, max_messages: int, timeout: float | None = None) -> list[Any]:
    received: list[Any] = []
    try:
        compiled.take_many(self, received, max_messages, timeout)
        return received
    except BaseException:
        compiled.keep(self, received, None)
        raise


def _get_batch(self: Any, n: int, *, min: int | None = None, timeout: float | None = None, out: Any = None) -> Any:
    received: list[Any] = []
    try:
        return compiled.take_batch(self, received, n, min, timeout, out)
    except BaseException:
        compiled.keep(self, received, NEW_BATCH if out is None else out)
        raise


def accelerate() -> None:
    """Replace the methods, if there is anything to replace them by."""
    if compiled is not None:
        compiled.replace(
            Sends.put,
            Receives.get,
            Receives.get_many,
            Receives.get_batch,
            Sending._encode_each,
            Sending._encode_rows,
        )
        for cls, name, function in (
            (Sends, "put", compiled.put),
            (Sending, "_encode_each", compiled.encode_each),
            (Sending, "_encode_rows", compiled.encode_rows),
            (Receives, "get", _get),
            (Receives, "get_many", _get_many),
            (Receives, "get_batch", _get_batch),
            (Sends, "loan", compiled.loan),
            (Receives, "borrow", compiled.borrow),
        ):
            setattr(cls, name, update_wrapper(function, getattr(cls, name)))
        _accelerate_blocks()


def _accelerate_blocks() -> None:
    """Replace a Latest's calls, and the methods of blocks, which are those of their compiled bases then."""
    reference: dict[tuple[str, str], Any] = {("Borrow", "_fail"): Borrow._fail}
    for name in ("publish", "read"):
        reference["Latest", name] = method = vars(Latest)[name]
        setattr(Latest, name, update_wrapper(getattr(compiled, name), method))
    for cls, names in (
        (Loan, ("__enter__", "__exit__", "__getitem__", "__setitem__", "array", "buffer")),
        (Borrow, ("__enter__", "__exit__", "__getitem__", "__del__", "_end", "value")),
    ):
        for name in names:
            method = vars(cls)[name]
            reference[cls.__name__, name] = method.fget if isinstance(method, property) else method
            delattr(cls, name)
            if not name.startswith("_") and not isinstance(method, property):
                update_wrapper(getattr(cls, name), method)
    compiled.replace_blocks(reference, Loan, Borrow)


accelerate()

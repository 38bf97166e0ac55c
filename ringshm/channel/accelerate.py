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
    """Replace the methods, if there is anything to replace them by. A block's are those of its compiled base then."""
    if compiled is None:
        return
    reference: dict[str, Any] = {"Borrow._fail": Borrow._fail}
    for cls, functions in (
        (Sends, {"put": compiled.put, "loan": compiled.loan}),
        (Sending, {"_encode_each": compiled.encode_each, "_encode_rows": compiled.encode_rows}),
        (Receives, {"get": _get, "get_many": _get_many, "get_batch": _get_batch, "borrow": compiled.borrow}),
        (Latest, {"publish": compiled.publish, "read": compiled.read, "_borrow": compiled.borrow_newest}),
        (Loan, dict.fromkeys(("__enter__", "__exit__", "__getitem__", "__setitem__", "array", "buffer"))),
        (Borrow, dict.fromkeys(("__enter__", "__exit__", "__getitem__", "__del__", "_end", "value"))),
    ):
        for name, function in functions.items():
            method = vars(cls)[name]
            reference[f"{cls.__name__}.{name}"] = method.fget if isinstance(method, property) else method
            if function is not None:
                setattr(cls, name, function)
            else:
                delattr(cls, name)
            if hasattr(replaced := getattr(cls, name), "__dict__"):
                update_wrapper(replaced, method)
    compiled.replace(reference, Loan, Borrow)


accelerate()

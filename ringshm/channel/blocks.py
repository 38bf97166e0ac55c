"""What loans and borrows say of their `with` block where it is missing, or has ended."""

from __future__ import annotations

from typing import NoReturn


def show(of: object, name: str, begun: bool, is_open: str, call: str) -> str:
    """The repr of a loan or borrow.

    Args:
        of: the loan or borrow.
        name: of its channel.
        begun: whether its block has begun; it may have ended.
        is_open: what the repr says while the block lasts; "" otherwise.
        call: how the block begins, as in "with channel.borrow() as message:".
    """
    state = is_open or ("ended" if begun else f"not begun: it needs a block, `{call}`")
    return f"<{type(of).__name__} of channel {name!r}, {state}>"


def refuse(what: str, name: str, begun: bool, call: str) -> NoReturn:
    """Raise for a use outside of the block."""
    if begun:
        raise ValueError(f"channel {name!r}: the block of this {what} has ended: use it within, or copy what you need")
    raise ValueError(f"channel {name!r}: this {what} has not begun: write `{call}`, and use it in that block")


def refuse_attribute(of: object, attribute: str, name: str, call: str) -> NoReturn:
    """Raise for an attribute of what gives it to an asynchronous block alone."""
    raise AttributeError(
        f"{type(of).__name__!r} object has no attribute {attribute!r} (channel {name!r}): write `{call}`, and use that "
        "in the block"
    )

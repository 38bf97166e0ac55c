"""A seat: what an attachment counts of one open handle.

A handle owns its seat; the attachment finds the seats of its open handles and adds them up into the process's entry
(attachment.Attachment.update_roles). So the attachment knows the roles, and not what a handle is.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass, field
from typing import Protocol

from ..segment.layout import RECEIVER, SENDER, UNDECIDED


class Holder(Protocol):
    """What a seat knows of its handle."""

    def close(self) -> None:
        """Close the handle, which vacates the seat."""


#: Packages whose code is none of the user's program: they pickle handles and start processes.
_NOT_THE_USERS = {
    *("ringshm", "multiprocessing", "multiprocess", "billiard", "concurrent", "threading"),
    *("pickle", "copyreg", "copy", "dill", "cloudpickle", "joblib", "torch"),
}


def caller() -> str:
    """The place in the user's program that is being executed: "file.py:12"; empty if only libraries' code is."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        if frame.f_back is None:
            return ""
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def levels_to_the_user() -> int:
    """The `stacklevel` of a warning that the caller gives: so that it names the line of the user's program."""
    frame, levels = sys._getframe(1), 1
    while frame.f_globals.get("__name__", "").partition(".")[0] == "ringshm" and frame.f_back is not None:
        frame, levels = frame.f_back, levels + 1
    return levels


@dataclass(eq=False)
class Seat:
    """The role of one handle, and how far it has taken it.

    Attributes:
        holder: the handle.
        role: SENDER, RECEIVER, or UNDECIDED, if the handle may still become either.
        creator: whether the handle has made the segment.
        sends, receives: whether the handle counts in that role.
        sent, received: whether a call of the handle has used that role in this process.
        inherited: whether a fork has brought the handle here.
        stray: whether the process was started with other handles than this one, which it merely inherited.
        made_at: the place in the user's program where the handle was made.
    """

    holder: weakref.ref[Holder]
    role: int
    creator: bool = False
    sends: bool = False
    receives: bool = False
    sent: bool = False
    received: bool = False
    inherited: bool = False
    stray: bool = False
    made_at: str = field(default_factory=caller)

    def __post_init__(self) -> None:
        self._begin()

    @property
    def holder_id(self) -> int:
        """The `id` of the handle; 0 if that is gone."""
        return id(holder) if (holder := self.holder()) is not None else 0

    def _begin(self) -> None:
        self.sends, self.receives = self.role == SENDER, self.role == RECEIVER
        self.sent = self.received = False

    @property
    def undecided(self) -> bool:
        """Whether the handle may still take either role."""
        return self.role == UNDECIDED and not (self.sends or self.receives)

    def inherit(self) -> None:
        """In a forked child: the role begins anew."""
        self._begin()
        self.creator, self.inherited = False, True

    def leave_to_others(self) -> None:
        """The handle is a stray: it counts for nothing until it is used."""
        self.stray, self.sends, self.receives = True, False, False

    def vacate(self) -> None:
        """The handle is closed."""
        self.sends = self.receives = self.sent = self.received = False

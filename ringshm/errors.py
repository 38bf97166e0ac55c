"""The errors that ringshm raises, divided by who has to act.

Closed: this side ended it. Broken: the peer has gone. End: the stream is over, which is normal. Each class also
derives from the built-in class that callers of pipes, files and queues already catch. Time-outs are `queue.Full`
and `queue.Empty` themselves.
"""

from __future__ import annotations

import errno
from typing import Any

__all__ = [
    "BrokenChannel",
    "ChannelClosed",
    "ChannelCorrupted",
    "ChannelDeadlock",
    "ChannelExists",
    "ChannelForbidden",
    "ChannelNotFound",
    "EndOfChannel",
    "IncompatibleChannel",
    "InsufficientSharedMemory",
    "InterruptedCall",
    "PayloadTooLarge",
    "ReentrantCall",
    "RingshmError",
    "SpecMismatch",
    "TooManyBorrows",
    "TooManyParticipants",
    "UndecodableMessage",
]


class RingshmError(Exception):
    """Base of all errors of ringshm."""


class ChannelClosed(RingshmError, ValueError):
    """This handle was closed, or somebody called `shutdown`; open or make another channel."""


class EndOfChannel(RingshmError, EOFError):
    """All messages were received and no sender is left or may still come: the normal end of a stream."""


class BrokenChannel(RingshmError, BrokenPipeError):
    """No receiver is left or may still come: what is sent would never be read."""


class PayloadTooLarge(RingshmError, ValueError):
    """The encoded message does not fit into a slot; nothing was sent."""


class SpecMismatch(RingshmError, ValueError):
    """A message does not have the fields, shapes or types that the channel's spec declares."""


class ChannelCorrupted(RingshmError, OSError):
    """The segment, or the file of that name, does not hold what a channel must hold."""


class ChannelExists(RingshmError, FileExistsError):
    """A live process uses a channel of that name."""


class ChannelNotFound(RingshmError, FileNotFoundError):
    """There is no channel of that name, or only dead processes have left one."""


class ChannelForbidden(RingshmError, PermissionError):
    """The channel of that name belongs to another user."""


class IncompatibleChannel(RingshmError, OSError):
    """The channel was made by a version of ringshm with another layout, or with another codec."""


class TooManyParticipants(RingshmError, OSError):
    """As many processes as `max_participants` are attached, all of them alive."""


class TooManyBorrows(RingshmError, RuntimeError):
    """Readers of a Latest hold as many versions as its `borrows` allows; `read` copies, and is not limited."""


class InsufficientSharedMemory(RingshmError, OSError):
    """The file system of shared memory has not enough space for the segment; `errno` is ENOSPC."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self),)


class UndecodableMessage(RingshmError):
    """The codec could not decode what arrived (`__cause__` says why); the message counts as received."""


class ChannelDeadlock(RingshmError, RuntimeError):
    """A call that could never end: all slots are held by loans, borrows or views in threads that wait themselves."""


class InterruptedCall(RingshmError, RuntimeError):
    """A signal handler has raised in an earlier call, of another kind, when that had just received a message.

    What it received is older than what this call would return. A call of the earlier kind returns it.
    """


class ReentrantCall(RingshmError, RuntimeError):
    """A signal handler or finaliser called into a channel while it had interrupted a call that holds its mutex.

    Waiting would wait for oneself. Set a flag in the handler and make the call in the main program.
    """

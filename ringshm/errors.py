"""The errors that ringshm raises.

    ended        ChannelClosed: this side closed it. BrokenChannel: the receivers have gone. EndOfChannel: the stream is
                 over, which is normal
    message      PayloadTooLarge, SpecMismatch, UndecodableMessage: the caller, or the sender, changes the message
    name         ChannelExists, ChannelNotFound, ChannelForbidden, IncompatibleChannel, ChannelCorrupted
    limit        TooManyParticipants, TooManyBorrows, InsufficientSharedMemory, ChannelUnavailable
    program      ReentrantCall, InterruptedCall, ChannelDeadlock: the program makes a call where it cannot be made

Each class also derives from the built-in class that callers of pipes, files and queues already catch. A time-out is
`queue.Full` or `queue.Empty` itself. Every text names the channel and says what to do next.
"""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Callable
from typing import Any


class RingshmError(Exception):
    """Base of all errors of ringshm.

    Attributes:
        sent: if the error ends `put_many` or `put_batch`, how many messages they had sent. Any other exception that
            ends these has the attribute, too.
    """

    sent: int


class ChannelClosed(RingshmError, ValueError):
    """This handle was closed, or a process called `shutdown`: attach again, or make another channel."""


class EndOfChannel(RingshmError, EOFError):
    """All messages were received, and no sender is left or may still come: the normal end of a stream."""


class BrokenChannel(RingshmError, BrokenPipeError):
    """No receiver is left or may still come: a message would never be received."""


class PayloadTooLarge(RingshmError, ValueError):
    """The encoded message does not fit into a slot. Nothing was sent."""


class SpecMismatch(RingshmError, ValueError):
    """A message does not have the fields, shapes or dtypes that the channel's spec declares."""


class ChannelCorrupted(RingshmError, OSError):
    """The file of that name is no segment of ringshm, or the segment was damaged."""


class ChannelExists(RingshmError, FileExistsError):
    """A live process uses a channel of that name."""


class ChannelNotFound(RingshmError, FileNotFoundError):
    """There is no channel of that name, or all processes that used it have died."""


class ChannelForbidden(RingshmError, PermissionError):
    """The channel of that name belongs to another user."""


class IncompatibleChannel(RingshmError, OSError):
    """The channel was made by a version of ringshm with another layout, or with another codec."""


class TooManyParticipants(RingshmError, OSError):
    """As many live processes as `max_participants` allows are attached already."""


class TooManyBorrows(RingshmError, RuntimeError):
    """Readers of a Latest hold as many versions as its `borrows` allows. `read`, which copies, is not limited."""


class InsufficientSharedMemory(RingshmError, OSError):
    """The file system of shared memory has too little space for the segment; `errno` is ENOSPC."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self),)


class ChannelUnavailable(RingshmError, OSError):
    """This process cannot make, open, or go on using the channel; `errno` says which limit is in the way.

    A limit of the process or of the host is reached, it may not open the segment, or its descriptors were closed.
    """


def again(error: ChannelUnavailable) -> ChannelUnavailable:
    """The same error for a further call. An error that is kept for that must have no traceback, which keeps frames."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy


class UndecodableMessage(RingshmError):
    """The codec could not decode a message; `__cause__` says why. The message counts as received."""


class ChannelDeadlock(RingshmError, RuntimeError):
    """The call could never end: threads that wait themselves hold all slots, by loans, borrows or views."""


class InterruptedCall(RingshmError, RuntimeError):
    """A signal handler raised in an earlier call, of another kind, when that call had just received a message.

    That message is older than any that this call could return. A call of the earlier kind returns it.
    """


class ReentrantCall(RingshmError, RuntimeError):
    """A signal handler or finaliser called into a channel while it had interrupted a call that holds its mutex.

    The call would wait for itself. Set a flag in the handler, and make the call in the main program.
    """


def is_own(error: BaseException) -> bool:
    """Whether ringshm's code has met that error, in the kernel or in words of a segment, where it is caught.

    If not, a signal handler has raised it, or a user's codec: it has passed through frames that are not ringshm's. What
    another thread has raised in this one has no frame, but no `errno` either, which each error of the kernel has.
    """
    if isinstance(error, OSError) and error.errno is None and not isinstance(error, RingshmError):
        return False
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return all(module.startswith("ringshm.") or module == "contextlib" for module in modules)


class suppress_own(contextlib.suppress):
    """`contextlib.suppress` for what ringshm's own code meets: what a signal handler raises meanwhile goes on."""

    def __exit__(self, kind: Any, error: Any, frames: Any) -> bool:
        return bool(super().__exit__(kind, error, frames)) and is_own(error)


def check_fails_again(call: Callable[[], object], error: Exception) -> None:
    """After a call of other code has failed with that error: raise it if the call succeeds now, since a signal handler
    has raised it. So one may tell where the frames of the error do not.

    Raises:
        Exception: also another one that the call fails with now.
    """
    try:
        call()
    except type(error):
        return
    raise error


def missing(module: str, library: str, extra: str, error: ImportError) -> ImportError:
    """The error of a module of ringshm whose library is not there: only that extra of ringshm installs it."""
    return ImportError(
        f"{module} needs {library}, which is in the extra [{extra}] of ringshm: pip install '.[{extra}]' in a copy of "
        f"its repository ({error})"
    )

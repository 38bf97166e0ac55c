"""Channel, Sender and Receiver: the handles that users hold. Objects in, objects out.

    Endpoint    what both roles have (endpoint.py)
    Sends       the methods that send (sender.py), on the steps of Sending (sending.py)
    Receives    the methods that receive (receiver.py), on the steps of Receiving (receiving.py)

A handle takes a role at its first `put` or `get`, unless its class fixes the role.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

from ..annotations import M, Oversize, T, T_co, T_contra, V, WaitStrategy, WhenFull
from ..arguments import choice, whole_number
from ..messages.codecs import Codec
from ..messages.specs import Fields, Spec, SpecLike
from ..process import registry
from ..segment import layout
from ..segment.files import check_name
from . import accelerate  # noqa: F401
from .handle import Handle, check_codec, spec_or_size
from .receiver import Receives
from .sender import Sends

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..annotations import ChannelOptions


class Sender(Sends[T_contra]):
    """A handle that only sends; get it from `Channel.sender()`."""

    role = layout.SENDER

    if not TYPE_CHECKING:  # to a type checker it would say that the other role's methods are there

        def __getattr__(self, attribute: str) -> NoReturn:
            raise _missing(self, attribute, Receives, "receiver")


class Receiver(Receives[T_co]):
    """A handle that only receives; get it from `Channel.receiver()`."""

    role = layout.RECEIVER

    if not TYPE_CHECKING:  # as Sender

        def __getattr__(self, attribute: str) -> NoReturn:
            raise _missing(self, attribute, Sends, "sender")


def _missing(handle: Handle, attribute: str, other: type[Handle], role: str) -> AttributeError:
    text = f"{type(handle).__name__!r} object has no attribute {attribute!r}"
    if hasattr(other, attribute):
        text += f": that is for a handle of the other role; get one with channel.{role}()"
    return AttributeError(text)


class Channel(Sends[T], Receives[T]):
    """A preallocated ring of `capacity` slots in shared memory, between any processes and threads of one machine.

    Many may send, many may receive. Each message goes to one receiver, in the order in which the `put`s completed.
    While the ring is full `put` waits; while it is empty `get` waits. A process that dies takes nothing with it: a
    message that it was about to send is not sent, and a message that it had not received whole goes to another.
    `Channel[Step](…)` tells a type checker what the messages are; `spec=Spec[Step](…)` and a codec tell it, too.

    >>> import ringshm
    >>> with ringshm.Channel(capacity=64, slot_size="4KiB") as channel:
    ...     channel.put({"reward": 1.0})
    ...     channel.get()
    {'reward': 1.0}

    Args:
        capacity: number of slots: messages that may be on their way at once.
        slot_size: largest encoded message in bytes, or a string such as "64KiB"; a bare array or `bytes` of exactly
            that size fits.
        spec: in place of slot_size and codec, what each message is: fields of fixed dtype and shape, see `Spec`.
        name: for `Channel.attach`; None makes a fresh, unguessable one. A name that only dead processes have left is
            reclaimed.
        codec: "pickle" (any picklable object), "plain" (built-in types and arrays; decoding runs no code), or an
            object with the `Codec` protocol.
        oversize: what becomes of a message larger than a slot. "stream" sends it in pieces of a slot's size, through as
            many slots as are free, or only one (see `put`); "error" refuses it with PayloadTooLarge.
        wait: "adaptive" (spin briefly while that pays, then sleep), "block" (sleep at once) or "spin" (never sleep;
            costs a core for each waiter).
        when_full: "wait", or "drop_oldest": the oldest unread message goes, and is counted. Only if there is none to
            drop, since all slots are being read or written, `put` waits, as long as its `timeout` says.
        keep_open: keep both ends open while this process lives, whoever else comes and goes.
        max_deliveries: how often a message is delivered, if its receivers die on it, before it is dropped.
        prefault: map all pages now, not at their first use. They are reserved in any case. Other processes map what
            they use.
        max_participants: how many processes may be attached at once.
        reuse_memory: receive arrays of 1 MiB and more into memory of earlier ones that nothing refers to any more: this
            saves page faults. The process keeps up to 256 MiB for it. The arrays are yours like any other, but they do
            not own their data (`flags.owndata`), so `resize` in place refuses.

    Raises:
        TypeError, ValueError: for an argument that makes no sense, by its name.
        ChannelExists: if a live process uses the name.
        InsufficientSharedMemory: if /dev/shm has not the space; nothing is left behind.
        ChannelUnavailable: if another limit of the process or host is in the way; it says which. The same.

    Any call raises ChannelCorrupted if it finds words in the segment that no channel can hold. It raises ReentrantCall
    if a signal handler or a finaliser makes it, and has interrupted a call that holds the mutex. It raises
    ChannelUnavailable in a forked child that cannot open the segment for itself, and in a process whose descriptors
    other code has closed, so that others take it for dead.
    """

    @overload
    def __init__(
        self, capacity: int, slot_size: None = None, *, spec: Spec[T], **options: Unpack[ChannelOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: Channel[dict[str, Any]],
        capacity: int,
        slot_size: None = None,
        *,
        spec: Fields,
        **options: Unpack[ChannelOptions],
    ) -> None: ...
    @overload
    def __init__(
        self,
        capacity: int,
        slot_size: int | str,
        *,
        codec: Literal["pickle", "plain"] | Codec[T] = "pickle",
        **options: Unpack[ChannelOptions],
    ) -> None: ...
    def __init__(
        self,
        capacity: int,
        slot_size: int | str | None = None,
        *,
        spec: SpecLike | None = None,
        name: str | None = None,
        codec: Literal["pickle", "plain"] | Codec[T] = "pickle",
        oversize: Oversize = "stream",
        wait: WaitStrategy = "adaptive",
        when_full: WhenFull = "wait",
        keep_open: bool = False,
        max_deliveries: int = 3,
        prefault: bool = True,
        max_participants: int = 256,
        reuse_memory: bool = True,
    ) -> None:
        self._attachment = None
        capacity = whole_number(capacity, "capacity")
        declared, nbytes = spec_or_size("channel", spec, slot_size)
        if declared is not None and codec != "pickle":
            raise TypeError(f"codec={codec!r} and spec were given: a channel with a spec needs no codec")
        if name is not None:
            check_name(name)
        custom = check_codec(codec)
        options = layout.Options(
            codec="spec" if declared is not None else "custom" if custom is not None else str(codec),
            oversize=choice("oversize", oversize, layout.OVERSIZE),
            wait=choice("wait", wait, layout.WAIT_STRATEGIES),
            when_full=choice("when_full", when_full, layout.WHEN_FULL),
            keep_open=bool(keep_open),
            max_deliveries=whole_number(max_deliveries, "max_deliveries", layout.MAX_DELIVERIES),
            kind=self.kind,
            reuse_memory=bool(reuse_memory),
            named=name is not None,
        )
        text = "" if declared is None else declared.to_text()
        participants = whole_number(max_participants, "max_participants", layout.MAX_ENTRIES - 2)
        shape = layout.Layout(capacity, nbytes, participants, len(text.encode()))
        codec_name = custom.name if custom is not None else ""
        attachment = registry.create(name, shape, options, codec_name, text, bool(prefault))
        super().__init__(attachment, custom, creator=True)

    @overload
    @classmethod
    def attach(cls, name: str, *, timeout: float | None = None, codec: Codec[V]) -> Channel[V]: ...
    @overload
    @classmethod
    def attach(cls, name: str, *, timeout: float | None = None, spec: Spec[M]) -> Channel[M]: ...
    @overload
    @classmethod
    def attach(cls, name: str, *, timeout: float | None = None, spec: Fields | None = None) -> Channel[T]: ...
    @classmethod
    def attach(
        cls, name: str, *, timeout: float | None = None, codec: Codec[Any] | None = None, spec: SpecLike | None = None
    ) -> Channel[Any]:
        """Open a channel that any process of the same user has made.

        A type checker knows the type of the messages from `codec` or `spec`, or from `Channel[Step].attach(name)`.

        Args:
            name: the name that the channel was made with, or its `name`.
            timeout: how long to wait for it to appear, in seconds; None does not wait.
            codec: the channel's codec, if it is your own. The segment records which of the built-in ones it is.
            spec: the spec that you expect the channel to have; None takes the one that the segment records.

        Returns:
            A handle on it, of no role yet. Close it.

        Raises:
            SpecMismatch: if the channel has another spec than the given one.
            ChannelNotFound: if there is none (in time), or if only dead processes have left one.
            ChannelForbidden: if it belongs to another user.
            ChannelUnavailable: if a limit of the process or host is in the way; it says which.
            ChannelCorrupted: if the file of that name is no segment.
            IncompatibleChannel: if it has another layout version, or another codec than the given one, or is a Latest.
            TooManyParticipants: if `max_participants` living processes are attached.
            BrokenChannel: if a stopped process holds the table of participants for all of `timeout` (or 10 s).
        """
        return cls._attach(name, timeout, codec, spec)

    def sender(self) -> Sender[T]:
        """Another handle on this channel, which sends only. Close it too.

        While it is open this process counts as a sender, from now on, whether it sends or not.

        Raises:
            ChannelClosed: after `close`.
        """
        return Sender(self._open(), self._custom_codec)

    def receiver(self) -> Receiver[T]:
        """As `sender`, of the other role: another handle, which receives only. Close it too."""
        return Receiver(self._open(), self._custom_codec)

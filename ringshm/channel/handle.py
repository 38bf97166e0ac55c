"""Handle: what every handle on a segment has in common, whatever passes through it.

A handle (Channel, Sender, Receiver, Latest) belongs to the attachment of one process. It has a role, it pickles, a
forked child inherits it, and it closes without waiting for anybody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TypeVar
from weakref import ref

from ..annotations import T
from ..arguments import choice, deadline_of, parse_size
from ..errors import (
    ChannelClosed,
    ChannelCorrupted,
    ChannelNotFound,
    IncompatibleChannel,
    PayloadTooLarge,
    SpecMismatch,
    UndecodableMessage,
)
from ..messages.codecs import Codec, Decodable
from ..messages.custom import CustomCodec
from ..messages.pickled import PickleCodec
from ..messages.plain import PlainCodec
from ..messages.pool import POOL, Pool
from ..messages.specs import Spec, SpecLike, as_spec
from ..messages.tensordicts import codec_of, spec_of_text
from ..messages.typed import SpecCodec
from ..process import registry
from ..process.attachment import Attachment
from ..process.seat import Seat
from ..ring.acceleration import CompiledHandle
from ..ring.mutex import SLICE
from ..ring.outcomes import Outcome
from ..ring.participants import TABLE_PATIENCE
from ..ring.slots import Ring
from ..ring.spin import Spin
from ..ring.stats import departure_in
from ..segment.files import CODEC_NAME_NBYTES, Segment, check_name
from ..segment.layout import RECEIVER_GONE, SHUTDOWN, UNDECIDED, Layout
from ..segment.origin import Origin, did_not_arrive, here
from ..system import close, monotonic, sleep
from .event_loop import LoopTurn
from .steps import NO_SPIN, BlockingTurn, finish

_BUILT_IN_CODECS: dict[str, type[PickleCodec] | type[PlainCodec]] = {"pickle": PickleCodec, "plain": PlainCodec}

H = TypeVar("H", bound="Handle")


def _codec_of(segment: Segment, codec: Codec[Any] | None, pool: Pool | None) -> Decodable:
    """The channel's codec, as this handle uses it; large received arrays lie in the pool."""
    layout = segment.layout
    if codec is not None:
        return CustomCodec(codec)
    if segment.options.codec != "spec":
        return _BUILT_IN_CODECS[segment.options.codec](pool, segment.name)
    try:
        spec = spec_of_text(segment.spec)
    except ValueError as error:
        raise ChannelCorrupted(f"channel {segment.name!r}: the segment's spec is damaged: {error}") from None
    if spec.slot_size != layout.slot_size:
        raise ChannelCorrupted(
            f"channel {segment.name!r}: the segment's spec needs slots of {spec.slot_size} bytes, it has slots of "
            f"{layout.slot_size}"
        )
    return codec_of(spec, segment.memory, layout.slots, layout.slot_stride, layout.capacity, segment.name, pool)


def closed_elsewhere(name: str) -> ChannelClosed:
    """The error for a call during which its handle was closed."""
    return ChannelClosed(
        f"this handle on channel {name!r} was closed by another thread: end that thread's calls before, or attach again"
    )


def field_of(message: Any, name: str, handle: Handle) -> Any:
    """A field of a borrowed message; SpecMismatch, which says what it holds, if there is none of that name."""
    try:
        return message[name]
    except KeyError:
        if handle.spec is None:
            raise
        raise SpecMismatch(f"channel {handle.name!r}: {handle.spec.root.unknown(name)}") from None


def spec_or_size(what: str, spec: SpecLike | None, slot_size: int | str | None) -> tuple[Spec[Any] | None, int]:
    """The spec, if one was given, and the size of a slot. The maker of a `what` must give exactly one of them."""
    if spec is None and slot_size is not None:
        return None, parse_size(slot_size, "slot_size")
    if spec is None or slot_size is not None:
        given = "neither was" if spec is None else "both were"
        raise TypeError(f"a {what} takes slot_size or spec, {given} given: slot_size follows from a spec")
    declared = as_spec(spec)
    return declared, declared.slot_size


def check_codec(codec: str | Codec[T]) -> Codec[T] | None:
    """The user's own codec, or None for a built-in one."""
    if isinstance(codec, str):
        choice("codec", codec, tuple(_BUILT_IN_CODECS))
        return None
    if not isinstance(codec, Codec) or not isinstance(codec.name, str) or not codec.name:
        raise TypeError(f"codec={codec!r} must be 'pickle', 'plain' or an object with name, encode and decode")
    if len(codec.name.encode()) > CODEC_NAME_NBYTES:
        raise ValueError(f"codec name {codec.name!r} is longer than {CODEC_NAME_NBYTES} bytes")
    return codec


class Handle(CompiledHandle):
    """What all handles on a channel have in common. Get one from `Channel(...)`, `Channel.attach`, `sender()`, ….

    Several threads may use one handle. A handle pickles (as an argument of `multiprocessing` under `spawn` or
    `forkserver`, in a message on another channel, for Ray), and attaches where it is unpickled. A forked child inherits
    it.
    """

    #: The role that the class fixes.
    role = UNDECIDED
    #: What kind of segment it is a handle on.
    kind = "Channel"
    _attachment: Attachment | None = None

    def __init__(self, attachment: Attachment, codec: Codec[Any] | None, creator: bool = False) -> None:
        """Count as an open handle of that attachment. Not for users, who get theirs from a Channel."""
        options = attachment.segment.options
        self._attachment = attachment
        self._lost: ChannelNotFound | None = None
        self._arrived_as: tuple[Any, ...] = ()
        self._custom_codec = codec
        self._pool = POOL if options.reuse_memory else None
        self._codec = self._codec_in(attachment.segment)
        self._name = attachment.name
        self._layout = attachment.segment.layout
        self._options = options
        self._slot_size = self._layout.slot_size
        self._look_at = 0.0
        self._send_spin, self._receive_spin = Spin(options.wait), Spin(options.wait)
        self._seat = Seat(ref(self), self.role, creator)
        self._bind(attachment)
        self._bind_compiled(attachment, self._codec)
        attachment.add(self._seat)

    def _codec_in(self, segment: Segment) -> Decodable:
        """What makes objects of that segment's messages, and messages of objects."""
        return _codec_of(segment, self._custom_codec, self._pool)

    def _bind(self, attachment: Attachment) -> None:
        """Look up what each call needs."""

    def _unbind(self) -> None:
        """Refuse threads that are on their way into a call."""
        self._unbind_compiled()

    @classmethod
    def _attach(cls: type[H], name: str, timeout: float | None, codec: Codec[Any] | None, spec: SpecLike | None) -> H:
        """A handle on a segment that any process of the same user has made under that name; see Channel.attach."""
        check_name(name)
        declared = None if spec is None else as_spec(spec)
        deadline = deadline_of(timeout is not None, timeout)
        pause = 0.001
        while True:
            try:
                patience = TABLE_PATIENCE if timeout is None else max(SLICE, deadline - monotonic())
                attachment = registry.attach(name, patience=patience)
                break
            except ChannelNotFound:
                remaining = deadline - monotonic()
                if remaining <= 0:
                    raise
                sleep(min(pause, remaining))
                pause = min(2 * pause, SLICE)
        options = attachment.segment.options
        if options.kind != cls.kind:
            raise IncompatibleChannel(f"{name!r} is a {options.kind}, not a {cls.kind}: attach to it as such")
        recorded = options.codec
        wanted = attachment.segment.codec_name
        if codec is not None:
            check_codec(codec)
        if (recorded == "custom") != (codec is not None) or (codec is not None and codec.name != wanted):
            made = f"codec {wanted!r}" if recorded == "custom" else f"the built-in codec {recorded!r}"
            given = "none was given" if codec is None else f"{codec.name!r} was given"
            raise IncompatibleChannel(f"channel {name!r} was made with {made}, {given}: pass the same codec to attach")
        channel = cls.__new__(cls)
        Handle.__init__(channel, attachment, codec)
        if declared is not None and declared != channel.spec:
            has = "no spec" if channel.spec is None else f"the spec\n{channel.spec.describe()}"
            channel.close()
            raise SpecMismatch(
                f"channel {name!r} has {has}\nattach was given the spec\n{declared.describe()}\n"
                "give the one that it was made with, or none"
            )
        return channel

    # --- what it is

    @property
    def name(self) -> str:
        """The channel's name, for `Channel.attach`."""
        return self._name

    @property
    def slot_size(self) -> int:
        """Largest encoded message, in bytes."""
        return self._layout.slot_size

    @property
    def spec(self) -> Spec[Any] | None:
        """What each message is, if the channel was made with a spec."""
        return self._codec.spec if isinstance(self._codec, SpecCodec) else None

    @property
    def closed(self) -> bool:
        """Whether this handle was closed."""
        return self._attachment is None

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        made = f", made at {self._seat.made_at}" if self._seat.made_at else ""
        return (
            f"<{type(self).__name__} {self._name!r} of {self._layout.capacity} x {self.slot_size} bytes{state}{made}>"
        )

    def _open(self) -> Attachment:
        """The attachment of an open handle."""
        attachment = self._attachment
        if attachment is None:
            if self._lost is not None:
                raise ChannelNotFound(*self._lost.args)
            raise ChannelClosed(f"handle on channel {self._name!r} is closed: use it before close(), or attach again")
        attachment.ensure_joined()
        return attachment

    def _typed(self, call: str) -> SpecCodec:
        if not isinstance(self._codec, SpecCodec):
            raise TypeError(f"channel {self._name!r} has no spec, which {call} needs: make it with one")
        return self._codec

    # --- who else is there

    def wait_for_peers(self, senders: int = 0, receivers: int = 0, timeout: float | None = None) -> bool:
        """Wait until so many other processes are attached in each role.

        Args:
            senders: how many processes that may send, at least; each counts once.
            receivers: how many that may receive, at least.
            timeout: in seconds; None waits for ever, 0 not at all.

        Returns:
            False if they were not there in time.

        Raises:
            ChannelClosed: after `close`; after `shutdown`, if not so many are attached.
        """
        turn = self._turn(deadline_of(True, timeout))
        attachment = turn.attachment

        def arrived() -> bool:
            now_senders, now_receivers = attachment.participants.peers(attachment.participants.index)
            return now_senders >= senders and now_receivers >= receivers

        if arrived():
            return True
        try:  # without the loop in its frame: see ring/mutex.py, 5
            attachment.changes.await_peers(senders, receivers)
            return self._until(arrived, turn)
        finally:
            attachment.changes.await_peers(0, 0)

    def _until(self, arrived: Callable[[], bool], turn: BlockingTurn) -> bool:
        while not arrived():
            if turn.attachment.words[SHUTDOWN]:
                raise ChannelClosed(f"channel {self._name!r} was shut down: nobody is to be waited for")
            if not finish(turn.event(arrived)):
                return False
        return True

    # --- ending

    def close(self) -> None:
        """Close this handle. It waits for nobody; a second `close` does nothing.

        Calls of other threads on the handle get ChannelClosed. Views of borrowed messages stay valid. The creator's
        `close` also removes the channel's names, as soon as all handles that are on their way to other processes have
        arrived, and this process has closed those that it got by `sender()` and `receiver()`, which may yet go to a
        child; processes that are attached go on. The close of the last handle anywhere removes the names, too.
        """
        self._close(closing=True)

    def _close(self, closing: bool) -> None:
        attachment = self._attachment
        if attachment is not None:
            received = self._seat.received
            try:
                self._leave(attachment, closing, received)
            except BaseException:  # a signal handler's: others would count a handle that nobody can close any more
                self._leave(attachment, closing, received)
                raise

    def _leave(self, attachment: Attachment, closing: bool, received: bool) -> None:
        """Count as an open handle no more. A second time does what the first has not."""
        self._attachment = None
        self._seat.vacate()
        self._unbind()
        attachment.remove(self._seat, closing, received)

    def __enter__(self: H) -> H:
        self._open()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._attachment is not None:  # or else there is nothing left to call, if the interpreter ends
            with contextlib.suppress(Exception):
                self._close(closing=False)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._attachment is None and self._arrived_as:  # it was never attached here: others may find its channel
            return _arrive, self._arrived_as
        attachment = self._open()
        number, tether = attachment.invitations.issue_pickled(self.role)
        where = self._name, attachment.segment.nonce, attachment.segment.origin
        return _arrive, (type(self), *where, self._layout, number, tether, self._custom_codec)

    # --- taking a role

    def _start_sending(self) -> None:
        self._take_role("sends", "sent")

    def _start_receiving(self) -> None:
        self._take_role("receives", "received")

    def _take_role(self, counts: str, used: str) -> None:
        """Count in a role from now on; the arguments are the seat's attributes for it."""
        self._open().take_role(self._seat, counts, used)
        self._role_taken(used == "sent")

    # --- waiting

    def _begin_call(self, ring: Ring) -> None:
        """Write down when the call begins, and look for the dead now and then. `put` and `get` have it in line."""
        now = ring.called[0] = monotonic()
        if now > self._look_at:
            self._look_around()

    def _look_around(self) -> None:
        """Look for the dead. Calls that never wait do so, too."""
        self._look_at = monotonic() + SLICE
        attachment = self._open()
        attachment.reaper.look()
        if self._seat.sent:
            attachment.remind_senders()
        processes = attachment.participants.active()
        self._send_spin.adapt_to(processes)
        self._receive_spin.adapt_to(processes)

    def _check_open(self, attachment: Attachment) -> None:
        """Raise if another thread has closed this handle meanwhile, or others have taken this process for dead."""
        if self._attachment is not attachment:
            raise closed_elsewhere(self._name)
        if not attachment.participants.joined:
            attachment.ensure_joined()

    def _turn(self, deadline: float, spin: Spin = NO_SPIN) -> BlockingTurn:
        """How a call on this handle waits that blocks."""
        attachment = self._open()
        return BlockingTurn(attachment, partial(self._check_open, attachment), deadline, spin)

    def _loop_turn(self, deadline: float) -> LoopTurn:
        """How a call on this handle waits in the running event loop."""
        attachment = self._open()
        return LoopTurn(attachment, partial(self._check_open, attachment), deadline)

    def _held(self, whose: str) -> str:
        """The text of the error of a call that did not get a mutex in time."""
        return (
            f"channel {self._name!r}: another process holds the {whose}' mutex: is one stopped? `ringshm stats "
            f"{self._name}` says which"
        )

    def _gone(self, attachment: Attachment, word: int) -> str:
        """Which process was the last of a role, and how it went."""
        departure = departure_in(attachment.words[word])
        return f": {departure}" if departure else ""

    def _nobody_left(self, attachment: Attachment, word: int, name: str) -> str:
        """That no other process has a role any more, for the error of a call whose time is up; "" if one has it."""
        departure, people = departure_in(attachment.words[word]), attachment.participants
        if departure is None or people.peers(people.index)[word == RECEIVER_GONE]:
            return ""
        return f" (no other {name} is left: {departure})"

    def _raise_undecodable(self, outcome: Outcome) -> NoReturn:
        """Raise the error for a message that the codec has failed on. The outcome lets go of the codec's error, whose
        traceback leads to frames that hold the outcome: that cycle would keep the segment, and its names.
        """
        error, outcome.error = outcome.error, None
        raise UndecodableMessage(
            f"channel {self._name!r}: a message could not be decoded ({error!r}); it counts as received: send it again "
            "once both ends have what its codec needs"
        ) from error

    def _too_large(self, nbytes: int, otherwise: str = "send it in parts") -> PayloadTooLarge:
        return PayloadTooLarge(
            f"channel {self._name!r}: slot holds {self.slot_size} bytes, message needs {nbytes}: "
            f"make it with a larger slot_size, or {otherwise}"
        )


def _arrive(
    kind: type[Handle],
    name: str,
    nonce: str,
    origin: Origin,
    layout: Layout,
    invitation: int,
    tether: Any,
    codec: Codec[Any] | None,
) -> Handle:
    """Unpickle a handle. If its channel is gone, or is elsewhere, the first call on the handle says so. One that is
    elsewhere may be pickled again, for a process there.
    """
    handle = kind.__new__(kind)
    fd = -1 if tether is None else tether.detach()  # which says that this process lives, until its entry does
    try:
        attachment = registry.attach(name, nonce)
        Handle.__init__(handle, attachment, codec)
        attachment.invitations.redeem(invitation)
    except ChannelNotFound:
        handle._attachment, handle._lost = None, did_not_arrive(name, origin)
        handle._name, handle._layout, handle._custom_codec = name, layout, codec
        handle._arrived_as = (kind, name, nonce, origin, layout, invitation, None, codec) if origin != here() else ()
        handle._seat = Seat(ref(handle), kind.role)
    if fd >= 0:
        close(fd)
    return handle

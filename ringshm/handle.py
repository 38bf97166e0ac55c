"""Handle: what every handle on a segment has in common, whatever passes through it.

A handle (Channel, Sender, Receiver, Latest) belongs to one process's attachment. It has a role, pickles, is inherited
by a fork, waits in slices for what the others do, and ends without waiting for anybody.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeVar

from .annotations import T
from .attachment import Attachment
from .codecs import Codec, CustomCodec, Decodable, PickleCodec, PlainCodec
from .errors import (
    ChannelClosed,
    ChannelCorrupted,
    ChannelNotFound,
    IncompatibleChannel,
    PayloadTooLarge,
    SpecMismatch,
    UndecodableMessage,
)
from .layout import (
    RECEIVER,
    SENDER,
    SHUTDOWN,
    UNDECIDED,
    Layout,
    parse_size,
)
from .mutex import SLICE, FencedMutex
from .participants import TABLE_PATIENCE
from .pool import POOL, Pool
from .ring import Ring
from .segment import CODEC_NAME_NBYTES, Segment, check_name
from .specs import Spec, SpecLike
from .stats import departure_in
from .stream import End
from .typed import SpecCodec
from .waiting import Spin, Waiters

_BUILT_IN_CODECS: dict[str, type[PickleCodec] | type[PlainCodec]] = {"pickle": PickleCodec, "plain": PlainCodec}
#: Slices that a call without time left grants a mutex whose holder has died, so that it is recovered meanwhile.
_RECOVERY_SLICES = 6

H = TypeVar("H", bound="Handle")


def _pool_of(segment: Segment) -> Pool | None:
    """Where the channel's large received arrays lie."""
    return POOL if segment.options.reuse_memory else None


def _codec_of(attachment: Attachment, codec: Codec[Any] | None) -> Decodable:
    """The channel's codec, as this handle uses it."""
    segment, layout = attachment.segment, attachment.segment.layout
    pool = _pool_of(segment)
    if codec is not None:
        return CustomCodec(codec)
    if segment.options.codec != "spec":
        return _BUILT_IN_CODECS[segment.options.codec](pool)
    try:
        spec = Spec.from_text(segment.spec)
    except ValueError as error:
        raise ChannelCorrupted(f"channel {segment.name!r}: the segment's spec is damaged: {error}") from None
    if spec.slot_size != layout.slot_size:
        raise ChannelCorrupted(
            f"channel {segment.name!r}: the segment's spec needs slots of {spec.slot_size} bytes, it has slots of "
            f"{layout.slot_size}"
        )
    return SpecCodec(spec, segment.memory, layout.slots, layout.slot_stride, layout.capacity, segment.name, pool)


def check_timeout(timeout: float) -> float:
    """A timeout in seconds; ValueError if negative or NaN, TypeError if no number."""
    try:
        sound = timeout >= 0
    except TypeError:
        raise TypeError(f"timeout={timeout!r} must be seconds or None, not {type(timeout).__name__}") from None
    if not sound:
        raise ValueError(f"timeout={timeout!r} must not be negative or NaN")
    return timeout


def deadline_of(block: bool, timeout: float | None) -> float:
    """When a call must answer, on the monotonic clock: 0 for at once, infinity for never."""
    if not block:
        return 0.0
    if timeout is None:
        return math.inf
    return monotonic() + timeout if check_timeout(timeout) else 0.0


def closed_elsewhere(name: str) -> ChannelClosed:
    """The error for a call during which its handle was closed."""
    return ChannelClosed(
        f"this handle on channel {name!r} was closed by another thread: end that thread's calls before, or attach again"
    )


def choice(argument: str, value: str, choices: tuple[str, ...]) -> str:
    """`value`, if it is one of these."""
    if value not in choices:
        raise ValueError(f"{argument}={value!r} must be one of {', '.join(map(repr, choices))}")
    return value


def spec_or_size(what: str, spec: SpecLike | None, slot_size: int | str | None) -> tuple[Spec[Any] | None, int]:
    """The spec, if that was given, and the size of a slot; exactly one of the two is to be given.

    Args:
        what: is to be made, for the error.
    """
    if spec is None and slot_size is not None:
        return None, parse_size(slot_size, "slot_size")
    if spec is None or slot_size is not None:
        given = "neither was" if spec is None else "both were"
        raise TypeError(f"a {what} takes slot_size or spec, {given} given: slot_size follows from a spec")
    declared: Spec[Any] = Spec(spec)
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


class Handle:
    """What all handles on a channel have in common. Get one from `Channel(...)`, `Channel.attach`, `sender()`, ….

    A handle may be used by several threads. It pickles (a `multiprocessing` argument under `spawn` or `forkserver`, a
    message on another channel, Ray) and then attaches where it is unpickled; a forked child inherits it.
    """

    #: The role that the class fixes.
    role = UNDECIDED
    #: What kind of segment it is a handle on.
    kind = "Channel"

    def __init__(self, attachment: Attachment, codec: Codec[Any] | None, creator: bool = False) -> None:
        """Count as an open handle of that attachment. Not for users, who get theirs from a Channel."""
        options = attachment.segment.options
        self._attachment: Attachment | None = attachment
        self._lost: ChannelNotFound | None = None
        self._custom_codec = codec
        self._codec = _codec_of(attachment, codec)
        self._pool = _pool_of(attachment.segment)
        self._name = attachment.name
        self._layout = attachment.segment.layout
        self._options = options
        self._slot_size = self._layout.slot_size
        self._look_at = 0.0
        self._send_spin, self._receive_spin = Spin(options.wait), Spin(options.wait)
        self.creator = creator
        self.inherited = self.stray = False
        self.sent = self.received = False
        self.sends = self.role == SENDER
        self.receives = self.role == RECEIVER
        self._bind(attachment)
        attachment.add(self)

    def _bind(self, attachment: Attachment) -> None:
        """Look up what each call needs."""

    def _unbind(self) -> None:
        """Refuse threads that are on their way into a call."""

    @classmethod
    def _attach(cls: type[H], name: str, timeout: float | None, codec: Codec[Any] | None, spec: SpecLike | None) -> H:
        """A handle on what any process of the same user has made under that name; see Channel.attach."""
        check_name(name)
        declared = None if spec is None else Spec(spec)
        deadline = deadline_of(timeout is not None, timeout)
        pause = 0.001
        while True:
            try:
                patience = TABLE_PATIENCE if timeout is None else max(SLICE, deadline - monotonic())
                attachment = Attachment.open_named(name, patience=patience)
                break
            except ChannelNotFound:
                remaining = deadline - monotonic()
                if remaining <= 0:
                    raise
                time.sleep(min(pause, remaining))
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
        return f"<{type(self).__name__} {self._name!r} of {self._layout.capacity} x {self.slot_size} bytes{state}>"

    def _open(self) -> Attachment:
        """The attachment of an open handle."""
        attachment = self._attachment
        if attachment is None:
            if self._lost is not None:
                raise ChannelNotFound(*self._lost.args) from self._lost
            raise ChannelClosed(f"handle on channel {self._name!r} is closed: use it before close(), or attach again")
        attachment.ensure_joined()
        return attachment

    def _typed(self, call: str) -> SpecCodec:
        if not isinstance(self._codec, SpecCodec):
            raise TypeError(f"channel {self._name!r} has no spec, which {call} needs: make it with one")
        return self._codec

    # --- who else is there

    def wait_for_peers(self, senders: int = 0, receivers: int = 0, timeout: float | None = None) -> bool:
        """Wait until so many other processes are attached in those roles.

        Args:
            senders: at least so many that may send, each process counted once.
            receivers: at least so many that may receive.
            timeout: in seconds; None waits for ever, 0 not at all.

        Returns:
            False if they were not there in time.

        Raises:
            ChannelClosed: after `close`; after `shutdown`, if not so many are attached.
        """
        deadline = deadline_of(True, timeout)
        attachment = self._open()

        def arrived() -> bool:
            now_senders, now_receivers = attachment.participants.peers()
            return now_senders >= senders and now_receivers >= receivers

        while not arrived():
            if attachment.words[SHUTDOWN]:
                raise ChannelClosed(f"channel {self._name!r} was shut down: nobody is to be waited for")
            if not self._sleep_for_event(attachment, arrived, deadline):
                return False
        return True

    # --- ending

    def close(self) -> None:
        """Close this handle; waits for nobody, and is not an error twice.

        Calls of other threads on it get ChannelClosed. Views of borrowed messages stay what they are. The creator's
        close also removes the channel's names, once all handles that are on their way to other processes have arrived;
        those attached go on. So does the close of the last handle anywhere.
        """
        self._close(closing=True)

    def _close(self, closing: bool) -> None:
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            self.sent = self.received = self.sends = self.receives = False
            self._unbind()
            attachment.remove(self, closing)

    def __enter__(self: H) -> H:
        self._open()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._close(closing=False)

    def after_fork(self) -> None:
        """In a forked child (attachment.after_fork): roles begin anew."""
        self.sent = self.received = self.creator = False
        self.inherited = True
        self.sends = self.role == SENDER
        self.receives = self.role == RECEIVER

    def __reduce__(self) -> tuple[Any, ...]:
        attachment = self._open()
        ticket = attachment.participants.issue_ticket(self.role)
        return _arrive, (type(self), self._name, attachment.segment.nonce, self._layout, ticket, self._custom_codec)

    # --- taking a role

    def _start_sending(self) -> None:
        attachment = self._open()
        with attachment.lock:
            try:
                self.sends = self.sent = True
                attachment.update_roles()
            except BaseException:
                self.sent = False  # interrupted: the next call tells the others
                raise
        attachment.announce_change()

    def _start_receiving(self) -> None:
        attachment = self._open()
        with attachment.lock:
            try:
                self.receives = self.received = True
                attachment.update_roles()
            except BaseException:
                self.received = False  # interrupted: the next call tells the others
                raise
        attachment.announce_change()

    # --- waiting

    def _begin_call(self, ring: Ring) -> None:
        """Say when; and look for the dead now and then. `put` and `get` have it in line."""
        now = ring.called[0] = monotonic()
        if now > self._look_at:
            self._look_around()

    def _look_around(self) -> None:
        """Look for the dead, also while nobody ever waits."""
        self._look_at = monotonic() + SLICE
        attachment = self._open()
        attachment.reaper.look()
        processes = attachment.participants.active()
        self._send_spin.regard(processes)
        self._receive_spin.regard(processes)

    def _check_open(self, attachment: Attachment) -> None:
        """Whether another thread has closed this handle meanwhile."""
        if self._attachment is not attachment:
            raise closed_elsewhere(self._name)

    def _sleep(
        self,
        attachment: Attachment,
        waiters: Waiters,
        arrived: Callable[[], Any],
        seconds: float,
        more: Callable[[], int] = lambda: 0,
    ) -> None:
        """Announce, look again, sleep; look for the dead if nobody woke us, else pass it on, if there is more."""
        woken = True
        try:
            waiters.announce()
            if not arrived():
                woken = waiters.sleep(seconds)
        finally:
            try:
                waiters.withdraw()
            except BaseException:  # a handler raised in it: nobody must seem to wait who does not
                waiters.withdraw()
                raise
        if woken:
            waiters.pass_on(more())
        else:
            attachment.reaper.look()
        self._check_open(attachment)

    def _pause(self, attachment: Attachment) -> None:
        """Between two rounds of a wait that never sleeps: let other threads run, look for the dead."""
        os.sched_yield()  # time.sleep(0) would sleep for some 60 us, from Python 3.11 on
        attachment.reaper.look()
        self._check_open(attachment)

    def _sleep_for_event(self, attachment: Attachment, arrived: Callable[[], bool], deadline: float) -> bool:
        """Sleep until something was received or somebody came or went, a slice at most; False if time is up."""
        remaining = deadline - monotonic()
        if remaining <= 0:
            return False
        self._sleep(attachment, attachment.events, arrived, min(SLICE / 2, remaining))
        return True

    def _wait_for_other_end(self, attachment: Attachment, end: End, spin: Spin, deadline: float) -> None:
        """Wait for the other end of a stream, a slice at most."""
        if spin.always:
            self._pause(attachment)
        else:
            seconds = min(SLICE, max(0.0, deadline - monotonic()))
            self._sleep(attachment, end.waiters, end.stirred, seconds, end.passes_on)

    def _patience(self, attachment: Attachment, mutex: FencedMutex, deadline: float, tries: int) -> bool:
        """Whether to go on trying for a contended mutex: while there is time, or its holder is not alive."""
        if monotonic() < deadline:
            return True
        living, _ = attachment.participants.holders(mutex.offset)
        return not living and tries < _RECOVERY_SLICES

    def _held(self, whose: str) -> str:
        """The text for a call that could not get a mutex in time."""
        return (
            f"channel {self._name!r}: another process holds the {whose}' mutex: is one stopped? `ringshm stats "
            f"{self._name}` says which"
        )

    def _gone(self, attachment: Attachment, word: int) -> str:
        """Who was the last of a role, and how it went."""
        departure = departure_in(attachment.words[word])
        return f": {departure}" if departure else ""

    def _undecodable(self, error: Exception | None) -> UndecodableMessage:
        """The error for a message that the codec has failed on."""
        return UndecodableMessage(
            f"channel {self._name!r}: a message could not be decoded ({error!r}); it counts as received: send it again "
            "once both ends have what its codec needs"
        )

    def _too_large(self, nbytes: int, otherwise: str = "send it in parts") -> PayloadTooLarge:
        return PayloadTooLarge(
            f"channel {self._name!r}: slot holds {self.slot_size} bytes, message needs {nbytes}: "
            f"make it with a larger slot_size, or {otherwise}"
        )


def _arrive(kind: type[Handle], name: str, nonce: str, layout: Layout, ticket: int, codec: Codec[Any] | None) -> Handle:
    """A pickled handle, in the process where it is unpickled. If its channel is gone, its first use says so."""
    handle = kind.__new__(kind)
    try:
        attachment = Attachment.open_named(name, nonce)
        Handle.__init__(handle, attachment, codec)
        attachment.participants.redeem_ticket(ticket)
    except ChannelNotFound as error:
        handle._attachment, handle._lost, handle._name, handle._layout = None, error, name, layout
        handle.sent = handle.received = False
    return handle

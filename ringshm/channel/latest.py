"""Latest: one value, always the newest, for policy weights. The face of versions.py.

A `publish` replaces the value and waits for no reader. A `read` or a `borrow` gives the newest value, whole, and may
skip versions. Versions are numbered from 1. Several processes may publish, one after the other. If a publisher dies
while it writes, no reader ever sees that value, and the next publisher makes the version after the newest.
"""

from __future__ import annotations

import gc
import itertools
import math
import operator
import os
import queue
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NoReturn, overload

import numpy as np

from ..annotations import M, T, T_co
from ..arguments import check_timeout, deadline_of, whole_number
from ..errors import EndOfChannel, TooManyBorrows, UndecodableMessage
from ..messages.codecs import TYPED, Decodable
from ..messages.specs import Fields, Spec, SpecLike
from ..messages.typed import SpecCodec
from ..process import registry
from ..process.attachment import Attachment
from ..ring.mutex import SLICE
from ..ring.outcomes import CONTENDED
from ..ring.stats import HeldVersion, LatestStats, take_latest_stats
from ..ring.versions import Pin
from ..segment.files import check_name
from ..segment.layout import MAX_ENTRIES, NEWEST, PIN_CELLS, SENDER_GONE, Layout, Options
from ..system import monotonic, sleep
from .blocks import refuse, show
from .handle import Handle, field_of, spec_or_size
from .loans import Payload
from .steps import finish

#: Largest `borrows`: a process has so many cells for pins, some of which may just be changing hands.
_MOST_BORROWS = PIN_CELLS - 4
#: Seconds that a call without time left waits for another process that reaps, which takes microseconds, or some slices.
_REAPERS_PATIENCE = 4 * SLICE
#: Copies without a pin that a read without time left makes, should they be overwritten meanwhile.
_COPIES = 8
_BORROW = "with latest.borrow() as value:"


class LatestBorrow(Generic[T_co]):
    """The newest value, read in its slot; a context manager, made by `Latest.borrow`, which says who keeps the slot.

    Attributes (while the block lasts):
        value: the value; every array in it is a read-only view of the slot, and `bytes` are a read-only memoryview.
        version: its number, from 1.

    Views that a forked child inherits do not keep the slot: they are the parent's.
    """

    __slots__ = ("_begun", "_latest", "_least", "_pin", "_timeout", "_value")

    def __init__(self, latest: Latest[T_co], least: int, timeout: float | None) -> None:
        self._latest = latest
        self._least = least
        self._timeout = timeout
        self._begun = False
        self._pin: Pin | None = None
        self._value: Any = None

    def _pinned(self) -> Pin:
        if self._pin is None:
            refuse("borrow", self._latest.name, self._begun, _BORROW)
        return self._pin

    @property
    def value(self) -> T_co:
        """The value, while the block lasts."""
        self._pinned()
        return self._value  # type: ignore[no-any-return]

    @property
    def version(self) -> int:
        """Its number, while the block lasts."""
        return self._pinned().version

    def __getitem__(self, name: str) -> Any:
        """A field of the value, if there is a spec."""
        return field_of(self.value, name, self._latest)

    def __repr__(self) -> str:
        shown = "" if self._pin is None else f"version {self._pin.version}"
        return show(self, self._latest.name, self._begun, shown, _BORROW)

    def __enter__(self) -> LatestBorrow[T_co]:
        if self._pin is not None:
            raise ValueError("this borrow has begun already: call borrow() for each block")
        self._value, self._pin = self._latest._borrow(self._least, self._timeout)
        self._begun = True
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._value = self._pin = None


class Latest(Handle, Generic[T]):
    """One value in shared memory, always the newest, for many readers in any processes and threads of one machine.

    A reader never makes the publisher wait, never sees a torn value, sees the newest at once when it attaches, and may
    skip versions. Before the first version readers wait. If a publisher dies in `publish`, the version before stays the
    newest. A handle pickles and is inherited by a fork, as a Channel's is.

    >>> import numpy as np, ringshm
    >>> with ringshm.Latest("1MB") as latest:
    ...     latest.publish({"w": np.ones(3)})
    ...     with latest.borrow() as weights:
    ...         print(weights.version, weights.value["w"].sum())
    1
    1 3.0

    Args:
        slot_size: largest encoded value in bytes, or a string such as "100MB".
        spec: in place of slot_size, what each value is: fields of fixed dtype and shape, see `Spec`.
        name: for `Latest.attach`; None makes a fresh, unguessable one. A name that only dead processes have left is
            reclaimed.
        readers: how many processes may be attached at once, beside the one that made it and a publisher.
        borrows: how many versions all readers together may hold at once, in borrows and in views; a reader that would
            hold one more gets TooManyBorrows. Readers that hold the same version count once. There are `borrows + 2`
            slots.

    Raises:
        TypeError, ValueError: for an argument that makes no sense, by its name.
        ChannelExists: if a live process uses the name.
        InsufficientSharedMemory, ChannelUnavailable: as Channel; nothing is left behind.
    """

    kind = "Latest"

    @overload
    def __init__(
        self, slot_size: None = None, *, spec: Spec[T], name: str | None = None, readers: int = 256, borrows: int = 4
    ) -> None: ...
    @overload
    def __init__(
        self: Latest[dict[str, Any]],
        slot_size: None = None,
        *,
        spec: Fields,
        name: str | None = None,
        readers: int = 256,
        borrows: int = 4,
    ) -> None: ...
    @overload
    def __init__(
        self, slot_size: int | str, *, name: str | None = None, readers: int = 256, borrows: int = 4
    ) -> None: ...
    def __init__(
        self,
        slot_size: int | str | None = None,
        *,
        spec: SpecLike | None = None,
        name: str | None = None,
        readers: int = 256,
        borrows: int = 4,
    ) -> None:
        self._attachment = None
        declared, nbytes = spec_or_size("Latest", spec, slot_size)
        if name is not None:
            check_name(name)
        text = "" if declared is None else declared.to_text()
        slots = whole_number(borrows, "borrows", _MOST_BORROWS) + 2
        participants = whole_number(readers, "readers", MAX_ENTRIES - 4) + 2
        layout = Layout(slots, nbytes, participants, len(text.encode()), PIN_CELLS)
        options = Options("pickle" if declared is None else "spec", named=name is not None)
        super().__init__(registry.create(name, layout, options, "", text, prefault=True), None, creator=True)

    @overload
    @classmethod
    def attach(cls, name: str, *, timeout: float | None = None, spec: Spec[M]) -> Latest[M]: ...
    @overload
    @classmethod
    def attach(cls, name: str, *, timeout: float | None = None, spec: Fields | None = None) -> Latest[T]: ...
    @classmethod
    def attach(cls, name: str, *, timeout: float | None = None, spec: SpecLike | None = None) -> Latest[Any]:
        """Open a Latest that any process of the same user has made, and close it in the end.

        Args, Raises:
            As `Channel.attach`.
        """
        return cls._attach(name, timeout, None, spec)

    @property
    def version(self) -> int:
        """The newest version; 0 if nothing was published yet."""
        return self._open().versions.newest

    @property
    def borrows(self) -> int:
        """How many versions readers may hold at once."""
        return self._layout.capacity - 2

    def stats(self) -> LatestStats:
        """A snapshot of versions, their holders, waiters and participants, taken without a mutex."""
        attachment = self._open()
        return take_latest_stats(attachment.segment, attachment.participants)

    # --- publishing

    def publish(self, obj: T) -> int:
        """Copy `obj` into a slot and make it the newest value, for all readers at once.

        It waits for no reader, but for another process that is publishing. If this process is interrupted or dies
        before `publish` has returned, the value was published whole or not at all.

        Args:
            obj: any picklable object; with a spec, a mapping of its fields.

        Returns:
            Its version.

        Raises:
            PayloadTooLarge: if the encoded object is larger than a slot.
            SpecMismatch: if it is not what the spec says; names the field.
            ChannelClosed: after `close`.
            Exception: what encoding `obj` raises; nothing was published.
        """
        return self._publish_encoded(*self._codec.encode(obj))

    def _publish_encoded(self, meta: int, data: Any, description: bytes) -> int:
        if meta >> 16 > self._slot_size:
            raise self._too_large(meta >> 16, "publish less")
        attachment = self._open()
        if not self._seat.sent:
            self._start_sending()
        self._begin_call(attachment.ring)
        while True:
            version = attachment.versions.publish(meta, data, description)
            if version:
                return version
            self._check_open(attachment)

    # --- reading

    def read(self, newer_than: int | None = None, timeout: float | None = None) -> tuple[int, T]:
        """The newest version and its value, which the caller owns: nothing in it points into shared memory.

        Args:
            newer_than: wait, in the kernel, for a version above this one; None takes any.
            timeout: in seconds, for such a version; None waits for ever, 0 not at all.

        Returns:
            The version, from 1, and the value.

        Raises:
            queue.Empty: if none was there in time.
            EndOfChannel: if none is there, `timeout` is None, there has been a publisher, and no other process
                publishes or may come to (a handle that has neither published nor read may). With a timeout the call
                waits for a process that attaches by name and takes over.
            ChannelClosed: after `close`.
            UndecodableMessage: if the value could not be decoded.
        """
        deadline = deadline_of(True, timeout)
        attachment = self._arrive_at(_version_above(newer_than), deadline)
        versions, memory = attachment.versions, attachment.segment.memory
        for tries in itertools.count():
            pin = versions.pin(attachment)
            if isinstance(pin, Pin):
                offset, meta, description = versions.content(pin)
                return pin.version, self._decoded(self._codec.decode, memory, offset, meta, description)
            copied = versions.copy()
            if copied is not None:
                version, meta, whole = copied
                return version, self._decoded(self._codec_of(whole).decode, whole, 0, meta, self._slot_size)
            if tries > _COPIES and monotonic() >= deadline:
                break
        raise queue.Empty(f"{self._name!r} was overwritten faster than it could be copied: borrow less at once")

    def borrow(self, newer_than: int | None = None, timeout: float | None = None) -> LatestBorrow[T]:
        """Read the newest value in its slot, within a `with` block: nothing is copied, so it costs the same at every
        size.

        Args:
            As `read`, when the block begins.

        Returns:
            A context manager, see LatestBorrow.

        Ownership:
            Arrays in the value are read-only views of the slot. No publisher writes to the slot while the block lasts,
            nor while a view that has escaped the block lives.

        Raises:
            TooManyBorrows: when the block begins, if `borrows` older versions are held; names the holders.
            As `read`.
        """
        if timeout is not None:
            check_timeout(timeout)
        return LatestBorrow(self, _version_above(newer_than), timeout)

    def _borrow(self, least: int, timeout: float | None) -> tuple[Any, Pin]:
        """The newest value, in views that hold on to its pin."""
        deadline = deadline_of(True, timeout)
        attachment = self._arrive_at(least, deadline)
        pin = self._pin(attachment, deadline)
        offset, meta, description = attachment.versions.content(pin)
        # a typed value's fields lie anywhere in its slot
        nbytes = self._slot_size if meta & 0xFF == TYPED else meta >> 16
        payload = Payload(nbytes, np.uint8, attachment.segment.memory, offset)
        payload.flags.writeable = False
        payload.hold = pin
        text = attachment.segment.memory[description : description + (meta >> 8 & 0xFF)]
        return self._decoded(self._codec.view, payload, meta, text), pin

    def _pin(self, attachment: Attachment, deadline: float) -> Pin:
        versions, turn, collected, give_up = attachment.versions, self._turn(deadline), False, 0.0
        while True:
            pin = versions.pin(attachment)
            if isinstance(pin, Pin):
                return pin
            if pin is CONTENDED:
                if not finish(turn.retry(attachment.ring.receivers)):
                    raise queue.Empty(self._held("readers"))
                continue
            held = self.stats().held
            if not all(version.alive for version in held):
                if not attachment.reaper.reap():  # another process is at it, or was stopped at it
                    self._check_open(attachment)
                    give_up = give_up or max(deadline, monotonic() + _REAPERS_PATIENCE)
                    if monotonic() >= give_up:
                        raise queue.Empty(
                            f"{self._name!r}: processes that have died hold versions, and one that is stopped keeps "
                            f"this one from freeing them: `ringshm stats {self._name}` says which; or use read()"
                        )
                    sleep(0.001)
            elif not collected and os.getpid() in {version.pid for version in held}:
                collected = True
                gc.collect()  # views of this process may be in cycles, and garbage
            else:
                raise self._too_many(held)

    def _too_many(self, held: tuple[HeldVersion, ...]) -> TooManyBorrows:
        told = ", ".join(f"version {version.version} by process {version.pid}" for version in held)
        return TooManyBorrows(
            f"{self._name!r}: readers hold {told}; borrows={self.borrows} allows no further version: drop views of "
            "older versions, use read(), or make it with more borrows"
        )

    def _decoded(self, decode: Callable[..., Any], *where: Any) -> Any:
        try:
            return decode(*where)
        except Exception as error:
            self._decode_again(error, decode, *where)

    def _decode_again(self, error: Exception, decode: Callable[..., Any], *where: Any) -> NoReturn:
        """After that error: raise it, if it was a signal handler's, else that the value cannot be decoded."""
        outcome = self._open().ring.consume_again(partial(decode, *where), error)
        try:
            text = f"{self._name!r}: the newest value could not be decoded ({outcome.error!r}): publish it again"
            raise UndecodableMessage(text) from outcome.error
        finally:
            del outcome, error  # which leads to this frame, and that to the pin

    def _codec_of(self, copy: bytes) -> Decodable:
        """The codec for a copy of a slot."""
        if not isinstance(self._codec, SpecCodec):
            return self._codec
        return self._codec.over(copy)

    # --- waiting

    def _look_around(self) -> None:
        super()._look_around()
        self._open().versions.clear_ended()

    def _arrive_at(self, least: int, deadline: float) -> Attachment:
        """Wait until the newest version is at least that one."""
        attachment = self._open()
        if not self._seat.received:
            self._start_receiving()
        self._begin_call(attachment.ring)
        words, turn = attachment.words, self._turn(deadline)
        while (newest := words[NEWEST]) >> 16 < least:
            if self._receive_spin.until_changed(words, NEWEST, newest):
                continue
            if deadline == math.inf and attachment.over_for_receivers() and words[NEWEST] >> 16 < least:
                gone = self._gone(attachment, SENDER_GONE)
                raise EndOfChannel(
                    f"{self._name!r} has no publisher any more{gone}; its newest version is {self.version}: read that, "
                    "or wait with a timeout for one that takes over"
                )
            awaiting = attachment.versions.awaiting((newest >> 16) + 1)
            moved = partial(_has_moved, words, newest)
            turn.doubt("version")
            if not finish(turn.change(awaiting, moved)) and not attachment.reaper.look():
                nobody = self._nobody_left(attachment, SENDER_GONE, "publisher")
                raise queue.Empty(
                    f"{self._name!r}: no version {least} came in time, the newest is {self.version}{nobody}: wait "
                    "longer, or publish"
                )
        return attachment


def _has_moved(words: memoryview, newest: int) -> bool:
    return words[NEWEST] >> 16 != newest >> 16


def _version_above(newer_than: int | None) -> int:
    """The least version that is asked for."""
    if newer_than is None:
        return 1
    try:
        version = operator.index(newer_than)
    except TypeError:
        raise TypeError(
            f"newer_than={newer_than!r} must be a version or None, not {type(newer_than).__name__}"
        ) from None
    if version < 0:
        raise ValueError(f"newer_than={version} must not be negative")
    return version + 1

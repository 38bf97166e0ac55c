"""Raw handles: they pass messages on as they are, from ring to ring, without decoding or encoding.

A raw message is what the ring has of it: R_META, the description, and the bytes of the payload. So any codec's messages
pass, and a spec's, and those larger than a slot. The rings at both ends have the same spec or codec. The values of a
Latest pass in the same way, with their versions.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..messages.buffers import Parts
from ..messages.codecs import TYPED, Encoded
from ..messages.typed import SpecCodec
from ..process.attachment import Attachment
from ..ring.outcomes import CLAIMED
from ..ring.returns import RETURN_SLICES
from ..segment import layout
from ..segment.files import Segment
from ..system import monotonic
from .channel import Receiver, Sender
from .handle import H, Handle
from .latest import Latest
from .loans import Borrow
from .steps import Turn, finish


class Raw(NamedTuple):
    """A message as it lies in a slot.

    Attributes:
        meta: its R_META.
        description: at most 255 bytes.
        payload: shape `(nbytes,)`; of a typed message, whose fields lie anywhere in it, the whole slot.
    """

    meta: int
    description: bytes
    payload: NDArray[np.uint8]


class _RawCodec:
    """Leaves messages as they are; a `messages.codecs.Decodable`."""

    def __init__(self, slot_size: int) -> None:
        self._slot_size = slot_size

    def encode(self, raw: Raw) -> Encoded:
        parts = Parts()
        parts.add(raw.payload, len(raw.payload))
        return raw.meta, parts, raw.description

    def decode(self, memory: Any, offset: int, meta: int, description: int) -> Raw:
        nbytes = self._slot_size if meta & 0xFF == TYPED else meta >> 16
        payload = np.frombuffer(memory, np.uint8, nbytes, offset).copy()
        return Raw(meta, bytes(memory[description : description + (meta >> 8 & 0xFF)]), payload)

    def view(self, payload: NDArray[np.uint8], meta: int, description: bytes) -> Raw:
        return Raw(meta, bytes(description), payload)

    adopt = view


class RawSender(Sender[Raw]):
    """A sender of raw messages."""

    def pass_on(self, raw: Raw, deliveries: int, timeout: float) -> None:
        """`put`, for a message of which so many deliveries have failed elsewhere: they count here, too. One thread at a
        time may do this.
        """
        if not deliveries:
            return self.put(raw, timeout=timeout)
        self._deliveries = min(deliveries, layout.MAX_DELIVERIES)
        try:
            self._pass_on(raw, self._turn(monotonic() + timeout, self._send_spin))
        finally:
            self._deliveries = 0

    def _pass_on(self, raw: Raw, turn: Turn) -> None:
        meta, data, description = self._codec.encode(raw)
        if meta >> 16 > self._slot_size:
            return finish(self._stream(turn, meta, data, description, [0]))
        attachment, claimed = self._open(), list[tuple[int, int]]()
        try:
            outcome = self._claim(attachment, claimed)
            if outcome is not CLAIMED:
                finish(self._until_claimed(turn, outcome, claimed))
            ((slot, _),) = claimed
            attachment.ring.write(slot, meta, data, description)
            self._publish(slot, meta, description)
        except BaseException:
            if claimed:
                attachment.ring.discard(*claimed[0])
            raise

    def _codec_in(self, segment: Segment) -> _RawCodec:
        return _RawCodec(segment.layout.slot_size)


class RawReceiver(Receiver[Raw]):
    """A receiver of raw messages. Those that `borrow` gives lie in their slots."""

    def _codec_in(self, segment: Segment) -> _RawCodec:
        return _RawCodec(segment.layout.slot_size)


class _RawLatest(Latest[Raw]):
    @classmethod
    def of(cls: type[H], attachment: Attachment) -> H:
        """A handle on what is attached already."""
        handle = cls.__new__(cls)
        Handle.__init__(handle, attachment, None)
        return handle

    def _codec_in(self, segment: Segment) -> _RawCodec:
        return _RawCodec(segment.layout.slot_size)


class RawReader(_RawLatest):
    """A reader of raw values. Those that `borrow` gives lie in their slots."""

    role = layout.RECEIVER


class RawPublisher(_RawLatest):
    """A publisher of raw values. While it is open, readers believe that there may be a further version."""

    role = layout.SENDER

    def republish(self, version: int, raw: Raw) -> int:
        """Make a value of another Latest the newest of this one, with its version, if that is newer; the newest then.

        Raises:
            ChannelClosed: after `close`.
        """
        attachment = self._open()
        if not self._seat.sent:
            self._start_sending()
        self._begin_call(attachment.ring)
        encoded = self._codec.encode(raw)
        while not (newest := attachment.versions.publish(*encoded, version)):
            self._check_open(attachment)
        return newest


def raw_of(handle: Handle, obj: Any) -> Raw:
    """An object as a message of that handle's, in memory of this process.

    Raises:
        PayloadTooLarge, SpecMismatch: as `put`.
    """
    codec, size = handle._codec, handle.slot_size
    if isinstance(codec, SpecCodec):
        payload = np.zeros(size, np.uint8)
        own = SpecCodec(codec.spec, payload.data, 0, size, 1, handle.name, codec.pool)
        meta, data, description = own.encode(obj)
        data.write(payload.data, 0)
        return Raw(meta, description, payload)
    meta, data, description = codec.encode(obj)
    if meta >> 16 > size:
        raise handle._too_large(meta >> 16)
    payload = np.empty(meta >> 16, np.uint8)
    if isinstance(data, Parts):
        data.write(payload.data, 0)
    elif len(payload):
        payload[:] = np.frombuffer(data, np.uint8, len(payload))
    return Raw(meta, description, payload)


def give_back(borrow: Borrow[Raw], deliveries: int) -> None:
    """Give a borrowed message back to its place, with so many more deliveries that have failed. No view of it may live.

    For one larger than a slot they do not count.

    Warns:
        RuntimeWarning: if it has been delivered so often that it is dropped.
    """
    attachment = borrow._channel._open()
    ring, most = attachment.ring, attachment.segment.options.max_deliveries
    record = ring.layout.record(borrow._slot)
    word = ring.words[record]
    if not deliveries or ring.words[record + layout.R_META] >> 16 > ring.layout.slot_size:
        borrow.requeue()
    elif borrow.delivery_count + deliveries <= most:
        ring.requeue_or_later([(record, word)], deliveries)
    elif ring.drop_taken(record, word, RETURN_SLICES):
        warnings.warn(
            f"channel {attachment.name!r}: dropped a message whose receivers elsewhere have died, after "
            f"max_deliveries={most} deliveries",
            RuntimeWarning,
            stacklevel=2,
        )
    borrow.__exit__(None, None, None)

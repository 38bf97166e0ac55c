"""Loans and borrows: slots that are written and read in place, without a copy.

    loan     FREE -> WRITING, the block writes, -> READY at its end; FREE again if it raises or discards
    borrow   READY -> READING, the block reads, -> FREE at its end; or KEPT while views of the slot are alive, and FREE
             when the last of them is gone; or READY again if the block asks for it

1. All views of a borrowed slot, whatever they are made of and by whom, hold on to one array over its payload, the
   `Payload`, and that one to a `_Hold`. So the end of the hold is the end of the last view. It may come in any thread
   and at any bytecode, where the collector runs: it stores FREE in the slot's word, which needs no mutex, and wakes.
2. A hold also keeps the ring's participant (and its lock, and the mapping): `close` ends the roles at once, and the
   process is seen to live until its last view is gone. If it dies, the slot is reaped.
3. A forked child has copies of its parent's holds, which are the parent's to end: the slot's word names the parent, and
   `Ring.owner` in the child does not.
4. On a loan's end the arrays handed out become read-only. What the user has derived from them cannot be revoked.
"""

from __future__ import annotations

import math
import operator
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic
from weakref import ref

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .annotations import T_co
from .buffers import ALIGNMENT
from .codecs import BYTES, TYPED, Decodable, describe_loaned, encode_loaned
from .layout import (
    DELIVERY,
    DELIVERY_MASK,
    FREE,
    KEPT,
    OWNER_MASK,
    R_SENDER,
    R_SEQUENCE,
    R_SINCE,
    READING,
    SPACE_HINT,
    STATE_MASK,
    round_up,
)
from .ring import Outcome, Taken
from .tensors import as_array, is_tensor
from .typed import LoanFields, loaned

if TYPE_CHECKING:
    from .attachment import Attachment
    from .channel import _Receives, _Sends
    from .stream import Assembly

#: References to an object that one variable or attribute and the call of `getrefcount` hold.
_UNSHARED = sys.getrefcount(object()) + 1


class _Hold:
    """A slot that this process reads or keeps; it is handed back when this object goes.

    A signal handler may raise at the very entry of a finaliser, where nothing can catch it: `Ring.watch` knows
    all holds, and the next look for the dead gives back what such a one has left.
    """

    _begun = False  # for `__del__`, should an exception end `__init__`

    def __init__(self, attachment: Attachment, slot: int, record: int, word: int) -> None:
        self.attachment = attachment
        self._record = record
        self._slot = slot
        self._sequence = attachment.words[record + R_SEQUENCE]
        self._word = word
        attachment.ring.watch(slot, ref(self), received=False)

    def begin(self) -> None:
        """The block begins: however it ends, the message is received, unless it is requeued."""
        self.attachment.words[self._record + R_SINCE] = time.monotonic_ns()
        self._begun = True
        self.attachment.ring.watch(self._slot, ref(self), received=True)

    def keep(self) -> None:
        """The message is received, and views of it are alive."""
        attachment, word = self.attachment, self._word
        if word & STATE_MASK == READING and word & OWNER_MASK == attachment.ring.owner:
            attachment.words[self._record] = self._word = word + KEPT - READING

    def end(self) -> None:
        """Hand the slot back, if it is still this participant's, with this message."""
        words, ring = self.attachment.words, self.attachment.ring
        if words[self._record + R_SEQUENCE] == self._sequence and ring.release(self._record, self._word):
            self._word = FREE
            ring.forget(self._slot)
            if words[SPACE_HINT]:
                ring.wake_freed()

    def requeue(self) -> None:
        """Give the message back to its old place."""
        self.attachment.ring.forget(self._slot)
        self.attachment.ring.give_back([(self._record, self._word)])
        self._word = FREE

    def __del__(self) -> None:
        if self._begun and self._word and not self.attachment.participants.in_fork():
            self.end()


class _StreamHold(_Hold):
    """The same for a message larger than a slot. Its views are of this process's own memory, and keep no slot. A
    finaliser cannot end it, since that takes a mutex: the next look for the dead gives it back then.
    """

    def __init__(self, attachment: Attachment, slot: int, record: int, word: int, assembly: Assembly) -> None:
        super().__init__(attachment, slot, record, word)
        self._assembly = assembly

    def begin(self) -> None:
        """The block begins; until it ends the message is still its sender's."""

    def keep(self) -> None:
        """The message is received."""
        self.end()

    def end(self) -> None:
        """The message is received, unless its sender has taken it back meanwhile."""
        if self._word:
            self._assembly.end()
            self._word = FREE
            self.attachment.ring.forget(self._slot)

    def __del__(self) -> None:
        pass


class Payload(np.ndarray[Any, np.dtype[np.uint8]]):
    """The payload of a borrowed slot, to which every view of it leads."""

    hold: Any  #: what keeps the slot: a _Hold here, a Pin of a Latest


class Misfit(BaseException):
    """A message does not go into the memory that it was to be copied to. No Exception: its codec has not failed."""


def into(codec: Decodable, out: Any) -> Callable[[Any, int, int, int], Any]:
    """A `decode` that copies array data into `out`: an array, a writable buffer, or nested dicts of these.

    It raises Misfit, before anything was copied, if the message does not go there.
    """
    if not isinstance(out, dict):
        _writable(out)

    def decode(memory: Any, offset: int, meta: int, description: int) -> Any:
        payload = np.frombuffer(memory, np.uint8, meta >> 16, offset)
        value = _view(codec, payload, meta, memory[description : description + (meta >> 8 & 0xFF)])
        return _copy_into(out, value, lambda: codec.decode(memory, offset, meta, description))

    return decode


def adopt_into(codec: Decodable, out: Any) -> Callable[[NDArray[np.uint8], int, bytes], Any]:
    """The same, as an `adopt`: for a payload in this process's own memory."""

    def adopt(payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
        value = _view(codec, payload, meta, description)
        return _copy_into(out, value, lambda: codec.adopt(payload, meta, description))

    return adopt


def _view(codec: Decodable, payload: NDArray[np.uint8], meta: int, description: bytes) -> Any:
    readonly = payload.view()
    readonly.flags.writeable = False
    return codec.view(readonly, meta, description)


def _copy_into(out: Any, value: Any, decode: Callable[[], Any]) -> Any:
    """Copy a message of views into `out`; what else there is goes in as it was decoded, and is owned."""
    copies: list[tuple[NDArray[Any], Any]] = []
    rest: list[tuple[dict[Any, Any], Any]] = []
    _match(value, out, "message", copies, rest)
    owned: Any = decode() if rest else None
    for target, source in copies:
        target[...] = source
    for target_dict, path in rest:
        whole = owned
        for key in path:
            whole = whole[key]
        target_dict[path[-1]] = whole
    return out


def _writable(out: Any) -> NDArray[Any]:
    """The memory of `out`, as an array."""
    if isinstance(out, np.ndarray) or is_tensor(type(out)):
        array = as_array(out)
    else:
        try:
            array = np.frombuffer(memoryview(out).cast("B"), np.uint8)
        except TypeError as error:
            raise TypeError(f"out={type(out).__name__} is no array, buffer or dict to copy into: {error}") from None
    if not array.flags.writeable:
        raise ValueError("out is read-only")
    return array


def _names_memory(out: Any) -> bool:
    """Whether something in `out` is there to be copied into."""
    if isinstance(out, dict):
        return any(map(_names_memory, out.values()))
    if isinstance(out, (np.ndarray, memoryview)) or is_tensor(type(out)):
        return True
    try:
        return not memoryview(out).readonly
    except TypeError:
        return False


def _match(value: Any, out: Any, where: str, copies: list[Any], rest: list[Any], path: tuple[Any, ...] = ()) -> None:
    """Find what to copy where; Misfit names the place of what does not go."""
    if isinstance(out, dict):
        if not isinstance(value, dict) or (missing := out.keys() - value.keys()):
            what = f"a dict without {sorted(map(repr, missing))}" if isinstance(value, dict) else type(value).__name__
            raise Misfit(f"{where} is {what}, out has {sorted(map(repr, out))}")
        for key, item in value.items():
            if key in out and _names_memory(out[key]):
                _match(item, out[key], f"{where}[{key!r}]", copies, rest, (*path, key))
            else:
                rest.append((out, (*path, key)))
        return
    try:
        target = _writable(out)
        source = as_array(value) if isinstance(value, np.ndarray) or is_tensor(type(value)) else None
    except (TypeError, ValueError) as error:
        raise Misfit(f"{where}: {error}") from None
    if not isinstance(out, np.ndarray) and not is_tensor(type(out)):
        if isinstance(value, (bytes, bytearray, memoryview)):
            source = np.frombuffer(value, np.uint8)
        elif source is not None:
            source = source.reshape(-1).view(np.uint8)
    if source is None:
        raise Misfit(f"{where} is a {type(value).__name__}, out is a {type(out).__name__}")
    if source.shape != target.shape or source.dtype != target.dtype:
        raise Misfit(
            f"{where} has shape {source.shape} and dtype {source.dtype}, out has shape {target.shape} and dtype "
            f"{target.dtype}"
        )
    copies.append((target, source))


class Borrow(Generic[T_co]):
    """A message that is read in its slot; a context manager, made by `Receiver.borrow`.

    Attributes (while the block lasts):
        value: the message; every array in it is a read-only view of the slot, and `bytes` are a read-only memoryview.
        sequence: its place in the order of all messages of the channel, from 0.
        sender: process id of its sender.
        delivery_count: 1, or more if receivers died that had taken it before.

    The message is received when the block ends, also by an exception. Its slot is given back then, or when the last
    view of it has gone that has escaped the block. Views that a forked child inherits are the parent's: they do not
    keep the slot.
    """

    _payload: Payload | None = None  # for `__del__`, should an exception end `__init__`
    _hold: _Hold | None = None

    def __init__(self, channel: _Receives[T_co], timeout: float | None) -> None:
        self._channel = channel
        self._timeout = timeout
        self._value: Any = None
        self._slot = -1
        self._requeue = False
        self.sequence = self.sender = self.delivery_count = 0

    @property
    def value(self) -> T_co:
        """The message, while the block lasts."""
        if self._payload is None:
            raise ValueError("this borrow has ended, or has not begun: use its value within the `with` block")
        return self._value  # type: ignore[no-any-return]

    def __getitem__(self, name: str) -> Any:
        """A field of the message, if the channel has a spec."""
        return self.value[name]  # type: ignore[index]

    def requeue(self) -> None:
        """Give the message back, unreceived, to its old place when the block ends.

        The next receiver gets it, and it counts as no delivery. If views of it are alive when the block ends, it cannot
        go back: it counts as received, and the block's end raises RuntimeError.
        """
        self._requeue = True

    def __enter__(self) -> Borrow[T_co]:
        if self._slot >= 0:
            raise ValueError("this borrow has begun already: call borrow() for each block")
        attachment, taken = self._channel._open(), Taken()
        try:
            self._channel._take(attachment, taken, self._timeout)
            self._begin(attachment, taken, threading.get_ident())
            return self  # here: an exception may come at any bytecode
        except BaseException:
            self._abandon(attachment, taken)
            raise

    def _begin(self, attachment: Attachment, taken: Taken, who: int) -> None:
        """A message is taken, and the block of that thread or task begins; `_abandon` if this raises."""
        channel = self._channel
        ((record, word),) = attachment.ring.pairs(taken)
        (slot,), (meta,) = taken.slots, taken.metas
        words, memory = attachment.words, attachment.segment.memory
        hold: _Hold
        if taken.assembly is not None:
            self._hold = hold = _StreamHold(attachment, slot, record, word, taken.assembly)
            payload = Payload(meta >> 16, np.uint8, taken.assembly.payload.data)
        else:
            self._hold = hold = _Hold(attachment, slot, record, word)
            # a typed message's fields lie anywhere in its slot
            nbytes = channel.slot_size if meta & 0xFF == TYPED else meta >> 16
            payload = Payload(nbytes, np.uint8, memory, attachment.ring.offsets[slot])
        payload.flags.writeable = False
        payload.hold = hold
        start = attachment.ring.description_of(slot)
        description = memory[start : start + (meta >> 8 & 0xFF)]
        try:
            value = channel._codec.view(payload, meta, description)
        except Exception as error:
            value = attachment.ring.consume_again(partial(channel._codec.view, payload, meta, description), error)
        if value.__class__ is Outcome:
            hold.end()
            raise channel._undecodable(value.error) from value.error
        self.sequence = words[record + R_SEQUENCE]
        self.sender = words[record + R_SENDER] >> 37
        self.delivery_count = (word & DELIVERY_MASK) // DELIVERY + 1
        attachment.standstill.blocks[slot] = who
        self._slot = slot
        self._payload, self._value = payload, value
        self._hold = None  # the payload's from here on
        hold.begin()

    def _abandon(self, attachment: Attachment, taken: Taken) -> None:
        """The block did not begin: the message goes back to its place."""
        hold = self._hold if self._payload is None else self._payload.hold
        self._hold = self._payload = self._value = None
        if hold is not None:
            hold.requeue()
        elif taken.words:
            attachment.ring.give_back(attachment.ring.pairs(taken))

    def __exit__(self, *exc_info: object) -> None:
        try:
            kept = self._end()
        except BaseException:
            self._end()
            raise
        if kept and self._requeue:
            raise RuntimeError(
                "requeue() of a borrowed message of which views are alive: it counts as received. Drop the views "
                "before the block ends"
            )

    def __del__(self) -> None:
        self._end()  # should an exception have come at the very entry of `__exit__`

    def _end(self) -> bool:
        """End the block, if it has not ended; whether views keep the slot."""
        if self._payload is None:
            return False
        self._value = None
        hold = self._payload.hold
        hold.attachment.standstill.blocks.pop(self._slot, None)
        # one is this object's own. A local variable would be another, and outlive an interrupt in its traceback
        kept = sys.getrefcount(self._payload) > _UNSHARED
        if kept:
            hold.keep()
        elif self._requeue:
            hold.requeue()
        else:
            hold.end()
        self._payload = None
        return kept


class Loan:
    """A free slot to write into; a context manager, made by `Sender.loan`.

    The message is published when the block ends, and given back unsent if the block raises or has called `discard`.

    If the channel has a spec, `loan["obs"]` is a writable view of that field, and `loan["reward"] = 1.0` checks and
    stores as `put` does. Else make arrays with `array`, one of which arrives as that array and several as a tuple of
    them, or write through `buffer`, which arrives as `bytes`.

    Arrays handed out are read-only after the block. Views that were derived from them, or from `buffer`, cannot be
    revoked: do not write through them.
    """

    __slots__ = (
        "__weakref__",
        "_arrays",
        "_attachment",
        "_buffer",
        "_channel",
        "_claimed",
        "_discarded",
        "_end",
        "_fields",
        "_nbytes",
        "_timeout",
    )

    def __init__(self, channel: _Sends[Any], timeout: float | None, nbytes: int | None) -> None:
        self._channel = channel
        self._timeout = timeout
        self._nbytes = nbytes
        self._claimed: list[tuple[int, int]] = []  # the slot, and when it was claimed
        self._attachment: Attachment | None = None
        self._buffer: memoryview | None = None
        self._arrays: list[tuple[int, NDArray[Any], bytes]] = []
        self._fields: LoanFields | None = None
        self._end = 0
        self._discarded = False

    def _open(self) -> tuple[Attachment, int]:
        if self._attachment is None:
            raise ValueError("this loan has ended, or has not begun: use it within the `with` block")
        return self._attachment, self._attachment.ring.offsets[self._claimed[0][0]]

    @property
    def nbytes(self) -> int:
        """How many bytes of `buffer` to send; settable until the block ends. The whole slot, if never set."""
        return self._channel.slot_size if self._nbytes is None else self._nbytes

    @nbytes.setter
    def nbytes(self, nbytes: int | str) -> None:
        self._nbytes = self._channel._fitting(nbytes)

    @property
    def buffer(self) -> memoryview:
        """The whole slot, writable. What is in it at first is left from older messages."""
        attachment, offset = self._open()
        self._refuse_spec("buffer")
        if self._arrays:
            raise ValueError("this loan holds arrays: it is sent as those, not as bytes")
        if self._buffer is None:
            self._buffer = memoryview(attachment.segment.memory)[offset : offset + self._channel.slot_size]
        return self._buffer

    def array(self, shape: int | tuple[int, ...], dtype: DTypeLike = float) -> NDArray[Any]:
        """A new array in the slot, behind those made before, aligned to 64 bytes.

        Args:
            shape: `(n, ...)`, or an int.
            dtype: anything but one that holds objects.

        Returns:
            A writable, C-contiguous array; what is in it at first is left from older messages.

        Raises:
            PayloadTooLarge: if the slot has no room for it.
        """
        attachment, offset = self._open()
        self._refuse_spec("array()")
        if self._buffer is not None:
            raise ValueError("this loan's buffer is in use: it is sent as bytes, not as arrays")
        dtype = np.dtype(dtype)
        try:
            lengths = tuple(map(operator.index, shape if isinstance(shape, (tuple, list)) else (shape,)))
        except TypeError:
            raise TypeError(f"shape={shape!r:.80} must be an int or a tuple of ints") from None
        if lengths and min(lengths) < 0:
            raise ValueError(f"shape={shape!r:.80} must not be negative")
        description = describe_loaned(lengths, dtype)
        start = round_up(self._end, ALIGNMENT)
        end = start + math.prod(lengths) * dtype.itemsize
        arrays = [(at, array.nbytes, text) for at, array, text in self._arrays]
        meta, _, _ = encode_loaned([*arrays, (start, end - start, description)])
        self._channel._fitting(meta >> 16)
        array: NDArray[Any] = np.ndarray(lengths, dtype, attachment.segment.memory, offset + start)
        self._arrays.append((start, array, description))
        self._end = end
        return array

    def _refuse_spec(self, what: str) -> None:
        if self._channel.spec is not None:
            raise TypeError(f"a loan of a channel with a spec has no {what}: write its fields, as in loan['x'] = value")

    @property
    def fields(self) -> LoanFields:
        """The slot's fields, for writing, if the channel has a spec: a mapping, with `set_length` for UpTo fields."""
        attachment, offset = self._open()
        if self._fields is None:
            spec = self._channel.spec
            if spec is None:
                raise TypeError("this loan has no fields, since its channel has no spec: use its array() or buffer")
            self._fields = loaned(spec, attachment.segment.memory, offset, attachment.name)
        return self._fields

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.fields[name] = value

    def set_length(self, name: str, length: int) -> None:
        """Say how much of an UpTo field is sent: all of it, if never said.

        Args:
            name: of a field at the top; one in a nested mapping has `loan["nested"].set_length(…)`.
            length: rows, from 0 to the field's maximum.

        Raises:
            SpecMismatch: if there is no such field, it has no UpTo dimension, or it cannot have that length.
            TypeError: if the channel has no spec.
        """
        self.fields.set_length(name, length)

    def discard(self) -> None:
        """Give the slot back unsent when the block ends."""
        self._discarded = True

    def __enter__(self) -> Loan:
        if self._claimed:
            raise ValueError("this loan has begun already: call loan() for each block")
        try:
            self._attachment = attachment = self._channel._open()
            self._channel._claim(self._claimed, self._timeout)
            self._begin(attachment, threading.get_ident())
            return self  # here: an exception may come at any bytecode
        except BaseException:
            self._discard()
            raise

    def _begin(self, attachment: Attachment, who: int) -> None:
        """The slot is claimed, and the block of that thread or task begins."""
        ((slot, _),) = self._claimed
        attachment.standstill.blocks[slot] = who
        attachment.ring.watch(slot, ref(self), received=False)

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            for _, array, _ in self._arrays:
                array.flags.writeable = False
            typed = self._fields.end() if self._fields is not None else None
            if kind is None and not self._discarded:
                self._publish(typed)
        finally:
            try:
                self._discard()
            except BaseException:
                self._discard()
                raise

    def _publish(self, typed: tuple[int, bytes] | None) -> None:
        attachment, offset = self._open()
        if not attachment.ring.is_claimed(*self._claimed[0]):
            raise RuntimeError("this loan belongs to the process that began it, not to a child that was forked within")
        if self._channel.spec is not None:
            meta, description = typed or self.fields.end()
        elif self._arrays:
            meta, description, table = encode_loaned([(at, array.nbytes, text) for at, array, text in self._arrays])
            end = offset + (meta >> 16)
            attachment.segment.memory[end - len(table) : end] = table
        elif self._buffer is not None or self._nbytes is not None:
            meta, description = self.nbytes << 16 | BYTES, b""
        else:
            raise ValueError("nothing was written to this loan: use its array() or buffer, or discard() it")
        self._channel._publish(self._claimed[0][0], meta, description)

    def _discard(self) -> None:
        """Give the slot back, unless it was published."""
        attachment = self._attachment
        if attachment is not None:
            for slot, since in self._claimed:
                attachment.ring.discard(slot, since)
                attachment.ring.forget(slot)
                attachment.standstill.blocks.pop(slot, None)
        self._attachment = None
        self._buffer = None
        self._fields = None
        self._arrays = []

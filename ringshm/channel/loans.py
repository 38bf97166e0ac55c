"""Loans and borrows: the user writes and reads slots in place, without a copy.

    loan     FREE -> WRITING, the block writes, -> READY at its end; FREE again if it raises or discards
    borrow   READY -> READING, the block reads, -> FREE at its end; or KEPT while views of the slot are alive, and FREE
             when the last of them is gone; or READY again if the block asks for it

1. Every view of a borrowed slot refers to one array over its payload, the `Payload`, and the Payload to a `_Hold`. So
   the hold goes when the last view goes. That may happen in any thread and at any bytecode, since the garbage collector
   may run there. The hold stores FREE in the slot's word, which needs no mutex, and wakes waiting senders.
2. A hold also keeps the participant of the ring, with its lock and the mapping. `close` ends the roles at once; the
   process counts as alive until its last view is gone. If the process dies, the reaper frees the slot.
3. A forked child has copies of its parent's holds. Only the parent may end them: the slot's word names the parent, and
   the child's `Ring.owner` does not.
4. When a loan ends, the arrays that it handed out become read-only. Views that the user has derived from them cannot be
   revoked.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NoReturn
from weakref import ref

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..annotations import T_co
from ..arguments import deadline_of
from ..messages.bare import describe_loaned, encode_loaned
from ..messages.buffers import ALIGNMENT
from ..messages.codecs import BYTES, TYPED
from ..messages.typed import LoanFields, loaned
from ..process.attachment import Attachment
from ..ring.acceleration import CompiledBorrow, CompiledLoan
from ..ring.large import Assembly
from ..ring.outcomes import CLAIMED, TAKEN, Outcome, consumed
from ..ring.take import Taken
from ..segment import layout
from ..system import get_ident, monotonic_ns
from .blocks import refuse, refuse_attribute, show
from .event_loop import in_loop, this_task
from .handle import field_of
from .receiving import Receiving
from .sending import Sending
from .steps import Steps, Turn, finish

_BORROW, _ABORROW = "with channel.borrow() as message:", "async with channel.aborrow() as message:"
_LOAN, _ALOAN = "with channel.loan() as loan:", "async with channel.aloan() as loan:"
#: Makes the turn of a call from its deadline.
TurnOf = Callable[[float], Turn]


class _Hold:
    """A slot that this process reads or keeps. The slot goes back when this object goes.

    A signal handler may raise at the very entry of a finaliser, where nothing can catch it. `Ring.watch` knows all
    holds, so the next look for the dead gives back the slot of a hold whose finaliser was interrupted.
    """

    _begun = False  # for `__del__`, should an exception end `__init__`

    def __init__(self, attachment: Attachment, slot: int, record: int, word: int) -> None:
        self.attachment = attachment
        self._record = record
        self._slot = slot
        self._sequence = attachment.words[record + layout.R_SEQUENCE]
        self._word = word
        attachment.ring.watch(slot, ref(self), received=False)

    def begin(self) -> None:
        """The block begins. However it ends, the message is received then, unless the block has called `requeue`."""
        self.attachment.words[self._record + layout.R_SINCE] = monotonic_ns()
        self._begun = True
        self.attachment.ring.watch(self._slot, ref(self), received=True)

    def go_back(self) -> None:
        """From a finaliser: the message goes back, unreceived, if it is still this participant's."""
        self._begun = False
        words, ring = self.attachment.words, self.attachment.ring
        own = self._word & layout.OWNER_MASK == ring.owner and words[self._record] == self._word
        if own and words[self._record + layout.R_SEQUENCE] == self._sequence:
            self.attachment.deadlocks.blocks.pop(self._slot, None)
            ring.requeue_abandoned((self._record, self._word))
            ring.forget(self._slot, sequence=self._sequence)

    def let_go(self) -> bool:
        """The message is to go back when the block ends; False if it cannot."""
        return True

    def keep(self) -> None:
        """The message is received, and views of it are alive."""
        attachment, word = self.attachment, self._word
        own = word & layout.OWNER_MASK == attachment.ring.owner and attachment.words[self._record] == word
        if own and word & layout.STATE_MASK == layout.READING:
            attachment.words[self._record] = self._word = word + layout.KEPT - layout.READING

    def end(self) -> None:
        """Hand the slot back, if it is still this participant's, with this message."""
        words, ring = self.attachment.words, self.attachment.ring
        if words[self._record + layout.R_SEQUENCE] == self._sequence and ring.release(self._record, self._word):
            self._word = layout.FREE
            ring.forget(self._slot, sequence=self._sequence)
            if words[layout.SPACE_HINT]:
                ring.wake_freed()

    def requeue(self) -> None:
        """Give the message back to its old place."""
        self.attachment.ring.forget(self._slot, sequence=self._sequence)
        taken = [(self._record, self._word)]
        try:
            self.attachment.ring.give_back(taken)
        finally:
            if not taken:
                self._word = layout.FREE

    def __del__(self) -> None:
        if self._begun and self._word and not self.attachment.participants.in_fork():
            self.end()


class _StreamHold(_Hold):
    """A hold of a message larger than a slot. Views of the message are of this process's own memory and keep no slot.
    A finaliser cannot end this hold, since that takes a mutex: the next look for the dead gives the message back then.
    """

    def __init__(self, attachment: Attachment, slot: int, record: int, word: int, assembly: Assembly) -> None:
        super().__init__(attachment, slot, record, word)
        self._assembly = assembly

    def begin(self) -> None:
        """The block begins; until it ends, or its sender goes on, the message is still its sender's."""

    def let_go(self) -> bool:
        """The message is to go back when the block ends; False if it cannot."""
        return self._assembly.let_go()

    def keep(self) -> None:
        """The message is received."""
        self.end()

    def end(self) -> None:
        """The message is received."""
        if self._word:
            self._assembly.end()
            self._word = layout.FREE
            self.attachment.ring.forget(self._slot, sequence=self._sequence)

    def __del__(self) -> None:
        pass


class Payload(np.ndarray[Any, np.dtype[np.uint8]]):
    """The payload of a borrowed slot, to which every view of it leads."""

    hold: Any  #: what keeps the slot: a _Hold here, a Pin of a Latest


class Borrow(CompiledBorrow, Generic[T_co]):
    """A message that is read in its slot; a context manager, made by `Receiver.borrow`, which says what its end does.

    Attributes (while the block lasts):
        value: the message; every array in it is a read-only view of the slot, and `bytes` are a read-only memoryview.
        sequence: its place in the order of all messages of the channel, from 0.
        sender: process id of its sender.
        delivery_count: 1, or more if receivers died that had taken it before.

    Views that a forked child inherits do not keep the slot: they are the parent's.
    """

    __slots__ = ()

    _channel: Receiving

    def __init__(self, channel: Receiving, timeout: float | None) -> None:
        self._channel = channel
        self._timeout = timeout
        self._value: Any = None
        self._slot = -1
        self._requeue = False
        self._seen = False  # whether the block has looked at the message
        self.sequence = self.sender = self.delivery_count = 0

    @property
    def value(self) -> T_co:
        """The message, while the block lasts."""
        if self._hold is None:
            refuse("borrow", self._channel.name, self._slot >= 0, _BORROW)
        self._seen = True
        return self._value  # type: ignore[no-any-return]

    def __getitem__(self, name: str) -> Any:
        """A field of the message, if the channel has a spec."""
        return field_of(self.value, name, self._channel)

    def __repr__(self) -> str:
        shown = "" if self._hold is None else f"message {self.sequence} from process {self.sender}"
        return show(self, self._channel.name, self._slot >= 0, shown, _BORROW)

    def requeue(self) -> None:
        """Give the message back, unreceived, to its old place when the block ends.

        The next receiver gets it, and this delivery does not count. If views of the message are alive when the block
        ends, it cannot go back: it counts as received, and the end of the block raises RuntimeError.

        Raises:
            RuntimeError: if the message did not fit into the ring, and the time of its `put` is up: nobody else has it.
        """
        if self._hold is not None and not self._hold.let_go():
            raise RuntimeError(
                f"channel {self._channel.name!r}: this message is larger than the ring, and its sender's time is up: "
                "it cannot go back, and counts as received. Work on it, or send it again yourself"
            )
        self._requeue = True

    def __enter__(self) -> Borrow[T_co]:
        attachment, taken = self._open(), Taken()
        turn_of = partial(self._channel._turn, spin=self._channel._receive_spin)
        try:
            finish(self._begin(attachment, taken, turn_of, get_ident()))
            return self  # here: an exception may come at any bytecode
        except BaseException:
            self._abandon(attachment, taken)
            raise

    def _open(self) -> Attachment:
        """Of the channel, for a block that may begin."""
        if self._slot >= 0:
            raise ValueError("this borrow has begun already: call borrow() or aborrow() for each block")
        return self._channel._open()

    def _begin(self, attachment: Attachment, taken: Taken, turn_of: TurnOf, who: int) -> Steps[None]:
        """Take a message, and begin the block of a thread or task (`who`). If this raises, call `_abandon`."""
        channel = self._channel
        outcome = channel._take(attachment, taken)
        if outcome is not TAKEN:
            yield from channel._until_taken(turn_of(deadline_of(True, self._timeout)), outcome, taken)
        ((record, word),) = attachment.ring.held(taken)
        (slot,), (meta,) = taken.slots, taken.metas
        words = attachment.words
        hold: _Hold
        if taken.assembly is not None:
            self._hold = hold = _StreamHold(attachment, slot, record, word, taken.assembly)
            payload = Payload(meta >> 16, np.uint8, taken.assembly.payload.data)
        else:
            self._hold = hold = _Hold(attachment, slot, record, word)
            payload = self._payload_in(attachment, slot, meta)
        payload.hold = hold
        value = consumed(self._view_of(attachment, payload, slot, meta))
        if value.__class__ is Outcome:
            hold.end()
            channel._raise_undecodable(value)
        self.sequence = words[record + layout.R_SEQUENCE]
        self.sender = words[record + layout.R_SENDER] >> 37
        self.delivery_count = (word & layout.DELIVERY_MASK) // layout.DELIVERY + 1
        attachment.deadlocks.blocks[slot] = who
        self._slot = slot
        self._payload, self._value = ref(payload), value
        hold.begin()

    def _payload_in(self, attachment: Attachment, slot: int, meta: int) -> Payload:
        """The payload of a message in its slot. A typed message's fields lie anywhere in it."""
        nbytes = self._channel.slot_size if meta & 0xFF == TYPED else meta >> 16
        return Payload(nbytes, np.uint8, attachment.segment.memory, attachment.ring.offsets[slot])

    def _view_of(self, attachment: Attachment, payload: Payload, slot: int, meta: int) -> Callable[[], Any]:
        """Makes the message of a payload, which is read-only from now on."""
        payload.flags.writeable = False
        start = attachment.ring.description_of(slot)
        description = attachment.segment.memory[start : start + (meta >> 8 & 0xFF)]
        return partial(self._channel._codec.view, payload, meta, description)

    def _fail(self, slot: int, record: int, word: int, meta: int, error: BaseException) -> NoReturn:
        """After the compiled path has taken a message and failed with that error to look at it: as `_begin` goes on."""
        attachment = self._hold.attachment
        self._hold = hold = _Hold(attachment, slot, record, word)
        try:
            if not isinstance(error, Exception):
                raise error
            payload = self._payload_in(attachment, slot, meta)
            outcome = attachment.ring.consume_again(self._view_of(attachment, payload, slot, meta), error)
            hold.end()
            self._channel._raise_undecodable(outcome)
        except BaseException:
            self._abandon(attachment, Taken())
            raise

    def _abandon(self, attachment: Attachment, taken: Taken) -> None:
        """The block did not begin: the message goes back to its place."""
        hold = self._hold
        self._hold = self._value = None
        if hold is not None:
            hold.requeue()
        elif taken.words:
            attachment.ring.give_back(attachment.ring.held(taken))

    def __exit__(self, *exc_info: object) -> None:
        try:
            kept = self._end()
        except BaseException:
            self._end()
            raise
        attachment = self._channel._attachment
        if attachment is not None and attachment.ring.reaped:  # the next call raises it
            warnings.warn(attachment.ring.moved().args[-1], RuntimeWarning, stacklevel=2)
        if kept and self._requeue:
            raise RuntimeError(
                "requeue() of a borrowed message of which views are alive: it counts as received. Drop the views "
                "before the block ends"
            )

    def __del__(self) -> None:
        # An exception came at the very entry of `__exit__`; or at the very end of `__enter__`, if the block has not
        # looked at the message. This may run amid a critical section.
        hold = self._hold
        if hold is None or hold.attachment.participants.in_fork():
            return
        if self._requeue or not self._seen:
            self._value = None
            if not (self._requeue and self._payload() is not None):  # which views keep
                self._hold = None
                hold.go_back()
        self._end()

    def _end(self) -> bool:
        """End the block, if it has not ended yet. Returns whether views keep the slot."""
        hold = self._hold
        if hold is None:
            return False
        hold.attachment.deadlocks.blocks.pop(self._slot, None)
        self._value = None  # from here on only views that have escaped the block keep the payload
        kept = self._payload() is not None
        if kept:
            hold.keep()
        elif self._requeue:
            hold.requeue()
        else:
            hold.end()
        self._hold = None
        return kept


class Loan(CompiledLoan):
    """A free slot to write into; a context manager, made by `Sender.loan`, which says what its end does.

    If the channel has a spec, `loan["obs"]` is a writable view of that field, and `loan["reward"] = 1.0` checks and
    stores as `put` does. Without a spec, make arrays with `array`: one array arrives as that array, several arrive as a
    tuple. Or write through `buffer`, which arrives as `bytes`.

    The arrays are read-only after the block. Views that you have derived from them, or from `buffer`, cannot be
    revoked: do not write through them.
    """

    __slots__ = ("__weakref__",)

    _channel: Sending
    _attachment: Attachment | None
    _fields: LoanFields | None

    def __init__(self, channel: Sending, timeout: float | None, nbytes: int | None) -> None:
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
            refuse("loan", self._channel.name, bool(self._claimed), _LOAN)
        return self._attachment, self._attachment.ring.offsets[self._claimed[0][0]]

    def __repr__(self) -> str:
        shown = "" if self._attachment is None else f"slot {self._claimed[0][0]}"
        return show(self, self._channel.name, bool(self._claimed), shown, _LOAN)

    @property
    def nbytes(self) -> int:
        """How many bytes of `buffer` to send; settable until the block ends. The whole slot, if never set."""
        return self._channel.slot_size if self._nbytes is None else self._nbytes

    @nbytes.setter
    def nbytes(self, nbytes: int | str) -> None:
        self._nbytes = self._channel._fitting(nbytes)

    @property
    def buffer(self) -> memoryview:
        """The whole slot, writable. At first it holds bytes of older messages."""
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
            A writable, C-contiguous array. At first it holds bytes of older messages.

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
        start = layout.round_up(self._end, ALIGNMENT)
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
        """Say how many rows of an UpTo field are sent. Without this call all are.

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
        self._refuse_second()
        try:
            turn_of = partial(self._channel._turn, spin=self._channel._send_spin)
            finish(self._begin(turn_of, get_ident()))
            return self  # here: an exception may come at any bytecode
        except BaseException:
            self._discard()
            raise

    def _refuse_second(self) -> None:
        if self._claimed:
            raise ValueError("this loan has begun already: call loan() or aloan() for each block")

    def _begin(self, turn_of: TurnOf, who: int) -> Steps[None]:
        """Claim a slot, and begin the block of a thread or task (`who`). If this raises, call `_discard`."""
        channel = self._channel
        self._attachment = attachment = channel._open()
        outcome = channel._claim(attachment, self._claimed)
        if outcome is not CLAIMED:
            yield from channel._until_claimed(turn_of(deadline_of(True, self._timeout)), outcome, self._claimed)
        ((slot, _),) = self._claimed
        attachment.deadlocks.blocks[slot] = who
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
        attachment.deadlocks.blocks.pop(self._claimed[0][0], None)  # before another thread may have the slot
        self._channel._publish(self._claimed[0][0], meta, description)

    def _discard(self) -> None:
        """Give the slot back, unless it is published."""
        attachment = self._attachment
        if attachment is not None:
            for slot, since in self._claimed:
                if attachment.ring.is_claimed(slot, since):
                    attachment.deadlocks.blocks.pop(slot, None)
                    attachment.ring.discard(slot, since)
                attachment.ring.forget(slot, since)
        self._attachment = None
        self._buffer = None
        self._fields = None
        self._arrays = []


class AsyncLoan:
    """A loan whose block may wait for its slot in an event loop; made by `Sender.aloan`. Its block gets a Loan."""

    def __init__(self, loan: Loan) -> None:
        self._loan = loan

    def __repr__(self) -> str:
        return show(self, self._loan._channel.name, bool(self._loan._claimed), "", _ALOAN)

    if not TYPE_CHECKING:

        def __getattr__(self, attribute: str) -> NoReturn:
            if attribute == "_loan":  # `__init__` has not run
                raise AttributeError(attribute)
            refuse_attribute(self, attribute, self._loan._channel.name, _ALOAN)

    async def __aenter__(self) -> Loan:
        loan = self._loan
        loan._refuse_second()
        try:
            await in_loop(loan._begin(loan._channel._loop_turn, this_task()))
            return loan
        except BaseException:
            loan._discard()
            raise

    async def __aexit__(self, *exc_info: Any) -> None:
        self._loan.__exit__(*exc_info)


class AsyncBorrow(Generic[T_co]):
    """A borrow whose block may wait for its message in an event loop; made by `Receiver.aborrow`. Its block gets a
    Borrow.
    """

    def __init__(self, borrow: Borrow[T_co]) -> None:
        self._borrow = borrow

    def __repr__(self) -> str:
        return show(self, self._borrow._channel.name, self._borrow._slot >= 0, "", _ABORROW)

    if not TYPE_CHECKING:

        def __getattr__(self, attribute: str) -> NoReturn:
            if attribute == "_borrow":  # as above
                raise AttributeError(attribute)
            refuse_attribute(self, attribute, self._borrow._channel.name, _ABORROW)

    async def __aenter__(self) -> Borrow[T_co]:
        borrow, taken = self._borrow, Taken()
        attachment = borrow._open()
        try:
            await in_loop(borrow._begin(attachment, taken, borrow._channel._loop_turn, this_task()))
            return borrow
        except BaseException:
            borrow._abandon(attachment, taken)
            raise

    async def __aexit__(self, *exc_info: Any) -> None:
        try:
            self._borrow.__exit__(*exc_info)
        except BaseException:  # a cycle of the task and its exception may keep the borrow alive for long
            self._borrow._end()
            raise

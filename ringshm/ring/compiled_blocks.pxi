"""Loans and borrows in the compiled path: a part of compiled.pyx, whose rules hold here. The reference is loans.py.

    loan      claim    enter; read ATTENTION, TAIL, the next slot's word; store R_SINCE, the slot's word (WRITING); leave
              publish  store the description, R_META, R_SENDER; enter; read SHUTDOWN, TAIL, the slot's word; as `send`
    borrow    take     as `get`; store R_SINCE
              end      read R_SEQUENCE and the slot's word; store FREE, or KEPT while views are alive; wake

1. Loan and Borrow, which users see, are Python's classes. Their bases here have the state of a block, and the methods
   that a block calls. A method that finds anything unusual calls the reference (`slow`), which finds the state that it
   knows. A block that Python began is Python's to its end.
2. All views of a slot that is borrowed refer to a Hold, and Hold's references say whether there are any. Its finaliser
   is not Python, so no signal handler interrupts it: it gives the slot back whatever happens. The same holds for the
   finalisers of the two blocks, which act if an exception comes before the block, or at the entry of its end.
3. A forked child has copies of its parent's blocks and holds. Their slots' words name the parent.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.object cimport PyTypeObject
from cpython.ref cimport Py_DECREF, Py_REFCNT

from .participants import forking as _forking

cdef tuple NOTHING = ()
cdef set forking = _forking
#: The forms of arrays that loans were asked for, by shape and dtype as they were given.
cdef dict loaned_forms = {}


# --- views

cdef inline bint in_fork(object attachment) except -1:
    """Whether this is a forked child that has not begun anew yet."""
    return len(forking) and attachment.participants.in_fork()


@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class Hold:
    """A slot that this process reads, keeps or has pinned, and the bytes of its payload: loans._Hold and Payload, or
    versions.Pin.
    """

    cdef CompiledRing ring
    cdef readonly object attachment  # keeps the participant
    cdef uint64_t record, word, sequence
    cdef uint64_t slot  # of a Latest
    cdef char *data
    cdef Py_ssize_t nbytes
    cdef bint begun  # the message is received when this goes
    cdef char *cell  # which says that the slot is pinned; NULL: it is not, but a message's

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        Py_DECREF(None)  # Cython's reference, over which that function writes its own
        PyBuffer_FillInfo(buffer, self, self.data, self.nbytes, True, flags)

    def __dealloc__(self):
        if self.cell != NULL:
            self.unpin()
        elif self.begun and not in_fork(self.attachment):
            self.end()

    @property
    def version(self):
        """Of a Latest."""
        return self.sequence

    cdef int keep(self) except -1:
        """The message is received, and views of it are alive."""
        cdef uint64_t *record = self.ring.words + self.record
        if self.word & STATE_MASK == READING and self.word & OWNER_MASK == self.ring.owner and LOAD(record) == self.word:
            self.word += KEPT - READING
            STORE(record, self.word)
        return 0

    cdef int end(self) except -1:
        """Hand the slot back, if it is still this participant's, with this message."""
        cdef CompiledRing ring = self.ring
        cdef uint64_t *record = ring.words + self.record
        cdef uint64_t word = self.word
        self.word = FREE
        if word & OWNER_MASK != ring.owner or (LOAD(record) ^ word) & ~STATE_MASK or word == FREE:
            return 0
        if LOAD(&record[R_SEQUENCE]) == self.sequence:
            STORE(record, FREE)
            if not ring.wake_sender():
                self.attachment.ring.wake_freed()
        return 0

    # --- of a Latest: compiled_latest.pxi

    cdef inline char *own_cell(self) noexcept:
        cdef CompiledRing ring = self.ring
        cdef uint64_t number = (ring.entry - ring.entries) // ENTRY_WORDS * PIN_CELLS + MOST_PINNED + self.slot
        return <char *> ring.words + ring.pins + number

    cdef inline bint share(self) noexcept:
        """Whether this process has pinned that version already: this Hold counts, too."""
        cdef Pinned *pinned = &self.ring.pinned[self.slot]
        GUARD(&self.ring.guard)
        if pinned.count and pinned.version == self.sequence:
            pinned.count += 1
            self.cell = self.own_cell()
        UNGUARD(&self.ring.guard)
        return self.cell != NULL

    cdef inline void pin(self, uint64_t newest) noexcept:
        """Within the receivers' mutex: pin that version, unless it is not the newest any more."""
        cdef Pinned *pinned = &self.ring.pinned[self.slot]
        cdef char *cell = self.own_cell()
        if self.share():
            return
        GUARD(&self.ring.guard)
        if pinned.count == 0:  # else damage
            STORE_BYTE(cell, self.slot + 1)
            FENCE()  # SYNC POINT p
            if LOAD(&self.ring.words[NEWEST]) == newest:
                pinned.version, pinned.count, self.cell = self.sequence, 1, cell
            else:
                STORE_BYTE(cell, 0)
        UNGUARD(&self.ring.guard)

    cdef int unpin(self) except -1:
        """Nothing leads to that version of a Latest by this Hold any more."""
        cdef CompiledRing ring = self.ring
        cdef Pinned *pinned = &ring.pinned[self.slot]
        cdef bint forked = in_fork(self.attachment)  # which may run other threads
        GUARD(&ring.guard)
        if not forked and ring.owner == self.word and pinned.count:
            pinned.count -= 1
            if pinned.count == 0 and ring.has_entry():
                STORE_BYTE(self.cell, 0)
        UNGUARD(&ring.guard)
        return 0

    def let_go(self):
        """As loans._Hold."""
        return True


# --- borrows

cdef class CompiledBorrow:
    """The block of a borrow: the base of Borrow. If the compiled path has begun it, its hold is a Hold."""

    cdef public CompiledHandle _channel
    cdef public object _timeout, _value, _hold, _payload
    cdef public Py_ssize_t _slot
    cdef public bint _requeue, _seen
    cdef public uint64_t sequence, sender, delivery_count

    @property
    def value(self):
        """The message, while the block lasts."""
        with cython.critical_section(self):  # another thread may end the block
            value = self._value
        if self._hold is None:
            return slow["Borrow.value"](self)
        self._seen = True
        return value

    def __getitem__(self, name):
        with cython.critical_section(self):  # as above
            message = self._value
        if self._hold is not None and type(message) is dict:
            self._seen = True
            value = (<dict> message).get(name)
            if value is not None:
                return value
        return slow["Borrow.__getitem__"](self, name)

    def __enter__(self):
        cdef CompiledHandle handle = self._channel
        cdef CompiledRing ring = handle.open_ring()
        cdef Taken taken
        cdef Hold hold = Hold.__new__(Hold)
        cdef double until = 0
        if self._slot >= 0 or not handle.begin(ring, False, True, None):
            return slow["Borrow.__enter__"](self)
        hold.ring, hold.attachment = ring, handle.open_attachment()
        if hold.attachment is None:
            return slow["Borrow.__enter__"](self)
        while self._slot >= 0 or not ring.take(&taken, 1):  # another thread may have begun it meanwhile
            if not handle.wait_briefly(ring, False, 1, True, self._timeout, &until):
                self._timeout = time_left(until, self._timeout)
                return slow["Borrow.__enter__"](self)
        hold.record, hold.word = taken.record, taken.own
        hold.sequence = LOAD(&ring.words[taken.record + R_SEQUENCE])
        hold.data, hold.nbytes = taken.data, taken.meta >> 16
        try:
            self._value = handle.codec.view(ring, taken.meta, taken.data, taken.description, hold)
            handle.blocks[<Py_ssize_t> taken.slot] = PyThread_get_thread_ident()
        except BaseException as error:
            self._hold = hold  # until the reference has it, it goes back by `__del__`
            return slow["Borrow._fail"](self, taken.slot, taken.record, taken.own, taken.meta, error)
        self.sequence, self.sender = hold.sequence, LOAD(&ring.words[taken.record + R_SENDER]) >> 37
        self.delivery_count = (taken.own & DELIVERY_MASK) // DELIVERY + 1
        STORE(&ring.words[taken.record + R_SINCE], monotonic_ns())
        self._slot, self._hold, hold.begun = taken.slot, hold, True
        return self

    def __exit__(self, kind=None, error=None, traceback=None):
        cdef CompiledHandle handle = self._channel
        cdef CompiledRing ring
        if type(self._hold) is Hold and not self._requeue:
            self.end()
            ring = handle.open_ring()
            if ring is None or ring.owner == 0 or ring.has_entry():  # Returns.reaped
                return None
        return slow["Borrow.__exit__"](self, kind, error, traceback)

    def __del__(self):
        cdef Hold hold
        if type(self._hold) is Hold:
            hold = self._hold
            if in_fork(hold.attachment):
                return
            self._value = None
            # an exception came before the block has looked; or the message is to go back, and no view keeps it
            if Py_REFCNT(hold) == 2 if self._requeue else not self._seen:
                hold.begun, self._hold = False, None
                self._channel.blocks.pop(self._slot, None)
                if hold.word & OWNER_MASK == hold.ring.owner:
                    hold.attachment.ring.requeue_abandoned((hold.record, hold.word))
            hold = None  # `end` counts the references
            self.end()
        elif self._hold is not None:
            slow["Borrow.__del__"](self)

    def _end(self):
        return self.end() if type(self._hold) is Hold else slow["Borrow._end"](self)

    cdef bint end(self) except -1:
        """Borrow._end"""
        with cython.critical_section(self):
            return self.end_once()

    cdef inline bint end_once(self) except -1:
        cdef Hold hold = self._hold
        cdef bint kept
        if hold is None:
            return False
        self._channel.blocks.pop(self._slot, None)
        self._value = None
        kept = Py_REFCNT(hold) > 2  # this function's, this object's, and one of each view
        if kept:
            hold.keep()
        elif self._requeue:
            taken = [(hold.record, hold.word)]
            try:
                hold.attachment.ring.give_back(taken)
            finally:
                if not taken:
                    hold.word = FREE
        else:
            hold.end()
        self._hold = None
        return kept


def borrow(CompiledHandle self not None, object timeout=None):
    cdef CompiledBorrow borrow
    if timeout is not None:
        check_timeout(timeout)
    borrow = (<PyTypeObject *> borrow_type).tp_new(borrow_type, <PyObject *> NOTHING, NULL)
    borrow._channel, borrow._timeout, borrow._slot = self, timeout, -1
    return borrow


# --- loans

cdef class CompiledLoan:
    """The block of a loan: the base of Loan. If the compiled path has begun it, `ring` is not None."""

    cdef public CompiledHandle _channel
    cdef public object _timeout, _nbytes, _attachment, _buffer, _fields
    cdef public list _arrays
    cdef public uint64_t _end
    cdef public bint _discarded
    cdef CompiledRing ring
    cdef uint64_t slot, since
    cdef list claimed
    cdef dict views  # of fields, by name

    @property
    def _claimed(self):
        """The slot and when it was claimed, once it is, as Ring.claim."""
        if self.claimed is None:
            self.claimed = [] if self.ring is None else [(self.slot, self.since)]
        return self.claimed

    @_claimed.setter
    def _claimed(self, list claimed):
        self.claimed = claimed

    cdef inline bint is_open(self) noexcept:
        """Whether the block lasts, and the compiled path has begun it."""
        return self.ring is not None and self._attachment is not None

    @property
    def buffer(self):
        """The whole slot, writable. At first it holds bytes of older messages."""
        if self._buffer is None:
            if not self.is_open() or self._arrays or not self._channel.codec.bare:
                return slow["Loan.buffer"](self)
            start = self.ring.slots + self.slot * self.ring.stride
            self._buffer = memoryview(self.ring.memory)[start:start + self.ring.slot_size]
        return self._buffer

    def array(self, shape, dtype=float):
        """The first array of a loan."""
        cdef ArrayForm form = None
        if not self.is_open() or self._arrays or self._buffer is not None or not self._channel.codec.bare:
            return slow["Loan.array"](self, shape, dtype)
        # by equality a float is the int of its value, and a dtype with metadata is the one without
        sound = type(dtype) is type or type(dtype) is str
        for length in shape if type(shape) is tuple else (shape,):
            sound = sound and type(length) is int
        if sound:
            form = loaned_forms.get((shape, dtype))
        if form is None or form.nbytes > self.ring.slot_size:
            array = slow["Loan.array"](self, shape, dtype)
            if sound:
                if len(loaned_forms) >= FORMS_RECEIVED:
                    loaned_forms.clear()
                loaned_forms[shape, dtype] = ArrayForm(self._arrays[0][2], array.nbytes)
            return array
        array = form.over(self.ring.payload_of(self.slot), C_CONTIGUOUS | WRITEABLE, self.ring)
        self._arrays.append((0, array, form.description))
        self._end = form.nbytes
        return array

    def __getitem__(self, name):
        cdef FieldForm field = self.field(name)
        if field is None:
            return slow["Loan.__getitem__"](self, name)
        if self.views is None:
            self.views = {}
        array = self.views.get(name)
        if array is None:
            array = field.over(self.ring.payload_of(self.slot) + field.offset, C_CONTIGUOUS | WRITEABLE, self.ring)
            self.views[name] = array
        return array

    def __setitem__(self, name, value):
        cdef FieldForm field = self.field(name)
        if field is None or not field.store(value, self.ring.payload_of(self.slot) + field.offset):
            slow["Loan.__setitem__"](self, name, value)

    cdef inline FieldForm field(self, object name):
        """A field of a typed message; None if it is Python's."""
        if self.is_open() and self._channel.codec.is_typed() and self._fields is None:
            return <FieldForm> self._channel.codec.spec.by_name.get(name)
        return None

    def __enter__(self):
        cdef CompiledHandle handle = self._channel
        cdef CompiledRing ring = handle.open_ring()
        if self.ring is not None or self.claimed or not handle.begin(ring, True, True, None):
            return slow["Loan.__enter__"](self)
        attachment = handle.open_attachment()
        if attachment is None:
            return slow["Loan.__enter__"](self)
        self.slot = ring.claim(&self.since)
        if self.slot == ring.capacity:
            return slow["Loan.__enter__"](self)
        self.ring, self._attachment = ring, attachment
        handle.blocks[<Py_ssize_t> self.slot] = PyThread_get_thread_ident()
        return self

    def __exit__(self, kind=None, error=None, traceback=None):
        cdef CompiledHandle handle = self._channel
        cdef CompiledRing ring = self.ring
        if self.views is not None:
            for array in self.views.values():
                (<Array *> <PyObject *> array).flags &= ~WRITEABLE
        if kind is not None or self._discarded or self._fields is not None or ring is None:
            return slow["Loan.__exit__"](self, kind, error, traceback)
        whose = handle.blocks.pop(<Py_ssize_t> self.slot, None)  # before another thread may have the slot
        if not self.send():
            if whose is not None:
                handle.blocks[<Py_ssize_t> self.slot] = whose
            return slow["Loan.__exit__"](self, kind, error, traceback)
        self._attachment = self._buffer = self.views = None
        self._arrays = []
        if not ring.wake_receiver():
            handle._ring.wake_receiver()

    cdef bint send(self) except -1:
        """Publish what was written; False if that is Python's."""
        cdef CompiledHandle handle = self._channel
        cdef CompiledRing ring = self.ring
        cdef Message message
        if not self.is_open() or not handle.has_role(ring, True):
            return False
        if handle.codec.is_typed():
            message.meta = handle.codec.spec.meta
        elif self._arrays:
            (start, array, description), *more = self._arrays
            if more or start:
                return False
            (<Array *> <PyObject *> array).flags &= ~WRITEABLE
            message.meta = <uint64_t> array.nbytes << 16 | <uint64_t> PyBytes_GET_SIZE(description) << 8 | ARRAY
            message.description = PyBytes_AS_STRING(description)
        elif self._buffer is not None or self._nbytes is not None:
            message.meta = (ring.slot_size if self._nbytes is None else <uint64_t> self._nbytes) << 16 | BYTES
        else:
            return False
        return ring.publish(self.slot, self.since, &message)

    def __del__(self):
        cdef CompiledRing ring = self.ring
        if self.is_open() and not in_fork(self._attachment) and ring.is_claimed(self.slot, self.since):
            STORE(&ring.words[ring.record_of(self.slot)], FREE)
            self._channel.blocks.pop(<Py_ssize_t> self.slot, None)
            self._attachment.ring.wake_freed()


def loan(CompiledHandle self not None, object timeout=None, object nbytes=None):
    cdef CompiledLoan loan
    if timeout is not None:
        check_timeout(timeout)
    if nbytes is not None:
        nbytes = self._fitting(nbytes)
    loan = (<PyTypeObject *> loan_type).tp_new(loan_type, <PyObject *> NOTHING, NULL)
    loan._channel, loan._timeout, loan._nbytes, loan._arrays = self, timeout, nbytes, []
    return loan

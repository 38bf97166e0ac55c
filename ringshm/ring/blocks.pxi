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

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.dict cimport PyDict_GetItemWithError
from cpython.ref cimport Py_REFCNT
from libc.string cimport memmove

from .participants import forking as _forking

cdef extern from *:
    """
    /* PyArray_Scalar and PyArray_ScalarAsCtype, entries 60 and 62 of NumPy's C API in every version. */
    typedef PyObject *(*NewScalar)(void *, PyObject *, PyObject *);
    typedef void (*ReadScalar)(PyObject *, void *);
    """
    ctypedef object (*NewScalar)(void *, object, PyObject *)
    ctypedef void (*ReadScalar)(object, void *)

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident()

cdef enum:
    F_CONTIGUOUS = 0x0002  # of an array's flags
    NEW_SCALAR = 60
    READ_SCALAR = 62

cdef uint64_t READING = layout.READING
cdef uint64_t DELIVERY = layout.DELIVERY, DELIVERY_MASK = layout.DELIVERY_MASK
cdef uint64_t BYTEARRAY = codecs.BYTEARRAY, TYPED = codecs.TYPED

cdef object BYTE = np.dtype(np.uint8)
cdef tuple NOTHING = ()
cdef set forking = _forking
#: The classes Loan and Borrow, and their methods that are replaced, by class and name; set by `replace_blocks`.
cdef object loan_type = None, borrow_type = None
cdef dict slow = {}
#: The forms of arrays that loans were asked for, by shape and dtype as they were given.
cdef dict loaned_forms = {}


# --- the ring

cdef inline bint is_claimed(CompiledRing ring, uint64_t slot, uint64_t since) noexcept:
    cdef uint64_t *record = ring.words + ring.records + slot * RECORD_WORDS
    return ring.owner != 0 and LOAD(record) == (WRITING | ring.owner) and LOAD(&record[R_SINCE]) == since


cdef inline char *payload_of(CompiledRing ring, uint64_t slot) noexcept:
    return <char *> ring.words + ring.slots + slot * ring.stride


cdef inline bint is_reaped(CompiledRing ring) noexcept:
    """Returns.reaped"""
    cdef uint64_t *entry = ring.words + ring.entry
    return ring.owner != 0 and (
        LOAD(&entry[P_STATUS]) != IN_USE or LOAD(&entry[P_INCARNATION]) != ring.owner >> INCARNATION_SHIFT
    )


# --- views

cdef inline bint in_fork(object attachment) except -1:
    """Whether this is a forked child that has not begun anew yet."""
    return len(forking) and attachment.participants.in_fork()


@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class Hold:
    """A slot that this process reads or keeps, and the bytes of its payload: loans._Hold and Payload in one."""

    cdef CompiledRing ring
    cdef readonly object attachment  # keeps the participant
    cdef uint64_t slot, record, word, sequence
    cdef char *data
    cdef Py_ssize_t nbytes
    cdef bint begun  # the message is received when this goes

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, self.nbytes, True, flags)

    def __dealloc__(self):
        if self.begun and not in_fork(self.attachment):
            self.end()

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
            if LOAD(&ring.words[SPACE_HINT]) and not ring.wake_sender():
                self.attachment.ring.wake_freed()
        return 0

    def let_go(self):
        """As loans._Hold."""
        return True


cdef object array_over(ArrayForm form, char *data, int flags, object base):
    """An array over memory that `base` keeps."""
    Py_INCREF(form.dtype)
    value = new_array(ndarray, form.dtype, form.nd, form.shape, NULL, data, flags, NULL)
    Py_INCREF(base)
    (<Array *> <PyObject *> value).base = <PyObject *> base
    return value


cdef object view(CompiledHandle handle, CompiledRing ring, Taken *taken, Hold hold):
    """What the message is, in views that keep the hold: messages/"""
    cdef uint64_t kind = taken.meta & 0xFF, nbytes = taken.meta >> 16
    cdef Py_ssize_t size
    cdef ArrayForm form
    if handle.bare:
        if kind == BYTES or kind == BYTEARRAY:
            return PyMemoryView_FromObject(hold)
        if kind == ARRAY and nbytes:
            form = handle.form_received(ring, taken)
            return array_over(form, hold.data, F_CONTIGUOUS if form.fortran else C_CONTIGUOUS, hold)
        if kind == STR or NONE <= kind <= FLOAT or (kind == CONTAINER and handle.pickles and nbytes <= LARGE_STREAM):
            return handle.decode(ring, taken)
    elif handle.fields is not None and taken.meta == handle.fields.meta:
        return handle.fields.message(hold.data, hold)
    size = ring.slot_size if kind == TYPED else nbytes  # a typed message's fields lie anywhere in its slot
    Py_INCREF(BYTE)
    payload = new_array(ndarray, BYTE, 1, &size, NULL, hold.data, C_CONTIGUOUS, NULL)
    Py_INCREF(hold)
    (<Array *> <PyObject *> payload).base = <PyObject *> hold
    description = <char *> (ring.words + taken.record + R_DESCRIPTION)
    return handle.codec.view(payload, taken.meta, PyBytes_FromStringAndSize(description, taken.meta >> 8 & 0xFF))


# --- typed messages

cdef class FieldForm(ArrayForm):
    """A field of a spec: where it lies in a slot, and which scalars it takes as they are."""

    cdef object name, scalar
    cdef uint64_t offset
    cdef int size  # of an item
    cdef char kind  # of its dtype, if a scalar of it can be stored here; else 0
    cdef int64_t low, high  # of integers
    cdef double limit

    def __init__(self, field, converter):
        self.name, self.dtype, self.scalar = field.path[0], field.dtype, field.dtype.type
        self.nbytes, self.offset, self.size = field.nbytes, field.offset, field.dtype.itemsize
        self.nd = len(field.shape)
        for axis in range(self.nd):
            self.shape[axis] = field.shape[axis]
        plain = not self.nd and self.size <= 32 and field.dtype.isnative and field.dtype.kind in "biufc"
        self.kind = ord(field.dtype.kind) if plain else 0
        self.low, self.high = max(converter._low, -(1 << 63)), min(converter._high, (1 << 63) - 1)
        self.limit = converter._limit

    cdef bint store(self, object value, char *to) except -1:
        """Store a scalar, if it needs no more of a check than here; whether it is stored."""
        cdef int64_t number
        cdef int overflow = 0
        cdef double real
        cdef float single
        if self.kind == 0:
            return False
        if type(value) is self.scalar:
            (<ReadScalar> numpy_functions[READ_SCALAR])(value, to)
        elif type(value) is int and (self.kind == c"i" or self.kind == c"u"):
            number = PyLong_AsLongLongAndOverflow(value, &overflow)
            if overflow or not self.low <= number <= self.high:
                return False
            memcpy(to, &number, self.size)
        elif type(value) is float and self.kind == c"f" and self.size in (4, 8):
            real = value
            single = <float> real
            if not -self.limit <= real <= self.limit:
                return False
            memcpy(to, <char *> &real if self.size == 8 else <char *> &single, self.size)
        elif type(value) is bool and self.kind == c"b":
            to[0] = value is True
        else:
            return False
        return True


cdef class SpecForm:
    """A spec whose fields always have the same form."""

    cdef list fields
    cdef dict by_name  # those at the top
    cdef object nest  # None: all are
    cdef uint64_t meta
    cdef bint copied  # whether messages are copied here: fields that are large lie in a pool
    cdef Part *parts  # of a message that is sent

    def __init__(self, codec):
        root = codec.spec.root
        self.fields = [FieldForm(of.field, of) for of in codec.spec.converters]
        self.by_name = {field.path[0]: form for field, form in zip(codec.spec.fields, self.fields) if not field.path[1:]}
        self.nest = None if root.flat else root.nest
        self.meta = codec._fixed[0]
        self.copied = all([field.nbytes < POOLED for field in codec.spec.fields])
        self.parts = <Part *> malloc(len(self.fields) * sizeof(Part))
        if self.parts == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.parts)

    cdef list collect(self, dict given, Message *message):
        """The values of a message that is sent as it is given; None if that is Python's. They keep `message.parts`,
        which is to be sent before any Python code runs.
        """
        cdef FieldForm field
        cdef Part *part = self.parts
        cdef PyObject *found
        cdef Array *array
        cdef list values = []
        if len(given) != len(self.fields) or self.nest is not None or self.meta >> 16 > SMALL_NBYTES:
            return None
        for form in self.fields:
            found = PyDict_GetItemWithError(given, (<FieldForm> form).name)
            if found == NULL:
                return None
            values.append(<object> found)
        for form, value in zip(self.fields, values):
            field = <FieldForm> form
            part.offset, part.nbytes, part.data = field.offset, field.nbytes, part.scalar
            array = <Array *> <PyObject *> value
            if type(value) is ndarray and array.descr == <PyObject *> field.dtype and array.nd == field.nd:
                if memcmp(array.dimensions, field.shape, field.nd * sizeof(Py_ssize_t)) or not array.flags & C_CONTIGUOUS:
                    return None
                part.data = array.data
            elif not field.store(value, part.scalar):
                return None
            part += 1
        message.meta, message.parts, message.count = self.meta, self.parts, len(self.fields)
        return values

    cdef dict message(self, char *data, Hold hold):
        """The message that lies there: in views that keep the hold, as typed.borrowed, or if that is None as copies."""
        cdef FieldForm field
        cdef dict message = {}
        cdef list values = []
        for form in self.fields:
            field = <FieldForm> form
            if field.nd == 0:
                value = (<NewScalar> numpy_functions[NEW_SCALAR])(data + field.offset, field.dtype, NULL)
            elif hold is not None:
                value = array_over(field, data + field.offset, C_CONTIGUOUS, hold)
            else:
                Py_INCREF(field.dtype)
                value = new_array(ndarray, field.dtype, field.nd, field.shape, NULL, NULL, 0, NULL)
                copy((<Array *> <PyObject *> value).data, data + field.offset, field.nbytes)
            if self.nest is None:
                message[field.name] = value
            else:
                values.append(value)
        return message if self.nest is None else self.nest(iter(values))


cdef SpecForm form_of_spec(object codec):
    """None if the codec is not that of a spec, or its messages are not such as are handled here."""
    if not isinstance(codec, SpecCodec) or codec.spec.up_to:
        return None
    structured = [field for field in codec.spec.fields if field.dtype.kind == "V" and not field.shape]
    return None if structured else SpecForm(codec)


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
        if self._hold is None:
            return slow["Borrow", "value"](self)
        self._seen = True
        return self._value

    def __getitem__(self, name):
        cdef PyObject *found
        if self._hold is not None and type(self._value) is dict:
            self._seen = True
            found = PyDict_GetItemWithError(self._value, name)
            if found != NULL:
                return <object> found
        return slow["Borrow", "__getitem__"](self, name)

    def __enter__(self):
        cdef CompiledHandle handle = self._channel
        cdef CompiledRing ring = handle.ring
        cdef Taken taken
        cdef Hold hold
        if self._slot >= 0 or not handle.has_role(ring, handle.receives_as) or PyList_GET_SIZE(ring.unreturned):
            return slow["Borrow", "__enter__"](self)
        handle.begin_call(ring)
        hold = Hold.__new__(Hold)
        if not handle.has_role(ring, handle.receives_as) or not ring.take(&taken, 1):
            return slow["Borrow", "__enter__"](self)
        hold.ring, hold.attachment = ring, handle.attachment
        hold.slot, hold.record, hold.word = taken.slot, taken.record, taken.own
        hold.sequence = LOAD(&ring.words[taken.record + R_SEQUENCE])
        hold.data, hold.nbytes = payload_of(ring, taken.slot), taken.meta >> 16
        try:
            self._value = view(handle, ring, &taken, hold)
            handle.blocks[<Py_ssize_t> taken.slot] = PyThread_get_thread_ident()
        except BaseException as error:
            self._hold = hold  # until the reference has it, it goes back by `__del__`
            return slow["Borrow", "_fail"](self, taken.slot, taken.record, taken.own, taken.meta, error)
        self.sequence, self.sender = hold.sequence, LOAD(&ring.words[taken.record + R_SENDER]) >> 37
        self.delivery_count = (taken.own & DELIVERY_MASK) // DELIVERY + 1
        STORE(&ring.words[taken.record + R_SINCE], monotonic_ns())
        self._slot, self._hold, hold.begun = taken.slot, hold, True
        return self

    def __exit__(self, kind=None, error=None, traceback=None):
        cdef CompiledHandle handle = self._channel
        if type(self._hold) is Hold and not self._requeue:
            self.end()
            if handle.ring is None or not is_reaped(handle.ring):
                return None
        return slow["Borrow", "__exit__"](self, kind, error, traceback)

    def __del__(self):
        cdef Hold hold
        if type(self._hold) is Hold:
            hold = self._hold
            if in_fork(hold.attachment):
                return
            if not self._seen and not self._requeue:  # an exception came before the block has looked
                hold.begun, self._hold = False, None
                if hold.word & OWNER_MASK == hold.ring.owner:
                    hold.attachment.ring.overdue.append((hold.record, hold.word))
                self._channel.blocks.pop(self._slot, None)
            self.end()
        elif self._hold is not None:
            slow["Borrow", "__del__"](self)

    def _end(self):
        return self.end() if type(self._hold) is Hold else slow["Borrow", "_end"](self)

    cdef bint end(self) except -1:
        """Borrow._end"""
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
            hold.attachment.ring.give_back([(hold.record, hold.word)])
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
            if not self.is_open() or self._arrays or not self._channel.bare:
                return slow["Loan", "buffer"](self)
            self._buffer = self.ring.view_of(self.slot)
        return self._buffer

    def array(self, shape, dtype=float):
        """The first array of a loan."""
        cdef ArrayForm form = None
        if not self.is_open() or self._arrays or self._buffer is not None or not self._channel.bare:
            return slow["Loan", "array"](self, shape, dtype)
        # by equality a float is the int of its value, and a dtype with metadata is the one without
        sound = type(dtype) is type or type(dtype) is str
        for length in shape if type(shape) is tuple else (shape,):
            sound = sound and type(length) is int
        if sound:
            form = loaned_forms.get((shape, dtype))
        if form is None or form.nbytes > self.ring.slot_size:
            array = slow["Loan", "array"](self, shape, dtype)
            if sound:
                if len(loaned_forms) >= FORMS_RECEIVED:
                    loaned_forms.clear()
                loaned_forms[shape, dtype] = ArrayForm(self._arrays[0][2], array.nbytes)
            return array
        array = array_over(form, payload_of(self.ring, self.slot), C_CONTIGUOUS | WRITEABLE, self.ring)
        self._arrays.append((0, array, form.description))
        self._end = form.nbytes
        return array

    def __getitem__(self, name):
        cdef PyObject *found
        cdef FieldForm field
        if not self.is_open() or self._channel.fields is None or self._fields is not None:
            return slow["Loan", "__getitem__"](self, name)
        if self.views is None:
            self.views = {}
        found = PyDict_GetItemWithError(self.views, name)
        if found != NULL:
            return <object> found
        found = PyDict_GetItemWithError(self._channel.fields.by_name, name)
        if found == NULL:
            return slow["Loan", "__getitem__"](self, name)
        field = <FieldForm> <object> found
        array = array_over(field, payload_of(self.ring, self.slot) + field.offset, C_CONTIGUOUS | WRITEABLE, self.ring)
        self.views[name] = array
        return array

    def __setitem__(self, name, value):
        cdef PyObject *found = NULL
        cdef FieldForm field
        if self.is_open() and self._channel.fields is not None and self._fields is None:
            found = PyDict_GetItemWithError(self._channel.fields.by_name, name)
        if found != NULL:
            field = <FieldForm> <object> found
            if field.store(value, payload_of(self.ring, self.slot) + field.offset):
                return
        slow["Loan", "__setitem__"](self, name, value)

    def __enter__(self):
        cdef CompiledHandle handle = self._channel
        cdef CompiledRing ring = handle.ring
        if self.ring is not None or self.claimed or not handle.has_role(ring, handle.sends_as):
            return slow["Loan", "__enter__"](self)
        handle.begin_call(ring)
        if not handle.has_role(ring, handle.sends_as):
            return slow["Loan", "__enter__"](self)
        self.slot = ring.claim(&self.since)
        if self.slot == ring.capacity:
            return slow["Loan", "__enter__"](self)
        self.ring, self._attachment = ring, handle.attachment
        handle.blocks[<Py_ssize_t> self.slot] = PyThread_get_thread_ident()
        return self

    def __exit__(self, kind=None, error=None, traceback=None):
        cdef CompiledHandle handle = self._channel
        cdef CompiledRing ring = self.ring
        if self.views is not None:
            for array in self.views.values():
                (<Array *> <PyObject *> array).flags &= ~WRITEABLE
        if kind is not None or self._discarded or self._fields is not None or not self.send():
            return slow["Loan", "__exit__"](self, kind, error, traceback)
        handle.blocks.pop(<Py_ssize_t> self.slot, None)
        self._attachment = self._buffer = self.views = None
        self._arrays = []
        if LOAD(&ring.words[MESSAGE_HINT]) and not ring.wake_receiver():
            handle._ring.wake_receiver()

    cdef bint send(self) except -1:
        """Publish what was written; False if that is Python's."""
        cdef CompiledHandle handle = self._channel
        cdef CompiledRing ring = self.ring
        cdef Message message
        if not self.is_open() or not handle.has_role(ring, handle.sends_as):
            return False
        if handle.fields is not None:
            message.meta = handle.fields.meta
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
        return is_claimed(ring, self.slot, self.since) and ring.publish(self.slot, &message)

    def __del__(self):
        cdef CompiledRing ring = self.ring
        if self.is_open() and not in_fork(self._attachment) and is_claimed(ring, self.slot, self.since):
            STORE(&ring.words[ring.records + self.slot * RECORD_WORDS], FREE)
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


def replace_blocks(dict methods, loan, borrow):
    """Know the two classes, and the methods of the reference."""
    global loan_type, borrow_type
    loan_type, borrow_type = loan, borrow
    slow.update(methods)

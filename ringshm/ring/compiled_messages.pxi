"""Objects to bytes, and back: a part of compiled.pyx, whose rules hold here. It knows no slots, but where bytes lie.
The reference: messages/.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdlib cimport free, malloc, realloc

import pickle

import numpy as np

from ..errors import SpecMismatch
from ..messages import codecs, containers
from ..messages.buffers import ALIGNMENT as _ALIGNMENT
from ..messages.bare import array_over, form_of
from ..messages.containers import ContainerCodec, pack_container
from ..messages.pickled import PickleCodec
from ..messages.pool import LEAST_NBYTES
from ..messages.typed import ALIGNED_NBYTES as _ALIGNED_NBYTES, Batch as TypedBatch, SpecCodec

cdef extern from *:
    """
    /* How every NumPy from 1.0 on lays out an array; `_check_numpy` compares one with what Python says of it. */
    typedef struct {
        PyObject_HEAD
        char *data;
        int nd;
        Py_ssize_t *dimensions;
        Py_ssize_t *strides;
        PyObject *base;
        PyObject *descr;
        int flags;
    } Array;

    /* PyArray_NewFromDescr, entry 94 of NumPy's C API in every version. */
    typedef PyObject *(*NewArray)(
        PyObject *, PyObject *, int, Py_ssize_t const *, Py_ssize_t const *, void *, int, PyObject *);

    /* PyArray_Scalar and PyArray_ScalarAsCtype, entries 60 and 62. */
    typedef PyObject *(*NewScalar)(void *, PyObject *, PyObject *);
    typedef void (*ReadScalar)(PyObject *, void *);
    """
    ctypedef struct Array:
        char *data
        int nd
        Py_ssize_t *dimensions
        Py_ssize_t *strides
        PyObject *base
        PyObject *descr
        int flags
    ctypedef object (*NewArray)(
        object, object, int, const Py_ssize_t *, const Py_ssize_t *, void *, int, PyObject *)
    ctypedef object (*NewScalar)(void *, object, PyObject *)
    ctypedef void (*ReadScalar)(object, void *)

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1
    bint PyUnicode_IS_ASCII(object)
    const char *PyUnicode_DATA(object)
    Py_ssize_t PyUnicode_GET_LENGTH(object)

cdef enum:
    NEW_FROM_DESCR = 94
    NEW_SCALAR = 60
    READ_SCALAR = 62
    C_CONTIGUOUS = 0x0001  # flags of an array
    F_CONTIGUOUS = 0x0002
    WRITEABLE = 0x0400
    MAX_DIMS = 64
    FORMS_SENT = 256  # forms of arrays that a handle remembers: of those that it sends (by what they are), and
    FORMS_RECEIVED = 1024  # of those that it receives
    HEAD_NBYTES = 12  # of a CONTAINER_OOB, and
    MOST_PLACES = 64  # what lies behind its table: the stream, and buffers

cdef uint64_t CONTAINER = codecs.CONTAINER, CONTAINER_OOB = codecs.CONTAINER_OOB, NONE = codecs.NONE, FALSE = codecs.FALSE, TRUE = codecs.TRUE
cdef uint64_t INT = codecs.INT, FLOAT = codecs.FLOAT, STR = codecs.STR, BYTES = codecs.BYTES
cdef uint64_t BYTEARRAY = codecs.BYTEARRAY, ARRAY = codecs.ARRAY, TYPED = codecs.TYPED
cdef uint64_t LARGE_STREAM = containers.LARGE_NBYTES, POOLED = LEAST_NBYTES, ALIGNED_NBYTES = _ALIGNED_NBYTES
cdef uint64_t ALIGNMENT = _ALIGNMENT

cdef object loads = pickle.loads, ndarray = np.ndarray, asarray = np.asarray, BYTE = np.dtype(np.uint8)
cdef NewArray new_array = NULL
cdef NewScalar new_scalar = NULL
cdef ReadScalar read_scalar = NULL


# --- arrays

cdef object array_at(object dtype, int nd, const Py_ssize_t *shape, char *data, int flags, object base):
    """An array over memory that `base` keeps; or a new one, if `data` is NULL."""
    Py_INCREF(dtype)
    value = new_array(ndarray, dtype, nd, shape, NULL, data, flags, NULL)
    if data != NULL:
        Py_INCREF(base)
        (<Array *> <PyObject *> value).base = <PyObject *> base
    return value


cdef class ArrayForm:
    """What a description says of an array: messages/bare.py."""

    cdef bytes description
    cdef object dtype
    cdef bytes dtype_text  # by which a pickle names the dtype; None: Python knows
    cdef bint readonly, fortran
    cdef int nd
    cdef Py_ssize_t shape[MAX_DIMS]
    cdef uint64_t nbytes

    def __init__(self, bytes description, uint64_t nbytes):
        known = form_of(description, nbytes)  # ValueError if it is damaged
        self.description, self.readonly, self.fortran = description, known.readonly, known.order == "F"
        self.set(known.dtype, known.shape, nbytes)

    cdef int set(self, object dtype, tuple shape, uint64_t nbytes) except -1:
        self.dtype, self.nd, self.nbytes = dtype, len(shape), nbytes
        for axis in range(self.nd):
            self.shape[axis] = shape[axis]
        return 0

    cdef inline bint is_of(self, PyObject *value, int more=0) noexcept:
        """Whether it is an array of that dtype and shape, behind so many more dimensions, and lies in memory as in a slot.
        """
        cdef Array *array = <Array *> value
        return (
            type(<object> value) is ndarray
            and array.descr == <PyObject *> self.dtype
            and array.nd == self.nd + more
            and array.flags & C_CONTIGUOUS
            and memcmp(array.dimensions + more, self.shape, self.nd * sizeof(Py_ssize_t)) == 0
        )

    cdef inline tuple shape_tuple(self):
        cdef int axis
        return tuple([self.shape[axis] for axis in range(self.nd)])

    cdef inline bint describes(self, PyObject *value) noexcept:
        """Whether it is an array that would have this description, if it was sent."""
        return self.is_of(value) and self.readonly == (not (<Array *> value).flags & WRITEABLE)

    cdef inline object over(self, char *data, int flags, object base):
        """An array of that form over memory that `base` keeps."""
        return array_at(self.dtype, self.nd, self.shape, data, flags, base)

    cdef inline object copied(self, const char *data):
        """A new array of that form."""
        value = array_at(self.dtype, self.nd, self.shape, NULL, self.fortran, None)
        copy((<Array *> <PyObject *> value).data, data, self.nbytes)
        if self.readonly:
            (<Array *> <PyObject *> value).flags &= ~WRITEABLE
        return value


# --- typed messages

@cython.final
cdef class FieldForm(ArrayForm):
    """A field of a spec: where it lies in a slot, and which scalars it takes as they are."""

    cdef object name, scalar
    cdef uint64_t offset
    cdef int size  # of an item
    cdef char kind  # of its dtype, if a scalar of it can be stored here; else 0
    cdef int64_t low, high  # of integers
    cdef double limit

    def __init__(self, converter):
        field = converter.field
        self.set(field.dtype, field.shape, field.nbytes)
        self.name, self.scalar, self.offset = field.path[0], field.dtype.type, field.offset
        self.size = field.dtype.itemsize
        plain = not self.nd and self.size <= 32 and field.dtype.isnative and field.dtype.kind in "biufc"
        self.kind = ord(field.dtype.kind) if plain else 0
        self.low, self.high = max(converter._low, -(1 << 63)), min(converter._high, (1 << 63) - 1)
        self.limit = converter._limit

    cdef bint is_of_rows(self, PyObject *value, Py_ssize_t n) noexcept:
        """Whether it is an array to write so many to."""
        cdef Array *array = <Array *> value
        return self.is_of(value, 1) and array.dimensions[0] == n and array.flags & WRITEABLE

    cdef bint store(self, object value, char *to) except -1:
        """Store a scalar, if it needs no more of a check than here; whether it is stored."""
        cdef int64_t number
        cdef int overflow = 0
        cdef double real
        cdef float single
        if self.kind == 0:
            return False
        if type(value) is self.scalar:
            read_scalar(value, to)
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

    cdef object new_rows(self, Py_ssize_t n, codec):
        """An array of `n` of them: one of SpecCodec.batch_arrays."""
        cdef Py_ssize_t shape[MAX_DIMS]
        shape[0] = n
        memcpy(&shape[1], self.shape, self.nd * sizeof(Py_ssize_t))
        if n * self.nbytes < ALIGNED_NBYTES:
            return array_at(self.dtype, self.nd + 1, shape, NULL, 0, None)
        return codec.aligned((n, *self.shape_tuple()), self.dtype, n * self.nbytes)

    cdef int copy_rows(self, Taken *taken, Py_ssize_t count, object rows) except -1:
        """Copy the field of each message to its row."""
        cdef char *to = (<Array *> <PyObject *> rows).data
        if count * self.nbytes >= COPY_WITHOUT_GIL:
            with nogil:
                copy_each(taken, count, to, self.offset, self.nbytes)
        else:
            copy_each(taken, count, to, self.offset, self.nbytes)
        return 0


cdef void copy_each(Taken *taken, Py_ssize_t count, char *to, uint64_t offset, uint64_t nbytes) noexcept nogil:
    """Copy the same bytes of several slots one behind the other."""
    cdef Py_ssize_t at
    for at in range(count):
        memcpy(to + at * nbytes, taken[at].data + offset, nbytes)


@cython.final
cdef class SpecForm:
    """A spec without UpTo fields: its messages always have the same form."""

    cdef object codec
    cdef list fields
    cdef dict by_name  # those at the top, if the compiled path stores into them
    cdef object nest  # None: all are at the top
    cdef uint64_t meta
    cdef bint structured  # whether scalars have fields of their own: single messages are Python's
    cdef bint arrays  # whether the codec makes messages of arrays, and arrays of messages: TensorDicts
    cdef bint copied  # whether single messages are copied here: large fields lie in a pool
    cdef Part *parts  # of a message that is sent before any other code runs

    def __init__(self, codec):
        cdef FieldForm field
        cdef Py_ssize_t k
        fields, root = codec.spec.fields, codec.spec.root
        self.codec, self.meta, self.nest = codec, codec._fixed[0], None if root.flat else root.nest
        self.fields = [FieldForm(converter) for converter in codec.spec.converters]
        self.arrays = type(codec) is not SpecCodec
        self.structured = any([of.dtype.kind == "V" and not of.shape for of in fields])
        self.copied = not self.structured and all([of.nbytes < POOLED for of in fields])
        self.by_name = {}
        self.parts = <Part *> malloc(len(fields) * sizeof(Part))
        if self.parts == NULL:
            raise MemoryError
        for k, field in enumerate(self.fields):
            self.parts[k].offset, self.parts[k].nbytes = field.offset, field.nbytes
            if not self.structured and len(fields[k].path) == 1:
                self.by_name[field.name] = field

    def __dealloc__(self):
        free(self.parts)

    cdef list collect(self, object given, Message *message):
        """The values of a message that is sent as it is given; None if that is Python's. They keep `message.parts`."""
        cdef FieldForm field
        cdef Part *part = self.parts
        cdef Part *own
        cdef PyObject *value
        cdef Py_ssize_t k
        cdef list values
        if self.structured or self.meta >> 16 > SMALL_NBYTES:
            return None
        if self.arrays:
            values = self.codec.collect(given)
        elif type(given) is not dict or len(<dict> given) != len(self.fields) or self.nest is not None:
            return None
        else:
            values = [(<dict> given).get((<FieldForm> form).name) for form in self.fields]
        if THREADS_AT_ONCE:  # each has parts of its own
            memory = self.copy_of_parts()
            part = <Part *> PyBytes_AS_STRING(memory)
        own = part
        for k in range(PyList_GET_SIZE(values)):
            field, value = <FieldForm> PyList_GET_ITEM(self.fields, k), PyList_GET_ITEM(values, k)
            if field.is_of(value):
                part.data = (<Array *> value).data
            elif field.store(<object> value, part.scalar):
                part.data = part.scalar
            else:
                return None
            part += 1
        message.meta, message.parts, message.count = self.meta, own, PyList_GET_SIZE(self.fields)
        if THREADS_AT_ONCE:
            values.append(memory)
        return values

    cdef bytes copy_of_parts(self):
        return PyBytes_FromStringAndSize(<char *> self.parts, PyList_GET_SIZE(self.fields) * sizeof(Part))

    cdef object message(self, char *data, object base):
        """The message that lies there: in views that keep `base`, as typed.borrowed, or if that is None as copies."""
        cdef FieldForm field
        cdef dict message = {}
        cdef list values = []
        if self.arrays:
            return self.codec.nest([
                (<FieldForm> form).copied(data + (<FieldForm> form).offset) if base is None
                # PyTorch's tensors know no protection
                else (<FieldForm> form).over(data + (<FieldForm> form).offset, C_CONTIGUOUS | WRITEABLE, base)
                for form in self.fields
            ])
        for form in self.fields:
            field = <FieldForm> form
            if field.nd == 0:
                value = new_scalar(data + field.offset, field.dtype, NULL)
            elif base is not None:
                value = field.over(data + field.offset, C_CONTIGUOUS, base)
            else:
                value = field.copied(data + field.offset)
            if self.nest is None:
                message[field.name] = value
            else:
                values.append(value)
        return message if self.nest is None else self.nest(iter(values))

    cdef list new_batch(self, Py_ssize_t n, object out):
        """SpecCodec.batch_arrays; None if messages are not copied to these as they lie in slots."""
        cdef FieldForm field
        cdef list rows = []
        if out is None:
            return [field.new_rows(n, self.codec) for field in self.fields]
        if self.nest is None and (type(out) is TypedBatch or type(out) is dict) and len(out) == len(self.fields):
            for field in self.fields:
                array = (<dict> out).get(field.name)
                if not field.is_of_rows(<PyObject *> array, n):
                    break
                rows.append(array)
            else:
                return rows
        try:
            arrays = self.codec.batch_arrays(n, out)
        except SpecMismatch:
            return None
        for array in arrays:
            if type(array) is not ndarray or not (<Array *> <PyObject *> array).flags & C_CONTIGUOUS:
                return None
        return arrays

    cdef object stack(self, Taken *taken, Py_ssize_t count, list arrays):
        """SpecCodec.stack; None if a message is none of the spec's."""
        cdef FieldForm field
        cdef Py_ssize_t at
        for at in range(count):
            if taken[at].meta != self.meta:
                return None
        for field, rows in zip(self.fields, arrays):
            field.copy_rows(taken, count, rows)
        return self.codec.batch(arrays) if self.arrays else TypedBatch(self.codec.nest(arrays))


# --- containers

#: Stand for arrays in a pickle, as those of messages/pickled.py: one for all, since arrays are noted in their order.
cdef object WRITABLE_BUFFER = pickle.PickleBuffer(bytearray()), READONLY_BUFFER = pickle.PickleBuffer(b"")


@cython.final
cdef class Pickler:
    """One of messages/pickled.py, what it fills, and how it reduces arrays."""

    cdef CompiledCodec codec
    cdef object pickling, dump, clear_memo
    cdef list stream, buffers, arrays, forms

    def __init__(self, CompiledCodec codec):
        self.codec, self.pickling = codec, codec.reference.new_pickling()
        self.dump, self.clear_memo = self.pickling.dump, self.pickling.clear_memo
        self.stream, self.buffers = self.pickling.stream, self.pickling.buffers
        self.arrays, self.forms = [], []
        self.pickling.pickler.dispatch_table[ndarray] = self.reduce

    def reduce(self, given):
        """As _Pickling._reduce_array. Arrays of forms that are known are noted here."""
        cdef ArrayForm form = self.codec.form_sent(<PyObject *> given)
        if form is None:
            encoded = self.codec.reference.encode_array(given)
            if encoded is not None and encoded[1] is given:
                self.codec.remember(given, ArrayForm(encoded[2], encoded[0] >> 16))
        if form is None or form.dtype_text is None:
            return self.pickling._reduce_array(given)
        self.arrays.append(given)
        self.forms.append(form)
        placeholder = READONLY_BUFFER if form.readonly and self.codec.keeps_readonly else WRITABLE_BUFFER
        # a str of its own, as from Python, so that the pickle has the same bytes
        text = PyUnicode_DecodeUTF8(PyBytes_AS_STRING(form.dtype_text), PyBytes_GET_SIZE(form.dtype_text), NULL)
        return array_over, (placeholder, text, form.shape_tuple(), "C")

    cdef object finish(self, Message *message):
        """What was dumped, as `CompiledCodec.encode` gives it. This pickler forgets it."""
        cdef Container container
        if PyList_GET_SIZE(self.buffers) != PyList_GET_SIZE(self.arrays):
            return self.finish_slowly(message)
        for piece in self.stream:
            if type(piece) is not bytes:
                return self.finish_slowly(message)
        self.clear_memo()
        if PyList_GET_SIZE(self.stream) == 1 and PyList_GET_SIZE(self.buffers) == 0:
            kept = self.stream.pop()
            message.meta, message.data = <uint64_t> PyBytes_GET_SIZE(kept) << 16 | CONTAINER, PyBytes_AS_STRING(kept)
            return kept
        container = Container.__new__(Container)
        container.stream, container.arrays, container.forms = self.stream[:], self.arrays, self.forms
        container.keeps_readonly = self.codec.keeps_readonly
        self.stream.clear()
        self.buffers.clear()
        self.arrays, self.forms = [], []
        container.arrange(message)
        return container

    cdef tuple finish_slowly(self, Message *message):
        """By the codec, to which the arrays are told that were noted here."""
        cdef Py_ssize_t at
        arrays = iter(self.arrays)
        for at, buffer in enumerate(self.buffers):
            if buffer is WRITABLE_BUFFER or buffer is READONLY_BUFFER:
                self.buffers[at] = self.pickling._out_of_band(next(arrays), buffer is READONLY_BUFFER)
        self.arrays, self.forms = [], []
        kept = self.pickling.container()
        message.meta, message.data = kept[0], NULL
        return kept


@cython.final
cdef class Container:
    """A pickle in several parts, which it keeps: pieces of the stream, and arrays. See messages/containers.py."""

    cdef list stream, arrays, forms
    cdef bint keeps_readonly
    cdef Part *parts  # the head with its table, the pieces, the arrays
    cdef Py_ssize_t count

    def __dealloc__(self):
        free(self.parts)

    cdef int arrange(self, Message *message) except -1:
        """pack_container"""
        cdef Py_ssize_t arrays = PyList_GET_SIZE(self.arrays), pieces = PyList_GET_SIZE(self.stream), k
        cdef uint64_t head = HEAD_NBYTES + 8 * arrays if arrays else 0, offset = head, entry
        cdef uint32_t count = arrays
        cdef ArrayForm form
        cdef Part *part
        cdef char *table
        self.count = 1 + pieces + arrays
        self.parts = part = <Part *> malloc(self.count * sizeof(Part) + head)
        if part == NULL:
            raise MemoryError
        table = <char *> &part[self.count]
        part.offset, part.nbytes, part.data = 0, head, table
        for k in range(pieces):
            part += 1
            part.offset, part.nbytes = offset, PyBytes_GET_SIZE(self.stream[k])
            part.data = PyBytes_AS_STRING(self.stream[k])
            offset += part.nbytes
        if arrays:
            entry = offset - head
            memcpy(table, &count, 4)
            memcpy(table + 4, &entry, 8)
        for k in range(arrays):
            form = <ArrayForm> PyList_GET_ITEM(self.forms, k)
            entry = form.nbytes << 1 | (form.readonly and self.keeps_readonly)
            memcpy(table + HEAD_NBYTES + 8 * k, &entry, 8)
            offset = aligned_to(offset)
            part += 1
            part.offset, part.nbytes, part.data = offset, form.nbytes, (<Array *> PyList_GET_ITEM(self.arrays, k)).data
            offset += part.nbytes
        message.meta = offset << 16 | (CONTAINER_OOB if arrays else CONTAINER)
        message.parts, message.count = self.parts, self.count
        message.data = <char *> self.parts if self.is_as_pickled() else NULL
        return 0

    cdef bint is_as_pickled(self) noexcept:
        """Whether the arrays are what the pickle says, and still lie where they lay: other code may change them."""
        cdef Py_ssize_t arrays = PyList_GET_SIZE(self.arrays), k
        cdef Part *part = &self.parts[self.count - arrays]
        cdef PyObject *array
        for k in range(arrays):
            array = PyList_GET_ITEM(self.arrays, k)
            if part[k].data != (<Array *> array).data or not (<ArrayForm> PyList_GET_ITEM(self.forms, k)).describes(array):
                return False
        return True

    cdef tuple encoded(self):
        """As a codec gives it."""
        cdef ArrayForm form
        return pack_container(self.stream, [
            (array, array.nbytes, form.readonly and self.keeps_readonly)
            for array, form in zip(self.arrays, self.forms)
        ])


cdef struct Place:  # in a container
    uint64_t start, nbytes
    bint readonly


cdef inline uint64_t aligned_to(uint64_t offset) noexcept:
    """buffers.aligned"""
    return offset + ALIGNMENT - 1 & ~(ALIGNMENT - 1)


cdef Py_ssize_t places_in(const char *data, uint64_t nbytes, Place *places) noexcept:
    """Where the stream and then the buffers of a CONTAINER_OOB lie, and how many these are together; 0 if that is
    Python's: they are many, or large, or it is damaged.
    """
    cdef uint32_t count
    cdef uint64_t table[MOST_PLACES]
    cdef uint64_t length, at, k
    if nbytes < HEAD_NBYTES:
        return 0
    memcpy(&count, data, 4)
    memcpy(&length, data + 4, 8)
    if count >= MOST_PLACES or length > LARGE_STREAM or HEAD_NBYTES + 8 * count + length > nbytes:
        return 0
    memcpy(table, data + HEAD_NBYTES, 8 * count)  # what is checked is what is used
    at = HEAD_NBYTES + 8 * count
    places[0] = Place(at, length, False)
    at += length
    for k in range(count):
        at = aligned_to(at)
        if at > nbytes or table[k] >> 1 > nbytes - at:
            return 0
        places[k + 1] = Place(at, table[k] >> 1, table[k] & 1)
        at += table[k] >> 1
    return count + 1


# --- any message

@cython.final
cdef class CompiledCodec:
    """A handle's codec, `reference`, and what is done in its stead."""

    cdef object reference, pool
    cdef bint bare, pickles, keeps_readonly
    cdef SpecForm spec  # None: the messages are not typed, or differ in form
    cdef list sent_forms
    cdef dict received_forms
    cdef ArrayForm last_form
    cdef Pickler idle
    cdef list idle_too  # of several threads
    cdef Guard guard  # of the pickler that is idle, and the last form

    def __init__(self, codec):
        self.reference = codec
        self.bare, self.pickles = isinstance(codec, ContainerCodec), isinstance(codec, PickleCodec)
        self.pool = codec._pool if self.bare else None
        self.keeps_readonly = self.pickles and codec.keeps_readonly
        if isinstance(codec, SpecCodec) and not codec.spec.up_to:
            self.spec = SpecForm(codec)
        self.sent_forms, self.received_forms = [None] * FORMS_SENT, {}
        self.idle_too = []

    cdef inline bint is_typed(self) noexcept:
        """Whether single messages are of a spec, and handled here."""
        return self.spec is not None and not self.spec.structured

    cdef object encode(self, object obj, Message *message):
        """The message of an object. What is returned, and the object, keep `message.data` and the description alive: for an
        array that is its form. It is a tuple, as codecs give it, and `message.data` is NULL, if only Python can copy it.
        """
        cdef Array *array
        cdef ArrayForm form
        cdef int overflow = 0
        cdef int64_t number
        cdef double real
        message.parts = NULL
        if not self.bare:
            return self.encode_slowly(obj, message)
        if type(obj) is bytes:
            message.meta = <uint64_t> PyBytes_GET_SIZE(obj) << 16 | BYTES
            message.data = PyBytes_AS_STRING(obj)
        elif type(obj) is ndarray:
            array = <Array *> <PyObject *> obj
            form = self.form_sent(<PyObject *> array)
            if form is None:
                return self.encode_slowly(obj, message)
            message.meta = form.nbytes << 16 | <uint64_t> PyBytes_GET_SIZE(form.description) << 8 | ARRAY
            message.data = array.data
            message.description = PyBytes_AS_STRING(form.description)
            return form
        elif type(obj) is str:
            if not PyUnicode_IS_ASCII(obj):
                return self.encode_slowly(obj, message)
            message.meta = <uint64_t> PyUnicode_GET_LENGTH(obj) << 16 | STR
            message.data = PyUnicode_DATA(obj)
        elif type(obj) is float:
            real = obj
            return self.packed(FLOAT, &real, 8, message)
        elif type(obj) is int:
            number = PyLong_AsLongLongAndOverflow(obj, &overflow)
            return self.encode_slowly(obj, message) if overflow else self.packed(INT, &number, 8, message)
        elif obj is None:
            return self.packed(NONE, NULL, 0, message)
        elif type(obj) is bool:
            return self.packed(TRUE if obj is True else FALSE, NULL, 0, message)
        elif self.pickles and type(obj) is not bytearray:
            return self.pickle(obj, message)
        else:
            return self.encode_slowly(obj, message)
        return obj

    cdef inline bytes packed(self, uint64_t kind, const void *data, Py_ssize_t nbytes, Message *message):
        """A message of those bytes."""
        kept = PyBytes_FromStringAndSize(<const char *> data, nbytes)
        message.meta, message.data = <uint64_t> nbytes << 16 | kind, PyBytes_AS_STRING(kept)
        return kept

    cdef object encode_slowly(self, object obj, Message *message):
        """By the codec."""
        encoded = self.reference.encode(obj)
        message.meta = encoded[0]
        data, description = encoded[1], encoded[2]
        message.data = NULL
        if type(data) is bytes and type(description) is bytes:
            message.data, message.description = PyBytes_AS_STRING(data), PyBytes_AS_STRING(description)
        elif data is obj and message.meta & 0xFF == ARRAY:
            self.remember(obj, ArrayForm(description, message.meta >> 16))
        return encoded

    cdef inline size_t place_of(self, Array *array) noexcept:
        """Which of `sent_forms` is that array's, if it is known."""
        cdef size_t at = <size_t> array.descr >> 4
        cdef int axis
        for axis in range(array.nd):
            at = 31 * at + <size_t> array.dimensions[axis]
        return (at ^ at >> 8) & FORMS_SENT - 1

    cdef inline ArrayForm form_sent(self, PyObject *array):
        """What is known of an array that is sent; None if that is nothing."""
        form = <ArrayForm> ITEM(self.sent_forms, self.place_of(<Array *> array))
        return form if form is not None and form.describes(array) else None

    cdef int remember(self, object sent, ArrayForm form) except -1:
        """The next array of that form need not be encoded by the codec."""
        cdef Array *array = <Array *> <PyObject *> sent
        dtype = sent.dtype
        if dtype != form.dtype:
            return 0  # other code has given it another dtype since it was described
        form.dtype = dtype  # it is known by the identity of its dtype
        form.dtype_text = form.dtype.str.encode() if form.dtype.isbuiltin == 1 else None
        form.readonly = not array.flags & WRITEABLE  # a codec may let it arrive writable
        self.sent_forms[self.place_of(array)] = form
        return 0

    cdef object pickle(self, object obj, Message *message):
        """PickleCodec.encode, of what is not bare."""
        cdef Pickler pickler = self.take_pickler()  # other threads, and calls that pickling makes, use another
        if pickler is None:
            pickler = Pickler(self)
        try:
            pickler.dump(obj)
            kept = pickler.finish(message)
        except BaseException as error:
            pickler.arrays = pickler.forms = None
            self.reference.refuse(pickler.pickling, error, obj)
        self.give_back(pickler)
        return kept

    cdef inline Pickler take_pickler(self):
        cdef Pickler pickler
        GUARD(&self.guard)
        pickler = self.idle
        self.idle = None
        UNGUARD(&self.guard)
        if THREADS_AT_ONCE and pickler is None:
            try:
                return self.idle_too.pop()
            except IndexError:
                pass
        return pickler

    cdef inline int give_back(self, Pickler pickler) except -1:
        cdef Pickler other
        GUARD(&self.guard)
        other = self.idle
        self.idle = pickler
        UNGUARD(&self.guard)
        if THREADS_AT_ONCE and other is not None:
            self.idle_too.append(other)
        return 0

    cdef object decode(self, CompiledRing ring, uint64_t meta, char *data, char *description):
        """What the message in the ring's memory is; the caller owns it."""
        cdef uint64_t kind = meta & 0xFF, nbytes = meta >> 16
        cdef int64_t number
        cdef double real
        if self.bare:
            if kind == BYTES:
                if nbytes < COPY_WITHOUT_GIL:
                    return PyBytes_FromStringAndSize(data, nbytes)
                value = PyBytes_FromStringAndSize(NULL, nbytes)
                copy(PyBytes_AS_STRING(value), data, nbytes)
                return value
            if kind == CONTAINER:
                if self.pickles and nbytes <= LARGE_STREAM:
                    return loads(PyBytes_FromStringAndSize(data, nbytes))
            elif kind == CONTAINER_OOB:
                if self.pickles:
                    return self.unpickle(ring, meta, data, description, None)
            elif kind == ARRAY:
                if 0 < nbytes < POOLED:
                    return self.form_received(meta, description).copied(data)
            elif kind == STR:
                return PyUnicode_DecodeUTF8(data, nbytes, NULL)
            elif nbytes == 8 and (kind == INT or kind == FLOAT):
                memcpy(&number, data, 8)
                memcpy(&real, data, 8)
                return number if kind == INT else real
            elif kind == NONE:
                return None
            elif kind == TRUE or kind == FALSE:
                return kind == TRUE
        elif self.spec is not None and meta == self.spec.meta and self.spec.copied:
            return self.spec.message(data, None)
        return self.decode_slowly(ring, meta, data, description)

    cdef object decode_slowly(self, CompiledRing ring, uint64_t meta, char *data, char *description):
        """By the codec."""
        start = <char *> ring.words
        return self.reference.decode(ring.memory, data - start, meta, description - start)

    cdef object view(self, CompiledRing ring, uint64_t meta, char *data, char *description, object base):
        """What the message is, in views that keep `base`, which is a buffer of its bytes."""
        cdef uint64_t kind = meta & 0xFF, nbytes = meta >> 16
        cdef ArrayForm form
        if self.bare:
            if kind == BYTES or kind == BYTEARRAY:
                return PyMemoryView_FromObject(base)
            if kind == ARRAY and nbytes:
                form = self.form_received(meta, description)
                return form.over(data, F_CONTIGUOUS if form.fortran else C_CONTIGUOUS, base)
            if kind == STR or NONE <= kind <= FLOAT or (kind == CONTAINER and self.pickles and nbytes <= LARGE_STREAM):
                return self.decode(ring, meta, data, description)
            if kind == CONTAINER_OOB and self.pickles:
                return self.unpickle(ring, meta, data, description, base)
        elif self.is_typed() and meta == self.spec.meta:
            return self.spec.message(data, base)
        return self.reference.view(*self.payload(ring, meta, data, description, base))

    cdef tuple payload(self, CompiledRing ring, uint64_t meta, char *data, char *description, object base):
        """What the codec's `view` takes."""
        cdef Py_ssize_t size = meta >> 16
        if meta & 0xFF == TYPED:
            size = ring.slot_size  # a typed message's fields lie anywhere in its slot
        payload = array_at(BYTE, 1, &size, data, C_CONTIGUOUS, base)
        return payload, meta, PyBytes_FromStringAndSize(description, meta >> 8 & 0xFF)

    cdef object unpickle(self, CompiledRing ring, uint64_t meta, char *data, char *description, object base):
        """What a CONTAINER_OOB is: with views of its buffers that keep `base`, or if that is None with copies."""
        cdef Place places[MOST_PLACES]
        cdef Py_ssize_t count = places_in(data, meta >> 16, places), k
        cdef list buffers = []
        if count == 0 and base is None:
            return self.decode_slowly(ring, meta, data, description)
        if count == 0:
            return self.reference.view(*self.payload(ring, meta, data, description, base))
        view = None if base is None else PyMemoryView_FromObject(base)
        for k in range(1, count):
            if base is None:
                buffers.append(self.owned(data + places[k].start, places[k].nbytes, places[k].readonly))
            else:
                buffers.append(view[places[k].start:places[k].start + places[k].nbytes])
        return loads(PyBytes_FromStringAndSize(data + places[0].start, places[0].nbytes), buffers=buffers)

    cdef inline object owned(self, const char *data, uint64_t nbytes, bint readonly):
        """A copy of a buffer, as of containers.owned_buffers."""
        cdef char *to
        if readonly:
            owned = PyBytes_FromStringAndSize(NULL, nbytes)
            to = PyBytes_AS_STRING(owned)
        elif self.pool is None or nbytes < POOLED:
            owned = PyByteArray_FromStringAndSize(NULL, nbytes)
            to = PyByteArray_AS_STRING(owned)
        else:
            owned = self.pool.empty(nbytes)
            to = (<Array *> <PyObject *> owned).data
        copy(to, data, nbytes)
        return owned

    cdef ArrayForm form_received(self, uint64_t meta, const char *description):
        """The form of an array in a slot; ValueError if its description is none of so many bytes."""
        cdef uint64_t nbytes = meta >> 16
        cdef Py_ssize_t length = meta >> 8 & 0xFF
        cdef ArrayForm form, last
        GUARD(&self.guard)
        form = self.last_form
        UNGUARD(&self.guard)
        if (
            form is None
            or PyBytes_GET_SIZE(form.description) != length
            or memcmp(PyBytes_AS_STRING(form.description), description, length) != 0
        ):
            text = PyBytes_FromStringAndSize(description, length)
            form = self.received_forms.get(text)
            if form is None:
                form = ArrayForm(text, nbytes)
                if len(self.received_forms) >= FORMS_RECEIVED:
                    self.received_forms.clear()
                self.received_forms[text] = form
            GUARD(&self.guard)
            last = self.last_form
            self.last_form = form
            UNGUARD(&self.guard)
        if form.nbytes != nbytes:
            raise ValueError(f"array of {nbytes} bytes is described as one of {form.nbytes}")
        return form


# --- several messages

cdef class Batch:
    """Encoded messages that are sent together; to Python a sequence of tuples as codecs give them."""

    cdef Message *messages
    cdef list kept, forms  # what keeps each one's data and description
    cdef Py_ssize_t count, room

    def __cinit__(self):
        self.kept, self.forms = [], []

    def __dealloc__(self):
        free(self.messages)

    cdef Message *next(self) except NULL:
        """Room for one more message."""
        cdef Message *more
        if self.count == self.room:
            more = <Message *> realloc(self.messages, (2 * self.room + 8) * sizeof(Message))
            if more == NULL:
                raise MemoryError
            self.messages, self.room = more, 2 * self.room + 8
        return &self.messages[self.count]

    cdef Message *message(self, Py_ssize_t at) noexcept:
        """A message, until another is asked for; NULL if only Python can send it: an array may have changed."""
        cdef Message *message = &self.messages[at]
        cdef PyObject *kept = PyList_GET_ITEM(self.kept, at)
        if message.data == NULL or type(<object> kept) is Container and not (<Container> kept).is_as_pickled():
            return NULL
        if message.meta & 0xFF == ARRAY and not (
            (<Array *> kept).data == message.data and (<ArrayForm> PyList_GET_ITEM(self.forms, at)).describes(kept)
        ):
            return NULL
        return message

    cdef tuple encoded(self, Py_ssize_t at):
        """A message as a codec gives it."""
        return as_tuple(&self.messages[at], self.kept[at], self.kept[at])

    def __len__(self):
        return self.count

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self.encoded(k) for k in range(*at.indices(self.count))]
        return self.encoded(range(self.count)[at])


@cython.final
cdef class Rows(Batch):
    """Typed messages that are sent together: one array for each field, a row for each message."""

    cdef SpecForm spec
    cdef bytes parts
    cdef Message row

    def __init__(self, SpecForm spec, list arrays):
        self.spec, self.kept, self.count, self.parts = spec, arrays, len(arrays[0]), spec.copy_of_parts()
        self.row.meta, self.row.count = spec.meta, PyList_GET_SIZE(spec.fields)
        self.row.parts = <Part *> PyBytes_AS_STRING(self.parts)

    cdef Message *message(self, Py_ssize_t at) noexcept:
        cdef Array *array
        cdef Py_ssize_t k
        for k in range(self.row.count):
            array = <Array *> PyList_GET_ITEM(self.kept, k)
            self.row.parts[k].data = array.data + at * array.strides[0]
        return &self.row

    cdef tuple encoded(self, Py_ssize_t at):
        return self.spec.codec.row(self.kept, at, [])


cdef tuple as_tuple(Message *message, object obj, object kept):
    """What `CompiledCodec.encode` returned for an object, as a codec would give it."""
    if type(kept) is ArrayForm:
        return message.meta, obj, (<ArrayForm> kept).description
    if type(kept) is tuple:
        return kept
    if type(kept) is Container:
        return (<Container> kept).encoded()
    if type(kept) is str:
        kept = PyBytes_FromStringAndSize(message.data, message.meta >> 16)
    return message.meta, kept, PyBytes_FromStringAndSize(message.description, message.meta >> 8 & 0xFF)


def _check_numpy():
    """Find NumPy's functions, and see that arrays are laid out as is said above; ImportError if not."""
    global new_array, new_scalar, read_scalar
    cdef Array *array
    core = getattr(np, "_core", None) or np.core
    functions = <void **> PyCapsule_GetPointer(core._multiarray_umath._ARRAY_API, NULL)
    new_array = <NewArray> functions[NEW_FROM_DESCR]
    new_scalar = <NewScalar> functions[NEW_SCALAR]
    read_scalar = <ReadScalar> functions[READ_SCALAR]
    sample = np.arange(6, dtype="f4").reshape(2, 3)
    array = <Array *> <PyObject *> sample
    as_said = (
        <uintptr_t> array.data == sample.__array_interface__["data"][0]
        and array.nd == 2
        and (array.dimensions[0], array.dimensions[1]) == (2, 3)
        and array.descr == <PyObject *> sample.dtype
        and array.flags == sample.flags.num
    )
    if not as_said:
        raise ImportError(f"NumPy {np.__version__} lays out arrays in a way that is not known")


_check_numpy()

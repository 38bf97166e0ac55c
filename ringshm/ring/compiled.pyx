# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, auto_pickle=False, binding=True
"""The compiled path: what succeeds at once, over pointers. Everything else is Python's.

The Python code is the reference: it has the whole protocol and runs everywhere (PEP 399 has this rule for CPython's own
accelerators). This file holds the same steps for a message that goes through without any hindrance, and hands over to
the Python code whenever something is not as it mostly is. Both speak the same segment: a process that has this file and
one that does not share a channel.

What it touches, in this order (layout.py says what the words mean; mutex.py and slots.py why the order is right):

    enter     read GEN; try the semaphore; store the hold word; fence (SYNC POINT a); read GEN again
    send      read ATTENTION, TAIL, the ring's last entry, the next slot's word; copy; store R_SEQUENCE, R_META,
              R_SENDER, the slot's word (READY: the message is sent), the ring's entry, TAIL, SENT_NBYTES
    leave     post the semaphore; clear the hold word
    wake      read the hint; clear it; fence; count those that wait; post

    take      enter; read HEAD, TAIL, the ring's entry, the slot's word, R_META; store the slot's word (READING), HEAD,
              TAKEN_NBYTES; leave
    decode    from the slot, which is this process's
    release   read the slot's word; store FREE; wake, as above, if space is waited for

    wait      look at TAIL, or at the slot that comes free next, while that pays; add 1 to the own P_WAITING_* and P_WAITS;
              set the hint; fence (SYNC POINT w); look again; sleep; take 1 from P_WAITING_*; wake the next, as above

Loans and borrows are in blocks.pxi, the values of a Latest in latest.pxi: parts of this file, which begin with the same
for them.

What is handed over, and when. Nothing is held then, and nothing has changed, but that a message may be taken:

    to Python             when
    the whole call        the mutex is not to be had at once; a recovery is under way; the call must not wait; ATTENTION
                          is set; a word is what no channel holds; the handle has not its role, or is closed; an earlier
                          call was interrupted when it had received
    an encoded message    it is in parts, or larger than a slot; the mutex is not to be had when it is to be published
    a message to decode   its kind or its size is none of those here, or decoding it has failed
    wakers                there are listeners
    a wait                of a first slice, when that is over; of later ones, if somebody has died, and for one look in
                          four; no other process could end it, or it is over: EndOfChannel and its like; this process
                          holds slots (deadlock.py); `put` drops what is oldest; ten seconds are over (doubts.py)

1. Under the GIL no signal handler and no other thread of this process runs between `enter` and `leave`: no Python object
   is made, let go or called there. So the local lock, and all that interrupts made necessary, stay on the Python side.
   If another thread is inside, the semaphore has no token, and the call is Python's.
2. Stores to the segment are releases, and loads acquires: the compiler keeps their order, and x86-64 does. Elsewhere
   this file is not used.
3. Each index and length that is read from the segment is compared with the layout before it is used.
4. CPython runs signal handlers when a C function has returned, and with an exception its result is lost. So what was
   received is in a list of the caller's, a Python function, from the moment at which the slot is released.
5. Encoding and decoding may run any code: of other threads, of handlers, of users. Before and after them the state is
   one that the Python side knows: no slot is claimed yet, or one is READING and the mutex has been left.
6. A call that waits holds nothing. Handlers run as soon as a signal comes, and what they raise ends the wait. Threads of
   this process may wait here and in the Python code at once: each adds to the same word (`set_waiting`).
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Size
from cpython.exc cimport PyErr_CheckSignals
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.object cimport PyObject, PyTypeObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy

import pickle

import numpy as np

from ..arguments import check_timeout, deadline_of
from ..errors import SpecMismatch
from ..messages import codecs, containers
from ..messages.bare import form_of
from ..messages.containers import ContainerCodec
from ..messages.pickled import PickleCodec
from ..messages.pool import LEAST_NBYTES
from ..messages.typed import ALIGNED_NBYTES as _ALIGNED_NBYTES, Batch as TypedBatch, SpecCodec
from ..segment import layout
from .mutex import SLICE
from .outcomes import EMPTY, FULL, SENT
from .waiters import IDLE_SLICE, IDLE_SLICES, SHORT_SLICE

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <math.h>
    #include <sched.h>
    #include <semaphore.h>
    #include <stdint.h>
    #include <time.h>

    #define LOAD(word) __atomic_load_n((word), __ATOMIC_ACQUIRE)
    #define STORE(word, value) __atomic_store_n((word), (value), __ATOMIC_RELEASE)
    #define FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)

    static double monotonic(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec + now.tv_nsec * 1e-9;
    }

    static uint64_t monotonic_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * UINT64_C(1000000000) + now.tv_nsec;
    }

    /* Take a token before that time; 0, or why not. ENOSYS if glibc is older than 2.30. */
    extern int sem_clockwait(sem_t *, clockid_t, const struct timespec *) __attribute__((weak));
    static int wait_until(sem_t *semaphore, double seconds) {
        struct timespec until;
        if (!sem_clockwait) return ENOSYS;
        until.tv_sec = (time_t) seconds;
        until.tv_nsec = (long) ((seconds - until.tv_sec) * 1e9);
        return sem_clockwait(semaphore, CLOCK_MONOTONIC, &until) ? errno : 0;
    }
    static int can_wait(void) { return sem_clockwait != NULL; }

    /* Whether another process holds that byte of a file, as segment/locks.py asks; not if there is no answer. */
    static int locked_elsewhere(int fd, uint64_t byte) {
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t) byte, .l_len = 1};
        return fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
    }

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
    #define NEW_FROM_DESCR 94
    """
    ctypedef struct sem_t:
        pass
    int sem_trywait(sem_t *) nogil
    int sem_post(sem_t *) nogil
    int sem_getvalue(sem_t *, int *) nogil
    uint64_t LOAD(uint64_t *) nogil
    void STORE(uint64_t *, uint64_t) nogil
    void FENCE() nogil
    double monotonic() nogil
    uint64_t monotonic_ns() nogil
    int wait_until(sem_t *, double) nogil
    bint can_wait()
    bint locked_elsewhere(int, uint64_t)
    int sched_yield() nogil
    int EINTR
    double INFINITY
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
    enum:
        NEW_FROM_DESCR

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object, int *) except? -1
    bint PyUnicode_IS_ASCII(object)
    const char *PyUnicode_DATA(object)
    Py_ssize_t PyUnicode_GET_LENGTH(object)

cdef enum:
    C_CONTIGUOUS = 0x0001  # flags of an array
    WRITEABLE = 0x0400
    MAX_DIMS = 64

# --- the words of the segment, as layout.py has them

cdef uint64_t GEN = layout.GEN, TAIL = layout.TAIL, HEAD = layout.HEAD, ATTENTION = layout.ATTENTION
cdef uint64_t SHUTDOWN = layout.SHUTDOWN
cdef uint64_t SENT_NBYTES = layout.SENT_NBYTES, TAKEN_NBYTES = layout.TAKEN_NBYTES
cdef uint64_t MESSAGE_HINT = layout.MESSAGE_HINT, SPACE_HINT = layout.SPACE_HINT
cdef uint64_t LISTENED = layout.LISTENED, HIGH_WATER = layout.HIGH_WATER
cdef uint64_t ENTRY_WORDS = layout.ENTRY_WORDS, P_CALLED = layout.P_CALLED, MAX_ENTRIES = layout.MAX_ENTRIES
cdef uint64_t P_SENDER_HOLD = layout.P_SENDER_HOLD, P_RECEIVER_HOLD = layout.P_RECEIVER_HOLD
cdef uint64_t P_WAITING_MESSAGE = layout.P_WAITING_MESSAGE, P_WAITING_SPACE = layout.P_WAITING_SPACE
cdef uint64_t P_WAITING_EVENT = layout.P_WAITING_EVENT, P_WAITS = layout.P_WAITS
cdef uint64_t P_STATUS = layout.P_STATUS, IN_USE = layout.IN_USE
cdef uint64_t P_INCARNATION = layout.P_INCARNATION, INCARNATION_SHIFT = layout.INCARNATION_SHIFT
cdef uint64_t LAST_CHECK = layout.LAST_CHECK, LOCK_ENTRIES = layout.LOCK_ENTRIES
cdef uint64_t P_SENDERS = layout.P_SENDERS, P_UNDECIDED = layout.P_UNDECIDED
cdef uint64_t P_RECEIVERS = layout.P_RECEIVERS, P_MAY_RECEIVE = layout.P_MAY_RECEIVE
cdef uint64_t RECORD_WORDS = layout.RECORD_WORDS, R_SEQUENCE = layout.R_SEQUENCE, R_META = layout.R_META
cdef uint64_t R_SINCE = layout.R_SINCE, R_SENDER = layout.R_SENDER, R_DESCRIPTION = layout.R_DESCRIPTION
cdef uint64_t DESCRIPTION_NBYTES = layout.DESCRIPTION_NBYTES, SMALL_NBYTES = layout.SMALL_NBYTES
cdef uint64_t FREE = layout.FREE, READY = layout.READY, WRITING = layout.WRITING, KEPT = layout.KEPT
cdef uint64_t STATE_MASK = layout.STATE_MASK, OWNER_MASK = layout.OWNER_MASK & layout.MAX_WORD, TAKE = layout.TAKE
cdef uint64_t MAX_WORD = layout.MAX_WORD

cdef uint64_t CONTAINER = codecs.CONTAINER, NONE = codecs.NONE, FALSE = codecs.FALSE, TRUE = codecs.TRUE
cdef uint64_t INT = codecs.INT, FLOAT = codecs.FLOAT, STR = codecs.STR, BYTES = codecs.BYTES
cdef uint64_t ARRAY = codecs.ARRAY
cdef uint64_t LARGE_STREAM = containers.LARGE_NBYTES, POOLED = LEAST_NBYTES, ALIGNED_NBYTES = _ALIGNED_NBYTES
#: Copies from this size on let other threads run.
cdef uint64_t COPY_WITHOUT_GIL = 256 * 1024
#: Bytes that a batch copies under one grant of the mutex, as in slots.py.
cdef uint64_t BATCH_NBYTES = 1024 * 1024
#: Seconds of a look at a word while spinning, as spin.py counts them; of a sleep, as steps.py has them.
cdef double LOOK = 30e-9, SLICE_SECONDS = SLICE, SHORT_SECONDS = SHORT_SLICE, IDLE_SECONDS = IDLE_SLICE
cdef int IDLE_ROUNDS = IDLE_SLICES
#: Of so many looks for the dead, one asks whether this process itself is still alive to others.
cdef int SELF_LOOKS = 4
#: Forms of arrays that a handle remembers: of those that it sends (by what they are), and of those that it receives.
cdef enum:
    FORMS_SENT = 8
    FORMS_RECEIVED = 1024

cdef object loads = pickle.loads, ndarray = np.ndarray, asarray = np.asarray, _SENT = SENT
cdef NewArray new_array = NULL
cdef void **numpy_functions = NULL
#: Whether the compiled path stands aside, for tests that count or stop at bytecodes.
cdef bint paused = False
#: The reference, set by `replace`.
cdef object slow_put = None, slow_get = None, slow_get_many = None, slow_get_batch = None, slow_encode_each = None
cdef object slow_encode_rows = None
cdef object _EMPTY = EMPTY, _FULL = FULL


cdef struct Part:
    uint64_t offset, nbytes  # of one field in the slot
    const char *data
    char scalar[32]  # what `data` points to, for a scalar


cdef struct Message:
    uint64_t meta
    const char *data
    Part *parts  # instead of `data`, if it is not NULL: `count` of them
    Py_ssize_t count
    const char *description
    int64_t number  # what `data` points to, for a message that is one number


cdef struct Taken:
    uint64_t slot
    uint64_t record
    uint64_t own  # the slot's word
    uint64_t meta


cdef struct Waiting:
    sem_t *semaphore
    uint64_t offset  # the word of an entry in which its threads are announced
    uint64_t hint
    uint64_t here  # threads of this process that wait in this file, and
    uint64_t elsewhere  # in the Python code


cdef inline void copy(char *to, const char *data, uint64_t nbytes) noexcept:
    """Copy; other threads run meanwhile, if that takes long."""
    if nbytes >= COPY_WITHOUT_GIL:
        with nogil:
            memcpy(to, data, nbytes)
    else:
        memcpy(to, data, nbytes)


cdef class CompiledRing:
    """A segment's ring as one process sees it, over pointers.

    Args:
        memory: the segment's mapping.
        shape: its Layout.
        semaphores: of the senders' mutex, of the receivers' (two each); of the waiters for messages, space, events.
        unreturned: `Ring._unreturned`: what interrupted calls had received.
    """

    cdef Py_buffer buffer
    cdef readonly object memory
    cdef object semaphores
    cdef list unreturned
    cdef list views  # one of each slot
    cdef uint64_t *words
    cdef sem_t *senders[2]
    cdef sem_t *receivers[2]
    cdef sem_t *messages
    cdef sem_t *space
    cdef sem_t *events
    cdef uint64_t capacity, slot_size, nearly_full, small
    cdef uint64_t ring, mask, records, slots, stride, entries, most_entries, pins
    cdef uint64_t entry, owner, sender
    cdef public bint receives  # whether receiving calls are not all Python's
    cdef uint64_t tail_seen, head_seen  # as Returns has them
    cdef Waiting waiting[2]  # for a message, and for space
    cdef uint64_t witness[2]  # index of an entry that was a sender, and a receiver, at the last look
    cdef uint64_t binding  # grows with each `rebind`

    def __init__(self, memory, shape, semaphores, list unreturned):
        self.memory, self.semaphores, self.unreturned = memory, semaphores, unreturned
        PyObject_GetBuffer(memory, &self.buffer, PyBUF_WRITABLE)
        self.words = <uint64_t *> self.buffer.buf
        addresses = [semaphore.address for semaphore in semaphores]
        for i in range(2):
            self.senders[i] = <sem_t *> <uintptr_t> addresses[i]
            self.receivers[i] = <sem_t *> <uintptr_t> addresses[2 + i]
        self.messages = <sem_t *> <uintptr_t> addresses[4]
        self.space = <sem_t *> <uintptr_t> addresses[5]
        self.events = <sem_t *> <uintptr_t> addresses[6]
        self.capacity, self.slot_size = shape.capacity, shape.slot_size
        self.nearly_full = shape.capacity - max(1, shape.capacity // 4)
        self.small = min(self.slot_size, SMALL_NBYTES)
        self.ring, self.mask, self.records = shape.ring, shape.ring_mask, shape.records
        self.slots, self.stride = shape.slots, shape.slot_stride
        self.entries, self.most_entries, self.pins = shape.entries, shape.max_participants + 1, shape.pins
        self.views = [None] * self.capacity
        self.waiting[0] = Waiting(self.messages, P_WAITING_MESSAGE, MESSAGE_HINT, 0, 0)
        self.waiting[1] = Waiting(self.space, P_WAITING_SPACE, SPACE_HINT, 0, 0)
        self.receives = True
        self.rebind(0, 0, 0)

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)

    def rebind(self, uint64_t entry, uint64_t owner, uint64_t sender):
        """Act for the participant with that entry; 0: for none, so that all calls are Python's."""
        self.entry, self.owner, self.sender = entry, owner, sender
        self.tail_seen = self.head_seen = 0
        self.waiting[0].here = self.waiting[0].elsewhere = self.waiting[1].here = self.waiting[1].elsewhere = 0
        self.binding += 1

    # --- the mutexes: mutex.py

    cdef inline uint64_t enter(self, sem_t **semaphores, uint64_t hold) noexcept nogil:
        """The generation of the grant; 0 if it was not to be had at once."""
        cdef uint64_t gen = LOAD(&self.words[GEN])
        if gen & 1 or gen == 0 or sem_trywait(semaphores[gen >> 1 & 1]) != 0:
            return 0
        STORE(&self.words[hold], gen)
        FENCE()  # SYNC POINT a
        if LOAD(&self.words[GEN]) != gen:
            STORE(&self.words[hold], 0)
            return 0
        return gen

    cdef inline void leave(self, sem_t **semaphores, uint64_t hold, uint64_t gen) noexcept nogil:
        sem_post(semaphores[gen >> 1 & 1])
        STORE(&self.words[hold], 0)

    # --- sending: Ring.send

    cdef bint send(self, Message *message) noexcept:
        """Claim, copy, publish; False, and nothing has changed, if that is Python's."""
        cdef uint64_t *words = self.words
        cdef uint64_t hold = self.entry + P_SENDER_HOLD
        cdef uint64_t gen = self.enter(self.senders, hold)
        cdef uint64_t tail, slot, record
        if gen == 0:
            return False
        tail = LOAD(&words[TAIL])
        if LOAD(&words[ATTENTION]) or tail == MAX_WORD:
            self.leave(self.senders, hold, gen)
            return False
        slot = self.find_free(tail)
        if slot == self.capacity:
            self.leave(self.senders, hold, gen)
            return False
        record = self.records + slot * RECORD_WORDS
        self.write(slot, record, message)
        self.append(slot, record, tail, message.meta >> 16)
        self.leave(self.senders, hold, gen)
        return True

    cdef uint64_t claim(self, uint64_t *since) noexcept:
        """Ring.claim: a slot that this participant writes from now on; `capacity`, if that is Python's."""
        cdef uint64_t *words = self.words
        cdef uint64_t hold = self.entry + P_SENDER_HOLD
        cdef uint64_t gen = self.enter(self.senders, hold)
        cdef uint64_t slot = self.capacity, record
        if gen == 0:
            return slot
        if not LOAD(&words[ATTENTION]):
            slot = self.find_free(LOAD(&words[TAIL]))
        if slot != self.capacity:
            record = self.records + slot * RECORD_WORDS
            since[0] = monotonic_ns()
            STORE(&words[record + R_SINCE], since[0])
            STORE(&words[record], WRITING | self.owner)
        self.leave(self.senders, hold, gen)
        return slot

    cdef bint publish(self, uint64_t slot, Message *message) noexcept:
        """Ring.publish, of a slot that was claimed and written; False, and it is still this participant's, if that is
        Python's.
        """
        cdef uint64_t *words = self.words
        cdef uint64_t hold = self.entry + P_SENDER_HOLD, record = self.records + slot * RECORD_WORDS
        cdef uint64_t gen, tail
        cdef bint sound
        if self.owner == 0:
            return False  # while the message was copied, this process was found to count as dead
        self.describe(record, message)
        gen = self.enter(self.senders, hold)
        if gen == 0:
            return False
        tail = LOAD(&words[TAIL])
        sound = not LOAD(&words[SHUTDOWN]) and LOAD(&words[record]) == (WRITING | self.owner) and tail != MAX_WORD
        if sound:
            self.append(slot, record, tail, message.meta >> 16)
        self.leave(self.senders, hold, gen)
        return sound

    cdef Py_ssize_t send_each(self, Batch batch, Py_ssize_t first) noexcept:
        """As `send`, for the messages from `first` on, as far as they are to be sent under one grant; how many were."""
        cdef uint64_t *words = self.words
        cdef uint64_t hold = self.entry + P_SENDER_HOLD
        cdef uint64_t gen, tail, slot, record, nbytes, left = BATCH_NBYTES
        cdef Py_ssize_t at = first
        gen = self.enter(self.senders, hold)
        if gen == 0:
            return 0
        tail = LOAD(&words[TAIL])
        if not LOAD(&words[ATTENTION]):
            for at in range(first, batch.count):
                nbytes = batch.meta_of(at) >> 16
                if not batch.is_as_encoded(at) or nbytes > self.small or nbytes > left or tail == MAX_WORD:
                    break
                slot = self.find_free(tail)
                if slot == self.capacity:
                    break
                left -= nbytes
                record = self.records + slot * RECORD_WORDS
                batch.write(self, at, slot, record)
                self.append(slot, record, tail, nbytes)
                tail += 1
            else:
                at = batch.count
        self.leave(self.senders, hold, gen)
        return at - first

    cdef inline void append(self, uint64_t slot, uint64_t record, uint64_t tail, uint64_t nbytes) noexcept nogil:
        """The message that is in that slot is sent, at that position."""
        cdef uint64_t *words = self.words
        STORE(&words[record + R_SEQUENCE], tail)
        STORE(&words[record], READY)  # from here on the message is sent, whoever dies
        STORE(&words[self.ring + (tail & self.mask)], slot)
        STORE(&words[TAIL], tail + 1)
        STORE(&words[SENT_NBYTES], LOAD(&words[SENT_NBYTES]) + nbytes)

    cdef inline uint64_t find_free(self, uint64_t tail) noexcept nogil:
        """The first FREE slot onward from the one that was published last; `capacity` if there is none."""
        cdef uint64_t *words = self.words
        cdef uint64_t slot = LOAD(&words[self.ring + (tail - 1 & self.mask)]), looked
        for looked in range(self.capacity):
            slot = slot + 1 if slot + 1 < self.capacity else 0
            if LOAD(&words[self.records + slot * RECORD_WORDS]) == FREE:
                return slot
            if looked == 0 and tail - LOAD(&words[HEAD]) >= self.capacity:
                break  # all are READY
        return self.capacity

    cdef inline void write(self, uint64_t slot, uint64_t record, Message *message) noexcept nogil:
        cdef char *to = <char *> self.words + self.slots + slot * self.stride
        cdef Py_ssize_t k
        if message.parts == NULL:
            memcpy(to, message.data, message.meta >> 16)
        else:
            for k in range(message.count):
                memcpy(to + message.parts[k].offset, message.parts[k].data, message.parts[k].nbytes)
        self.describe(record, message)

    cdef inline void describe(self, uint64_t record, Message *message) noexcept nogil:
        cdef uint64_t *words = self.words
        cdef uint64_t described = message.meta >> 8 & 0xFF
        if described:
            memcpy(words + record + R_DESCRIPTION, message.description, described)
        STORE(&words[record + R_META], message.meta)
        STORE(&words[record + R_SENDER], self.sender)

    cdef object view_of(self, uint64_t slot):
        """A writable view of the slot."""
        if self.views[slot] is None:
            start = self.slots + slot * self.stride
            self.views[slot] = memoryview(self.memory)[start:start + self.slot_size]
        return PyMemoryView_FromObject(self.views[slot])

    # --- receiving: Ring.receive

    cdef Py_ssize_t take(self, Taken *taken, Py_ssize_t at_most) noexcept:
        """Take the oldest messages; 0, and nothing has changed, if there is none, or that is Python's."""
        cdef uint64_t *words = self.words
        cdef uint64_t hold = self.entry + P_RECEIVER_HOLD
        cdef uint64_t gen, head, slot, record, state, meta
        cdef Py_ssize_t count = 0
        if not self.receives:
            return 0
        if self.tail_seen <= self.head_seen:
            self.tail_seen = LOAD(&words[TAIL])
            if LOAD(&words[HEAD]) == self.tail_seen:
                return 0
        gen = self.enter(self.receivers, hold)
        if gen == 0:
            return 0
        head = LOAD(&words[HEAD])
        if head >= self.tail_seen or at_most > 1:
            self.tail_seen = LOAD(&words[TAIL])
        while count < at_most and head < self.tail_seen:
            slot = LOAD(&words[self.ring + (head & self.mask)])
            if slot >= self.capacity:
                break
            record = self.records + slot * RECORD_WORDS
            state, meta = LOAD(&words[record]), LOAD(&words[record + R_META])
            if state & STATE_MASK != READY or meta >> 16 > self.slot_size or (meta >> 8 & 0xFF) > DESCRIPTION_NBYTES:
                break
            taken.slot, taken.record, taken.meta, taken.own = slot, record, meta, state + TAKE + self.owner
            STORE(&words[record], taken.own)
            head += 1
            STORE(&words[HEAD], head)
            STORE(&words[TAKEN_NBYTES], LOAD(&words[TAKEN_NBYTES]) + (meta >> 16))
            count += 1
            taken += 1
        self.head_seen = head
        self.leave(self.receivers, hold, gen)
        return count

    cdef void copy_column(
        self, Taken *taken, Py_ssize_t count, char *to, uint64_t offset, uint64_t nbytes
    ) noexcept nogil:
        """Copy the same bytes of several slots one behind the other."""
        cdef Py_ssize_t at
        for at in range(count):
            memcpy(to + at * nbytes, <char *> self.words + self.slots + taken[at].slot * self.stride + offset, nbytes)

    # --- waking: waiters.py

    cdef bint wake_receiver(self) noexcept:
        """Wake a receiver that waits for a message; False if that is Python's."""
        if LOAD(&self.words[LISTENED]):
            return False
        STORE(&self.words[MESSAGE_HINT], 0)
        FENCE()  # SYNC POINT w: whoever set the hint before this store is counted now
        self.post(self.messages, P_WAITING_MESSAGE, 1)
        return True

    cdef bint wake_sender(self) noexcept:
        """Wake a sender that waits for space, and all who wait for events; False if that is Python's."""
        cdef uint64_t *words = self.words
        if LOAD(&words[LISTENED]):
            return False
        if LOAD(&words[TAIL]) - LOAD(&words[HEAD]) <= self.nearly_full:  # as Returns.wake_freed
            STORE(&words[SPACE_HINT], 0)
            FENCE()
            self.post(self.space, P_WAITING_SPACE, 1)
            self.post(self.events, P_WAITING_EVENT, MAX_ENTRIES)
        return True

    cdef void post(self, sem_t *semaphore, uint64_t offset, uint64_t at_most) noexcept:
        """Post for waiters that have announced themselves at that word, until so many are being woken."""
        cdef uint64_t count = self.announced(offset), index
        cdef int tokens = 0
        sem_getvalue(semaphore, &tokens)
        for index in range(max(tokens, 0), min(count, at_most, MAX_ENTRIES)):
            sem_post(semaphore)

    cdef uint64_t announced(self, uint64_t offset) noexcept:
        """How many threads of all processes have announced themselves at that word."""
        cdef uint64_t count = 0, index
        for index in range(min(LOAD(&self.words[HIGH_WATER]), self.most_entries)):
            count += min(LOAD(&self.words[self.entries + index * ENTRY_WORDS + offset]), MAX_ENTRIES)
        return count

    # --- waiting: waiters.py

    def set_waiting(self, bint for_space, uint64_t entry, uint64_t threads):
        """So many threads of this process wait in the Python code; announce them with those that wait here."""
        self.waiting[for_space].elsewhere = threads
        STORE(&self.words[entry + self.waiting[for_space].offset], threads + self.waiting[for_space].here)

    cdef inline void count_here(self, Waiting *waiting, int change) noexcept:
        waiting.here += change
        if self.has_entry():
            STORE(&self.words[self.entry + waiting.offset], waiting.here + waiting.elsewhere)

    cdef inline bint has_entry(self) noexcept:
        """Whether the entry is this participant's: others may have taken it for dead."""
        cdef uint64_t *entry = &self.words[self.entry]
        return LOAD(&entry[P_STATUS]) == IN_USE and LOAD(&entry[P_INCARNATION]) == self.owner >> INCARNATION_SHIFT

    cdef void announce(self, Waiting *waiting) noexcept:
        cdef uint64_t *waits = &self.words[self.entry + P_WAITS]
        self.count_here(waiting, 1)
        STORE(waits, LOAD(waits) + 1)
        STORE(&self.words[waiting.hint], 1)
        FENCE()  # SYNC POINT w

    cdef uint64_t there(self, bint space) noexcept:
        """How many messages, or free slots, are there; 2 may be more."""
        cdef uint64_t *words = self.words
        cdef uint64_t head = LOAD(&words[HEAD]), count = LOAD(&words[TAIL]) - head, slot
        if not space:
            return 0 if <int64_t> count < 0 else min(count, 2)
        if count >= self.capacity:
            return 0
        count = 0
        for slot in range(self.capacity):
            count += LOAD(&words[self.records + slot * RECORD_WORDS]) == FREE
            if count == 2:
                break
        return count

    cdef int sleep(self, Waiting *waiting, double until) except -1:
        """Whether a token came before that time. Signal handlers run at once; what they raise is raised."""
        cdef int failed = sem_trywait(waiting.semaphore)
        while failed:
            with nogil:
                failed = wait_until(waiting.semaphore, until)
            if failed != EINTR:
                break
            PyErr_CheckSignals()
        return not failed

    cdef bint pass_on(self, bint space) noexcept:
        """After a sleep that a token has ended, as Waiters.pass_on; False if that is Python's."""
        cdef Waiting *waiting = &self.waiting[space]
        if not self.announced(waiting.offset):
            return True
        if LOAD(&self.words[LISTENED]):
            return False
        STORE(&self.words[waiting.hint], 1)
        if self.there(space) > 1:
            STORE(&self.words[waiting.hint], 0)
            FENCE()
            self.post(waiting.semaphore, waiting.offset, 1)
        return True

    cdef bint may_come(self, bint space) noexcept:
        """Whether another process is, or may become, one that could end this wait. If not, Python knows the rest."""
        cdef uint64_t *entry
        cdef uint64_t index = self.witness[space], looked
        cdef uint64_t count = min(LOAD(&self.words[HIGH_WATER]), self.most_entries)
        if LOAD(&self.words[SHUTDOWN]) or not self.has_entry():
            return False
        for looked in range(count):
            if index >= count:
                index = 0
            entry = &self.words[self.entries + index * ENTRY_WORDS]
            if entry != &self.words[self.entry] and LOAD(&entry[P_STATUS]) == IN_USE and (
                LOAD(&entry[P_RECEIVERS if space else P_SENDERS])
                or LOAD(&entry[P_MAY_RECEIVE if space else P_UNDECIDED])
            ):
                self.witness[space] = index
                return True
            index += 1
        return False

    cdef bint all_live(self, int fd) noexcept:
        """Whether nobody has died, as far as anybody can know who looks once a slice; Reaper.look knows the rest."""
        cdef uint64_t *entry
        cdef uint64_t index, now = monotonic_ns()
        if now - LOAD(&self.words[LAST_CHECK]) < SLICE_SECONDS * 1e9:  # a time to come is damage
            return True
        STORE(&self.words[LAST_CHECK], now)
        for index in range(min(LOAD(&self.words[HIGH_WATER]), self.most_entries)):
            entry = &self.words[self.entries + index * ENTRY_WORDS]
            if LOAD(&entry[P_STATUS]) == IN_USE and entry != &self.words[self.entry]:
                if not locked_elsewhere(fd, LOCK_ENTRIES + index):
                    STORE(&self.words[LAST_CHECK], 0)  # so that Python looks
                    return False
        return True

    cdef bint keeps_slots(self) noexcept:
        """Whether views keep a slot for this process: deadlock.py"""
        cdef uint64_t slot, word
        for slot in range(self.capacity):
            word = LOAD(&self.words[self.records + slot * RECORD_WORDS])
            if word & STATE_MASK == KEPT and word & OWNER_MASK == self.owner:
                return True
        return False


cdef class SpecForm
cdef class Hold


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

    cdef void finish(self) noexcept:
        """All are encoded, and stay where they are: numbers may be pointed to."""
        cdef Message *message
        cdef Py_ssize_t at
        for at in range(self.count):
            message = &self.messages[at]
            if type(self.kept[at]) is tuple:
                continue  # a codec has encoded it, and its bytes lie in the tuple
            if message.meta & 0xFF == INT or message.meta & 0xFF == FLOAT:
                message.data = <char *> &message.number

    cdef bint is_as_encoded(self, Py_ssize_t at) noexcept:
        """Whether a message can be sent here: an array may have changed since it was encoded."""
        cdef Message *message = &self.messages[at]
        cdef PyObject *kept = PyList_GET_ITEM(self.kept, at)
        if message.data == NULL:
            return False
        if message.meta & 0xFF == ARRAY:
            return (<Array *> kept).data == message.data and (<ArrayForm> PyList_GET_ITEM(self.forms, at)).is_of(<Array *> kept)
        return True

    cdef uint64_t meta_of(self, Py_ssize_t at) noexcept:
        return self.messages[at].meta

    cdef void write(self, CompiledRing ring, Py_ssize_t at, uint64_t slot, uint64_t record) noexcept:
        ring.write(slot, record, &self.messages[at])

    cdef tuple encoded(self, Py_ssize_t at):
        """A message as a codec gives it."""
        return as_tuple(&self.messages[at], self.kept[at])

    def __len__(self):
        return self.count

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self.encoded(k) for k in range(*at.indices(self.count))]
        return self.encoded(range(self.count)[at])


cdef class Rows(Batch):
    """Typed messages that are sent together: one array for each column, a row for each message."""

    cdef object codec
    cdef list columns
    cdef Message message  # what all of them have

    def __init__(self, codec, list columns, list arrays):
        self.codec, self.columns, self.kept = codec, columns, arrays
        self.message.meta, _ = codec.spec.record(())
        self.count = len(arrays[0])

    cdef bint is_as_encoded(self, Py_ssize_t at) noexcept:
        return True

    cdef uint64_t meta_of(self, Py_ssize_t at) noexcept:
        return self.message.meta

    cdef void write(self, CompiledRing ring, Py_ssize_t at, uint64_t slot, uint64_t record) noexcept:
        cdef Array *array
        cdef Column column
        cdef Py_ssize_t k
        for k in range(PyList_GET_SIZE(self.kept)):
            array = <Array *> PyList_GET_ITEM(self.kept, k)
            column = <Column> PyList_GET_ITEM(self.columns, k)
            memcpy(
                <char *> ring.words + ring.slots + slot * ring.stride + column.offset,
                array.data + at * array.strides[0],
                column.nbytes,
            )
        ring.describe(record, &self.message)

    cdef tuple encoded(self, Py_ssize_t at):
        return self.codec.row(self.kept, at, [])


cdef tuple as_tuple(Message *message, object kept):
    """What `CompiledHandle.encode` returned, as a codec would give it."""
    if type(kept) is tuple:
        return kept
    if type(kept) is not bytes and type(kept) is not ndarray:
        kept = PyBytes_FromStringAndSize(message.data, message.meta >> 16)
    return message.meta, kept, PyBytes_FromStringAndSize(message.description, message.meta >> 8 & 0xFF)


cdef class ArrayForm:
    """What a description says of an array: messages/bare.py."""

    cdef bytes description
    cdef object dtype
    cdef bint readonly, fortran
    cdef int nd
    cdef Py_ssize_t shape[MAX_DIMS]
    cdef uint64_t nbytes

    def __init__(self, bytes description, uint64_t nbytes):
        known = form_of(description, nbytes)  # ValueError if it is damaged
        self.description, self.nbytes = description, nbytes
        self.dtype = known.dtype
        self.readonly = known.readonly
        self.fortran = known.order == "F"
        self.nd = len(known.shape)
        for axis in range(self.nd):
            self.shape[axis] = known.shape[axis]

    cdef inline bint is_of(self, Array *array) noexcept:
        """Whether that C-contiguous array, if it was sent, would have this description."""
        return (
            array.descr == <PyObject *> self.dtype
            and array.nd == self.nd
            and self.readonly == (not array.flags & WRITEABLE)
            and memcmp(array.dimensions, self.shape, self.nd * sizeof(Py_ssize_t)) == 0
        )


cdef class Column:
    """One field of the messages of a spec without UpTo fields: messages/fields.py."""

    cdef object dtype
    cdef uint64_t offset, nbytes
    cdef int nd
    cdef Py_ssize_t shape[MAX_DIMS]  # of a batch's array, whose first dimension is the number of messages

    def __init__(self, field):
        self.dtype, self.offset, self.nbytes = field.dtype, field.offset, field.nbytes
        self.nd = 1 + len(field.shape)
        for axis in range(1, self.nd):
            self.shape[axis] = field.shape[axis - 1]


cdef class Pickler:
    """One of messages/pickled.py, and what it fills."""

    cdef object pickling, dump, clear_memo
    cdef list stream, buffers

    def __init__(self, pickling):
        self.pickling, self.dump, self.clear_memo = pickling, pickling.dump, pickling.clear_memo
        self.stream, self.buffers = pickling.stream, pickling.buffers


cdef class CompiledHandle:
    """What the compiled path knows of a handle; the base of all handles."""

    cdef public double _look_at
    cdef CompiledRing ring  # None: all calls are Python's
    cdef object attachment, reference, codec
    cdef dict blocks  # DeadlockDetector.blocks
    cdef SpecForm fields  # None: the messages are not typed, or not so that they are handled here
    cdef bint bare, pickles, drops
    cdef uint64_t sends_as, receives_as
    cdef list sent_forms
    cdef dict received_forms
    cdef ArrayForm last_form, form_in_use
    cdef Pickler idle
    cdef list columns  # of a typed message without UpTo fields; else None
    cdef uint64_t typed_meta

    def _bind_compiled(self, attachment, codec):
        """Use the ring of that attachment, and that codec."""
        self.attachment, self.reference, self.codec = attachment, attachment.ring, codec
        self.ring, self.blocks = self.reference.compiled, attachment.deadlocks.blocks
        self.fields = form_of_spec(codec)
        self.bare = isinstance(codec, ContainerCodec)
        self.pickles = isinstance(codec, PickleCodec)
        self.drops = self._options.when_full == "drop_oldest"
        self.sends_as = self.receives_as = 0
        self.sent_forms = [None] * FORMS_SENT
        self.received_forms = {}
        self.last_form = None
        self.idle = None
        self.columns = None
        if isinstance(codec, SpecCodec) and not codec.spec.up_to:
            if all([len(field.shape) < MAX_DIMS for field in codec.spec.fields]):
                self.columns = [Column(field) for field in codec.spec.fields]
                self.typed_meta, _ = codec.spec.record(())

    def _unbind_compiled(self):
        """The handle is closed."""
        self.ring = self.attachment = self.reference = None

    def _role_taken(self, bint sends):
        """The handle counts in that role, for the participant that this process is now."""
        if self.ring is not None:
            if sends:
                self.sends_as = self.ring.owner
            else:
                self.receives_as = self.ring.owner

    cdef inline bint has_role(self, CompiledRing ring, uint64_t role) noexcept:
        """Whether the handle is open and has the role that it took as this participant: a forked child is another."""
        return ring is not None and ring is self.ring and ring.owner != 0 and role == ring.owner and not paused

    cdef inline int begin_call(self, CompiledRing ring) except -1:
        """Handle._begin_call"""
        cdef double now = monotonic()
        (<double *> ring.words)[ring.entry + P_CALLED] = now
        if now > self._look_at:
            self._look_around()
        return 0

    # --- waiting: steps.py, receiving.py, sending.py

    def _wait_compiled(self, bint space, double until, bint endless):
        """Wait for a message, or for space: whether one may be there. If not, go on in Python, or time is up."""
        return self.ring is not None and self.wait(self.ring, space, until, endless, False)

    cdef bint wait(self, CompiledRing ring, bint space, double until, bint endless, bint brief) except -1:
        """As `_wait_compiled`; `brief`: for a slice at most."""
        cdef Waiting *waiting = &ring.waiting[space]
        cdef uint64_t role = self.sends_as if space else self.receives_as, binding
        cdef double now = monotonic(), look_at = now + SLICE_SECONDS
        cdef int rounds = 0, looks = 1
        cdef bint woken
        attachment = self.attachment  # keeps the entry, if another thread closes the handle
        if attachment is None or not self.has_role(ring, role) or not can_wait() or self.drops and space:
            return False
        spin = self._send_spin if space else self._receive_spin
        while True:
            PyErr_CheckSignals()
            if self.look(ring, space, spin):
                break
            if not self.has_role(ring, role) or not ring.may_come(space):
                return False
            if endless and (PyDict_Size(self.blocks) or not brief and ring.keeps_slots()):
                return False
            now = monotonic()
            if now >= until:
                return False
            if spin.always:
                with nogil:
                    sched_yield()
            else:
                binding = ring.binding
                ring.announce(waiting)
                try:
                    woken = ring.there(space) or not ring.may_come(space)
                    woken = woken or ring.sleep(waiting, min(until, now + self.seconds(space, rounds)))
                finally:
                    if ring.binding == binding:
                        ring.count_here(waiting, -1)
                rounds += 1
                if woken:
                    if not ring.pass_on(space):
                        (attachment.space if space else attachment.messages).pass_on(ring.there(space) > 1)
                    break
            if monotonic() >= look_at:
                if brief or looks % SELF_LOOKS == 0 or not self.nothing_to_do(ring, attachment):
                    attachment.reaper.look()
                if brief:
                    return False
                looks += 1
                look_at = monotonic() + SLICE_SECONDS
        return self.has_role(ring, role)

    cdef bint nothing_to_do(self, CompiledRing ring, attachment) except -1:
        """Whether a look for the dead would find nothing to do in this process, nor anybody dead."""
        ours = attachment.ring
        if PyDict_Size(ours._watched) or PyList_GET_SIZE(ours.overdue) or ours.partial is not None:
            return False
        return ring.all_live(attachment.segment.file.lock_fd)

    cdef inline double seconds(self, bint space, int rounds) noexcept:
        """Of a sleep, after so many: BlockingTurn._slice"""
        if space and not rounds:
            return SHORT_SECONDS
        return SLICE_SECONDS if rounds < IDLE_ROUNDS else IDLE_SECONDS

    cdef bint look(self, CompiledRing ring, bint space, object spin) except -1:
        """Look whether something is there, for as long as that pays: Spin.until_changed"""
        cdef uint64_t *words = ring.words
        cdef uint64_t *word
        cdef uint64_t seen, slot
        cdef double end
        if ring.there(space):
            return True
        cdef int looks = spin.looks
        if not looks:
            return False
        if space:
            slot = LOAD(&words[ring.ring + (LOAD(&words[TAIL]) - 1 & ring.mask)]) % ring.capacity + 1
            word, seen = &words[ring.records + (slot if slot < ring.capacity else 0) * RECORD_WORDS], FREE
        else:
            word, seen = &words[TAIL], LOAD(&words[HEAD])
        end = monotonic() + looks * LOOK
        while (LOAD(word) == seen) != space:
            if monotonic() > end:
                spin.wasted()
                return False
        spin.paid()
        return ring.there(space) > 0

    # --- encoding: messages/

    cdef object encode(self, object obj, Message *message):
        """The message of an object. What is returned keeps `message.data` alive. It is a tuple, as codecs give it, and
        `message.data` is NULL, if only Python can copy it.
        """
        cdef Array *array
        cdef ArrayForm form
        cdef int overflow = 0
        cdef double real
        message.data, message.parts = <char *> &message.number, NULL
        if not self.bare:
            return self.encode_slowly(obj, message)
        if type(obj) is bytes:
            message.meta = <uint64_t> PyBytes_GET_SIZE(obj) << 16 | BYTES
            message.data = PyBytes_AS_STRING(obj)
        elif type(obj) is ndarray:
            array = <Array *> <PyObject *> obj
            form = self.sent_forms[self.place_of(array)]
            if form is None or not array.flags & C_CONTIGUOUS or not form.is_of(array):
                return self.encode_slowly(obj, message)
            message.meta = form.nbytes << 16 | <uint64_t> PyBytes_GET_SIZE(form.description) << 8 | ARRAY
            message.data = array.data
            message.description = PyBytes_AS_STRING(form.description)
            self.form_in_use = form
        elif type(obj) is str:
            if not PyUnicode_IS_ASCII(obj):
                return self.encode_slowly(obj, message)
            message.meta = <uint64_t> PyUnicode_GET_LENGTH(obj) << 16 | STR
            message.data = PyUnicode_DATA(obj)
        elif type(obj) is float:
            message.meta = 8 << 16 | FLOAT
            real = obj
            memcpy(&message.number, &real, 8)
        elif type(obj) is int:
            message.number = PyLong_AsLongLongAndOverflow(obj, &overflow)
            if overflow:
                return self.encode_slowly(obj, message)
            message.meta = 8 << 16 | INT
        elif obj is None:
            message.meta = NONE
        elif type(obj) is bool:
            message.meta = TRUE if obj is True else FALSE
        elif self.pickles and type(obj) is not bytearray:
            return self.pickle(obj, message)
        else:
            return self.encode_slowly(obj, message)
        return obj

    cdef object encode_slowly(self, object obj, Message *message):
        """By the codec."""
        encoded = self.codec.encode(obj)
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
        cdef size_t at = <size_t> array.descr >> 4 ^ <size_t> array.nd
        if array.nd:
            at ^= <size_t> array.dimensions[0]
        return at & FORMS_SENT - 1

    cdef int remember(self, object sent, ArrayForm form) except -1:
        """The next array of that form need not be encoded by the codec."""
        cdef Array *array = <Array *> <PyObject *> sent
        form.dtype = sent.dtype  # it is known by the identity of its dtype
        form.readonly = not array.flags & WRITEABLE  # a codec may let it arrive writable
        self.sent_forms[self.place_of(array)] = form
        return 0

    cdef object pickle(self, object obj, Message *message):
        """PickleCodec.encode, of what is not bare."""
        cdef Pickler pickler = self.idle
        self.idle = None  # other threads, and calls that pickling makes, use another
        if pickler is None:
            pickler = Pickler(self.codec.new_pickling())
        try:
            pickler.dump(obj)
            if PyList_GET_SIZE(pickler.stream) == 1 and PyList_GET_SIZE(pickler.buffers) == 0:
                kept = pickler.stream.pop()
                pickler.clear_memo()
            else:
                kept = pickler.pickling.container()
        except BaseException as error:
            self.codec.refuse(pickler.pickling, error, obj)
        self.idle = pickler
        if type(kept) is bytes:
            message.meta = <uint64_t> PyBytes_GET_SIZE(kept) << 16 | CONTAINER
            message.data = PyBytes_AS_STRING(kept)
        elif type(kept) is tuple:
            message.meta, message.data = kept[0], NULL
        else:
            kept = len(kept) << 16 | CONTAINER, kept, b""
            message.meta, message.data = kept[0], NULL
        return kept

    # --- decoding: messages/

    cdef object decode(self, CompiledRing ring, Taken *taken):
        """What the message is; the caller owns it."""
        cdef uint64_t kind = taken.meta & 0xFF, nbytes = taken.meta >> 16
        cdef char *data = <char *> ring.words + ring.slots + taken.slot * ring.stride
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
            elif kind == ARRAY:
                if 0 < nbytes < POOLED:
                    return self.decode_array(ring, taken, data, nbytes)
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
        elif self.fields is not None and taken.meta == self.fields.meta and self.fields.copied:
            return self.fields.message(data, None)
        offset = ring.slots + taken.slot * ring.stride
        return self.codec.decode(ring.memory, offset, taken.meta, (taken.record + R_DESCRIPTION) * 8)

    cdef ArrayForm form_received(self, CompiledRing ring, Taken *taken):
        """The form of an array in a slot; ValueError if its description is none of so many bytes."""
        cdef uint64_t nbytes = taken.meta >> 16
        cdef const char *description = <char *> (ring.words + taken.record + R_DESCRIPTION)
        cdef Py_ssize_t length = taken.meta >> 8 & 0xFF
        cdef ArrayForm form = self.last_form
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
            self.last_form = form
        if form.nbytes != nbytes:
            raise ValueError(f"array of {nbytes} bytes is described as one of {form.nbytes}")
        return form

    cdef object decode_array(self, CompiledRing ring, Taken *taken, const char *data, uint64_t nbytes):
        """bare.decode_array"""
        cdef ArrayForm form = self.form_received(ring, taken)
        cdef Array *array
        cdef char *to
        Py_INCREF(form.dtype)  # for the new array
        value = new_array(ndarray, form.dtype, form.nd, form.shape, NULL, NULL, form.fortran, NULL)
        array = <Array *> <PyObject *> value
        copy(array.data, data, nbytes)
        if form.readonly:
            array.flags &= ~WRITEABLE
        return value

    # --- Sends.put and Receives.get

    cdef object send(self, object obj, object block, object timeout):
        cdef CompiledRing ring = self.ring
        cdef Message message
        if not self.has_role(ring, self.sends_as):
            return slow_put(self, obj, block, timeout)
        if timeout is not None and block:
            check_timeout(timeout)
        self.begin_call(ring)  # before the object is looked at: other threads may run in it
        if self.fields is not None and type(obj) is dict:
            kept = self.fields.collect(obj, &message)
            if kept is not None and self.has_role(ring, self.sends_as) and ring.send(&message):
                if LOAD(&ring.words[MESSAGE_HINT]) and not ring.wake_receiver():
                    self._ring.wake_receiver()
                return None
        kept = self.encode(obj, &message)
        form = self.form_in_use  # keeps `message.description` alive while other threads send
        outcome, until = None, 0.0
        while message.data != NULL and message.meta >> 16 <= ring.slot_size and self.has_role(ring, self.sends_as):
            if message.meta >> 16 > ring.small:
                if self.send_large(ring, &message):
                    return None
            elif ring.send(&message):
                if LOAD(&ring.words[MESSAGE_HINT]) and not ring.wake_receiver():
                    self._ring.wake_receiver()
                return None
            if ring.there(True) or LOAD(&ring.words[ATTENTION]):
                outcome = None
                break
            if until == 0:
                until = deadline_of(block, timeout)
            outcome = _FULL
            if until == 0 or not self.wait(ring, True, until, until == INFINITY, True):
                break
            if type(obj) is ndarray:
                kept = self.encode(obj, &message)  # it may have been changed meanwhile
                form = self.form_in_use
        meta, data, description = as_tuple(&message, kept)
        if meta >> 16 > ring.slot_size:
            return self._put_larger(meta, data, description, block, timeout)
        if outcome is None or not self.has_role(ring, self.sends_as):
            outcome = self._ring.send(meta, data, description)
        if outcome is not _SENT:
            self._put_slowly(outcome, meta, data, description, until or deadline_of(block, timeout))
        return None

    cdef bint send_large(self, CompiledRing ring, Message *message) except -1:
        """Ring._send_large: the copy is made outside of the critical sections. False, if that is Python's."""
        cdef uint64_t since = 0, nbytes = message.meta >> 16
        cdef uint64_t slot = ring.claim(&since)
        cdef char *to = <char *> ring.words + ring.slots + slot * ring.stride
        reference = self.reference  # as in `receive`
        if slot == ring.capacity:
            return False
        copy(to, message.data, nbytes)
        try:
            if ring.publish(slot, message):
                if LOAD(&ring.words[MESSAGE_HINT]) and not ring.wake_receiver():
                    reference.wake_receiver()
                return True
            description = PyBytes_FromStringAndSize(message.description, message.meta >> 8 & 0xFF)
            if reference.publish(slot, message.meta, description) is _SENT:
                return True
        except BaseException:
            reference.discard(slot, since)
            raise
        reference.discard(slot, since)
        return False

    cdef object receive(self, list received, object block, object timeout, object out):
        cdef CompiledRing ring = self.ring
        cdef Taken taken
        if out is not None or not self.has_role(ring, self.receives_as) or PyList_GET_SIZE(ring.unreturned):
            return self.receive_slowly(received, block, timeout, out)
        if timeout is not None and block:
            check_timeout(timeout)
        self.begin_call(ring)
        if not self.has_role(ring, self.receives_as):
            return self.receive_slowly(received, block, timeout, out)
        until = 0.0
        while not ring.take(&taken, 1):
            empty = not ring.there(False)
            if empty and until == 0:
                until = deadline_of(block, timeout)
            if not empty or until == 0 or not self.wait(ring, False, until, until == INFINITY, True):
                return self.receive_later(received, until, block, timeout)
        reference, codec = self.reference, self.codec  # which another thread may take from us by `close`
        try:
            value = self.decode(ring, &taken)
        except BaseException as error:
            try:
                value = reference.consume_failed(taken.slot, taken.own, taken.meta, codec.decode, error)
            except BaseException:
                reference.give_back([(taken.record, taken.own)])  # a handler may raise where that function begins
                raise
            self.release(ring, &taken, reference)
            self.wake_freed(ring, reference)
            self._raise_undecodable(value)
        self.release(ring, &taken, reference)
        received.append(value)
        self.wake_freed(ring, reference)
        return value

    cdef object receive_slowly(self, list received, object block, object timeout, object out):
        value = slow_get(self, block, timeout, out)
        received.append(value)
        return value

    cdef object receive_many(self, list received, object max_messages, object timeout):
        cdef CompiledRing ring = self.ring
        cdef Taken *taken
        cdef Py_ssize_t count, at
        if (
            not self.has_role(ring, self.receives_as)
            or PyList_GET_SIZE(ring.unreturned)
            or type(max_messages) is not int
            or not 0 < max_messages
        ):
            return self.receive_many_slowly(received, max_messages, timeout)
        if timeout is not None:
            check_timeout(timeout)
        self.begin_call(ring)
        count = min(max_messages, ring.capacity, LOAD(&ring.words[TAIL]) - LOAD(&ring.words[HEAD]))
        if count <= 0 or not self.has_role(ring, self.receives_as):
            return self.receive_many_slowly(received, max_messages, timeout)
        taken = <Taken *> malloc(count * sizeof(Taken))
        if taken == NULL:
            raise MemoryError
        try:
            count = ring.take(taken, count)
            if count == 0:
                return self.receive_many_slowly(received, max_messages, timeout)
            self.decode_many(ring, received, taken, count)
        finally:
            free(taken)

    cdef int decode_many(self, CompiledRing ring, list received, Taken *taken, Py_ssize_t count) except -1:
        """Decode what was taken, and release it: all, or what lies before a message that cannot be decoded."""
        cdef Py_ssize_t at = 0
        cdef list values = []
        reference, codec = self.reference, self.codec
        try:
            for at in range(count):
                values.append(self.decode(ring, &taken[at]))
        except BaseException as error:
            held = [(taken[k].record, taken[k].own) for k in range(count)]
            try:
                outcome = reference.consume_failed_in(held, at, taken[at].slot, taken[at].meta, codec.decode, error)
            except BaseException:
                reference.give_back(held)  # as in `receive`
                raise
            count = max(at, 1)
            if at == 0:
                self.release_all(ring, taken, 1, reference)
                self.wake_freed(ring, reference)
                self._raise_undecodable(outcome)
        self.release_all(ring, taken, count, reference)
        received.extend(values)
        self.wake_freed(ring, reference)
        return 0

    cdef object receive_batch(self, list received, object n, object least, object timeout, object out):
        cdef CompiledRing ring = self.ring
        cdef Taken *taken
        cdef Py_ssize_t count
        if (
            not self.has_role(ring, self.receives_as)
            or self.columns is None
            or PyList_GET_SIZE(ring.unreturned)
            or type(n) is not int
            or not 0 < n <= ring.capacity
            or least is not None
        ):
            return self.receive_batch_slowly(received, n, least, timeout, out)
        if timeout is not None:
            check_timeout(timeout)
        self.begin_call(ring)
        try:
            arrays = self.new_batch(n) if out is None else self.codec.batch_arrays(n, out)
        except SpecMismatch:
            arrays = None
        count = LOAD(&ring.words[TAIL]) - LOAD(&ring.words[HEAD])
        if count < n or not self.has_role(ring, self.receives_as) or not are_contiguous(arrays):
            return self.receive_batch_slowly(received, n, least, timeout, out)
        taken = <Taken *> malloc(<size_t> n * sizeof(Taken))
        if taken == NULL:
            raise MemoryError
        try:
            count = ring.take(taken, n)
            if count:
                self.stack(ring, received, taken, count, n, arrays)
        finally:
            free(taken)
        if PyList_GET_SIZE(received) == 0:
            return self.receive_batch_slowly(received, n, least, timeout, out)
        return received[0]

    cdef int stack(
        self, CompiledRing ring, list received, Taken *taken, Py_ssize_t count, Py_ssize_t n, list arrays
    ) except -1:
        """SpecCodec.stack, of messages that were taken, and release them; if they are not `n`, or one is none of the
        spec's, they go back.
        """
        cdef Py_ssize_t at
        cdef bint sound = count == n
        reference = self.reference
        for at in range(count):
            sound = sound and taken[at].meta == self.typed_meta
        try:
            if sound:
                self.copy_columns(ring, taken, count, arrays)
                batch = TypedBatch(self.codec.nest(arrays))
            else:
                reference.requeue_or_later([(taken[at].record, taken[at].own) for at in range(count)])
        except BaseException:
            reference.give_back([(taken[at].record, taken[at].own) for at in range(count)])
            raise
        if sound:
            self.release_all(ring, taken, count, reference)
            received.append(batch)
            self.wake_freed(ring, reference)
        return 0

    cdef int copy_columns(self, CompiledRing ring, Taken *taken, Py_ssize_t count, list arrays) except -1:
        cdef Column column
        cdef Py_ssize_t k
        for k in range(PyList_GET_SIZE(arrays)):
            column = self.columns[k]
            to = (<Array *> PyList_GET_ITEM(arrays, k)).data
            if count * column.nbytes >= COPY_WITHOUT_GIL:
                with nogil:
                    ring.copy_column(taken, count, to, column.offset, column.nbytes)
            else:
                ring.copy_column(taken, count, to, column.offset, column.nbytes)
        return 0

    cdef list new_batch(self, Py_ssize_t n):
        """SpecCodec.batch_arrays, of new arrays."""
        cdef Column column
        cdef list arrays = []
        for column in self.columns:
            if n * column.nbytes >= ALIGNED_NBYTES:
                shape = (n, *[column.shape[axis] for axis in range(1, column.nd)])
                arrays.append(self.codec.aligned(shape, column.dtype, n * column.nbytes))
            else:
                column.shape[0] = n
                Py_INCREF(column.dtype)
                arrays.append(new_array(ndarray, column.dtype, column.nd, column.shape, NULL, NULL, 0, NULL))
        return arrays

    cdef object receive_batch_slowly(self, list received, object n, object least, object timeout, object out):
        batch = slow_get_batch(self, n, min=least, timeout=timeout, out=out)
        received.append(batch)
        return batch

    cdef object receive_many_slowly(self, list received, object max_messages, object timeout):
        received.extend(slow_get_many(self, max_messages, timeout))

    cdef int release_all(self, CompiledRing ring, Taken *taken, Py_ssize_t count, object reference) except -1:
        cdef Py_ssize_t at
        for at in range(count):
            if LOAD(&ring.words[taken[at].record]) != taken[at].own:
                raise reference.moved()
        for at in range(count):
            STORE(&ring.words[taken[at].record], FREE)
        return 0

    cdef object receive_later(self, list received, double until, object block, object timeout):
        """Go on after an attempt that took nothing."""
        if until == 0:
            value = slow_get(self, block, timeout)
        elif self.has_role(self.ring, self.receives_as):
            value = self._get_slowly(_EMPTY, until)
        else:
            value = slow_get(self, True, None if until == INFINITY else max(0.0, until - monotonic()))
        received.append(value)
        return value

    cdef inline int wake_freed(self, CompiledRing ring, object reference) except -1:
        if LOAD(&ring.words[SPACE_HINT]) and not ring.wake_sender():
            reference.wake_freed()
        return 0

    cdef inline int release(self, CompiledRing ring, Taken *taken, object reference) except -1:
        if LOAD(&ring.words[taken.record]) != taken.own:
            raise reference.moved()
        STORE(&ring.words[taken.record], FREE)
        return 0


def put(CompiledHandle self not None, object obj, object block=True, object timeout=None):
    return self.send(obj, block, timeout)


def take(CompiledHandle self not None, list received not None, object block, object timeout, object out):
    """The next message, as Receives.get. It is in `received` from the moment at which no other process may have it."""
    return self.receive(received, block, timeout, out)


def take_many(CompiledHandle self not None, list received not None, object max_messages, object timeout):
    """The next messages, as Receives.get_many; they are in `received`, as by `take`."""
    self.receive_many(received, max_messages, timeout)


def take_batch(
    CompiledHandle self not None, list received not None, object n, object least, object timeout, object out
):
    """The next batch, as Receives.get_batch; it is in `received`, as by `take`."""
    return self.receive_batch(received, n, least, timeout, out)


cdef bint are_contiguous(list arrays):
    """Whether these are arrays, and nothing more than that, in C order."""
    if arrays is None:
        return False
    for array in arrays:
        if type(array) is not ndarray or not (<Array *> <PyObject *> array).flags & C_CONTIGUOUS:
            return False
    return True


def keep(CompiledHandle self not None, list received not None, object kind):
    """After an exception, when these were received by a call of that kind: the next such call returns them."""
    cdef CompiledRing ring = self.ring
    if ring is not None and received:
        reference = self.reference
        ring.unreturned.extend([(kind, value) for value in received])
        reference._tail_seen = 0
        if not ring.receives:
            reference.quieten()  # which makes descriptors readable: the message was there, and is again


def encode_each(CompiledHandle self not None, objs):
    """The messages of those objects, a sequence of what codecs give, and the largest payload's bytes."""
    cdef Batch batch = Batch()
    cdef uint64_t largest = 0
    cdef Message *message
    if self.ring is None or paused:
        return slow_encode_each(self, objs)
    for obj in objs:
        message = batch.next()
        kept = self.encode(obj, message)
        batch.kept.append(kept)
        batch.forms.append(self.form_in_use if type(kept) is ndarray else None)
        largest = max(largest, message.meta >> 16)
        batch.count += 1
    batch.finish()
    return batch, largest


def encode_rows(CompiledHandle self not None, codec, batch):
    """The messages of a typed batch, a sequence of what codecs give."""
    if self.ring is None or paused or self.columns is None or codec is not self.codec:
        return slow_encode_rows(self, codec, batch)
    arrays, lengths = codec.check_batch(batch)
    # views of one's own, which nobody else resizes; a row must be as it lies in a slot
    rows = [asarray(array)[:] for array in arrays]
    if len(lengths) and all([array[0, ...].flags.c_contiguous for array in rows]):
        return Rows(codec, self.columns, rows)
    return [codec.row(arrays, index, []) for index in range(len(lengths))]


def send_many(CompiledRing ring not None, batch, list sent not None):
    """As Ring.send_many, what is to be had at once; how many were sent, which `sent` counts, too."""
    cdef Py_ssize_t count
    if not isinstance(batch, Batch) or ring.owner == 0 or paused:
        return 0
    count = ring.send_each(batch, sent[0])
    sent[0] += count
    return count


def replace(put, get, get_many, get_batch, encode_each, encode_rows):
    """Know the reference, which does what the compiled path does not."""
    global slow_put, slow_get, slow_get_many, slow_get_batch, slow_encode_each, slow_encode_rows
    slow_put, slow_get, slow_get_many, slow_get_batch = put, get, get_many, get_batch
    slow_encode_each, slow_encode_rows = encode_each, encode_rows


include "blocks.pxi"
include "latest.pxi"


def pause(bint on):
    """Whether all calls are Python's, from now on; returns whether they were."""
    global paused
    before, paused = paused, on
    return before


def _check_numpy():
    """Find NumPy's function, and see that arrays are laid out as is said above; ImportError if not."""
    global new_array, numpy_functions
    cdef Array *array
    core = getattr(np, "_core", None) or np.core
    numpy_functions = <void **> PyCapsule_GetPointer(core._multiarray_umath._ARRAY_API, NULL)
    new_array = <NewArray> numpy_functions[NEW_FROM_DESCR]
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

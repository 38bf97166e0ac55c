"""The ring, over pointers: a part of compiled.pyx, whose rules hold here. It knows no messages but by their bytes.
The reference: mutex.py, slots.py, take.py, waiters.py.
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals


cdef enum:
    MOST_PINNED = 32  # slots of a Latest that the compiled path pins

#: Copies from this size on let other threads run.
cdef uint64_t COPY_WITHOUT_GIL = 256 * 1024
#: Bytes from this size on, which the receiver will not find in a cache, are copied past the caches.
cdef uint64_t STREAMED_NBYTES = 4 * 1024 * 1024


cdef struct Mutex:
    PyThread_type_lock local  # of this process's threads, where they run at once
    sem_t *semaphores[2]
    uint64_t hold  # the hold word, and
    uint64_t gen  # what is in it, while this process is inside


cdef struct Part:  # of a message: a field, or a piece of a container
    uint64_t offset, nbytes
    const char *data
    char scalar[32]  # what `data` points to, for a scalar


cdef struct Message:  # that is sent
    uint64_t meta
    const char *data  # NULL: only Python can copy it
    Part *parts  # instead of `data`, if it is not NULL: `count` of them
    Py_ssize_t count
    const char *description


cdef struct Taken:  # a message that is received
    uint64_t slot, record
    uint64_t own  # the slot's word
    uint64_t meta
    char *data
    char *description


cdef struct Pinned:  # a slot of a Latest, by this process
    uint64_t version, count


cdef struct Waiting:
    Guard guard  # of the two counts
    sem_t *semaphore
    uint64_t offset  # the word of an entry in which its threads are announced
    uint64_t hint
    uint64_t here  # threads of this process that wait in the compiled path, and
    uint64_t elsewhere  # in the Python code


cdef inline void copy(char *to, const char *data, uint64_t nbytes) noexcept:
    """Copy; other threads run meanwhile, if that takes long."""
    if nbytes >= COPY_WITHOUT_GIL:
        with nogil:
            memcpy(to, data, nbytes)
    else:
        memcpy(to, data, nbytes)


cdef inline void fill(char *to, Message *message) noexcept nogil:
    """Copy a message's bytes to its slot."""
    cdef Py_ssize_t k
    if message.parts == NULL:
        fill_part(to, message.data, message.meta >> 16)
    else:
        for k in range(message.count):
            fill_part(to + message.parts[k].offset, message.parts[k].data, message.parts[k].nbytes)


cdef inline void fill_part(char *to, const char *data, uint64_t nbytes) noexcept nogil:
    if nbytes >= STREAMED_NBYTES:
        stream(to, data, nbytes)
    else:
        memcpy(to, data, nbytes)


#: Whether the threads of a process run at once.
threads_at_once = bool(THREADS_AT_ONCE)


@cython.final
cdef class LocalLock:
    """What keeps a process's threads apart at a mutex where they run at once: an RLock that the compiled path can take."""

    cdef PyThread_type_lock lock
    cdef uint64_t owner, count  # the thread in whose Python code it is held, and how often; 0: in none

    def __cinit__(self):
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.lock != NULL:
            PyThread_free_lock(self.lock)

    def acquire(self, bint blocking=True):
        """Wait for it, unless `blocking` is False. Handlers run meanwhile; what they raise is raised."""
        cdef uint64_t thread = <uint64_t> PyThread_get_thread_ident()
        cdef bint taken
        if LOAD(&self.owner) != thread:
            taken = TAKE_LOCAL(self.lock)
            if not (taken or blocking):
                return False
            while not taken:
                with nogil:
                    taken = PyThread_acquire_lock_timed(self.lock, SLICE_MICROSECONDS, 1) == PY_LOCK_ACQUIRED
                if not taken:
                    PyErr_CheckSignals()
            STORE(&self.owner, thread)
        self.count += 1
        return True

    def release(self):
        """Of its owner."""
        self.count -= 1
        if self.count == 0:
            STORE(&self.owner, 0)
            PyThread_release_lock(self.lock)

    def _is_owned(self):
        return LOAD(&self.owner) == <uint64_t> PyThread_get_thread_ident()


@cython.final
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
    cdef object keeps  # the semaphores
    cdef list unreturned
    cdef uint64_t *words
    cdef Mutex senders, receivers
    cdef sem_t *events
    cdef uint64_t capacity, slot_size, nearly_full, small
    cdef uint64_t ring, mask, records, slots, stride, entries, most_entries, pins
    cdef uint64_t entry, owner, sender
    cdef public bint receives  # whether receiving calls are not all Python's
    cdef uint64_t tail_seen, head_seen  # as Returns has them
    cdef Waiting waiting[2]  # for a message, and for space
    cdef uint64_t witness[2]  # index of an entry that was a sender, and a receiver, at the last look
    cdef uint64_t binding  # grows with each `rebind`
    cdef Guard guard  # of `pinned`
    cdef Pinned pinned[MOST_PINNED]  # the slots of a Latest that Holds of this process have pinned
    cdef tuple locals  # the LocalLock of each mutex

    def __init__(self, memory, shape, semaphores, list unreturned):
        cdef sem_t *of[7]
        self.memory, self.keeps, self.unreturned = memory, semaphores, unreturned
        PyObject_GetBuffer(memory, &self.buffer, PyBUF_WRITABLE)
        self.words = <uint64_t *> self.buffer.buf
        for which, semaphore in enumerate(semaphores):
            of[<int> which] = <sem_t *> <uintptr_t> semaphore.address
        self.senders.semaphores = [of[0], of[1]]
        self.receivers.semaphores = [of[2], of[3]]
        self.waiting[0].semaphore, self.waiting[1].semaphore = of[4], of[5]
        self.waiting[0].offset, self.waiting[1].offset = P_WAITING_MESSAGE, P_WAITING_SPACE
        self.waiting[0].hint, self.waiting[1].hint = MESSAGE_HINT, SPACE_HINT
        self.events = of[6]
        self.capacity, self.slot_size = shape.capacity, shape.slot_size
        self.nearly_full = shape.capacity - max(1, shape.capacity // 4)
        self.small = min(self.slot_size, SMALL_NBYTES)
        self.ring, self.mask, self.records = shape.ring, shape.ring_mask, shape.records
        self.slots, self.stride = shape.slots, shape.slot_stride
        self.entries, self.most_entries, self.pins = shape.entries, shape.max_participants + 1, shape.pins
        self.receives = True
        self.rebind(0, 0, 0)

    def __dealloc__(self):
        PyBuffer_Release(&self.buffer)

    def rebind(self, uint64_t entry, uint64_t owner, uint64_t sender):
        """Act for the participant with that entry; 0: for none, so that all calls are Python's."""
        self.entry, self.owner, self.sender = entry, owner, sender
        self.senders.hold, self.receivers.hold = entry + P_SENDER_HOLD, entry + P_RECEIVER_HOLD
        self.tail_seen = self.head_seen = 0
        self.waiting[0].here = self.waiting[0].elsewhere = self.waiting[1].here = self.waiting[1].elsewhere = 0
        self.binding += 1
        memset(self.pinned, 0, sizeof(self.pinned))  # before a fork they were its parent's

    def lock_by(self, senders, receivers):
        """Take those locks of the two mutexes, as Python does, where threads run at once. After a fork they are new."""
        if THREADS_AT_ONCE:
            self.locals = senders, receivers
            self.senders.local, self.receivers.local = (<LocalLock?> senders).lock, (<LocalLock?> receivers).lock

    cdef inline bint has_entry(self) noexcept:
        """Whether the entry is this participant's: others may have taken it for dead."""
        cdef uint64_t *entry = &self.words[self.entry]
        return LOAD(&entry[P_STATUS]) == IN_USE and LOAD(&entry[P_INCARNATION]) == self.owner >> INCARNATION_SHIFT

    cdef inline uint64_t record_of(self, uint64_t slot) noexcept:
        return self.records + slot * RECORD_WORDS

    cdef inline char *payload_of(self, uint64_t slot) noexcept:
        return <char *> self.words + self.slots + slot * self.stride

    # --- the mutexes: mutex.py

    cdef inline bint enter(self, Mutex *mutex) noexcept:
        """Whether it was to be had at once."""
        cdef uint64_t gen
        if not TAKE_LOCAL(mutex.local):
            return False
        gen = LOAD(&self.words[GEN])
        if gen & 1 or gen == 0 or sem_trywait(mutex.semaphores[gen >> 1 & 1]) != 0:
            GIVE_LOCAL(mutex.local)
            return False
        STORE(&self.words[mutex.hold], gen)
        FENCE()  # SYNC POINT a
        if LOAD(&self.words[GEN]) != gen:
            STORE(&self.words[mutex.hold], 0)
            GIVE_LOCAL(mutex.local)
            return False
        mutex.gen = gen
        return True

    cdef inline void leave(self, Mutex *mutex) noexcept:
        sem_post(mutex.semaphores[mutex.gen >> 1 & 1])
        STORE(&self.words[mutex.hold], 0)
        GIVE_LOCAL(mutex.local)

    # --- sending: Ring.send, claim, publish

    cdef bint send(self, Message *message) noexcept:
        """Claim, copy, publish; False, and nothing has changed, if that is Python's."""
        cdef uint64_t slot
        if not self.enter(&self.senders):
            return False
        slot = self.find_free()
        if slot != self.capacity:
            self.write(slot, message)
            self.append(slot, message.meta >> 16)
        self.leave(&self.senders)
        return slot != self.capacity

    cdef uint64_t claim(self, uint64_t *since) noexcept:
        """A slot that this participant writes from now on; `capacity`, if that is Python's."""
        cdef uint64_t slot, record
        if not self.enter(&self.senders):
            return self.capacity
        slot = self.find_free()
        if slot != self.capacity:
            record = self.record_of(slot)
            since[0] = monotonic_ns()
            STORE(&self.words[record + R_SINCE], since[0])
            STORE(&self.words[record], WRITING | self.owner)
        self.leave(&self.senders)
        return slot

    cdef bint publish(self, uint64_t slot, uint64_t since, Message *message) noexcept:
        """Publish a slot that was claimed and written; False, and it is as it was, if that is Python's."""
        cdef bint sound
        if not self.is_claimed(slot, since):
            return False  # while the message was copied, this process was found to count as dead
        self.describe(slot, message)
        if not self.enter(&self.senders):
            return False
        sound = not LOAD(&self.words[SHUTDOWN]) and self.is_claimed(slot, since) and LOAD(&self.words[TAIL]) != MAX_WORD
        if sound:
            self.append(slot, message.meta >> 16)
        self.leave(&self.senders)
        return sound

    cdef inline bint is_claimed(self, uint64_t slot, uint64_t since) noexcept:
        cdef uint64_t *record = &self.words[self.record_of(slot)]
        return self.owner != 0 and LOAD(record) == (WRITING | self.owner) and LOAD(&record[R_SINCE]) == since

    cdef inline uint64_t find_free(self) noexcept:
        """The first FREE slot onward from the one that was published last; `capacity`, if there is none, or that is
        Python's.
        """
        cdef uint64_t *words = self.words
        cdef uint64_t tail = LOAD(&words[TAIL]), slot = LOAD(&words[self.ring + (tail - 1 & self.mask)]), looked
        if LOAD(&words[ATTENTION]) or tail == MAX_WORD:
            return self.capacity
        for looked in range(self.capacity):
            slot = slot + 1 if slot + 1 < self.capacity else 0
            if LOAD(&words[self.record_of(slot)]) == FREE:
                return slot
            if looked == 0 and tail - LOAD(&words[HEAD]) >= self.capacity:
                break  # all are READY
        return self.capacity

    cdef inline void write(self, uint64_t slot, Message *message) noexcept:
        fill(self.payload_of(slot), message)
        self.describe(slot, message)

    cdef inline void describe(self, uint64_t slot, Message *message) noexcept:
        cdef uint64_t *record = &self.words[self.record_of(slot)]
        cdef uint64_t described = message.meta >> 8 & 0xFF
        if described:
            memcpy(&record[R_DESCRIPTION], message.description, described)
        STORE(&record[R_META], message.meta)
        STORE(&record[R_SENDER], self.sender)

    cdef inline void append(self, uint64_t slot, uint64_t nbytes) noexcept:
        """The message that is in that slot is sent, at the end of the ring."""
        cdef uint64_t *words = self.words
        cdef uint64_t tail = LOAD(&words[TAIL]), record = self.record_of(slot)
        STORE(&words[record + R_SEQUENCE], tail)
        STORE(&words[record], READY)  # from here on the message is sent, whoever dies
        STORE(&words[self.ring + (tail & self.mask)], slot)
        STORE(&words[TAIL], tail + 1)
        STORE(&words[SENT_NBYTES], LOAD(&words[SENT_NBYTES]) + nbytes)

    # --- receiving: Ring.receive

    cdef Py_ssize_t take(self, Taken *taken, Py_ssize_t at_most) noexcept:
        """Take the oldest messages; 0, and nothing has changed, if there is none, or that is Python's."""
        cdef uint64_t *words = self.words
        cdef uint64_t head, slot, record, state, meta
        cdef Py_ssize_t count = 0
        if not self.receives:
            return 0
        if self.tail_seen <= self.head_seen:
            self.tail_seen = LOAD(&words[TAIL])
            if LOAD(&words[HEAD]) == self.tail_seen:
                return 0
        if not self.enter(&self.receivers):
            return 0
        head = LOAD(&words[HEAD])
        if head >= self.tail_seen or at_most > 1:
            self.tail_seen = LOAD(&words[TAIL])
        while count < at_most and head < self.tail_seen:
            slot = LOAD(&words[self.ring + (head & self.mask)])
            if slot >= self.capacity:
                break
            record = self.record_of(slot)
            state, meta = LOAD(&words[record]), LOAD(&words[record + R_META])
            if state & STATE_MASK != READY or meta >> 16 > self.slot_size or (meta >> 8 & 0xFF) > DESCRIPTION_NBYTES:
                break
            taken.slot, taken.record, taken.meta, taken.own = slot, record, meta, state + TAKE + self.owner
            taken.data, taken.description = self.payload_of(slot), <char *> &words[record + R_DESCRIPTION]
            STORE(&words[record], taken.own)
            head += 1
            STORE(&words[HEAD], head)
            STORE(&words[TAKEN_NBYTES], LOAD(&words[TAKEN_NBYTES]) + (meta >> 16))
            count += 1
            taken += 1
        self.head_seen = head
        self.leave(&self.receivers)
        return count

    cdef inline uint64_t ready(self) noexcept:
        """How many messages are there; after damage any number."""
        return LOAD(&self.words[TAIL]) - LOAD(&self.words[HEAD])

    cdef inline bint release(self, Taken *taken, Py_ssize_t count) noexcept:
        """Hand slots back; False, and nothing has changed, if one is no longer this participant's."""
        cdef Py_ssize_t at
        for at in range(count):
            if LOAD(&self.words[taken[at].record]) != taken[at].own or taken[at].own & OWNER_MASK != self.owner:
                return False
        for at in range(count):
            STORE(&self.words[taken[at].record], FREE)
        return True

    # --- waking: waiters.py

    cdef inline bint wake_receiver(self) noexcept:
        """Wake a receiver that waits for a message, if any does; False if that is Python's."""
        if LOAD(&self.words[MESSAGE_HINT]):
            if LOAD(&self.words[LISTENED]):
                return False
            self.wake(&self.waiting[0])
        return True

    cdef inline bint wake_sender(self) noexcept:
        """Wake a sender that waits for space, if any does, and all who wait for events; False if that is Python's."""
        if LOAD(&self.words[SPACE_HINT]):
            if LOAD(&self.words[LISTENED]):
                return False
            if self.ready() <= self.nearly_full:  # as Returns.wake_freed
                self.wake(&self.waiting[1])
                self.post(self.events, P_WAITING_EVENT, MAX_ENTRIES)
        return True

    cdef void wake(self, Waiting *waiting) noexcept:
        STORE(&self.words[waiting.hint], 0)
        FENCE()  # SYNC POINT w: whoever set the hint before this store is counted now
        self.post(waiting.semaphore, waiting.offset, 1)

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
        cdef Waiting *waiting = &self.waiting[for_space]
        GUARD(&waiting.guard)
        waiting.elsewhere = threads
        STORE(&self.words[entry + waiting.offset], threads + waiting.here)
        UNGUARD(&waiting.guard)

    cdef inline void count_here(self, Waiting *waiting, int change) noexcept:
        GUARD(&waiting.guard)
        waiting.here += change
        if self.has_entry():
            STORE(&self.words[self.entry + waiting.offset], waiting.here + waiting.elsewhere)
        UNGUARD(&waiting.guard)

    cdef void announce(self, Waiting *waiting) noexcept:
        cdef uint64_t *waits = &self.words[self.entry + P_WAITS]
        self.count_here(waiting, 1)
        STORE(waits, LOAD(waits) + 1)
        STORE(&self.words[waiting.hint], 1)
        FENCE()  # SYNC POINT w

    cdef uint64_t there(self, bint space) noexcept:
        """How many messages, or free slots, are there; 2 slots may be more."""
        cdef uint64_t *words = self.words
        cdef uint64_t head = LOAD(&words[HEAD]), count = LOAD(&words[TAIL]) - head, slot
        if not space:
            return 0 if <int64_t> count < 0 else count
        if count >= self.capacity:
            return 0
        count = 0
        for slot in range(self.capacity):
            count += LOAD(&words[self.record_of(slot)]) == FREE
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

    cdef bint pass_on(self, bint space, uint64_t need) noexcept:
        """After a sleep that a token has ended, as Waiters.pass_on; False if that is Python's."""
        cdef Waiting *waiting = &self.waiting[space]
        if not self.announced(waiting.offset):
            return True
        if LOAD(&self.words[LISTENED]):
            return False
        STORE(&self.words[waiting.hint], 1)
        if self.there(space) > need:
            self.wake(waiting)
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

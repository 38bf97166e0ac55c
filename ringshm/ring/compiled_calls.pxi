"""What users call: `put`, `get` and their like, and how they wait. A part of compiled.pyx, whose rules hold here. The
reference: sender.py, receiver.py, sending.py, receiving.py, steps.py.
"""

from cpython.dict cimport PyDict_Size

from ..arguments import check_timeout, deadline_of
from .outcomes import EMPTY, FULL, SENT

#: Bytes that a batch copies under one grant of the mutex, as in slots.py.
cdef uint64_t BATCH_NBYTES = 1024 * 1024

cdef object _EMPTY = EMPTY, _FULL = FULL, _SENT = SENT
#: The reference, by qualified names; the classes of loans and borrows. `replace` sets them.
cdef dict slow = {}
cdef object loan_type = None, borrow_type = None
#: Whether the compiled path stands aside, for tests that count or stop at bytecodes.
cdef bint paused = False


cdef class CompiledHandle:
    """What the compiled path knows of a handle; the base of all handles."""

    cdef public double _look_at
    cdef public bint _drops_oldest
    cdef Guard guard  # of the ring, the attachment and the reference
    cdef CompiledRing ring  # None: all calls are Python's
    cdef CompiledCodec codec
    cdef object attachment, reference
    cdef dict blocks  # DeadlockDetector.blocks
    cdef uint64_t looks  # for the dead, of calls that found it time for that
    cdef uint64_t sends_as, receives_as  # the owner value under which it took the role; 0: it has not

    def _bind_compiled(self, attachment, codec):
        """Use the ring of that attachment, and that codec."""
        self.blocks, self.codec = attachment.deadlocks.blocks, CompiledCodec(codec)
        cdef CompiledRing ring
        reference = attachment.ring
        ring = reference.compiled
        GUARD(&self.guard)
        self.attachment, self.reference, self.ring = attachment, reference, ring
        UNGUARD(&self.guard)
        self.sends_as = self.receives_as = 0

    def _unbind_compiled(self):
        """The handle is closed."""
        cdef CompiledRing ring
        GUARD(&self.guard)  # a call of another thread has them, or has not
        ring, attachment, reference = self.ring, self.attachment, self.reference
        self.ring = self.attachment = self.reference = None
        UNGUARD(&self.guard)
        self.sends_as = self.receives_as = 0

    def _role_taken(self, bint sends):
        """The handle counts in that role, for the participant that this process is now."""
        cdef CompiledRing ring = self.open_ring()
        if ring is not None:
            if sends:
                self.sends_as = ring.owner
            else:
                self.receives_as = ring.owner

    @cython.final
    cdef inline CompiledRing open_ring(self):
        """The ring, if the handle is open: a call keeps it, whoever closes the handle meanwhile."""
        cdef CompiledRing ring
        GUARD(&self.guard)
        ring = self.ring
        UNGUARD(&self.guard)
        return ring

    @cython.final
    cdef inline object open_attachment(self):
        """The attachment, as `open_ring`: it keeps the process's entry."""
        GUARD(&self.guard)
        attachment = self.attachment
        UNGUARD(&self.guard)
        return attachment

    @cython.final
    cdef inline object open_reference(self):
        """The ring in Python, as `open_ring`."""
        GUARD(&self.guard)
        reference = self.reference
        UNGUARD(&self.guard)
        return reference

    @cython.final
    cdef int wake_receiver(self) except -1:
        """Ring.wake_receiver; whoever waits looks by itself, if another thread has just closed the handle."""
        reference = self.open_reference()
        if reference is not None:
            reference.wake_receiver()
        return 0

    @cython.final
    cdef inline bint has_role(self, CompiledRing ring, bint sends) noexcept:
        """Whether the handle is open and has the role that it took as this participant: a forked child is another."""
        cdef uint64_t role = self.sends_as if sends else self.receives_as
        return role != 0 and ring is self.ring and role == ring.owner and not paused

    @cython.final
    cdef inline bint begin(self, CompiledRing ring, bint sends, object block, object timeout) except -1:
        """Begin a call, as Handle._begin_call; False if the call is Python's."""
        cdef double now
        if timeout is not None and block:
            check_timeout(timeout)
        if not self.has_role(ring, sends) or not sends and ring.unreturned:
            return False
        now = monotonic()
        (<double *> ring.words)[ring.entry + P_CALLED] = now
        if now > self._look_at and not self.has_looked(ring, now):
            self._look_around()
            return self.has_role(ring, sends)
        return True

    cdef bint has_looked(self, CompiledRing ring, double now) except -1:
        """Look as Handle._look_around, here; False if that is to look: one time in four, or if there is more to do."""
        attachment = self.open_attachment()
        self.looks += 1
        if attachment is None:  # another thread has just closed the handle
            return False
        if self.looks % SELF_LOOKS == 1 or attachment._versions is not None or not self.nothing_to_do(ring, attachment):
            return False
        file = attachment.segment.file
        device, inode = file.identity
        if not holds(file.fd, file.lock_fd, LOCK_ENTRIES + <int64_t> attachment.participants.index, device, inode):
            return False
        self._look_at = now + SLICE_SECONDS
        return True

    # --- waiting: steps.py, receiving.py, sending.py

    def _wait_compiled(self, bint space, double until, bint endless, uint64_t need):
        """Wait for so many messages, or a slot: whether they may be there. If not, go on in Python, or time is up."""
        cdef CompiledRing ring = self.open_ring()
        return ring is not None and self.wait(ring, space, until, endless, need, False)

    cdef bint wait_briefly(
        self, CompiledRing ring, bint space, uint64_t need, object block, object timeout, double *until
    ) except -1:
        """After an attempt in vain: whether to try again. `until`: when the time is up, if that is known, else 0."""
        if ring.there(space) >= need:
            return False  # it was for another reason
        if until[0] == 0:
            until[0] = deadline_of(block, timeout)
        return until[0] != 0 and self.wait(
            ring, space, until[0], until[0] == INFINITY, need, True
        )

    cdef bint wait(
        self, CompiledRing ring, bint space, double until, bint endless, uint64_t need, bint brief
    ) except -1:
        """As `_wait_compiled`; `brief`: for some slices at most, before which no look of Python's is due."""
        cdef Waiting *waiting = &ring.waiting[space]
        cdef uint64_t binding
        cdef double now = monotonic(), look_at = now + SLICE_SECONDS
        cdef int rounds = 0, looks = 1
        cdef bint woken
        attachment = self.open_attachment()
        if attachment is None or not self.has_role(ring, space) or not can_wait() or self._drops_oldest and space:
            return False
        spin = self._send_spin if space else self._receive_spin
        while True:
            PyErr_CheckSignals()
            if ring.there(space) >= need or need == 1 and self.look(ring, space, spin):
                break
            if not self.has_role(ring, space) or not ring.may_come(space):
                return False
            if endless and (PyDict_Size(self.blocks) or (not brief or looks > 1) and attachment.ring.kept()):
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
                    woken = ring.there(space) >= need or not ring.may_come(space)
                    woken = woken or ring.sleep(waiting, min(until, now + self.seconds(space, rounds)))
                finally:
                    if ring.binding == binding:
                        ring.count_here(waiting, -1)
                if not woken:
                    rounds += 1
                elif not ring.pass_on(space, need):
                    (attachment.space if space else attachment.messages).pass_on(ring.there(space) > need)
            if monotonic() >= look_at:
                if looks % SELF_LOOKS == 0 or not self.nothing_to_do(ring, attachment):
                    attachment.reaper.look()
                    if brief:
                        return False
                looks += 1
                look_at = monotonic() + SLICE_SECONDS
        return self.has_role(ring, space)

    cdef bint nothing_to_do(self, CompiledRing ring, attachment) except -1:
        """Whether a look for the dead would find nothing to do in this process, nor anybody dead."""
        ours = attachment.ring
        if PyDict_Size(ours._watched) or PyDict_Size(ours.overdue) or ours.partial is not None:
            return False
        return ring.all_live(attachment.segment.file.lock_fd)

    cdef inline double seconds(self, bint space, int rounds) noexcept:
        """Of a sleep, after so many: BlockingTurn._slice"""
        if space and not rounds:
            return SHORT_SECONDS
        return SLICE_SECONDS if rounds < IDLE_ROUNDS else IDLE_SECONDS

    cdef bint look(self, CompiledRing ring, bint space, object spin) except -1:
        """Look whether something is there, for as long as that pays: Spin.until_changed"""
        cdef int looks = spin.looks
        cdef double end = monotonic() + looks * LOOK
        while looks and monotonic() <= end:
            if ring.there(space):
                spin.paid()
                return True
        if looks:
            spin.wasted()
        return False

    # --- sending

    @cython.final
    cdef bint send_large(self, CompiledRing ring, Message *message) except -1:
        """Ring._send_large: the copy is made outside of the critical sections. False, if that is Python's."""
        cdef uint64_t since = 0, slot
        cdef char *to
        reference = self.open_reference()
        if reference is None:
            return False
        slot = ring.claim(&since)
        if slot == ring.capacity:
            return False
        to = ring.payload_of(slot)
        if message.meta >> 16 >= COPY_WITHOUT_GIL:
            with nogil:
                fill(to, message)
        else:
            fill(to, message)
        try:
            if ring.publish(slot, since, message):
                if not ring.wake_receiver():
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

    @cython.final
    cdef object put_later(
        self, CompiledRing ring, tuple encoded, bint full, object block, object timeout, double until
    ):
        """Go on with a message that was not sent at once."""
        outcome = _FULL if full and self.has_role(ring, True) else None
        if encoded[0] >> 16 > ring.slot_size:
            return self._put_larger(*encoded, block, timeout)
        if outcome is None:
            outcome = self._ring.send(*encoded)
        if outcome is not _SENT:
            self._put_slowly(outcome, *encoded, until or deadline_of(block, timeout))

    # --- receiving

    @cython.final
    cdef int decode(self, CompiledRing ring, reference, list received, Taken *taken, Py_ssize_t count) except -1:
        """Decode what was taken, and release it: all, or what lies before a message that cannot be decoded."""
        cdef Py_ssize_t at = 0
        try:
            for at in range(count):
                received.append(self.codec.decode(ring, taken[at].meta, taken[at].data, taken[at].description))
        except BaseException as error:
            self.fail(ring, reference, received, taken, count, at, error)
            return 0
        self.release(ring, reference, received, taken, count)
        return 0

    @cython.final
    cdef int fail(
        self, CompiledRing ring, reference, list received, Taken *taken, Py_ssize_t count, Py_ssize_t at, error
    ) except -1:
        """Decoding has failed at that message: those behind it go back, and it itself unless it is the first."""
        values, held = received[:], held_of(taken, count)
        received.clear()
        try:
            outcome = reference.consume_failed(
                held, at, taken[at].slot, taken[at].meta, self.codec.reference.decode, error
            )
        except BaseException:
            reference.give_back(held)  # a handler may raise where that function begins
            raise
        received.extend(values)
        self.release(ring, reference, received, taken, max(at, 1))
        if at == 0:
            self._raise_undecodable(outcome)
        return 0

    @cython.final
    cdef inline int release(
        self, CompiledRing ring, object reference, list received, Taken *taken, Py_ssize_t count
    ) except -1:
        """Hand the slots back of what was received."""
        if not ring.release(taken, count):
            received.clear()
            raise reference.moved(taken.own)
        if not ring.wake_sender():
            reference.wake_freed()
        return 0

    @cython.final
    cdef int stack(
        self, CompiledRing ring, reference, list received, Taken *taken, Py_ssize_t count, Py_ssize_t n, list arrays
    ) except -1:
        """Copy to a batch what was taken, and release it. If they are not `n`, or one is no typed one, they go back."""
        try:
            batch = self.codec.spec.stack(taken, count, arrays) if count == n else None
            if batch is None:
                reference.requeue_or_later(held_of(taken, count))
                return 0
        except BaseException:
            reference.give_back(held_of(taken, count))
            raise
        received.append(batch)
        self.release(ring, reference, received, taken, count)
        return 0


cdef list held_of(Taken *taken, Py_ssize_t count):
    """As Ring.held."""
    cdef Py_ssize_t at
    return [(taken[at].record, taken[at].own) for at in range(count)]


# --- one message

def put(CompiledHandle self not None, object obj, object block=True, object timeout=None):
    cdef CompiledRing ring = self.open_ring()
    cdef Message message
    cdef bint full = False
    cdef double until = 0
    if not self.begin(ring, True, block, timeout):  # looks at no object yet: other threads may run in it
        return slow["Sends.put"](self, obj, block, timeout)
    if self.codec.spec is not None:
        kept = self.codec.spec.collect(obj, &message)
        if kept is not None and self.has_role(ring, True) and ring.send(&message):
            if not ring.wake_receiver():
                self.wake_receiver()
            return None
    kept = self.codec.encode(obj, &message)
    while message.data != NULL and message.meta >> 16 <= ring.slot_size and self.has_role(ring, True):
        if message.meta >> 16 > ring.small:
            if self.send_large(ring, &message):
                return None
        elif ring.send(&message):
            if not ring.wake_receiver():
                self.wake_receiver()
            return None
        full = not ring.there(True) and not LOAD(&ring.words[ATTENTION])
        if not full or not self.wait_briefly(ring, True, 1, block, timeout, &until):
            break
        if type(obj) is ndarray:
            kept = self.codec.encode(obj, &message)  # it may have been changed meanwhile
        elif type(kept) is Container and not (<Container> kept).is_as_pickled():
            break
    return self.put_later(ring, as_tuple(&message, obj, kept), full, block, timeout, until)


def take(CompiledHandle self not None, list received not None, object block, object timeout, object out):
    """The next message, as Receives.get. It is in `received` from the moment at which no other process may have it."""
    cdef CompiledRing ring = self.open_ring()
    cdef Taken taken
    cdef double until = 0
    if out is None and self.begin(ring, False, block, timeout):
        reference = self.open_reference()  # which another thread may take from us by `close`
        while reference is None or not ring.take(&taken, 1):
            if reference is None or not self.wait_briefly(ring, False, 1, block, timeout, &until):
                break
        else:
            self.decode(ring, reference, received, &taken, 1)
            return received[0]
    if until == 0:
        received.append(slow["Receives.get"](self, block, timeout, out))
    elif self.has_role(ring, False):
        received.append(self._get_slowly(_EMPTY, until))
    else:
        received.append(slow["Receives.get"](self, True, time_left(until, timeout)))
    return received[0]


cdef object time_left(double until, object timeout):
    """What is left of a time-out, if the call has begun to wait."""
    return timeout if until == 0 or until == INFINITY else max(0.0, until - monotonic())


# --- several

def take_many(CompiledHandle self not None, list received not None, object max_messages, object timeout):
    """The next messages, as Receives.get_many; they are in `received`, as by `take`."""
    cdef CompiledRing ring = self.open_ring()
    cdef Taken *taken
    cdef Py_ssize_t count
    cdef double until = 0
    if type(max_messages) is int and max_messages > 0 and self.begin(ring, False, True, timeout):
        reference = self.open_reference()  # as in `take`
        while reference is not None:
            count = min(max_messages, ring.capacity, ring.ready())
            memory = PyBytes_FromStringAndSize(NULL, count * sizeof(Taken))
            taken = <Taken *> PyBytes_AS_STRING(memory)
            count = ring.take(taken, count)
            if count:
                self.decode(ring, reference, received, taken, count)
                return
            if not self.wait_briefly(ring, False, 1, True, timeout, &until):
                break
    received.extend(slow["Receives.get_many"](self, max_messages, time_left(until, timeout)))


def take_batch(
    CompiledHandle self not None, list received not None, object n, object least, object timeout, object out
):
    """The next batch, as Receives.get_batch; it is in `received`, as by `take`."""
    cdef CompiledRing ring = self.open_ring()
    cdef Taken *taken
    cdef Py_ssize_t count
    cdef double until = 0
    cdef list arrays = None
    if least is None and type(n) is int and self.begin(ring, False, True, timeout):
        if self.codec.spec is not None and 0 < n <= ring.capacity:
            arrays = self.codec.spec.new_batch(n, out)
        reference = self.open_reference()  # as in `take`
        while arrays is not None and reference is not None and self.has_role(ring, False):
            if ring.ready() < n:
                if not self.wait_briefly(ring, False, n, True, timeout, &until):
                    break
                arrays = self.codec.spec.new_batch(n, out)  # other threads may have changed `out`
                continue
            memory = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> n * sizeof(Taken))
            taken = <Taken *> PyBytes_AS_STRING(memory)
            count = ring.take(taken, n)
            if count:
                self.stack(ring, reference, received, taken, count, n, arrays)
            break
    if not received:
        received.append(slow["Receives.get_batch"](self, n, min=least, timeout=time_left(until, timeout), out=out))
    return received[0]


def keep(CompiledHandle self not None, list received not None, object kind):
    """After an exception, when these were received by a call of that kind: the next such call returns them."""
    cdef CompiledRing ring = self.open_ring()
    if ring is not None and received:
        reference = self.open_reference()
        ring.unreturned.extend([(kind, value) for value in received])
        if reference is not None:
            reference._tail_seen = 0
        if reference is not None and not ring.receives:
            reference.quieten()  # which makes descriptors readable: the message was there, and is again


def encode_each(CompiledHandle self not None, objs):
    """The messages of those objects, a sequence of what codecs give, and the largest payload's bytes."""
    cdef CompiledCodec codec = self.codec
    cdef Batch batch = Batch()
    cdef uint64_t largest = 0
    cdef Message *message
    if self.ring is None or paused:
        return slow["Sending._encode_each"](self, objs)
    for obj in objs:
        message = batch.next()
        kept = codec.encode(obj, message)
        batch.kept.append(obj if type(kept) is ArrayForm else kept)
        batch.forms.append(kept if type(kept) is ArrayForm else None)
        largest = max(largest, message.meta >> 16)
        batch.count += 1
    return batch, largest


def encode_rows(CompiledHandle self not None, codec, batch):
    """The messages of a typed batch, a sequence of what codecs give."""
    if self.ring is None or paused or codec is not self.codec.reference or self.codec.spec is None:
        return slow["Sending._encode_rows"](self, codec, batch)
    arrays, lengths = codec.check_batch(batch)
    # views of one's own, which nobody else resizes; a row must be as it lies in a slot
    rows = [asarray(array)[:] for array in arrays]
    if len(lengths) and all([array[0, ...].flags.c_contiguous for array in rows]):
        return Rows(self.codec.spec, rows)
    return [codec.row(arrays, index, []) for index in range(len(lengths))]


def send_many(CompiledRing ring not None, batch, list sent not None):
    """As Ring.send_many, what is to be had at once, under one grant; how many were sent, which `sent` counts, too."""
    cdef uint64_t slot, left = BATCH_NBYTES
    cdef Py_ssize_t first = sent[0], at = first
    cdef Batch messages
    cdef Message *message
    if not isinstance(batch, Batch) or ring.owner == 0 or paused or not ring.enter(&ring.senders):
        return 0
    messages = <Batch> batch
    while at < messages.count:
        message = messages.message(at)
        if message == NULL or message.meta >> 16 > min(ring.small, left):
            break
        slot = ring.find_free()
        if slot == ring.capacity:
            break
        left -= message.meta >> 16
        ring.write(slot, message)
        ring.append(slot, message.meta >> 16)
        at += 1
    ring.leave(&ring.senders)
    sent[0] = at
    return at - first


def replace(dict reference, loan, borrow):
    """Know the reference, which does what the compiled path does not."""
    global loan_type, borrow_type
    slow.update(reference)
    loan_type, borrow_type = loan, borrow


def pause(bint on):
    """Whether all calls are Python's, from now on; returns whether they were."""
    global paused
    before, paused = paused, on
    return before

"""The values of a Latest in the compiled path: a part of compiled.pyx, whose rules hold here. See versions.py.

    publish  enter the senders' mutex; read NEWEST, HIGH_WATER and the pins; store 0 in the slot's R_SEQUENCE; fence;
             copy; store R_META, R_SENDER, R_SEQUENCE, NEWEST (the value is published); leave (the post is SYNC POINT p)
    read     read NEWEST and the slot's R_META; copy to memory of this process; fence; read R_SEQUENCE. If it is another
             version's, the copy is not to be used
    borrow   enter the receivers' mutex; read NEWEST, HIGH_WATER and the pins; store the cell; fence (SYNC POINT p); read
             NEWEST again; leave. When the last view goes, store 0 in the cell

1. A read takes no pin, as one in Python that finds none to be had: its copy is small.
2. The Holds of this process on one version share a cell, and `CompiledRing.pinned` counts them. The cell is the slot's own
   in the upper half of the process's cells; the lower half is for pins that Python makes, of the same versions perhaps.
   A Latest that has more slots than that has Python's pins alone.
3. All else is Python's: waiting, waking, typed values that are copied, and copies of more than 128 KiB.
"""

cdef extern from "string.h":
    void *memchr(const void *, int, size_t) nogil

cdef uint64_t SLOT_MASK = 0xFFFF
assert PIN_CELLS == 2 * MOST_PINNED


cdef uint64_t publish_next(CompiledRing ring, Message *message) noexcept:
    """The next version is that message; 0, and nothing has changed, if that is Python's."""
    cdef uint64_t *words = ring.words
    cdef uint64_t newest, current, used, slot, record, version = 0
    cdef char *pins = <char *> words + ring.pins
    if not ring.enter(&ring.senders):
        return 0
    newest = LOAD(&words[NEWEST])
    used = min(LOAD(&words[HIGH_WATER]), ring.most_entries) * PIN_CELLS
    current = newest & SLOT_MASK
    if current <= ring.capacity and (current == 0) == (newest >> 16 == 0) and newest >> 16 < MAX_WORD >> 16:
        for slot in range(ring.capacity):
            if slot + 1 != current and memchr(pins, <int> slot + 1, used) == NULL:
                record = ring.record_of(slot)
                version = (newest >> 16) + 1
                STORE(&words[record + R_SEQUENCE], 0)
                FENCE()  # large copies bypass the order in which stores become visible
                ring.write(slot, message)
                STORE(&words[record + R_SEQUENCE], version)
                STORE(&words[NEWEST], version << 16 | slot + 1)  # SYNC POINT p: the post of the mutex is the fence
                break
    ring.leave(&ring.senders)
    return version


cdef Hold pin_newest(CompiledRing ring, object attachment):
    """The newest version, pinned; None, and nothing has changed, if that is Python's."""
    cdef uint64_t *words = ring.words
    cdef uint64_t newest = LOAD(&words[NEWEST]), slot = (newest & SLOT_MASK) - 1, number, used, others = 0
    cdef char *pins = <char *> words + ring.pins
    cdef Hold pin
    if slot >= ring.capacity or ring.capacity > MOST_PINNED:
        return None
    pin = Hold.__new__(Hold)
    pin.ring, pin.attachment, pin.slot, pin.word = ring, attachment, slot, ring.owner
    pin.sequence, pin.data = newest >> 16, ring.payload_of(slot)
    if pin.share():
        return pin
    if not ring.enter(&ring.receivers):
        return None
    used = min(LOAD(&words[HIGH_WATER]), ring.most_entries) * PIN_CELLS
    for number in range(1, ring.capacity + 1):
        others += number != slot + 1 and memchr(pins, <int> number, used) != NULL
    if others < ring.capacity - 2 or memchr(pins, <int> slot + 1, used) != NULL:
        pin.pin(newest)
    ring.leave(&ring.receivers)
    return None if pin.cell == NULL else pin


cdef object copy_newest(CompiledRing ring, uint64_t newest, uint64_t *meta):
    """The payload of that version, and behind it the description; None if that is Python's."""
    cdef uint64_t *words = ring.words
    cdef uint64_t slot = (newest & SLOT_MASK) - 1, record = ring.record_of(slot), nbytes, described
    if slot >= ring.capacity or not ORDERED:  # the publisher may be Python, whose stores the mutex alone orders
        return None
    meta[0] = LOAD(&words[record + R_META])
    nbytes, described = meta[0] >> 16, meta[0] >> 8 & 0xFF
    if nbytes > ring.small or described > DESCRIPTION_NBYTES:
        return None
    copied = PyBytes_FromStringAndSize(NULL, nbytes + described)
    memcpy(PyBytes_AS_STRING(copied), ring.payload_of(slot), nbytes)
    memcpy(PyBytes_AS_STRING(copied) + nbytes, words + record + R_DESCRIPTION, described)
    FENCE()  # the copy, then the look
    return copied if LOAD(&words[record + R_SEQUENCE]) == newest >> 16 else None


def publish(CompiledHandle self not None, obj):
    cdef CompiledRing ring = self.open_ring()
    cdef Message message
    cdef uint64_t version = 0
    if not self.begin(ring, True, True, None) or not self.codec.bare:  # looks at no object yet, as in `put`
        return slow["Latest.publish"](self, obj)
    kept = self.codec.encode(obj, &message)
    if message.data != NULL and message.meta >> 16 <= ring.small and self.has_role(ring, True):
        version = publish_next(ring, &message)
    if version == 0:
        return self._publish_encoded(*as_tuple(&message, obj, kept))
    if LOAD(&ring.words[SPACE_HINT if version & 1 else MESSAGE_HINT]):
        attachment = self.open_attachment()
        if attachment is not None:
            attachment.versions.wake(version)
    return version


def borrow_newest(CompiledHandle self not None, int64_t least, timeout):
    """As Latest._borrow."""
    cdef CompiledRing ring = self.open_ring()
    cdef uint64_t meta, record
    cdef Hold pin = None
    if self.begin(ring, False, True, timeout) and <int64_t> (LOAD(&ring.words[NEWEST]) >> 16) >= least:
        attachment = self.open_attachment()
        pin = None if attachment is None else pin_newest(ring, attachment)
    if pin is not None:
        record = ring.record_of(pin.slot)
        meta = LOAD(&ring.words[record + R_META])
        pin.nbytes = meta >> 16
        if meta >> 16 <= ring.slot_size and (meta >> 8 & 0xFF) <= DESCRIPTION_NBYTES:
            description = <char *> (ring.words + record + R_DESCRIPTION)
            try:
                return self.codec.view(ring, meta, pin.data, description, pin), pin
            except Exception as error:
                self._decode_again(
                    error, self.codec.reference.view, *self.codec.payload(ring, meta, pin.data, description, pin)
                )
    return slow["Latest._borrow"](self, least, timeout)


def read(CompiledHandle self not None, newer_than=None, timeout=None):
    cdef CompiledRing ring = self.open_ring()
    cdef uint64_t newest, meta
    copied = None
    if self.begin(ring, False, True, timeout) and self.codec.bare:
        newest = LOAD(&ring.words[NEWEST])
        if newest and (newer_than is None or (type(newer_than) is int and 0 <= newer_than < <int64_t> (newest >> 16))):
            copied = copy_newest(ring, newest, &meta)
    if copied is None:
        return slow["Latest.read"](self, newer_than, timeout)
    if meta & 0xFF != BYTES:
        copied = self._decoded(self.codec.reference.decode, copied, 0, meta, meta >> 16)
    return newest >> 16, copied

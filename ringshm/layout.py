"""Where everything lies in the segment: arithmetic, no call of the operating system.

    offset (bytes)      what                                         size
    0                   header, one cache line per group of writers  HEADER_NBYTES
    participants        one entry per attached process               ENTRY_WORDS words each
    tickets             one record per handle that is on its way     TICKET_WORDS words each
    ready ring          slot indices, a power of two of them         1 word each
    records             one per slot: its word of state, and what    RECORD_WORDS words each
                        describes the message in it
    pins                of a Latest: one row of cells per entry      PIN_CELLS bytes each
    spec                text of the channel's spec, if it has one    SPEC_NBYTES of the header
    slots               `capacity` of them, each on pages of its own slot_stride bytes each

Everything but the slots is made of native, aligned 8-byte words, read and written one at a time through a
`memoryview` cast to "Q", so that each store is one store of the processor. Constants that begin with `P_`, `T_` and
`R_` count words from the start of an entry, a ticket and a record; the header's words have no prefix.

The slot's word
---------------
    bits 0-2    state: FREE, READY, WRITING, READING, KEPT, PIECE
    bits 3-10   deliveries that failed so far (their receivers died)
    bits 11-23  owner: index of a participant's entry   } zero unless WRITING, READING or KEPT
    bits 24-55  owner: incarnation of that entry        }
    bits 11-63  of a PIECE: the slot at the head of the message that it belongs to

so FREE is 0, and to take a READY slot is to add `owner + TAKE` to its word.
"""

from __future__ import annotations

import mmap
import operator
import re
from dataclasses import dataclass

PAGE_SIZE = mmap.PAGESIZE
WORD_SIZE = 8

MAGIC_VALUE = int.from_bytes(b"ringshm\n", "little")
LAYOUT_VERSION = 5

# --- header, in words. Constant once the segment has its name:
MAGIC = 0  # this one, VERSION, NONCE and the lock bytes are where they are in every layout version (segment.py)
VERSION = 1
CAPACITY = 2
SLOT_SIZE = 3
MAX_PARTICIPANTS = 4
OPTIONS = 5  # see Options
TOTAL_SIZE = 6
CREATOR = 7  # owner value of the entry of the process that made the channel
NONCE = 8  # 16 ASCII hexadecimal digits: 2 words
CODEC_NAME = 10  # 48 bytes of UTF-8, NUL-padded: 6 words
# Changed in recovery only; read by every grant:
GEN = 16  # even: normal use; odd: a recovery is under way
# Guarded by the senders' mutex:
TAIL = 24  # position where the next message is published, and its sequence
SENT_NBYTES = 25
SHUTDOWN = 26  # 1: shutdown was called; no message is published after it
NEWEST = 27  # of a Latest: version << 16 | slot + 1, or 0 before the first
TASKS_DONE = 28  # of a JoinableQueue: how many messages were done, see tasks.py,
TASKS_LOST = 29  # and how many will never be
# Guarded by the receivers' mutex:
HEAD = 32  # position of the oldest message
TAKEN_NBYTES = 33
DROPPED = 34  # messages that nobody will receive: by drop_oldest, shutdown(immediate) or too many deliveries
REDELIVERED = 35
COUNTING = 36  # record << 8 | counter: a change of that slot's word goes with a new count; 0: none is under way
COUNTING_WORD = 37  # the slot's word before,
COUNTING_SEQUENCE = 38  # and its sequence: if they are the same still, the change was not made
COUNTING_TOTAL = 39  # the new count
WITHDRAWN = 78  # messages larger than a slot that were given up before they were received: no `put` of one has returned
# Hints, set by whoever has announced itself, so that wakers look for waiters only then:
MESSAGE_HINT = 40
SPACE_HINT = 48
ROOM_HINT = 49  # senders and
PIECE_HINT = 50  # receivers of messages larger than a slot: see stream.py
# Set by whoever leaves, cleared under the senders' mutex: senders look whether they are alone
ATTENTION = 56
# Rarely written:
EVER_SENDER = 64  # whether there has been a sender: 0, one unused one (its owner value), or ANYBODY
EVER_RECEIVER = 65
LAST_CHECK = 66  # monotonic ns of the last look for the dead, by anyone
RECOVERIES = 67
HIGH_WATER = 68  # no entry at or above this index was ever used; guarded by the table lock
NEXT_TICKET = 69  # guarded by the table lock
HIGH_TICKET = 75  # no ticket at or above this index was ever used; guarded by the table lock
SENDER_GONE = 70  # pid << 1 | died, of the last sender that went
RECEIVER_GONE = 71
NAME_GONE = 72  # 1: the names were removed, or are about to be: nobody may join by name any more
SPEC_NBYTES = 76  # constant: length of the spec's text
LISTENED = 77  # 1: somebody has been woken through a FIFO, so that wakers look for listeners (wakeup.py)
NAME_DOOMED = 74  # 1: the creator has closed; the names go when no ticket is left
REAPED = 73  # participants found dead so far; guarded by the table lock
# The last deaths that were found, DEATHS_KEPT records of DEATH_WORDS words, in turn; guarded by the table lock
DEATHS = 128

ANYBODY = 1

#: Largest value of a word.
MAX_WORD = (1 << 64) - 1
#: Largest even GEN; after it comes 2, not 0, which would say of a holder that it holds nothing.
MAX_GEN = MAX_WORD - 1

HEADER_NBYTES = PAGE_SIZE

DEATHS_KEPT = 8
DEATH_WORDS = 4
D_PID = 0
D_FOUND = 1  # monotonic ns
D_SLOTS = 2  # slots that it was using
D_ROLES = 3  # its senders and receivers: open handles, 32 bits each

# --- one participant's entry. Written by its process, unless it says otherwise:
ENTRY_WORDS = 32
P_STATUS = 0  # UNUSED or IN_USE; a reaper writes UNUSED for the dead
P_INCARNATION = 1  # grows with each use of the entry
P_PID = 2
P_SINCE = 3  # monotonic ns
P_SENDERS = 4  # open handles that send
P_RECEIVERS = 5
P_UNDECIDED = 6  # open handles that have done neither yet
P_SENDER_HOLD = 8  # the generation in which it was granted the senders' mutex, or 0; a recoverer clears the dead's
P_RECEIVER_HOLD = 9
P_CALLED = 10  # monotonic seconds, as a double: when its latest call that sends or receives began
P_WAITING_MESSAGE = 16  # threads of it that wait for a message
P_WAITING_SPACE = 17
P_WAITING_EVENT = 18
P_WAITING_PIECE = 21
P_WAITING_ROOM = 22
P_WAITS = 19  # how often a call of it had to block
P_STUCK = 20  # slots held by threads of it that wait without a time limit: see standstill.py
P_TASKS = 23  # messages of a JoinableQueue that it has taken and not done, see tasks.py
# Its listeners (wakeup.py), one bit each:
P_FIFOS = 24  # there are FIFOs of these
P_LISTENS_MESSAGE = 25  # these want to be woken for messages
P_LISTENS_SPACE = 26
P_LISTENS_PIECE = 27
P_LISTENS_ROOM = 28
P_WATCHED = 29  # these are users' own, who wait or not, by `fileno()`
MAX_LISTENERS = 64

UNUSED = 0
IN_USE = 1

# --- a ticket: a handle that was pickled and is not attached yet. Guarded by the table lock.
TICKET_WORDS = 4
T_NUMBER = 0  # 0: unused
T_MAKER = 1  # owner value of the process that pickled it
T_EXPIRES = 2  # monotonic ns
T_ROLE = 3

UNDECIDED = 0
SENDER = 1
RECEIVER = 2
FORKED = 4  # flag in T_ROLE: the ticket of a forked child, which needs no name and may outlive its maker

# --- one slot's record. Its word belongs to whoever the word says; the rest is written before READY.
RECORD_WORDS = 32
R_STATE = 0
R_SEQUENCE = 1
R_META = 2  # length of the payload << 16 | length of the description << 8 | kind of the payload
R_SENDER = 3  # pid << 37 | entry << 24 | low bits of the incarnation
R_SINCE = 4  # monotonic ns at which a slot was claimed that is WRITING, or borrowed that is KEPT
R_PIECE = (
    5  # of each slot of a message larger than a slot: which piece is in it; see stream.py, also for the next three
)
R_WRITTEN = 6  # of the head: how many pieces its sender has written,
R_READ = 7  # and its receiver has read
R_FEEDER = 8  # of the head: owner value of the sender that still writes pieces; ALL_THERE or GIVEN_UP
R_DESCRIPTION = 9  # what a bare array's bytes mean
DESCRIPTION_NBYTES = (RECORD_WORDS - R_DESCRIPTION) * WORD_SIZE

FREE = 0
READY = 1
WRITING = 2
READING = 3
KEPT = 4
PIECE = 5
STATE_MASK = 7
STATES = ("free", "ready", "writing", "reading", "kept", "piece")

ALL_THERE = 0
GIVEN_UP = 1

TAKE = READING - READY
DELIVERY = 1 << 3
DELIVERY_MASK = 0xFF << 3
OWNER_MASK = ~(STATE_MASK | DELIVERY_MASK)
ENTRY_SHIFT = 11
INCARNATION_SHIFT = 24
MAX_ENTRIES = 1 << (INCARNATION_SHIFT - ENTRY_SHIFT)
MAX_INCARNATION = (1 << 32) - 1
MAX_DELIVERIES = 255

# --- bytes of the segment's file on which record locks are held; they need not exist
LOCK_TABLE = 0
LOCK_RECOVERY = 1
LOCK_NAME = 2
LOCK_ENTRIES = 64

#: Cells in which one process says which slots of a Latest it reads: slot + 1, or 0; a cache line.
PIN_CELLS = 64

#: Messages up to this size are claimed, copied and published in one critical section. The second entry that this saves
#: costs 3 us; a copy of this size takes some 8 us at 16 GB/s, about what all senders together get of the memory.
SMALL_NBYTES = 128 * 1024
#: The same for messages in parts, among which there may be strided arrays, which are copied some ten times more slowly.
SMALL_PARTS_NBYTES = 16 * 1024


def owner_value(entry: int, incarnation: int) -> int:
    """What a slot's word holds of its owner."""
    return entry << ENTRY_SHIFT | incarnation << INCARNATION_SHIFT


def sender_value(pid: int, entry: int, incarnation: int) -> int:
    """What a record says of its sender: enough for its pid, and to tell this sender from all others."""
    return pid << 37 | entry << 24 | incarnation & 0xFFFFFF


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Offsets for a channel of `capacity` slots of `slot_size` bytes; words count from the segment's start."""

    capacity: int
    slot_size: int
    max_participants: int
    spec_nbytes: int = 0
    pin_cells: int = 0

    @property
    def entries(self) -> int:
        """Word at which the participants' table starts."""
        return HEADER_NBYTES // WORD_SIZE

    @property
    def spare_entry(self) -> int:
        """Index of the entry beyond `max_participants`, from which a newcomer reaps the dead of a full table."""
        return self.max_participants

    @property
    def tickets(self) -> int:
        """Word at which the tickets start; there are as many as participants."""
        return self.entries + (self.max_participants + 1) * ENTRY_WORDS

    @property
    def ring(self) -> int:
        """Word at which the ready ring starts."""
        return self.tickets + self.max_participants * TICKET_WORDS

    @property
    def ring_mask(self) -> int:
        """Size of the ready ring, a power of two, less one."""
        return (1 << (self.capacity - 1).bit_length()) - 1

    @property
    def records(self) -> int:
        """Word at which the slots' records start, on a cache line of their own."""
        return round_up(self.ring + self.ring_mask + 1, RECORD_WORDS)

    @property
    def words_end(self) -> int:
        """Number of words before the slots."""
        return round_up(self.spec + self.spec_nbytes, PAGE_SIZE) // WORD_SIZE

    @property
    def pins(self) -> int:
        """Byte at which the pins start."""
        return (self.records + self.capacity * RECORD_WORDS) * WORD_SIZE

    @property
    def spec(self) -> int:
        """Byte at which the spec's text starts."""
        return self.pins + (self.max_participants + 1) * self.pin_cells

    @property
    def slots(self) -> int:
        """Byte at which the slots start."""
        return self.words_end * WORD_SIZE

    @property
    def slot_stride(self) -> int:
        """Bytes from one slot to the next."""
        return round_up(self.slot_size, PAGE_SIZE)

    @property
    def total_size(self) -> int:
        """Size of the segment in bytes."""
        return self.slots + self.capacity * self.slot_stride

    def entry(self, index: int) -> int:
        """Word at which a participant's entry starts."""
        return self.entries + index * ENTRY_WORDS

    def ticket(self, index: int) -> int:
        """Word at which a ticket starts."""
        return self.tickets + index * TICKET_WORDS

    def record(self, slot: int) -> int:
        """Word at which a slot's record starts."""
        return self.records + slot * RECORD_WORDS

    def slot(self, slot: int) -> int:
        """Byte at which a slot starts."""
        return self.slots + slot * self.slot_stride


CODECS = ("pickle", "plain", "custom", "spec")
WAIT_STRATEGIES = ("adaptive", "block", "spin")
OVERSIZE = ("stream", "error")
WHEN_FULL = ("wait", "drop_oldest")
KINDS = ("Channel", "Latest")


@dataclass(frozen=True)
class Options:
    """What a channel was made with, as one word of its header. The defaults are what a Latest has."""

    codec: str
    oversize: str = "error"
    wait: str = "adaptive"
    when_full: str = "wait"
    keep_open: bool = False
    max_deliveries: int = 1
    kind: str = "Latest"
    reuse_memory: bool = True

    def pack(self) -> int:
        """The options as one word."""
        return (
            CODECS.index(self.codec)
            | OVERSIZE.index(self.oversize) << 8
            | WAIT_STRATEGIES.index(self.wait) << 16
            | WHEN_FULL.index(self.when_full) << 24
            | self.keep_open << 32
            | KINDS.index(self.kind) << 33
            | self.max_deliveries << 40
            | self.reuse_memory << 48
        )

    @classmethod
    def unpack(cls, word: int) -> Options:
        """The options in a word; ValueError if it holds none."""
        try:
            options = cls(
                CODECS[word & 0xFF],
                OVERSIZE[word >> 8 & 0xFF],
                WAIT_STRATEGIES[word >> 16 & 0xFF],
                WHEN_FULL[word >> 24 & 0xFF],
                bool(word >> 32 & 1),
                word >> 40 & 0xFF,
                KINDS[word >> 33 & 0x7F],
                bool(word >> 48 & 1),
            )
        except IndexError:
            options = None
        if options is None or options.pack() != word or not options.max_deliveries:
            raise ValueError(f"options {word:#x} mean nothing")
        return options


_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_size(size: int | str, argument: str) -> int:
    """A size in bytes from an int, or from a string such as "64KiB" or "1.5GB".

    Raises:
        TypeError: if it is neither.
        ValueError: if it is no positive whole number of bytes, or its unit is unknown.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", size)
        if match is None:
            raise ValueError(f'{argument}={size!r} is no size: give bytes as an int, or a string such as "64KiB"')
        unit = _UNITS.get(match[2].lower())
        if unit is None:
            raise ValueError(f"{argument}={size!r} has an unknown unit {match[2]!r}: use B, kB, MB, GB, KiB, MiB, GiB")
        whole, _, fraction = match[1].partition(".")
        nbytes, rest = divmod(int((whole or "0") + fraction) * unit, 10 ** len(fraction))
        if rest:
            raise ValueError(f"{argument}={size!r} is not a whole number of bytes")
        return whole_number(nbytes, argument)
    return whole_number(size, argument)


def whole_number(value: int, argument: str, at_most: int | None = None, limit: str = "") -> int:
    """`value` as an int of at least 1, and of `at_most`, which is `limit` (", the capacity").

    Raises:
        TypeError: if it is no integer (a bool is none either).
        ValueError: if it is below 1 or above `at_most`.
    """
    if isinstance(value, bool):
        raise TypeError(f"{argument}={value!r} must be an int, not a bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}={value!r} must be an int, not {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{argument}={number} must be at least 1")
    if at_most is not None and number > at_most:
        raise ValueError(f"{argument}={number} must be at most {at_most}{limit}")
    return number

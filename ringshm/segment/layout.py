"""Where everything lies in the segment: arithmetic, no call of the operating system.

    offset (bytes)  size                           content
    0               HEADER_NBYTES                  header: one cache line or more for each group of writers
    entries         ENTRY_WORDS words each         participants: one entry for each attached process, and a spare one
    invitations     INVITATION_WORDS words each    invitations: one for each handle that is on its way
    ring            1 word each                    ready ring: indices of slots, a power of two of them
    records         RECORD_WORDS words each        one for each slot: the slot's word, and what describes its message
    pins            PIN_CELLS bytes for each entry of a Latest: cells that say which slots a process reads
    spec            SPEC_NBYTES                    text of the channel's spec, if it has one
    slots           slot_stride bytes each         `capacity` slots, from the start of a page on

A slot of a page or more has pages of its own. Smaller slots lie side by side, each on cache lines of its own, so that a
process maps few pages. Slots start where every dtype is aligned (messages/buffers.py: ALIGNMENT), and nothing else may
be relied on: a slot's pages may be its neighbours' pages, and the last page may end behind the segment. Pages are
reserved, mapped and pinned for all slots at once, from the page on which they start.

Everything but the pins, the spec and the slots is made of native, aligned 8-byte words, read and written one at a time
through a `memoryview` cast to "Q", so that each store is one store of the processor. Constants that begin with `P_`,
`I_`, `R_` and `D_` count words from the start of an entry, an invitation, a record and a death; the header's words have
no prefix. `m` in the tables is a mutex (senders' or receivers'), the table is the table lock (participants.py).

Header
------
    word               writer              guarded by    meaning
    MAGIC              creator             constant      MAGIC_VALUE
    VERSION            creator             constant      LAYOUT_VERSION
    CAPACITY           creator             constant      number of slots
    SLOT_SIZE          creator             constant      bytes of a slot
    MAX_PARTICIPANTS   creator             constant      number of entries but the spare one, and of invitations
    OPTIONS            creator             constant      see Options
    TOTAL_SIZE         creator             constant      bytes of the segment
    CREATOR            creator             constant      owner value of the process that made the channel
    NONCE              creator             constant      16 ASCII hexadecimal digits: 2 words
    CODEC_NAME         creator             constant      48 bytes of UTF-8, NUL-padded: 6 words
    SPEC_NBYTES        creator             constant      bytes of the spec's text
    GEN                recoverer           LOCK_RECOVERY even: normal use; odd: a recovery is under way; every grant of
                                                         a mutex reads it
    TAIL               sender              senders' m    position where the next message is published: its sequence
    SENT_NBYTES        sender              senders' m    bytes of all messages sent
    SHUTDOWN           any process         senders' m    1: `shutdown` was called; no message is published after it
    NEWEST             publisher           senders' m    of a Latest: version << 16 | slot + 1; 0: none yet
    TASKS_DONE         receiver            senders' m    of a JoinableQueue: messages that were done (tasks.py)
    TASKS_LOST         any process         senders' m    of a JoinableQueue: messages that will never be done
    HEAD               receiver            receivers' m  position of the oldest message
    TAKEN_NBYTES       receiver            receivers' m  bytes of all messages taken
    DROPPED            receiver, sender    receivers' m  messages that nobody will receive: by drop_oldest,
                                                         shutdown(immediate) or too many deliveries
    REDELIVERED        receiver, reaper    receivers' m  messages that were requeued
    WITHDRAWN          receiver, sender    receivers' m  messages larger than a slot that were given up before they were
                                                         received: no `put` of one has returned
    UNREAD             any process         receivers' m  of the dropped ones: those that shutdown(immediate) dropped
    COUNTING           changer of a count  receivers' m  record << 8 | counter: the slot's word and the counter change
                                                         together; 0: no change is under way
    COUNTING_WORD      changer of a count  receivers' m  the slot's word before the change, and
    COUNTING_SEQUENCE  changer of a count  receivers' m  its sequence: if both are the same still, nothing was changed
    COUNTING_TOTAL     changer of a count  receivers' m  the new count
    MESSAGE_HINT       waiter 1, waker 0   nothing       1: a waiter for messages may sleep; wakers look only then
    SPACE_HINT         waiter 1, waker 0   nothing       the same for free slots and events
    ROOM_HINT          waiter 1, waker 0   nothing       the same for senders of messages larger than a slot (large.py)
    PIECE_HINT         waiter 1, waker 0   nothing       the same for receivers of such messages
    ATTENTION          any process 1,      nothing;      1: perhaps no receiver is left (changes.py), or there was a
                       sender 0            senders' m    shutdown: the next sender looks round
    EVER_SENDER        any process         nothing       0: there was no sender; an owner value: only that process's,
                                                         unused; ANYBODY: there was one, or a process that was started
                                                         as one; PERHAPS: none, but the creator has died, which
                                                         might have become one
    EVER_RECEIVER      any process         nothing       the same for receivers
    LAST_CHECK         any process         nothing       monotonic ns of the last look for the dead
    RECOVERIES         recoverer           LOCK_RECOVERY number of recoveries
    HIGH_WATER         joiner              table         no entry at or above this index was ever used
    NEXT_INVITATION    maker               table         number of the invitation that was issued last
    HIGH_INVITATION    maker               table         no invitation at or above this index was ever used
    SENDER_GONE        leaver, reaper      nothing       pid << 1 | died, of the last sender that went
    RECEIVER_GONE      leaver, reaper      nothing       the same for receivers
    NAME_GONE          remover             LOCK_NAME     1: the names are removed, or about to be: nobody may attach
    NAME_DOOMED        creator             nothing       1: the creator has closed; the last invitation ends the names
    UNSENT             leaver, reaper,     table         processes that were started as senders and ended without
                       issuer                            sending: how many, and pid << 1 | died of the last UNSENT_KEPT
                                                         of them, in turn, in the words behind it; pid 0: unknown
    LISTENED           listener            nothing       1: somebody has FIFOs: wakers look for listeners (listeners.py)
    REAPED             reaper              table         participants found dead so far
    DEATHS             reaper              table         the last DEATHS_KEPT deaths, DEATH_WORDS words each, in turn

    D_PID, D_FOUND     its pid, and the monotonic ns at which it was found
    D_SLOTS, D_ROLES   slots that it was using; its senders << 32 | its receivers (open handles)

An entry
--------
Its process writes it, unless the table says otherwise. Words of one process, so no mutex guards them.

    word               writer              meaning
    P_STATUS           process, reaper     UNUSED or IN_USE; a reaper writes UNUSED for the dead, under the table
    P_INCARNATION      process             grows with each use of the entry
    P_PID              process             its pid
    P_SINCE            process             monotonic ns at which it joined
    P_SENDERS          process             open handles that send
    P_RECEIVERS        process             open handles that receive
    P_UNDECIDED        process             open handles that have done neither yet, and may still send
    P_MAY_RECEIVE      process             the creator's open handle that has not received yet, which may
    P_STARTED          process             1: it was started with a handle that may send, and has not sent yet
    P_SENDER_HOLD      process, recoverer  generation in which it was granted the senders' mutex, or 0; a recoverer
                                           clears the words of the dead
    P_RECEIVER_HOLD    process, recoverer  the same for the receivers' mutex
    P_CALLED           process             monotonic seconds, as a double: when its latest call began
    P_AWAITS           process             AWAITING | senders << 32 | receivers: the fewest peers that a thread of it
                                           waits for; 0: none waits for peers (changes.py)
    P_WAITING_*        process             its threads that wait: MESSAGE, SPACE, EVENT, PIECE, ROOM
    P_WAITS            process             how often a call of it had to block
    P_STUCK            process             slots held by threads of it that wait without a time limit (deadlock.py)
    P_TASKS            process             messages of a JoinableQueue that it has taken and not done (tasks.py)
    P_FIFOS            process             its listeners that have FIFOs, one bit each (listeners.py)
    P_LISTENS_*        process             bits of its listeners to be woken for: MESSAGE, SPACE, PIECE, ROOM
    P_WATCHED          process             bits of its listeners that users watch by `fileno()`, waiting or not

An invitation
-------------
Its maker writes it under the table lock. Whoever redeems it clears I_NUMBER: the holder of its byte without a lock, as
it is nobody else's then; the others under the table lock.

    I_NUMBER           its number; 0: unused
    I_MAKER            owner value of the process that issued it
    I_KIND             UNDECIDED, SENDER or RECEIVER, and bits:
                       TETHERED    it counts while its byte, LOCK_INVITATIONS + its index, is locked; without it, while
                                   its maker has open handles
                       FORKED      for a forked child, which needs no name
                       STARTED     for a process that was started with the handle: it counts as having been there
                       SHARED      it stands for several handles, and is not redeemed
    I_SINCE            monotonic ns at which it was issued
    I_PID, I_BEGAN     the process that it is for, once it is known, and when that began, in the kernel's clock ticks
    I_NAMESPACE        inode of the pid namespace in which that pid holds; 0: unknown
    I_PLACE            the place in the program where it was issued: PLACE_NBYTES bytes of UTF-8, the end of it

A record
--------
The slot's word says who may write the rest; all of it is written before READY.

    word               writer              meaning
    R_STATE            see below           the slot's word
    R_SEQUENCE         sender              the message's sequence; of a Latest its version
    R_META             sender              length of payload << 16 | length of description << 8 | kind of payload
    R_SENDER           sender              pid << 37 | entry << 24 | low bits of the incarnation
    R_SINCE            owner               monotonic ns at which a WRITING slot was claimed, or a KEPT one was borrowed
    R_PIECE            sender              of each slot of a large message: which piece is in it (large.py)
    R_WRITTEN          sender              of the head of a large message: pieces that the sender has written
    R_READ             receiver            of the head: pieces that the receiver has read; one more in a borrow's
                                           block, which has them all
    R_FEEDER           sender, others      of the head: owner value of the sender that still writes pieces;
                                           ALL_THERE; GIVEN_UP, by the process that drops it, or LEFT to
                                           the block that has all of it, under the receivers' mutex
    R_DESCRIPTION      sender              the bytes from here on say what a bare array's bytes mean

The slot's word
    bits 0-2           state: FREE, READY, WRITING, READING, KEPT, PIECE
    bits 3-10          deliveries that failed so far (their receivers died)
    bits 11-23         owner: index of a participant's entry   } zero unless WRITING, READING or KEPT
    bits 24-55         owner: incarnation of that entry        }
    bits 11-63         of a PIECE: the slot at the head of the message that it belongs to

so FREE is 0, and to take a READY slot is to add `owner + TAKE` to its word.

How to change it
----------------
MAGIC, VERSION, NONCE and the LOCK_* bytes stay where they are in every version: by them each version tells the dead of
another from the living (files.py). If any other offset, size or meaning changes, raise LAYOUT_VERSION. README.md beside
these folders, "How to change the layout", says what must change together. Words that are written often share a cache
line, eight words, only with words of the same guard; free are 30 and 31 in that of the senders' mutex, and 88 to 127.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

PAGE_SIZE = mmap.PAGESIZE
CACHE_LINE = 64
WORD_SIZE = 8

MAGIC_VALUE = int.from_bytes(b"ringshm\n", "little")
LAYOUT_VERSION = 8
HEADER_NBYTES = PAGE_SIZE

# --- header: constant once the segment has its name
MAGIC, VERSION, CAPACITY, SLOT_SIZE, MAX_PARTICIPANTS, OPTIONS, TOTAL_SIZE, CREATOR, NONCE = range(9)
CODEC_NAME, SPEC_NBYTES = 10, 76
# changed in recovery only
GEN = 16
# guarded by the senders' mutex
TAIL, SENT_NBYTES, SHUTDOWN, NEWEST, TASKS_DONE, TASKS_LOST = range(24, 30)
# guarded by the receivers' mutex
HEAD, TAKEN_NBYTES, DROPPED, REDELIVERED = range(32, 36)
COUNTING, COUNTING_WORD, COUNTING_SEQUENCE, COUNTING_TOTAL = range(36, 40)
WITHDRAWN, UNREAD = 78, 127
# hints of waiters to wakers
MESSAGE_HINT, SPACE_HINT, ROOM_HINT, PIECE_HINT = 40, 48, 49, 50
# rarely written
ATTENTION = 56
EVER_SENDER, EVER_RECEIVER, LAST_CHECK, RECOVERIES, HIGH_WATER, NEXT_INVITATION = range(64, 70)
SENDER_GONE, RECEIVER_GONE, NAME_GONE, REAPED, NAME_DOOMED, HIGH_INVITATION = range(70, 76)
LISTENED, UNSENT, DEATHS = 77, 79, 128
UNSENT_KEPT = 8

ANYBODY, PERHAPS = 1, 2
#: Largest value of a word.
MAX_WORD = (1 << 64) - 1
#: Largest even GEN; after it comes 2, not 0, which would say of a holder that it holds nothing.
MAX_GEN = MAX_WORD - 1

DEATHS_KEPT = 8
DEATH_WORDS = 4
D_PID, D_FOUND, D_SLOTS, D_ROLES = range(DEATH_WORDS)

# --- a participant's entry
ENTRY_WORDS = 32
P_STATUS, P_INCARNATION, P_PID, P_SINCE, P_SENDERS, P_RECEIVERS, P_UNDECIDED = range(7)
P_MAY_RECEIVE, P_SENDER_HOLD, P_RECEIVER_HOLD, P_CALLED, P_STARTED, P_AWAITS = 7, 8, 9, 10, 11, 12
P_WAITING_MESSAGE, P_WAITING_SPACE, P_WAITING_EVENT = 16, 17, 18
P_WAITS, P_STUCK = 19, 20
P_WAITING_PIECE, P_WAITING_ROOM = 21, 22
P_TASKS, P_FIFOS = 23, 24
P_LISTENS_MESSAGE, P_LISTENS_SPACE, P_LISTENS_PIECE, P_LISTENS_ROOM, P_WATCHED = range(25, 30)
WAITING_WORDS = P_WAITING_MESSAGE, P_WAITING_SPACE, P_WAITING_EVENT, P_WAITING_PIECE, P_WAITING_ROOM
LISTENER_WORDS = P_LISTENS_MESSAGE, P_LISTENS_SPACE, P_LISTENS_PIECE, P_LISTENS_ROOM, P_WATCHED
MAX_LISTENERS = 64

UNUSED, IN_USE = 0, 1
AWAITING, MOST_PEERS = 1 << 63, (1 << 31) - 1

# --- an invitation
INVITATION_WORDS = 16
I_NUMBER, I_MAKER, I_KIND, I_SINCE, I_PID, I_BEGAN, I_NAMESPACE, I_PLACE = range(8)
PLACE_NBYTES = (INVITATION_WORDS - I_PLACE) * WORD_SIZE

UNDECIDED, SENDER, RECEIVER = 0, 1, 2
ROLES = ("undecided", "sender", "receiver", "undecided")
ROLE_MASK, TETHERED, FORKED, STARTED, SHARED = 3, 4, 8, 16, 32

# --- a slot's record
RECORD_WORDS = 32
R_STATE, R_SEQUENCE, R_META, R_SENDER, R_SINCE, R_PIECE, R_WRITTEN, R_READ, R_FEEDER, R_DESCRIPTION = range(10)
DESCRIPTION_NBYTES = (RECORD_WORDS - R_DESCRIPTION) * WORD_SIZE

FREE, READY, WRITING, READING, KEPT, PIECE = range(6)
STATE_MASK = 7
STATES = ("free", "ready", "writing", "reading", "kept", "piece")

ALL_THERE, GIVEN_UP, LEFT = range(3)
#: R_PIECE, R_WRITTEN and R_READ are an attempt and a number of pieces.
ATTEMPT = 1 << 40
PIECES_MASK = ATTEMPT - 1

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
LOCK_TABLE, LOCK_RECOVERY, LOCK_NAME, LOCK_ENTRIES, LOCK_INVITATIONS = 0, 1, 2, 64, 1 << 14

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


def is_owned(words: memoryview, entry: int, owner: int) -> bool:
    """Whether the entry at that word is in use, by that very participant."""
    return bool(words[entry + P_STATUS] == IN_USE and words[entry + P_INCARNATION] == owner >> INCARNATION_SHIFT)


def sender_value(pid: int, entry: int, incarnation: int) -> int:
    """What a record says of its sender: enough for its pid, and to tell this sender from all others."""
    return pid << 37 | entry << 24 | incarnation & 0xFFFFFF


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


@dataclass
class Layout:
    """Offsets for a channel of `capacity` slots of `slot_size` bytes; words count from the segment's start.

    Attributes:
        entries, invitations, ring, records: the words at which these parts start; there are as many invitations as
            participants, and the records start on a cache line of their own.
        pins, spec, slots: the bytes at which these parts start.
        spare_entry: index of the entry beyond `max_participants`, from which a newcomer reaps the dead of a full table.
        ring_mask: size of the ready ring, a power of two, less one.
        words_end: number of words before the slots.
        slot_stride: bytes from one slot to the next.
        total_size: bytes of the segment.
    """

    capacity: int
    slot_size: int
    max_participants: int
    spec_nbytes: int = 0
    pin_cells: int = 0

    def __post_init__(self) -> None:
        self.spare_entry = self.max_participants
        self.entries = HEADER_NBYTES // WORD_SIZE
        self.invitations = self.entry(self.max_participants + 1)
        self.ring = self.invitation(self.max_participants)
        self.ring_mask = (1 << (self.capacity - 1).bit_length()) - 1
        self.records = round_up(self.ring + self.ring_mask + 1, RECORD_WORDS)
        self.pins = self.record(self.capacity) * WORD_SIZE
        self.spec = self.pins + (self.max_participants + 1) * self.pin_cells
        self.words_end = round_up(self.spec + self.spec_nbytes, PAGE_SIZE) // WORD_SIZE
        self.slots = self.words_end * WORD_SIZE
        self.slot_stride = round_up(self.slot_size, PAGE_SIZE if self.slot_size >= PAGE_SIZE else CACHE_LINE)
        self.total_size = self.slot(self.capacity)

    def entry(self, index: int) -> int:
        """Word at which a participant's entry starts."""
        return self.entries + index * ENTRY_WORDS

    def invitation(self, index: int) -> int:
        """Word at which an invitation starts."""
        return self.invitations + index * INVITATION_WORDS

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
    named: bool = False

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
            | self.named << 49
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
                bool(word >> 49 & 1),
            )
        except IndexError:
            options = None
        if options is None or options.pack() != word or not options.max_deliveries:
            raise ValueError(f"options {word:#x} mean nothing")
        return options

# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, auto_pickle=False, binding=True
# cython: freethreading_compatible=True
"""The compiled path: what succeeds at once, over pointers. Everything else is Python's.

The Python code is the reference: it has the whole protocol and runs everywhere (PEP 399 has this rule for CPython's own
accelerators). The compiled path holds the same steps for a message that goes through without any hindrance, and hands
over to the Python code whenever something is not as it mostly is. Both speak the same segment: a process that has it
and one that does not share a channel.

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

    wait      look at TAIL and HEAD, for space also at slots' words, while that pays; add 1 to the own P_WAITING_* and
              P_WAITS; set the hint; fence (SYNC POINT w); look again; sleep; take 1 from P_WAITING_*; wake the next, as above

Its parts, each of which knows only those before it:

    compiled_words      the words of the segment; what C and the system do with them
    compiled_ring       the mutexes, send, take, wake, sleep, over pointers: it knows no messages but by their bytes
    compiled_messages   objects to bytes and back: it knows no slots, but where bytes lie
    compiled_calls      put, get and their like, and how they wait
    compiled_blocks     loans and borrows; and
    compiled_latest     the values of a Latest: each begins with what it touches

What is handed over, and when. Nothing is held then, and nothing has changed, but that a message may be taken:

    to Python             when
    the whole call        the mutex is not to be had at once; a recovery is under way; the call must not wait; ATTENTION
                          is set; a word is what no channel holds; the handle has not its role, or is closed; an earlier
                          call was interrupted when it had received
    an encoded message    it is larger than a slot, or in parts that are not contiguous; an array in it was changed; the
                          mutex is not to be had when it is to be published
    a message to decode   its kind or its size is none of those here, or decoding it has failed
    wakers                there are listeners
    a look for the dead   somebody has died, or this process counts as dead; of a Latest; and one in four
    a wait                if somebody has died, and for one look in four, which is Python's first; no other process could
                          end it, or it is over: EndOfChannel and its like; this process holds slots (deadlock.py);
                          `put` drops what is oldest; ten seconds are over (doubts.py)

1. No signal handler runs between `enter` and `leave`: no Python object is made, let go or called there. So all that
   interrupts made necessary stays on the Python side. Under the GIL no other thread of this process runs there either:
   if one is inside, the semaphore has no token, and the call is Python's. Without the GIL `enter` takes the local lock,
   which Python's threads take, too (LocalLock); if it is not to be had within microseconds, the call is Python's.
2. Stores to the segment are releases, and loads acquires: the compiler and the processor keep their order. The pure
   Python code of other processes has none but the mutex's, so that off x86-64 both ends have one mutex here, too, and a
   Latest is not read without it. A release needs no mutex: its store comes after all that was read of the slot.
3. Each index and length that is read from the segment is compared with the layout before it is used.
4. CPython runs signal handlers when a C function has returned, and with an exception its result is lost. So what was
   received is in a list of the caller's, a Python function, from the moment at which the slot is released.
5. Encoding and decoding may run any code: of other threads, of handlers, of users. Before and after them the state is
   one that the Python side knows: no slot is claimed yet, or one is READING and the mutex has been left.
6. Without the GIL other threads run between any two instructions. What they may change is read under a guard: what a
   handle leads to until it is closed (`open_ring`), the counts of waiters and of pins, the codec's idle pickler and last
   form; or by CPython's functions that lock (`ITEM`, dicts). What a message is written from is the call's own. The rest
   are hints, of which any value does: `tail_seen`, `head_seen`, `witness`, `_look_at`. A guard is not held where CPython
   stops a thread, and so not where the process forks. A block's object is for the thread that has it.
7. A call that waits holds nothing. Handlers run as soon as a signal comes, and what they raise ends the wait. Threads of
   this process may wait here and in the Python code at once: each adds to the same word (`set_waiting`).
"""

include "compiled_words.pxi"
include "compiled_ring.pxi"
include "compiled_messages.pxi"
include "compiled_calls.pxi"
include "compiled_blocks.pxi"
include "compiled_latest.pxi"

"""Rebuild: what the mutexes guard is made anew from the slots' records, after a process has died inside a mutex.

A recoverer of the mutexes calls it (`mutex.Fence`), while no live participant holds one. The slots' words are the
truth; all else follows from them:

    word                      rebuilt from
    ready ring, HEAD, TAIL    the READY slots, by sequence; TAIL never goes back
    SENT_NBYTES, TAKEN_NBYTES each only ever lags behind a slot's word by one message: the one that lags is raised
    DROPPED, REDELIVERED,     COUNTING*: whether `Returns._store_and_count` stored a slot's word and did not come to
    WITHDRAWN                 the counter
"""

from __future__ import annotations

from ..segment import layout
from ..segment.layout import KEPT, MAX_WORD, READING, READY, STATE_MASK, Layout
from .damage import corrupted


def rebuild(name: str, words: memoryview, shape: Layout) -> None:
    """Make the ready ring, HEAD, TAIL and the counters anew.

    Raises:
        ChannelCorrupted: if no position is left for a message.
    """
    records = [shape.record(slot) for slot in range(shape.capacity)]
    states = [words[record + layout.R_STATE] & STATE_MASK for record in records]
    sequences = [words[record + layout.R_SEQUENCE] for record in records]
    sent = [n for n, state in zip(sequences, states, strict=True) if state in (READY, READING, KEPT)]
    ready = sorted((sequences[slot], slot) for slot, state in enumerate(states) if state == READY)
    tail = max([words[layout.TAIL], len(ready), *(sequence + 1 for sequence in sent)])
    head = tail - len(ready)
    if tail >= MAX_WORD:
        raise corrupted(name)
    for position, (_, slot) in enumerate(ready, head):
        words[shape.ring + (position & shape.ring_mask)] = slot
    words[layout.HEAD] = head
    words[layout.TAIL] = tail
    _raise_nbytes(words, sum(words[records[slot] + layout.R_META] >> 16 for _, slot in ready))
    _finish_count(words, records)


def _raise_nbytes(words: memoryview, waiting: int) -> None:
    """Let the two counters of bytes differ by what waits."""
    if (words[layout.SENT_NBYTES] | words[layout.TAKEN_NBYTES]) >> 63:  # damage: no message could be counted any more
        words[layout.SENT_NBYTES] = words[layout.TAKEN_NBYTES] = 0
    lag = words[layout.SENT_NBYTES] - words[layout.TAKEN_NBYTES] - waiting
    word = layout.TAKEN_NBYTES if lag > 0 else layout.SENT_NBYTES
    words[word] = words[word] + abs(lag) & MAX_WORD


def _finish_count(words: memoryview, records: list[int]) -> None:
    """Count the change of a slot's word whose process died before it had counted."""
    record, counter = words[layout.COUNTING] >> 8, words[layout.COUNTING] & 0xFF
    if record in records and counter in (layout.DROPPED, layout.REDELIVERED, layout.WITHDRAWN):
        before = words[layout.COUNTING_WORD], words[layout.COUNTING_SEQUENCE]
        if (words[record], words[record + layout.R_SEQUENCE]) != before:
            words[counter] = words[layout.COUNTING_TOTAL] & MAX_WORD
    words[layout.COUNTING] = 0

"""Slots, mutexes, participants, waiters, large messages, versions. Knows bytes, not objects.

    file           what it does
    mutex          the fenced mutex, and `critical`, the one way into it
    observe        the slots: what only looks, without a mutex
    returns        slots and messages go back: release, discard, requeue, drop, withdraw
    take           a receiver takes the oldest messages
    slots          the ring: theory of operation; send and receive, alone or in batches
    compiled       the hot path of slots and of codecs, compiled; acceleration says whether it is in use
    large          messages larger than a slot
    versions       the versions of a Latest
    outcomes       how a call ended that neither raised nor gave a message
    damage         words that no channel holds raise ChannelCorrupted
    rebuild        what the mutexes guard is made anew after a death
    participants   the processes attached, their roles, and which of them live
    reaper         what survivors do for the dead
    waiters, spin  how a call waits, and how it is woken
    listeners      how an event loop or a selector is woken
    deadlock       waits that could never end
    stats          what `stats()` returns

Start with slots.py and mutex.py.
"""

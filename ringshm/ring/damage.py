"""Damage: words that a channel cannot hold, since a foreign process has written them. It raises, and never hangs.

What succeeds checks nothing for it: an index that leads nowhere, or a sum that is no word any more, fails by itself.
"""

from __future__ import annotations

from ..errors import ChannelCorrupted, RingshmError, is_own


def corrupted(name: str) -> ChannelCorrupted:
    """The error for words that a channel cannot hold."""
    return ChannelCorrupted(
        f"channel {name!r}: the segment's ready ring, slot records or counters do not hold what they must: make a new "
        "channel"
    )


def refuse_damage(name: str, error: BaseException) -> None:
    """Raise ChannelCorrupted if a call on the ring has failed on what the segment holds.

    An IndexError or ValueError that a user's codec or a signal handler raises is left alone.
    """
    if isinstance(error, (IndexError, ValueError)) and not isinstance(error, RingshmError) and is_own(error):
        raise corrupted(name) from error

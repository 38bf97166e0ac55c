"""Damage: words that a channel cannot hold, since a foreign process has written them. It raises, and never hangs.

What succeeds checks nothing for it: an index that leads nowhere, or a sum that is no word any more, fails by itself.
"""

from __future__ import annotations

import traceback

from ..errors import ChannelCorrupted, RingshmError


def corrupted(name: str) -> ChannelCorrupted:
    """The error for words that a channel cannot hold."""
    return ChannelCorrupted(
        f"channel {name!r}: the segment's ready ring, slot records or counters do not hold what they must: make a new "
        "channel"
    )


def refuse_damage(name: str, error: BaseException) -> None:
    """Raise ChannelCorrupted if a call on the ring has failed on what the segment holds.

    An IndexError or ValueError that a user's codec or a signal handler raises is left alone: it has passed through
    frames that are not ringshm's.
    """
    if isinstance(error, (IndexError, ValueError)) and not isinstance(error, RingshmError):
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        if all(str(frame.f_globals.get("__name__")).startswith("ringshm.") for frame in frames):
            raise corrupted(name) from error

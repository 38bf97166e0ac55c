"""What a host may lack of POSIX, and ringshm can do without: all of it is switched off here, and nowhere else.

macOS has no timed wait for a semaphore, does not tell a semaphore's value, allows 30 characters for a name in shared
memory, and no record locks on a segment. Each constant says whether this host has the thing; beside it stands who
replaces it, and how. Linux has all four. There they can be switched off by the environment variable RINGSHM_WITHOUT, a
list of the names below or "all", and the tests pass so; that is how the replacements are tested. Processes that differ
in them may share a channel, unless its name is a long one.
"""

from __future__ import annotations

import os
import sys

WITHOUT = "RINGSHM_WITHOUT"
_NAMES = ("timed-waits", "semaphore-values", "long-names", "record-locks")


def _lacking(asked: str, platform: str) -> set[str]:
    lacking = set(asked.replace(",", " ").split())
    if "all" in lacking or platform == "darwin":
        return set(_NAMES)
    if unknown := lacking - set(_NAMES):
        raise ImportError(
            f"the environment variable {WITHOUT}={asked!r} names {min(unknown)!r}: give some of {', '.join(_NAMES)}, "
            "or 'all'"
        )
    return lacking


_LACKS = _lacking(os.environ.get(WITHOUT, ""), sys.platform)

#: Whether a semaphore can be waited for with a limit. Else semaphores.py tries it again and again, ever less often.
TIMED_WAITS = "timed-waits" not in _LACKS
#: Whether a semaphore tells how many tokens it has. Else semaphores.py takes them out to count them.
SEMAPHORE_VALUES = "semaphore-values" not in _LACKS
#: Whether a name in shared memory may be as long as a file's. Else segment.py has a digest in place of a long one.
LONG_NAMES = "long-names" not in _LACKS
#: Whether a segment can carry record locks. Else segment.py has a file beside each that does.
RECORD_LOCKS = "record-locks" not in _LACKS

"""Locality: who shares a /dev/shm, whatever Ray calls their nodes.

A process has a *place*: the boot id of its kernel and the device of its /dev/shm. Two processes of one place reach each
other through a ring; all others go through Ray. So two raylets on one host share rings, and two pods on one host, each
with a /dev/shm of its own, do not. Whether a ring can be opened is found out by opening it, with its nonce.
"""

from __future__ import annotations

from ..segment.origin import Origin, here

__all__ = ["Place", "here", "label"]

#: What tells places apart: an `Origin`, as of a segment.
Place = Origin


def label(place: Place) -> str:
    """A place in few characters, for names of actors: "3f2a9c01.27"."""
    boot, device = place
    return f"{boot[:8]}.{device}"

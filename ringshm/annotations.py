"""What annotations are made of: the type variables of the public classes.

A message type that nothing tells, as in `Channel(64, "4KiB")`, is Any: so the variables have a default, which Python
has from 3.13 on and type checkers always. Nothing here does anything at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Buffer as Buffer
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Any)
    T_co = TypeVar("T_co", covariant=True, default=Any)
    T_contra = TypeVar("T_contra", contravariant=True, default=Any)
    #: What a spec's messages are; a TypedDict, to have their fields known.
    M = TypeVar("M", default=dict[str, Any])
else:
    from typing import TypeVar

    Buffer = Any
    T = TypeVar("T")
    T_co = TypeVar("T_co", covariant=True)
    T_contra = TypeVar("T_contra", contravariant=True)
    M = TypeVar("M")

#: Of one call alone.
V = TypeVar("V")

Oversize: TypeAlias = Literal["stream", "error"]
WaitStrategy: TypeAlias = Literal["adaptive", "block", "spin"]
WhenFull: TypeAlias = Literal["wait", "drop_oldest"]


class ChannelOptions(TypedDict, total=False):
    """What every channel takes beside its size and what says the type of its messages; see Channel."""

    name: str | None
    oversize: Oversize
    wait: WaitStrategy
    when_full: WhenFull
    keep_open: bool
    max_deliveries: int
    prefault: bool
    max_participants: int
    reuse_memory: bool

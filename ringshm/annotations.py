"""Type variables and aliases for the annotations of public classes. They do nothing at run time.

The type variables have a default: the messages of `Channel(64, "4KiB")`, whose type is nowhere told, are Any. Type
checkers know defaults in every version, Python itself from 3.13 on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Buffer as Buffer
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Any)
    T_co = TypeVar("T_co", covariant=True, default=Any)
    T_contra = TypeVar("T_contra", contravariant=True, default=Any)
    #: The messages of a spec: a TypedDict, if their fields are to be known.
    M = TypeVar("M", default=dict[str, Any])
else:
    from typing import TypeVar

    Buffer = Any
    T = TypeVar("T")
    T_co = TypeVar("T_co", covariant=True)
    T_contra = TypeVar("T_contra", contravariant=True)
    M = TypeVar("M")

#: The result of one call.
V = TypeVar("V")

Oversize: TypeAlias = Literal["stream", "error"]
WaitStrategy: TypeAlias = Literal["adaptive", "block", "spin"]
WhenFull: TypeAlias = Literal["wait", "drop_oldest"]


class ChannelOptions(TypedDict, total=False):
    """The options of every channel beside its size and the type of its messages; see Channel."""

    name: str | None
    oversize: Oversize
    wait: WaitStrategy
    when_full: WhenFull
    keep_open: bool
    max_deliveries: int
    prefault: bool
    max_participants: int
    reuse_memory: bool

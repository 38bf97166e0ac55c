"""Objects that this process finds again, and does not keep alive."""

from __future__ import annotations

from typing import Generic, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


class Living(Generic[T]):
    """Objects, for as long as others keep them. They need not be hashable.

    Other threads, finalisers and signal handlers may add to it and take from it at any moment: so nobody iterates over
    it. `all` copies the references in one step, as a WeakSet's own iterator does not.
    """

    def __init__(self) -> None:
        self._references: WeakValueDictionary[int, T] = WeakValueDictionary()  # by `id`

    def add(self, one: T) -> None:
        """Find that object from now on."""
        self._references[id(one)] = one

    def discard(self, one: T) -> None:
        """Find it no more."""
        self._references.pop(id(one), None)

    def all(self) -> list[T]:
        """Those that are alive."""
        return [one for reference in self._references.valuerefs() if (one := reference()) is not None]

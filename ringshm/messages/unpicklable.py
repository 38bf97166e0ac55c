"""Which part of a message cannot be pickled, for errors.

Pickle says what is wrong, and seldom where. So the message is pickled once more, by a pickler that notes each object to
which it comes, and the last of these that a walk through the message finds is the part.
"""

from __future__ import annotations

import pickle
import reprlib
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

#: Errors that are made anew, with a text that says more; to others that is added as a note.
_REMADE = {AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError, pickle.PicklingError}
#: Objects that are noted, the last ones, and objects that are walked through.
_NOTED, _WALKED = 1000, 100_000
#: Characters of a place in the message, in errors.
_PATH_LENGTH = 120
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.FunctionType, types.ModuleType)


class NotingPickler(pickle.Pickler):
    """A pickler that notes to which objects it came."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.noted: deque[Any] = deque(maxlen=_NOTED)

    def persistent_id(self, obj: Any) -> str | None:
        """Called before each object is pickled; None has it pickled as it is. A handle would count as on its way."""
        self.noted.append(obj)
        return "ringshm" if type(obj).__module__.partition(".")[0] == "ringshm" else None


def explain(error: Exception, message: Any, name: str, dump: Callable[[Any], None], noted: deque[Any]) -> Exception:
    """The error to raise for a message that could not be pickled: it names the channel and the part.

    Args:
        error: what pickling it raised.
        name: the channel's.
        dump: pickles the message once more.
        noted: to which objects that came; the pickler's.
    """
    try:
        dump(message)
    except Exception:
        part = _part(message, noted)
    else:
        return error  # a signal handler's, not the message's
    said = str(error) or repr(error)
    text = f"channel {name!r}: {part} cannot be pickled: {said}; nothing was sent: send something else in its place"
    if type(error) in _REMADE:
        return type(error)(text)
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(text)
    return error


def _part(message: Any, noted: deque[Any]) -> str:
    """The last of the noted objects that is in the message."""
    ranks = {id(obj): rank for rank, obj in enumerate(noted)}
    best, found, path = -1, message, ""
    for obj, at in _walk(message, noted[-1] if noted else None):
        rank = ranks.get(id(obj), -1)
        if rank > best:
            best, found, path = rank, obj, at
    kind = type(found)
    if len(path) > _PATH_LENGTH:
        path = f"{path[: _PATH_LENGTH // 2]}…{path[-_PATH_LENGTH // 2 :]}"
    return f"message{path} ({kind.__module__}.{kind.__qualname__})"


def _walk(message: Any, last: Any) -> Iterator[tuple[Any, str]]:
    """Each object in the message, with its place in it; of atoms, which may be in many places, `last` alone."""
    waiting, seen = deque([(message, "")]), {id(message)}
    while waiting and len(seen) < _WALKED:
        obj, path = waiting.popleft()
        yield obj, path
        for child, place in _children(obj):
            if id(child) not in seen and (child is last or not isinstance(child, _ATOMS)):
                seen.add(id(child))
                waiting.append((child, path + place))


def _children(obj: Any) -> Iterator[tuple[Any, str]]:
    if isinstance(obj, dict):
        for key, value in obj.items():
            yield key, f" key {reprlib.repr(key)}"
            yield value, f"[{reprlib.repr(key)}]"
    elif isinstance(obj, (list, tuple)):
        for index, item in enumerate(obj):
            yield item, f"[{index}]"
    elif isinstance(obj, (set, frozenset)):
        for item in obj:
            yield item, f" item {reprlib.repr(item)}"
    if not isinstance(obj, _ATOMS):
        yield from ((value, f".{name}") for name, value in _attributes(obj))


def _attributes(obj: Any) -> Iterator[tuple[str, Any]]:
    try:
        yield from object.__getattribute__(obj, "__dict__").items()
    except AttributeError:
        pass
    for kind in type(obj).__mro__:
        for name, slot in vars(kind).items():
            if isinstance(slot, types.MemberDescriptorType) and _is_set(slot, obj):
                yield name, slot.__get__(obj)


def _is_set(slot: types.MemberDescriptorType, obj: Any) -> bool:
    try:
        slot.__get__(obj)
    except AttributeError:
        return False
    return True

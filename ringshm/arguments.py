"""Checks of arguments that several calls share: sizes, whole numbers, choices, time limits."""

from __future__ import annotations

import math
import operator
import re

from .system import monotonic

_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", 1):
    _UNITS |= {_prefix: 1000**_power, f"{_prefix}b": 1000**_power, f"{_prefix}ib": 1024**_power}


def parse_size(size: int | str, argument: str) -> int:
    """A size in bytes from an int, or from a string such as "64KiB" or "1.5GB".

    Raises:
        TypeError: if it is neither.
        ValueError: if it is no positive whole number of bytes, or its unit is unknown.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", size)
        if match is None:
            raise ValueError(f'{argument}={size!r} is no size: give bytes as an int, or a string such as "64KiB"')
        unit = _UNITS.get(match[2].lower())
        if unit is None:
            raise ValueError(f"{argument}={size!r} has an unknown unit {match[2]!r}: use B, kB, MB, GB, KiB, MiB, GiB")
        whole, _, fraction = match[1].partition(".")
        nbytes, rest = divmod(int((whole or "0") + fraction) * unit, 10 ** len(fraction))
        if rest:
            raise ValueError(f"{argument}={size!r} is not a whole number of bytes")
        return whole_number(nbytes, argument)
    return whole_number(size, argument)


def whole_number(value: int, argument: str, at_most: int | None = None, limit: str = "") -> int:
    """`value` as an int from 1 to `at_most`; `limit` says in errors what that is, as in ", the capacity".

    Raises:
        TypeError: if it is no integer, or a bool.
        ValueError: if it is below 1 or above `at_most`.
    """
    if isinstance(value, bool):
        raise TypeError(f"{argument}={value!r} must be an int, not a bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}={value!r} must be an int, not {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{argument}={number} must be at least 1")
    if at_most is not None and number > at_most:
        raise ValueError(f"{argument}={number} must be at most {at_most}{limit}")
    return number


def check_timeout(timeout: float) -> float:
    """The timeout in seconds; ValueError if it is negative or NaN, TypeError if it is no number."""
    try:
        sound = timeout >= 0
    except TypeError:
        raise TypeError(f"timeout={timeout!r} must be seconds or None, not {type(timeout).__name__}") from None
    if not sound:
        raise ValueError(f"timeout={timeout!r} must not be negative or NaN")
    return timeout


def deadline_of(block: bool, timeout: float | None) -> float:
    """The time, on the monotonic clock, at which a call must answer: 0 for at once, infinity for never."""
    if not block:
        return 0.0
    if timeout is None:
        return math.inf
    return monotonic() + timeout if check_timeout(timeout) else 0.0


def choice(argument: str, value: str, choices: tuple[str, ...]) -> str:
    """`value`, if it is one of the choices; ValueError otherwise."""
    if value not in choices:
        raise ValueError(f"{argument}={value!r} must be one of {', '.join(map(repr, choices))}")
    return value

"""Numbers, names and rows as text: what all commands write alike."""

from __future__ import annotations

from collections.abc import Sequence

_AGES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def in_bytes(number: float) -> str:
    """A number of bytes, such as 1.5 GiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f} B"


def in_short(number: float) -> str:
    """A number in at most five characters, such as 12.3k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            value = number / size
            return f"{value:.{2 if value < 9.995 else int(value < 99.95)}f}{unit}"
    return f"{number:.3g}"


def age(seconds: float | None) -> str:
    """A time in its largest unit, such as 2.5 min; nothing for None."""
    if seconds is None:
        return ""
    unit, size = next((unit, size) for unit, size in _AGES if seconds >= size or size == 1)
    return f"{seconds / size:.1f} {unit}"


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: names of channels and processes may hold anything."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Rows of cells as lines, in columns; the columns of those numbers are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

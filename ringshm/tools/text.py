"""Numbers, names, sentences and tables as text: what all commands write alike, as wide as the terminal.

Nothing is cut: a text that is too long goes on in the next line. Names and other words stay whole, however long, so
that they can be copied; the terminal breaks them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_AGES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
_SPACE = re.compile(" (?=(?:[^`]*`[^`]*`)*[^`]*$)")  # an even number of backquotes follows: not between two
_GAP = "  "  # between columns, and before what belongs to the line above


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


def cells(text: str) -> int:
    """How many of a terminal's cells a printable text takes."""
    if text.isascii():
        return len(text)
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text if not _is_mark(char))


def _is_mark(char: str) -> bool:
    """Whether it is shown in the cell of the character before."""
    return unicodedata.category(char) in ("Mn", "Me")


def folded(text: str, width: int | None, first: str = "", rest: str = "") -> list[str]:
    """A text as lines of at most so many cells, broken between words; a longer word has a longer line of its own.

    A command in backquotes is one word.

    Args:
        text: it is printable.
        width: None for one line, however long.
        first, rest: what the first line, and each further one, begins with.
    """
    words = _SPACE.split(text)
    lines = [first + words[0]]
    for word in words[1:]:
        if width is None or cells(lines[-1]) + 1 + cells(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(rest + word)
    return lines


def broken(line: str, width: int) -> list[str]:
    """A line as lines of at most so many cells, broken anywhere: as a terminal does it."""
    lines = [""]
    for char in line:
        if cells(lines[-1]) + cells(char) > width:
            lines.append("")
        lines[-1] += char
    return lines


def in_columns(rows: Sequence[Sequence[str]], right: Sequence[int], width: int | None = None) -> list[list[str]]:
    """Rows of printable cells as lines, in columns: the lines of each row.

    A row begins with its name. Where a name is too long for the columns beside it, it has a line of its own. Where even
    the names' title, in the first row, is too long, all have, and the columns share as few lines as they can.

    Args:
        rows: the first one has the titles.
        right: the numbers of the columns that are aligned to the right.
        width: in cells, or None for one line for each row.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(cells, column)) for column in columns]
    padded = [
        [_padded(cell, width, at in right) for at, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    if width is None or _total(widths) <= width:
        return [[_GAP.join(row).rstrip()] for row in padded]
    room = width - _total([0, *widths[1:]])
    if room < cells(rows[0][0]):
        groups = _dealt(widths, width)
        shared = [[_GAP + _GAP.join(row[at] for at in group).rstrip() for group in groups] for row in padded]
        return [[row[0], *(line for line in lines if line.strip())] for row, lines in zip(rows, shared, strict=True)]
    most = max(size for name in columns[0] if (size := cells(name)) <= room)
    return [
        [(_padded(row[0], most, 0 in right) + rest).rstrip()]
        if cells(row[0]) <= room
        else [row[0], *([(most * " " + rest).rstrip()] if rest.strip() else [])]
        for row, rest in zip(rows, ("".join(_GAP + cell for cell in row[1:]) for row in padded), strict=True)
    ]


def _padded(text: str, width: int, right: bool) -> str:
    blank = " " * (width - cells(text))
    return blank + text if right else text + blank


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _dealt(widths: Sequence[int], width: int) -> list[list[int]]:
    """The numbers of the columns but the first, as many for each line as fit behind a gap."""
    lines: list[list[int]] = []
    for at in range(1, len(widths)):
        if lines and _total([0, *(widths[number] for number in lines[-1]), widths[at]]) <= width:
            lines[-1].append(at)
        else:
            lines.append([at])
    return lines

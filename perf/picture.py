"""Draws the ring: what lies in the segment, a moment in its life, and the states of a slot.

    python -m perf.picture [FILE.svg]

The states, their names and the sizes are those of ringshm.segment.layout, so that the picture cannot say anything else.
"""

from __future__ import annotations

import sys
from math import cos, radians, sin
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Wedge

from ringshm.segment.layout import FREE, KEPT, PAGE_SIZE, PIECE, READING, READY, STATES, WRITING, Layout

FILE = Path(__file__).parent / "plots" / "ring.svg"

_WIDTH, _HEIGHT = 880, 960  # pixels, of which matplotlib draws 96 to an inch
_INK, _SOFT, _PAPER = "#1f2328", "#59636e", "#fbfaf7"
_SENDERS, _RECEIVERS, _OWNER, _ONCE = "#cfe3fb", "#fde0c2", "#e4dcf5", "#e8e8e4"  # who writes there
_DEATH = "#b3372a"
_FILL = {FREE: "#ffffff", READY: "#cdebc9", WRITING: "#a9cdf7", READING: "#fbc48d", KEPT: "#f2a097", PIECE: "#d7e6f7"}

Point = tuple[float, float]

#: The moment that is drawn: each slot's state, its message's sequence (None: it has none yet), and whose it is.
_MOMENT = [
    (WRITING, None, "sender 1"),
    (PIECE, None, "of slot 0"),
    (READY, 44, ""),
    (READY, 43, ""),
    (FREE, None, ""),
    (READY, 42, ""),
    (READING, 41, "receiver 1"),
    (KEPT, 40, "receiver 2"),
]
_LAYOUT = Layout(capacity=len(_MOMENT), slot_size=PAGE_SIZE, max_participants=256)


class _Canvas:
    """A page in pixels, the origin at its top left."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(_WIDTH / 96, _HEIGHT / 96), facecolor=_PAPER)
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, _WIDTH), ylim=(_HEIGHT, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 8, align: str = "center", **style: Any) -> None:
        style = {"color": _INK, "va": "center", "linespacing": 1.35, **style}
        self.axes.text(x, y, text, fontsize=size, ha=align, **style)

    def box(self, x: float, y: float, width: float, height: float, fill: str, text: str = "", **style: Any) -> None:
        """A box with its top left at (x, y)."""
        shape = "round,pad=0,rounding_size=5"
        patch = FancyBboxPatch((x, y), width, height, shape, facecolor=fill, edgecolor=_INK, linewidth=0.9)
        self.axes.add_patch(patch)
        self.text(x + width / 2, y + height / 2, text, **style)

    def arrow(self, start: Point, end: Point, bend: float = 0, color: str = _INK) -> None:
        patch = FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=10,
            shrinkA=0, shrinkB=0, linewidth=1.2, color=color,
        )  # fmt: skip
        self.axes.add_patch(patch)

    def heading(self, y: float, text: str, more: str) -> None:
        self.text(20, y, text, size=11, align="left", weight="bold")
        self.text(20, y + 20, more, align="left", color=_SOFT)


def _name(state: int) -> str:
    return STATES[state].upper()


def _segment(page: _Canvas, y: float) -> None:
    """The segment from its first byte to its last."""
    page.heading(y, "One segment of shared memory", "Reserved when the channel is made; nothing is allocated later.")
    regions = [
        (66.0, _ONCE, "sizes,\noptions", ""),
        (82.0, _SENDERS, "tail, next\nsequence", "header"),
        (66.0, _RECEIVERS, "head,\ncounts", ""),
        (
            148.0,
            _OWNER,
            "participants,\ninvitations",
            "an entry for each process:\nwhat it holds and waits for;\none for a handle on its way",
        ),
        (112.0, _SENDERS, "ready ring", "slot numbers, in\nthe order of sending"),
        (
            150.0,
            _OWNER,
            "slot records",
            "the slot's word: state, owner,\nfailed deliveries; sequence,\nlength and sender",
        ),
    ]
    x, top, height = 20.0, y + 36, 46.0
    for width, fill, text, more in regions:
        page.box(x, top, width, height, fill, text)
        page.text(x + width / 2, top + height + 7, more, size=7, va="top", color=_SOFT)
        x += width
    width = (_WIDTH - 20 - x) / len(_MOMENT)
    for slot in range(len(_MOMENT)):
        page.box(x + width * slot, top, width, height, _OWNER, f"{slot}")
    note = "slots, small ones side by side: the\nmessages, copied in and out, or\nwritten and read where they are"
    page.text((x + _WIDTH - 20) / 2, top + height + 7, note, size=7, va="top", color=_SOFT)
    owner = "by its owner; a FREE slot's word by who holds the senders' mutex, a READY one's the receivers'"
    for left, below, fill, text in (
        (20, 145, _ONCE, "written once, when the channel is made"),
        (300, 145, _SENDERS, "by who holds the senders' mutex"),
        (550, 145, _RECEIVERS, "by who holds the receivers' mutex"),
        (20, 165, _OWNER, owner),
    ):
        page.box(left, y + below - 6, 12, 12, fill)
        page.text(left + 18, y + below, text, size=7.5, align="left")


def _ring(page: _Canvas, middle: Point, radius: float) -> dict[int, Point]:
    """The ready ring, its head towards the receivers; the outer point of the cell of each sequence."""
    x, y = middle
    size = _LAYOUT.ring_mask + 1
    ready = {sequence: slot for slot, (state, sequence, _) in enumerate(_MOMENT) if state == READY and sequence}
    head, tail = min(ready), max(ready) + 1
    found = {}
    for position in range(head - 3, head - 3 + size):
        angle = 45 + 45 * (position - head)  # clockwise from the right; what is ready lies at the bottom
        fill = _FILL[READY] if position in ready else _FILL[FREE]
        wedge = Wedge(
            middle, radius, angle - 22.5, angle + 22.5, width=38, facecolor=fill, edgecolor=_INK, linewidth=0.9
        )
        page.axes.add_patch(wedge)

        def at(distance: float, angle: float = angle) -> Point:
            return x + distance * cos(radians(angle)), y + distance * sin(radians(angle))

        if position in ready:
            page.text(*at(radius - 19), f"{ready[position]}", size=10, weight="bold")
            found[position] = at(radius)
    page.text(x, y - 8, "ready ring", size=9, weight="bold")
    page.text(x, y + 12, f"head {head}, tail {tail}", size=7.5, color=_SOFT)
    return found


def _moment(page: _Canvas, y: float) -> None:
    """Senders at the left, receivers at the right, the ring between them, the slots below."""
    page.heading(y, "A moment in its life", "Three messages wait. The ring holds the numbers of their slots.")
    middle, radius, top, width, step = (440.0, y + 136.0), 94.0, y + 286.0, 96.0, 106.0
    line = middle[1]
    cells = _ring(page, middle, radius)
    for slot, (state, sequence, whose) in enumerate(_MOMENT):
        x = 69 + step * slot
        page.box(x - width / 2, top, width, 66, _FILL[state])
        page.text(x, top + 13, f"slot {slot}", size=7, color=_SOFT)
        page.text(x, top + 32, _name(state), size=9.5, weight="bold")
        page.text(x, top + 51, whose or (f"message {sequence}" if sequence else ""), size=7.2)
        if state == READY and sequence:
            page.arrow(cells[sequence], (x, top - 3), color=_SOFT)
        elif state in (WRITING, READING, KEPT):
            page.box(x - width / 2, top - 68, width, 30, _FILL[state], whose, size=8.5)
    first, reads, keeps = (69 + step * slot for slot in (0, 6, 7))
    page.arrow((first, top - 38), (first, top - 3))
    page.text(first + 8, top - 20, "copies in, or writes a loan", size=7, align="left")
    page.arrow((reads, top - 3), (reads, top - 38))
    page.text(reads - 8, top - 20, "decodes, or borrows", size=7, align="right")
    page.arrow((keeps, top - 3), (keeps, top - 38))
    page.text(keeps - 8, top - 20, "still has a view", size=7, align="right")
    page.box(21, line - 22, 96, 44, _FILL[WRITING], "sender 2", size=8.5)
    page.arrow((117, line), (153, line))
    page.box(156, line - 22, 124, 44, _SENDERS, "senders' mutex", size=8.5, weight="bold")
    page.text(218, line + 28, "which FREE slot is next,\nthe tail, the next sequence", size=7, va="top", color=_SOFT)
    page.arrow((280, line), (middle[0] - radius - 3, line))
    page.text(311, line - 11, "publish", size=7.5)
    page.arrow((middle[0] + radius + 1, line), (597, line))
    page.text(566, line - 11, "take", size=7.5)
    page.box(600, line - 22, 124, 44, _RECEIVERS, "receivers' mutex", size=8.5, weight="bold")
    page.text(662, line + 28, "the head, what was\ntaken and dropped", size=7, va="top", color=_SOFT)
    page.arrow((724, line), (760, line))
    page.box(763, line - 22, 96, 44, _FILL[READING], "receiver 3", size=8.5)
    page.text(
        440,
        top + 84,
        "A release takes no mutex: the owner stores FREE. So slots come free in any order, and one that is kept "
        "holds up nobody.",
        size=8,
        color=_SOFT,
    )


def _states(page: _Canvas, y: float) -> None:
    """What may become of a slot."""
    more = "Each change is one store of one 8-byte word. From these words ring, head and tail are made anew"
    page.heading(y, "The states of a slot", f"{more} if somebody died in a mutex.")
    place = {
        FREE: (76.0, y + 186.0),
        WRITING: (330.0, y + 84.0),
        READY: (580.0, y + 84.0),
        READING: (800.0, y + 186.0),
        KEPT: (580.0, y + 270.0),
        PIECE: (76.0, y + 280.0),
    }
    for state in range(len(STATES)):
        x, at = place[state]
        page.box(x - 52, at - 20, 104, 40, _FILL[state], _name(state), size=10, weight="bold")

    def move(
        states: tuple[int, int], start: Point, end: Point, text: str, at: Point, bend: float = 0, align: str = "center",
        death: str = "",
    ) -> None:  # fmt: skip
        """An arrow between two states' boxes, from and to points relative to their middles; `at` is the page's."""
        (x, top), (to_x, to_top) = (place[state] for state in states)
        page.arrow((x + start[0], top + start[1]), (to_x + end[0], to_top + end[1]), bend)
        page.text(at[0], y + at[1], text, size=7.5, align=align)
        page.text(at[0], y + at[1] + 12 + 7 * text.count("\n"), death, size=7.5, align=align, color=_DEATH)

    move((FREE, WRITING), (-36, -20), (-52, -8), "claim", (74, 76), bend=-0.4)
    move((WRITING, READY), (52, 0), (-52, 0), "publish", (455, 74))
    move((READY, READING), (52, -8), (0, -20), "take", (738, 80), bend=-0.25)
    move((READING, FREE), (-52, 0), (52, 0), "release", (360, 197))
    move((WRITING, FREE), (-52, 10), (34, -20), "discard", (112, 101), align="left", death="or its sender died")
    move((FREE, READY), (52, -8), (-52, 16), "a small message: one store", (420, 152))
    move((READY, FREE), (-20, 20), (484, -1), "dropped", (552, 152), align="right")
    requeued = "or its receiver died"
    move((READING, READY), (-52, -10), (24, 20), "requeue", (586, 146), align="left", death=requeued)
    move((READING, KEPT), (0, 20), (52, 0), "the borrow has ended,\na view is left", (690, 230), bend=-0.25)
    gone = "the last view has gone"
    move((KEPT, FREE), (-52, 0), (40, 20), gone, (350, 264), death="or its process died")
    move((FREE, PIECE), (-16, 20), (-16, -20), "", (0, 0))
    piece = "a further slot of a message\nthat is larger than one"
    move((PIECE, FREE), (16, -20), (16, 20), piece, (102, 238), align="left")
    page.text(860, y + 298, "red: done by others, who saw that it died", size=7.5, align="right", color=_DEATH)


def draw(path: Path = FILE) -> Path:
    """Write the picture; the same bytes each time, by the same matplotlib."""
    page = _Canvas()
    _segment(page, 26)
    _moment(page, 232)
    _states(page, 640)
    with matplotlib.rc_context({"svg.hashsalt": "ringshm", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        page.figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE))

"""Pages that commands print: plain lines and aligned columns, as wide as the terminal, in colour where it shows any."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..ring.diagnosis import Finding, Process, count, listed, on_its_way
from ..ring.stats import ChannelStats, LatestStats, ParticipantStats, SegmentStats
from ..segment.layout import Layout
from .text import age, folded, in_bytes, in_columns, printable

_STYLES = {"ok": "32", "warn": "33", "dead": "33", "fail": "1;31", "stuck": "1;31", "title": "1"}
_NARROWEST = 20  # columns: a narrower terminal breaks the lines itself
_LABEL = 10  # columns

Line = tuple[str, str]  # a text, and its level: "note", or one that has a style


def obeys() -> bool:
    """Whether the output is a terminal that obeys escape sequences."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def styled(line: Line) -> str:
    """A line as a terminal that obeys gets it."""
    text, style = line[0], _STYLES.get(line[1])
    return f"\x1b[{style}m{text}\x1b[0m" if style and not os.environ.get("NO_COLOR") else text


class Row(NamedTuple):
    """A row of a table: its cells, of which the first is its name; its level; and lines that belong below it."""

    cells: Sequence[str]
    level: str = "note"
    below: Sequence[Line] = ()


class Page:
    """Prints lines and tables. On a terminal they are folded to its width; elsewhere each is whole.

    Attributes:
        width, height: of the terminal, in cells; None where there is none.
    """

    def __init__(self) -> None:
        size = shutil.get_terminal_size() if sys.stdout.isatty() else None
        self.width = max(_NARROWEST, size.columns) if size else None
        self.height = size.lines if size else None

    def put(self, lines: Iterable[Line]) -> None:
        """Print lines that are folded already."""
        for line in lines:
            print(styled(line) if obeys() else line[0])

    def pieces(self, line: str) -> Sequence[str]:
        """The lines that a line takes which is longer than the terminal is wide: one, which the terminal breaks."""
        return [line]

    def line(self, text: str, level: str = "note", first: str = "", rest: str = "") -> None:
        """Print a text. Its first line, and each further one, begin with `first` and `rest`."""
        self.put(self._folded(text, level, first, rest))

    def _folded(self, text: str, level: str, first: str, rest: str) -> list[Line]:
        lines = folded(printable(text), self.width, first, rest)
        return [(piece, level) for line in lines for piece in self.pieces(line)]

    def entry(self, label: str, text: str) -> None:
        """Print a text behind a label."""
        self.line(text, first=label.ljust(_LABEL), rest=" " * _LABEL)

    def some(self, things: Sequence[Any], part: int) -> Sequence[Any]:
        """Things that are shown one below the other: as many as take a part of the terminal's height, or all."""
        return things if self.height is None else things[: max(1, self.height // part)]

    def rows(self, header: Sequence[str], rows: Sequence[Row], right: Sequence[int]) -> list[list[Line]]:
        """The lines of a table's header and of each row; the columns of those numbers are aligned to the right."""
        shown = in_columns([header, *([printable(cell) for cell in row.cells] for row in rows)], right, self.width)
        title, *lines = [[piece for line in lines for piece in self.pieces(line)] for lines in shown]
        whole = [
            [(line, row.level) for line in lines]
            + [line for text, level in row.below for line in self._folded(text, level, "  ", "    ")]
            for row, lines in zip(rows, lines, strict=True)
        ]
        return [[(line, "title") for line in title], *whole]

    def table(self, header: Sequence[str], rows: Sequence[Row], right: Sequence[int]) -> None:
        """Print a table. A column that is empty in all rows is left out."""
        kept = [at for at in range(len(header)) if any(row.cells[at] for row in rows)]
        rows = [row._replace(cells=[row.cells[at] for at in kept]) for row in rows]
        for lines in self.rows([header[at] for at in kept], rows, [kept.index(at) for at in right if at in kept]):
            self.put(lines)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document, for programs."""
    print(json.dumps(document, indent=2))


# --- a channel in full


def show_findings(page: Page, name: str, layout: Layout, live: bool, findings: list[Finding]) -> None:
    """Show a channel's size, and what keeps it from moving."""
    size, memory = in_bytes(layout.slot_size), f"{in_bytes(layout.total_size)} of shared memory"
    channel, latest = f"{layout.capacity} slots of {size}", f"a Latest of {size}, borrows={layout.capacity - 2}"
    page.line(f"{name}: {'live' if live else 'dead'}, {latest if layout.pin_cells else channel}, {memory}", "title")
    shown = page.some(findings, 6)
    for finding in shown:
        if finding.problem:
            page.line(finding.text, "stuck", "  ! ", "    ")
        else:
            page.line(finding.text, "note", "  - ", "    ")
    _tell_more(page, len(findings) - len(shown))


def show_counts(page: Page, stats: SegmentStats) -> None:
    """Show how much a channel has carried, what is in use, and which calls wait."""
    if isinstance(stats, ChannelStats):
        _show_traffic(page, stats)
    elif isinstance(stats, LatestStats):
        _show_versions(page, stats)
    if stats.recoveries or stats.reaped:
        page.entry(
            "repairs", f"{count(stats.reaped, 'participant')} died, mutexes recovered {_times(stats.recoveries)}"
        )
    for handle in stats.on_their_way:
        page.entry("coming", on_its_way(handle))


def _show_traffic(page: Page, stats: ChannelStats) -> None:
    sent, received = (
        f"{number:,} {done} ({in_bytes(nbytes)})"
        for number, done, nbytes in (
            (stats.sent, "sent", stats.sent_nbytes),
            (stats.received, "received", stats.received_nbytes),
        )
    )
    withdrawn = f", {stats.withdrawn:,} withdrawn" * bool(stats.withdrawn)
    gone = f"{stats.dropped:,} dropped, {stats.redelivered:,} redelivered{withdrawn}"
    page.entry("messages", f"{sent}, {received}, {gone}")
    pieces = f", {stats.pieces} with pieces of large messages" * bool(stats.pieces)
    free, used = f"{stats.free} of {stats.capacity} free", f"{len(stats.slots)} in use"
    page.entry("slots", f"{free}, {stats.ready} ready{pieces}, {used}")
    _show_holders(page, stats)
    waiting = f"{count(stats.waiting_senders, 'sender')}, {count(stats.waiting_receivers, 'receiver')}"
    page.entry("waiting", f"{waiting}; calls had to wait {_times(stats.waits)}")


def _show_versions(page: Page, stats: LatestStats) -> None:
    page.entry("newest", f"version {stats.version:,}, {in_bytes(stats.nbytes)}")
    held = {held.version for held in stats.held}
    page.entry("held", f"{len(held)} of the {count(stats.borrows, 'version')} that readers may hold at once")
    _show_holders(page, stats)
    page.entry("waiting", f"{count(stats.waiting_receivers, 'reader')}; calls had to wait {_times(stats.waits)}")


def _show_holders(page: Page, stats: SegmentStats) -> None:
    held = holders(stats)
    shown = page.some(held, 8)
    for text in shown:
        page.entry("", text)
    _tell_more(page, len(held) - len(shown))


def _tell_more(page: Page, left: int) -> None:
    if left:
        page.line(f"{left} more: `ringshm stats NAME | less`", "warn", "    ", "    ")


def _times(number: int) -> str:
    return count(number, "time")


def holders(stats: SegmentStats) -> list[str]:
    """Which slots or versions each process holds; of slots, for how long the longest, and those come first."""
    if isinstance(stats, LatestStats):
        held: dict[tuple[int, bool], set[int]] = {}
        for version in stats.held:
            held.setdefault((version.pid, version.alive), set()).add(version.version)
        return [f"{_pid(*who)} holds {_numbers('version', versions)}" for who, versions in held.items()]
    assert isinstance(stats, ChannelStats)
    slots: dict[tuple[int, bool, str], dict[int, float]] = {}
    for slot in stats.slots:
        slots.setdefault((slot.pid, slot.alive, slot.state), {})[slot.slot] = slot.seconds or 0.0
    longest = sorted(slots.items(), key=lambda item: -max(item[1].values()))
    return [
        f"{_pid(pid, alive)} {'keeps views of' if state == 'kept' else f'is {state}'} {_numbers('slot', those)} "
        f"for {age(max(those.values()))}"
        for (pid, alive, state), those in longest
    ]


def _pid(pid: int, alive: bool) -> str:
    return f"{pid}{' (dead)' * (not alive)}"


def _numbers(thing: str, numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    return f"{thing}{'s' * (len(numbers) != 1)} {listed(numbers)}"


def show_participants(page: Page, stats: SegmentStats, processes: Mapping[int, Process]) -> None:
    """Show a channel's participants, and those that died last."""
    latest = isinstance(stats, LatestStats)
    rows = [_participant(person, processes.get(person.pid), latest) for person in stats.participants]
    rows.sort(key=lambda row: row.level == "note" and not row.below)  # those that are not well, or hold a mutex, first
    shown = page.some(rows, 3)
    if rows:
        header = ["pid", "process", "state", "handles", "waits for", "last call", "attached"]
        page.table(header, shown, right=[0, 5, 6])
        _tell_more(page, len(rows) - len(shown))
    deaths = page.some(stats.deaths, 8)
    for number, death in enumerate(deaths):
        had, slots = _handles(death.senders, death.receivers, 0, latest), count(death.slots, "slot")
        text = f"{death.pid}, found {age(death.seconds)} ago; handles: {had}; {slots} given back"
        page.entry("died" * (not number), text)
    _tell_more(page, len(stats.deaths) - len(deaths))


def _participant(person: ParticipantStats, process: Process | None, latest: bool) -> Row:
    state = "dead" if not person.alive else "stopped" if process and process.stopped else "alive"
    command = process.command if process else "(not seen)" * person.alive
    handles = _handles(person.senders, person.receivers, person.undecided, latest)
    cells = [str(person.pid), command, state, handles, person.waiting_for, age(person.called), age(person.attached)]
    below = [(f"holds the {mutex}' mutex", "note") for mutex in person.holds]
    return Row(cells, "note" if state == "alive" else "dead", below)


def _handles(senders: int, receivers: int, undecided: int, latest: bool) -> str:
    """The open handles of a process, by role."""
    names = ("publisher", "reader") if latest else ("sender", "receiver")
    parts = [(senders, names[0]), (receivers, names[1])]
    shown = [name if number == 1 else count(number, name) for number, name in parts if number]
    if undecided:
        shown.append("undecided" if undecided == 1 else f"{undecided} undecided")
    return ", ".join(shown) or "none"

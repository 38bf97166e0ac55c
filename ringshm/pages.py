"""What commands show, as text: by rich on a terminal where it is installed, as plain aligned text otherwise."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .diagnosis import Finding, Process
from .doctor import in_bytes
from .layout import Layout
from .stats import ChannelStats, LatestStats, SegmentStats

_AGES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
STYLES = {
    "ok": "green",
    "warn": "yellow",
    "fail": "bold red",
    "stuck": "bold red",
    "note": "",
    "dead": "yellow",
    "title": "bold",
}


def terminal() -> Any:
    """A rich Console, if the output is a terminal and rich is installed; else None."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console

            return Console(highlight=False)
    return None


class Page:
    """What is printed, line by line and table by table."""

    def __init__(self) -> None:
        self._console = terminal()

    def line(self, text: str, level: str = "note") -> None:
        """A line; it is not cut where the terminal is too narrow."""
        text = printable(text)
        if self._console is None:
            print(text)
            return
        from rich.text import Text

        self._console.print(Text(text, style=STYLES[level]), soft_wrap=True)

    def table(self, header: list[str], rows: list[list[str]], right: Sequence[int]) -> None:
        """A table; the columns of those numbers are aligned to the right."""
        rows = [[printable(cell) for cell in row] for row in rows]
        if self._console is None:
            for line in aligned([header, *rows], right):
                print(line)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for at, title in enumerate(header):
            table.add_column(title, justify="right" if at in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=STYLES.get(cell.partition(",")[0], "")) for cell in row))
        self._console.print(table)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Rows of cells as lines, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: names of channels and processes may hold anything."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document, for programs."""
    print(json.dumps(document, indent=2))


def age(seconds: float | None) -> str:
    """Seconds as people say them; nothing for None."""
    if seconds is None:
        return ""
    unit, size = next((unit, size) for unit, size in _AGES if seconds >= size or size == 1)
    return f"{seconds / size:.1f} {unit}"


def show_findings(page: Page, name: str, layout: Layout, live: bool, findings: list[Finding]) -> None:
    """What a channel is, and what keeps it from moving."""
    shape = f"{layout.capacity} slots of {in_bytes(layout.slot_size)}, {in_bytes(layout.total_size)} of shared memory"
    page.line(f"{name}: {'live' if live else 'dead'}, {shape}")
    for finding in findings:
        level = "stuck" if finding.problem else "note"
        page.line(f"  {'!' if finding.problem else '-'} {finding.text}", level)


def show_counts(page: Page, stats: SegmentStats, processes: Mapping[int, Process]) -> None:
    """Its counts, participants, slots in use and last deaths."""
    if isinstance(stats, ChannelStats):
        _show_traffic(page, stats)
    elif isinstance(stats, LatestStats):
        _show_versions(page, stats)
    if stats.participants:
        page.table(
            [
                "pid",
                "process",
                "state",
                "senders",
                "receivers",
                "undecided",
                "waits for",
                "holds",
                "last call",
                "since",
            ],
            [
                [
                    str(person.pid),
                    processes[person.pid].command if person.pid in processes else "",
                    _state(person.alive, processes.get(person.pid)),
                    str(person.senders),
                    str(person.receivers),
                    str(person.undecided),
                    person.waiting_for,
                    ", ".join(f"{mutex}' mutex" for mutex in person.holds),
                    age(person.called),
                    age(person.attached),
                ]
                for person in stats.participants
            ],
            right=[0, 3, 4, 5, 8, 9],
        )
    if stats.deaths:
        page.table(
            ["died", "found", "senders", "receivers", "slots given back"],
            [
                [str(death.pid), f"{age(death.seconds)} ago", *map(str, (death.senders, death.receivers, death.slots))]
                for death in stats.deaths
            ],
            right=range(5),
        )


def _show_traffic(page: Page, stats: ChannelStats) -> None:
    page.table(
        ["messages", "sent", "received", "dropped", "redelivered", "ready"],
        [
            ["count", *map(str, (stats.sent, stats.received, stats.dropped, stats.redelivered, stats.ready))],
            ["payload", in_bytes(stats.sent_nbytes), in_bytes(stats.received_nbytes), "", "", ""],
        ],
        right=range(1, 6),
    )
    page.table(
        ["slots", "free", "in use", "waiting senders", "waiting receivers", "waits", "recoveries", "reaped"],
        [
            [
                str(stats.capacity),
                str(stats.free),
                str(len(stats.slots)),
                str(stats.waiting_senders),
                str(stats.waiting_receivers),
                str(stats.waits),
                str(stats.recoveries),
                str(stats.reaped),
            ]
        ],
        right=range(8),
    )
    if stats.slots:
        rows = [
            [str(slot.slot), slot.state, str(slot.pid), "alive" if slot.alive else "dead", age(slot.seconds)]
            for slot in stats.slots
        ]
        page.table(["slot", "state", "pid", "", "for"], rows, right=[0, 2, 4])


def _show_versions(page: Page, stats: LatestStats) -> None:
    held = {held.version for held in stats.held}
    page.table(
        ["newest version", "size", "versions held", "of", "waiting readers", "waits", "recoveries", "reaped"],
        [
            [
                str(stats.version),
                in_bytes(stats.nbytes),
                str(len(held)),
                str(stats.borrows),
                str(stats.waiting_receivers),
                str(stats.waits),
                str(stats.recoveries),
                str(stats.reaped),
            ]
        ],
        right=range(8),
    )
    if stats.held:
        rows = [[str(held.version), str(held.pid), "alive" if held.alive else "dead"] for held in stats.held]
        page.table(["version held", "pid", ""], rows, right=[0, 1])


def _state(alive: bool, process: Process | None) -> str:
    if not alive:
        return "dead"
    if process is None:
        return "alive, not visible here"
    return f"stopped ({process.state})" if process.stopped else f"alive ({process.state})"

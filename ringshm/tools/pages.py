"""Pages that commands print: with rich on a terminal where rich is installed, as plain aligned text otherwise."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..ring.diagnosis import Finding, Process
from ..ring.stats import ChannelStats, LatestStats, SegmentStats
from ..segment.layout import Layout
from .text import age, aligned, in_bytes, printable

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
STYLES |= {"stuck": "bold red", "note": "", "dead": "yellow", "title": "bold"}


def terminal() -> Any:
    """A rich Console, if the output is a terminal and rich is installed; else None."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console

            return Console(highlight=False)
    return None


class Page:
    """Prints lines and tables."""

    def __init__(self) -> None:
        self._console = terminal()

    def line(self, text: str, level: str = "note") -> None:
        """Print a line. It is not cut where the terminal is too narrow."""
        text = printable(text)
        if self._console is None:
            print(text)
            return
        from rich.text import Text

        self._console.print(Text(text, style=STYLES[level]), soft_wrap=True)

    def table(self, header: list[str], rows: list[list[str]], right: Sequence[int]) -> None:
        """Print a table; the columns of those numbers are aligned to the right."""
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


def print_json(document: dict[str, Any]) -> None:
    """One JSON document, for programs."""
    print(json.dumps(document, indent=2))


def show_findings(page: Page, name: str, layout: Layout, live: bool, findings: list[Finding]) -> None:
    """Show a channel's size, and what keeps it from moving."""
    shape = f"{layout.capacity} slots of {in_bytes(layout.slot_size)}, {in_bytes(layout.total_size)} of shared memory"
    page.line(f"{name}: {'live' if live else 'dead'}, {shape}")
    for finding in findings:
        level = "stuck" if finding.problem else "note"
        page.line(f"  {'!' if finding.problem else '-'} {finding.text}", level)


def show_counts(page: Page, stats: SegmentStats, processes: Mapping[int, Process]) -> None:
    """Show a channel's counts, participants, slots in use and last deaths."""
    if isinstance(stats, ChannelStats):
        _show_traffic(page, stats)
    elif isinstance(stats, LatestStats):
        _show_versions(page, stats)
    if stats.participants:
        header = ["pid", "process", "state", "senders", "receivers", "undecided", "waits for", "holds"]
        rows = [
            [
                str(person.pid),
                processes[person.pid].command if person.pid in processes else "",
                _state(person.alive, processes.get(person.pid)),
                *map(str, (person.senders, person.receivers, person.undecided)),
                person.waiting_for,
                ", ".join(f"{mutex}' mutex" for mutex in person.holds),
                *map(age, (person.called, person.attached)),
            ]
            for person in stats.participants
        ]
        page.table([*header, "last call", "since"], rows, right=[0, 3, 4, 5, 8, 9])
    if stats.deaths:
        page.table(
            ["died", "found", "senders", "receivers", "slots given back"],
            [
                [str(death.pid), f"{age(death.seconds)} ago", *map(str, (death.senders, death.receivers, death.slots))]
                for death in stats.deaths
            ],
            right=range(5),
        )


def _counts(stats: SegmentStats) -> tuple[int, int, int]:
    return stats.waits, stats.recoveries, stats.reaped


def _show_traffic(page: Page, stats: ChannelStats) -> None:
    waiting = stats.waiting_senders, stats.waiting_receivers
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
        [[*map(str, (stats.capacity, stats.free, len(stats.slots), *waiting, *_counts(stats)))]],
        right=range(8),
    )
    if stats.slots:
        rows = [
            [str(slot.slot), slot.state, str(slot.pid), "alive" if slot.alive else "dead", age(slot.seconds)]
            for slot in stats.slots
        ]
        page.table(["slot", "state", "pid", "", "for"], rows, right=[0, 2, 4])


def _show_versions(page: Page, stats: LatestStats) -> None:
    held, rest = {held.version for held in stats.held}, (stats.borrows, stats.waiting_receivers)
    page.table(
        ["newest version", "size", "versions held", "of", "waiting readers", "waits", "recoveries", "reaped"],
        [[str(stats.version), in_bytes(stats.nbytes), *map(str, (len(held), *rest, *_counts(stats)))]],
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

"""`ringshm top`: what all channels of this user do, over time; the text, the screen and the loop.

sampler.py looks, ring/stats.py counts what is there, diagnosis.py says why something stands still.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from ..errors import RingshmError
from ..ring.diagnosis import count, listed, seen_waiting
from ..ring.stats import ChannelStats, LatestStats, SegmentStats
from . import leftovers
from .pages import STYLES, Page, show_counts, show_findings, terminal
from .sampler import Sampler, Watched, looks, rates_between
from .text import age, aligned, in_bytes, in_short, printable

_TREND = 16  # characters
_RAMPS = ("▁▂▃▄▅▆▇█", "_.-=+*%#")  # levels from 0 up, for terminals that show the first and those that do not
_HEADER = ["channel", "sent/s", "bytes/s", "received/s", "bytes/s", "fill"]
_WIDTHS = [0, 7, 11, 10, 11, 5]  # so that columns stay where they are


# --- as text


def trend(values: Iterable[float], most: float | None = None, ramp: str = _RAMPS[0]) -> str:
    """A character of the ramp for each value, from 0 up; its height says how large the value is. Only 0 has the lowest.

    The highest character stands for `most`, or for the largest value.
    """
    shown = list(values)
    most = most or max(shown, default=0.0) or 1.0
    steps = len(ramp) - 1
    return "".join(ramp[min(steps, -int(-value * steps // most))] for value in shown)


def _ramp() -> str:
    try:
        _RAMPS[0].encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return _RAMPS[1]
    return _RAMPS[0]


def _row(channel: Watched) -> list[str]:
    rates, cells = channel.rates, [printable(channel.name)]
    if channel.stats is None or channel.gone is not None:
        return [*cells, "", "", "", "", "gone" if channel.gone is not None else ""]
    cells += [in_short(rates.sent), in_bytes(rates.sent_nbytes)] if rates else ["", ""]
    counted = isinstance(channel.stats, ChannelStats)
    cells += [in_short(rates.received), in_bytes(rates.received_nbytes)] if rates and counted else ["", ""]
    return [*cells, f"{channel.points[-1].fill:.0%}"]


def facts(channel: Watched) -> str:
    """Which processes wait and hold, and what has gone wrong so far; nothing that is not the case is mentioned."""
    stats = channel.stats
    if channel.gone is not None or channel.wrong or stats is None:
        return "" if channel.gone is not None else channel.wrong
    found = [] if channel.live else ["no process that uses it lives"]
    found += _waiting(channel, stats)
    found += _holding(stats)
    if stats.dead:
        found.append(f"dead and not reaped: {listed(person.pid for person in stats.dead)}")
    if channel.stopped:
        found.append(f"stopped: {listed(channel.stopped)}")
    found += [
        f"{name} {number}"
        for name in ("ready", "dropped", "redelivered", "withdrawn", "recoveries", "reaped")
        if (number := getattr(stats, name, 0))
    ]
    return "; ".join(found)


def _waiting(channel: Watched, stats: SegmentStats) -> list[str]:
    waiting: dict[str, list[int]] = {}
    for person in stats.participants:
        seen = seen_waiting(channel.before, person) if channel.before else person
        if seen.alive and seen.waiting_for:
            waiting.setdefault(seen.waiting_for, []).append(seen.pid)
    return [f"waiting for {what}: {listed(pids)}" for what, pids in sorted(waiting.items())]


def _holding(stats: SegmentStats) -> list[str]:
    """How many slots each process holds, and for how long the longest of them."""
    if isinstance(stats, LatestStats):
        held: dict[int, set[int]] = {}
        for version in stats.held:
            held.setdefault(version.pid, set()).add(version.version)
        return [f"{pid} holds {len(versions)} of {stats.borrows} versions" for pid, versions in held.items()]
    assert isinstance(stats, ChannelStats)
    slots: dict[tuple[int, str], list[float]] = {}
    for slot in stats.slots:
        slots.setdefault((slot.pid, slot.state), []).append(slot.seconds or 0.0)
    longest = sorted(slots.items(), key=lambda item: -max(item[1]))
    return [f"{pid} {state} {count(len(seconds), 'slot')} for {age(max(seconds))}" for (pid, state), seconds in longest]


def show_overview(page: Page, channels: Sequence[Watched], height: int | None = None, ramp: str = "") -> None:
    """Show a row for each channel, and its facts below; only the first ones, where so many lines are not free.

    The ramp's characters draw a trend of the fill; "" draws none.
    """
    below = [_below(channel) for channel in channels]
    room = len(channels) if height is None else _how_many([1 + len(lines) for lines in below], height - 1)
    rows = [[title.rjust(width) for title, width in zip(_HEADER, _WIDTHS, strict=True)]]
    rows[0].append("over time" * bool(ramp))
    for channel in channels[:room]:
        past = [point.fill for point in channel.points][-_TREND:]
        rows.append([*_row(channel), trend(past, 1.0, ramp) if ramp else ""])
    title, *lines = aligned(rows, range(1, len(_HEADER)))
    page.line(title, "title")
    for line, channel, more in zip(lines, channels, below, strict=False):
        page.line(line, "fail" if channel.rank[0] == 0 else "note" if channel.live else "dead")
        for text, level in more:
            page.line(f"  {text}", level)
    if not channels:
        page.line("no channels of this user")
    if room < len(channels):
        page.line(f"{len(channels) - room} more: a taller terminal, or `ringshm top NAME...`", "warn")


def _below(channel: Watched) -> list[tuple[str, str]]:
    lines = [(text, "note") for text in (facts(channel),) if text]
    return lines + [(f"! {text}", "stuck") for text in (channel.problems if channel.live else [])]


def _how_many(heights: Sequence[int], height: int) -> int:
    """How many of the first fit. If not all do, a line is kept to say so."""
    if sum(heights) <= height:
        return len(heights)
    room, height = 0, height - 1
    for taken in heights:
        height -= taken
        if height < 0:
            break
        room += 1
    return room


def show_detail(page: Page, channel: Watched, ramp: str) -> None:
    """Show everything about one channel."""
    if channel.gone is not None:
        page.line(f"{channel.name}: gone", "dead")
    if channel.wrong:
        page.line(channel.wrong, "warn")
    if channel.stats is None or channel.layout is None:
        return
    show_findings(page, channel.name, channel.layout, channel.live, channel.findings)
    points = list(channel.points)
    if len(points) > 1:
        between = [rates_between(*pair) for pair in pairwise(points)]
        mean = rates_between(points[0], points[-1])
        seconds = f"over {points[-1].time - points[0].time:.0f} s"
        rows = []
        for end in ("sent", "received") if isinstance(channel.stats, ChannelStats) else ("sent",):
            for title, name, show in ((f"{end}/s", end, in_short), ("bytes/s", f"{end}_nbytes", in_bytes)):
                values = [getattr(rates, name) for rates in between]
                rows.append(_series(title, values, getattr(mean, name), show, ramp))
        fills = [point.fill for point in points[1:]]
        rows.append(_series("fill", fills, sum(fills) / len(fills), "{:.0%}".format, ramp, 1.0))
        for title, name in (("waiting senders", "waiting_senders"), ("receivers", "waiting_receivers")):
            waiting = [float(getattr(point, name)) for point in points[1:]]
            rows.append(_series(title, waiting, sum(waiting) / len(waiting), in_short, ramp))
        page.table(["", "now", "mean", "most", seconds], rows, right=range(1, 4))
    show_counts(page, channel.stats, channel.processes)


def _series(
    title: str, values: list[float], mean: float, show: Callable[[float], str], ramp: str, most: float | None = None
) -> list[str]:
    return [title, show(values[-1]), show(mean), show(max(values)), trend(values[-3 * _TREND :], most, ramp)]


def as_document(channels: Sequence[Watched]) -> dict[str, Any]:
    """The result of a look, for programs."""
    return {
        "time": time.time(),
        "channels": [
            {
                "name": channel.name,
                "nonce": channel.nonce,
                "live": channel.live and not channel.wrong,
                "gone": channel.gone is not None,
                "wrong": channel.wrong,
                "rates": channel.rates and dataclasses.asdict(channel.rates),
                "fill": channel.points[-1].fill if channel.points else None,
                "findings": [dataclasses.asdict(finding) for finding in channel.findings],
                "processes": {pid: dataclasses.asdict(process) for pid, process in channel.processes.items()},
                "stats": channel.stats and dataclasses.asdict(channel.stats),
            }
            for channel in channels
        ],
    }


# --- the loop


def run(names: Sequence[str], interval: float, seconds: float | None, file: str | None, as_json: bool) -> None:
    """Look and show, until interrupted or for so many seconds; with a `file` to plot to, until the channel has gone.

    Raises:
        ChannelNotFound, ChannelForbidden, ChannelCorrupted, IncompatibleChannel: if one of the names is no channel.
        RingshmError: if there is a file to plot to, but no matplotlib, or nothing was recorded.
        ValueError: if a name or the file is none.
        KeyboardInterrupt: by Ctrl-C or SIGTERM; both end a recording normally instead.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        leftovers.observe(name)
    recording = _recording(names[0], file) if file is not None else None
    sampler, console = Sampler(names), None if as_json else terminal()
    on_screen = console is not None and not console.is_dumb_terminal
    with _ended_by_sigterm(), _Screen(console, interval) if on_screen else contextlib.nullcontext() as screen:
        show = _print_json_line if as_json else screen.show if screen else _print_plain if not recording else None

        def watch() -> None:
            for _ in looks(sampler, interval, seconds):
                if recording and not recording.add(sampler.channels[names[0]]):
                    break
                if show:
                    show(sampler.in_order())

        try:  # without the loop in its frame: see ring/mutex.py, 5
            watch()
        except KeyboardInterrupt:
            if not recording:
                raise
    if recording:
        recording.draw()
        if not as_json:
            Page().line(f"wrote {file}: {recording.seconds:.1f} s of {names[0]}")


def _recording(name: str, file: str) -> Any:
    try:
        from .plot import Recording  # only here is matplotlib needed
    except ImportError as error:
        raise RingshmError(f"--plot needs matplotlib ({error}): pip install matplotlib") from error
    return Recording(name, file)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM does as Ctrl-C: the terminal is left as it was, and a recording is drawn."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_plain(channels: Sequence[Watched]) -> None:
    page = Page()
    page.line(time.strftime("%H:%M:%S"))
    show_overview(page, channels)
    sys.stdout.flush()


def _print_json_line(channels: Sequence[Watched]) -> None:
    print(json.dumps(as_document(channels)), flush=True)


class _Screenful(Page):
    """A page of one screen; the last line says if there is more."""

    def __init__(self, cut: bool) -> None:
        self._cut = cut
        self._parts: list[Any] = []

    def line(self, text: str, level: str = "note") -> None:
        """Add a line. Where the terminal is too narrow it is cut, or goes on below."""
        self._put(text, level, self._cut)

    def table(self, header: list[str], rows: list[list[str]], right: Sequence[int]) -> None:
        """Add a table as plain text, which takes less room than frames; its lines are cut."""
        title, *lines = aligned([header, *([printable(cell) for cell in row] for row in rows)], right)
        self._put(title, "title", True)
        for line in lines:
            self._put(line, "note", True)

    def _put(self, text: str, level: str, cut: bool) -> None:
        from rich.text import Text

        overflow: Any = "ellipsis" if cut else "fold"
        self._parts.append(Text(printable(text), style=STYLES[level], no_wrap=cut, overflow=overflow))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.console import Group
        from rich.segment import Segment as Piece

        lines = console.render_lines(Group(*self._parts), options.update(height=None), pad=False)
        if len(lines) > options.max_height:
            left = len(lines) - options.max_height + 1
            lines[options.max_height - 1 :] = [[Piece(f"{left} more lines: a taller terminal, or `ringshm stats`")]]
        for line in lines:
            yield from line
            yield Piece.line()


class _Screen:
    """The terminal's other screen, as full-screen programs use it. Only `show` draws, in the thread that calls it."""

    def __init__(self, console: Any, interval: float) -> None:
        from rich.live import Live

        self._console = console
        self._interval = interval
        self._live = Live(
            console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, *_: object) -> None:
        # a second Ctrl-C would leave the terminal on the other screen
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._live.stop()
        finally:
            signal.signal(signal.SIGINT, before)

    def show(self, channels: Sequence[Watched]) -> None:
        """Show the channels; one alone in full."""
        self._live.start()  # not before: errors of the first look go to the usual screen
        alone = len(channels) == 1
        page = _Screenful(cut=not alone)
        when = f"{time.strftime('%H:%M:%S')}, every {self._interval:g} s; Ctrl-C ends"
        page.line(f"ringshm top: {count(len(channels), 'channel')}, {when}")
        if alone:
            show_detail(page, channels[0], _ramp())
        else:
            show_overview(page, channels, self._console.height - 1, _ramp())
        self._live.update(page, refresh=True)

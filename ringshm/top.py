"""`ringshm top`: what all channels of this user do, over time; the text, the screen and the loop.

The looks are sampler.py's, what each finds is stats.py's, and why something stands still is diagnosis.py's.
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

from . import leftovers
from .diagnosis import listed, seen_waiting
from .doctor import in_bytes
from .errors import RingshmError
from .pages import STYLES, Page, age, aligned, printable, show_counts, show_findings, terminal
from .sampler import Sampler, Watched, looks, rates_between
from .stats import ChannelStats, LatestStats, SegmentStats

_TREND = 16  # characters
_RAMPS = ("▁▂▃▄▅▆▇█", "_.-=+*%#")  # levels from 0 up, for terminals that show the first and those that do not
_HEADER = ["channel", "sent/s", "bytes/s", "received/s", "bytes/s", "fill"]
_WIDTHS = [0, 7, 11, 10, 11, 5]  # so that columns stay where they are


# --- as text


def trend(values: Iterable[float], most: float | None = None, ramp: str = _RAMPS[0]) -> str:
    """A line of characters, one for each value, whose height says how large it is; `most`: what the highest stands for.

    Only 0 gets the lowest.
    """
    shown = list(values)
    most = most or max(shown, default=0.0) or 1.0
    steps = len(ramp) - 1
    return "".join(ramp[min(steps, -int(-value * steps // most))] for value in shown)


def in_short(number: float) -> str:
    """A number in at most five characters, such as 12.3k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            value = number / size
            return f"{value:.{2 if value < 9.995 else int(value < 99.95)}f}{unit}"
    return f"{number:.3g}"


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
    if rates is None:
        cells += [""] * 4
    else:
        cells += [in_short(rates.sent), in_bytes(rates.sent_nbytes)]
        counted = isinstance(channel.stats, ChannelStats)
        cells += [in_short(rates.received), in_bytes(rates.received_nbytes)] if counted else ["", ""]
    return [*cells, f"{channel.points[-1].fill:.0%}"]


def facts(channel: Watched) -> str:
    """Who waits, who holds what, and what has gone wrong so far; nothing of what is not."""
    if channel.gone is not None:
        return ""
    if channel.wrong:
        return channel.wrong
    stats = channel.stats
    if stats is None:
        return ""
    told = [] if channel.live else ["no process that uses it lives"]
    told += _waiting(channel, stats)
    told += _holding(stats)
    if stats.dead:
        told.append(f"dead and not reaped: {listed(person.pid for person in stats.dead)}")
    if channel.stopped:
        told.append(f"stopped: {listed(channel.stopped)}")
    told += [
        f"{name} {number}"
        for name in ("ready", "dropped", "redelivered", "withdrawn", "recoveries", "reaped")
        if (number := getattr(stats, name, 0))
    ]
    return "; ".join(told)


def _waiting(channel: Watched, stats: SegmentStats) -> list[str]:
    waiting: dict[str, list[int]] = {}
    for person in stats.participants:
        seen = seen_waiting(channel.before, person) if channel.before else person
        if seen.alive and seen.waiting_for:
            waiting.setdefault(seen.waiting_for, []).append(seen.pid)
    return [f"waiting for {what}: {listed(pids)}" for what, pids in sorted(waiting.items())]


def _holding(stats: SegmentStats) -> list[str]:
    """Who holds how many slots, and the longest of them for how long."""
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
    return [
        f"{pid} {state} {len(seconds)} slot{'s' * (len(seconds) > 1)} for {age(max(seconds))}"
        for (pid, state), seconds in longest
    ]


def show_overview(page: Page, channels: Sequence[Watched], height: int | None = None, ramp: str = "") -> None:
    """A row for each channel, with what there is to say of it below; only the first ones, where height is limited.

    Args:
        page: where to.
        channels: the most important first.
        height: how many lines there may be.
        ramp: characters of a trend of the fill; none without.
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
    """How many of the first fit; if not all do, a line is left to say so."""
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
    """All there is to say of one channel."""
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
        rows = [
            _series("sent/s", [rates.sent for rates in between], mean.sent, in_short, ramp),
            _series("bytes/s", [rates.sent_nbytes for rates in between], mean.sent_nbytes, in_bytes, ramp),
        ]
        if isinstance(channel.stats, ChannelStats):
            received = [rates.received for rates in between], [rates.received_nbytes for rates in between]
            rows.append(_series("received/s", received[0], mean.received, in_short, ramp))
            rows.append(_series("bytes/s", received[1], mean.received_nbytes, in_bytes, ramp))
        for title, name in (
            ("fill", "fill"),
            ("waiting senders", "waiting_senders"),
            ("receivers", "waiting_receivers"),
        ):
            values = [float(getattr(point, name)) for point in points[1:]]
            show, most = (_percent, 1.0) if name == "fill" else (in_short, None)
            rows.append(_series(title, values, sum(values) / len(values), show, ramp, most))
        page.table(["", "now", "mean", "most", seconds], rows, right=range(1, 4))
    show_counts(page, channel.stats, channel.processes)


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _series(
    title: str, values: list[float], mean: float, show: Callable[[float], str], ramp: str, most: float | None = None
) -> list[str]:
    return [title, show(values[-1]), show(mean), show(max(values)), trend(values[-3 * _TREND :], most, ramp)]


def as_document(channels: Sequence[Watched]) -> dict[str, Any]:
    """What a look has found, for programs."""
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
    """Look and show, until interrupted, for so many seconds, or, with a `file` to plot to, until the channel has gone.

    Raises:
        ChannelNotFound, ChannelForbidden, ChannelCorrupted, IncompatibleChannel: if one of the names is no channel.
        RingshmError: if there is a file to plot to, but no matplotlib, or nothing was recorded.
        ValueError: if a name or the file is none.
        KeyboardInterrupt: by Ctrl-C or SIGTERM, which end a recording in the usual way.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        leftovers.observe(name)
    recording = _recording(names[0], file) if file is not None else None
    sampler, console = Sampler(names), None if as_json else terminal()
    on_screen = console is not None and not console.is_dumb_terminal
    with _ended_by_sigterm(), _Screen(console, interval) if on_screen else contextlib.nullcontext() as screen:
        show = _print_json_line if as_json else screen.show if screen else _print_plain if not recording else None
        try:
            for _ in looks(sampler, interval, seconds):
                if recording and not recording.add(sampler.channels[names[0]]):
                    break
                if show:
                    show(sampler.in_order())
        except KeyboardInterrupt:
            if not recording:
                raise
    if recording:
        recording.draw()
        if not as_json:
            Page().line(f"wrote {file}: {recording.seconds:.1f} s of {names[0]}")


def _recording(name: str, file: str) -> Any:
    try:
        from .plot import Recording  # matplotlib is not needed without
    except ImportError as error:
        raise RingshmError(f"--plot needs matplotlib ({error}): pip install matplotlib") from error
    return Recording(name, file)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does: with the terminal as it was, and the recording drawn."""
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
    """What one screen shows; it says so if there is more."""

    def __init__(self, cut: bool) -> None:
        self._cut = cut
        self._parts: list[Any] = []

    def line(self, text: str, level: str = "note") -> None:
        """A line; it is cut or goes on below where the terminal is too narrow."""
        self._put(text, level, self._cut)

    def table(self, header: list[str], rows: list[list[str]], right: Sequence[int]) -> None:
        """As plain text, for which there is more room than for frames; it is cut."""
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
    """The terminal's other screen, as full-screen programs use it; drawn by this thread only, when told to."""

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
        # who presses Ctrl-C twice would keep the other screen
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._live.stop()
        finally:
            signal.signal(signal.SIGINT, before)

    def show(self, channels: Sequence[Watched]) -> None:
        """Show them; one alone with all there is to say of it."""
        self._live.start()  # if it has not: what is wrong at the first look is said on the usual screen
        alone = len(channels) == 1
        page = _Screenful(cut=not alone)
        when = f"{time.strftime('%H:%M:%S')}, every {self._interval:g} s; Ctrl-C ends"
        page.line(f"ringshm top: {len(channels)} channel{'s' * (not alone)}, {when}")
        if alone:
            show_detail(page, channels[0], _ramp())
        else:
            show_overview(page, channels, self._console.height - 1, _ramp())
        self._live.update(page, refresh=True)

"""`ringshm top`: what all channels of this user do, over time.

sampler.py looks, screen.py has the terminal and its keys; here it becomes text.
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
from .pages import Line, Page, Row, holders, obeys, show_counts, show_findings, show_participants
from .sampler import Sampler, Watched, looks, rates_between
from .screen import Screen
from .text import in_bytes, in_short

_TREND = 16  # characters
_MOST_LINES = 8  # of a channel among others
_LONGEST_TREND = 3 * _TREND
_BESIDE_TREND = 52  # columns
_RAMPS = ("▁▂▃▄▅▆▇█", "_.-=+*%#")  # levels from 0 up, for terminals that show the first and those that do not
_HEADER = ["channel", "sent/s", "bytes/s", "received/s", "fill"]
_WIDTHS = [0, 6, 9, 10, 4]  # so that columns stay where they are

#: What `?` shows, and `ringshm top --help`.
COLUMNS = (
    ("sent/s, received/s", "messages since the look before; of a Latest, whose reads are not counted, versions"),
    ("bytes/s", "payload sent; of a Latest, versions times the size of the newest"),
    ("fill", "share of a channel's slots that are not free"),
    ("over time", "the fill at the last looks, now at the right"),
    (
        "below a channel",
        "what keeps it from moving (!); processes that wait, and for what; that hold slots or versions, the longest "
        "first; that are stopped, or dead and not reaped; how many messages are ready, were dropped, redelivered, "
        "withdrawn; how often mutexes were recovered, and how many processes reaped. Only what is the case is shown",
    ),
    ("red, yellow", "a channel that stands still; one that is dead or gone"),
)


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


def _row(channel: Watched, ramp: str) -> Row:
    stats, rates, below = channel.stats, channel.rates, _below(channel)
    level = "fail" if channel.rank[0] == 0 else "note" if channel.live else "dead"
    if stats is None or channel.gone is not None:
        gone = "gone" if channel.gone is not None else ""
        return Row([channel.name, "", "", "", gone, ""], level, below)
    sent = [in_short(rates.sent), in_bytes(rates.sent_nbytes)] if rates else ["", ""]
    if not isinstance(stats, ChannelStats):
        return Row([channel.name, *sent, "", "", ""], level, below)
    received = in_short(rates.received) if rates else ""
    past = [point.fill for point in channel.points][-_TREND:]
    fill = [f"{channel.points[-1].fill:.0%}", trend(past, 1.0, ramp) if ramp else ""]
    return Row([channel.name, *sent, received, *fill], level, below)


def facts(channel: Watched) -> str:
    """Which processes wait and hold, and what has gone wrong so far; nothing that is not the case is mentioned."""
    stats = channel.stats
    if channel.gone is not None or channel.wrong or stats is None:
        return "" if channel.gone is not None else channel.wrong
    found = [] if channel.live else ["no process that uses it lives"]
    found += _waiting(channel, stats)
    found += holders(stats)
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


def show_overview(page: Page, channels: Sequence[Watched], height: int | None = None, ramp: str = "") -> None:
    """Show a row for each channel, and its facts below; only the first ones, where so many lines are not free.

    The ramp's characters draw a trend of the fill; "" draws none.
    """
    if not channels:
        page.line("no channels of this user")
        return
    header = [
        *(title.rjust(width) for title, width in zip(_HEADER, _WIDTHS, strict=True)),
        "over time".ljust(_TREND) * bool(ramp),
    ]
    title, *shown = page.rows(header, [_row(channel, ramp) for channel in channels], range(1, len(_HEADER)))
    if height is not None:
        most = max(1, min(_MOST_LINES, height - len(title) - 1))  # a line is kept for those that do not fit
        shown = [_cut(lines, most) for lines in shown]
    room = len(shown) if height is None else _how_many([len(lines) for lines in shown], height - len(title))
    page.put(title)
    for lines in shown[:room]:
        page.put(lines)
    if room < len(channels):
        page.line(f"{len(channels) - room} more: a taller terminal, or `ringshm top NAME...`", "warn")


def _below(channel: Watched) -> list[Line]:
    lines = [(text, "note") for text in (facts(channel),) if text]
    return [(f"! {text}", "stuck") for text in (channel.problems if channel.live else [])] + lines


def _cut(lines: list[Line], most: int) -> list[Line]:
    """The first lines of a channel, with what says that there are more; so one leaves room for others."""
    if len(lines) <= most:
        return lines
    kept = lines[: max(1, most - 1)]
    return [*kept, (f"  {len(lines) - len(kept)} more lines: `ringshm stats NAME`", "warn")][:most]


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
    if len(channel.points) > 1:
        _show_past(page, channel, ramp)
    show_counts(page, channel.stats)
    show_participants(page, channel.stats, channel.processes)


def _show_past(page: Page, channel: Watched, ramp: str) -> None:
    """Show rates, fill, and how many wait: now, on average, the most, and as a trend."""
    points, stats = list(channel.points), channel.stats
    room = min(_LONGEST_TREND, max(_TREND, (page.width or 0) - _BESIDE_TREND))
    between = [rates_between(*pair) for pair in pairwise(points)]
    mean = rates_between(points[0], points[-1])

    def rate(title: str, name: str, show: Callable[[float], str]) -> Row:
        values = [getattr(rates, name) for rates in between]
        return _series(title, values, getattr(mean, name), show, ramp, room)

    def share(title: str, values: list[float], show: Callable[[float], str], most: float | None = None) -> Row:
        return _series(title, values, sum(values) / len(values), show, ramp, room, most)

    if isinstance(stats, LatestStats):
        borrows, held = stats.borrows, [point.fill * stats.borrows for point in points[1:]]
        rows = [
            rate("published/s", "sent", in_short),
            rate("bytes/s", "sent_nbytes", in_bytes),
            share(f"held, of {borrows}", held, in_short, borrows),
            share("readers", [float(point.receivers) for point in points[1:]], in_short),
        ]
    else:
        rows = [
            rate("sent/s", "sent", in_short),
            rate("bytes/s", "sent_nbytes", in_bytes),
            rate("received/s", "received", in_short),
            share("fill", [point.fill for point in points[1:]], "{:.0%}".format, 1.0),
            share("waiting senders", [float(point.waiting_senders) for point in points[1:]], in_short),
        ]
    waiting = "waiting readers" if isinstance(stats, LatestStats) else "waiting receivers"
    rows.append(share(waiting, [float(point.waiting_receivers) for point in points[1:]], in_short))
    header = ["", "now", "mean", "most", f"over {points[-1].time - points[0].time:.0f} s"]
    page.table(header, rows, right=range(1, 4))


def _series(
    title: str, values: list[float], mean: float, show: Callable[[float], str], ramp: str, room: int,
    most: float | None = None,
) -> Row:  # fmt: skip
    return Row([title, show(values[-1]), show(mean), show(max(values)), trend(values[-room:], most, ramp)])


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
    """Look and show, until `q`, an interrupt, or for so many seconds; with a plot's file, until the channel has gone.

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
    sampler = Sampler(names)
    on_screen = obeys() and not as_json
    with _ended_by_sigterm(), Screen(explain) if on_screen else contextlib.nullcontext() as screen:
        show = _print_json_line if as_json else _print_plain if not recording else None

        def watch() -> None:
            for _ in looks(sampler, interval, seconds, *([screen.pause] if screen else [])):
                if recording and not recording.add(sampler.channels[names[0]]):
                    break
                if screen:
                    screen.show(lambda page: _fill(page, sampler.in_order(), interval, screen.keys))
                elif show:
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


def _fill(page: Page, channels: Sequence[Watched], interval: float, keys: bool) -> None:
    """Show the channels; one alone in full."""
    ends = "q ends, ? explains" if keys else "Ctrl-C ends"
    when = f"{time.strftime('%H:%M:%S')}, every {interval:g} s"
    page.line(f"ringshm top: {count(len(channels), 'channel')}, {when}; {ends}")
    if len(channels) == 1:
        show_detail(page, channels[0], _ramp())
    else:
        show_overview(page, channels, (page.height or 1) - 1, _ramp())


def explain(page: Page) -> None:
    """Say what the columns are, and what the keys do."""
    page.line("ringshm top: q ends, any other key goes back to the channels")
    page.line("")
    for title, text in COLUMNS:
        page.line(f"{title}: {text}", first="  ", rest="    ")

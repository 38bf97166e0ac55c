"""`ringshm top NAME --plot FILE`: a channel over time, drawn by matplotlib without a display."""

from __future__ import annotations

import contextlib
import io
import os
import time
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from ..errors import RingshmError
from .sampler import Point, Watched, rates_between
from .text import printable

_MOST_POINTS = 10_000  # more than a plot has pixels


class Recording:
    """What one channel did. It keeps at most `most` points: beyond that every second one goes.

    Rates are differences of counters, so they stay exact means.
    """

    def __init__(self, name: str, file: str, most: int = _MOST_POINTS) -> None:
        """Check the file before anything is recorded.

        Raises:
            ValueError: if matplotlib cannot draw a file of that name, or it cannot be written in that folder.
        """
        self.points: list[Point] = []
        self._name = name
        self._file = file
        self._path = os.path.realpath(file)  # a symbolic link stays one
        self._most = most
        self._every, self._seen = 1, 0
        self._nonce = self._what = ""
        self._borrows = 0  # of a Latest
        self._began = time.strftime("%Y-%m-%d %H:%M:%S")
        folder = os.path.dirname(self._path)
        if not os.path.isdir(folder) or os.path.isdir(file) or not os.access(folder, os.W_OK):
            raise ValueError(f"--plot {file!r} cannot be written: give a file in a folder that exists and is yours")
        trial = Figure()
        trial.text(0, 0, "some kinds need other programs, but only for text")
        try:
            trial.savefig(io.BytesIO(), format=self._kind)
        except Exception as error:
            raise ValueError(f"--plot {file!r} cannot be drawn: {error}") from error

    @property
    def _kind(self) -> str:
        return os.path.splitext(self._file)[1][1:].lower()

    @property
    def seconds(self) -> float:
        """From the first point to the last."""
        return self.points[-1].time - self.points[0].time

    def add(self, channel: Watched) -> bool:
        """Add the latest look; False if the channel has gone, even if another of its name has come."""
        layout = channel.layout
        if channel.gone is not None or layout is None or self._nonce not in ("", channel.nonce):
            return False
        if not self.points:
            self._nonce, self._borrows = channel.nonce, layout.capacity - 2 if layout.pin_cells else 0
            what = "a Latest" if self._borrows else f"{layout.capacity} slots"
            self._what = f"{what} of {layout.slot_size:,} bytes"
            self.points += list(channel.points)[:-1]
            self._seen = len(self.points)
        if self._seen % self._every == 0:
            self.points.append(channel.points[-1])
        self._seen += 1
        if len(self.points) > self._most:
            del self.points[1::2]
            self._every *= 2
        return True

    def draw(self) -> None:
        """Write the file.

        Raises:
            RingshmError: if there were fewer than two looks; or if the file cannot be written: one that was there stays
                as it was.
        """
        if len(self.points) < 2:
            raise RingshmError(f"nothing of channel {self._name!r} was recorded: let it run for some intervals")
        figure = self._figure()
        drawn = io.BytesIO()
        figure.savefig(drawn, format=self._kind, dpi=120)
        part = f"{self._path}.part"
        try:
            with open(part, "wb") as file:
                file.write(drawn.getbuffer())
            os.replace(part, self._path)  # whole or not at all, even if it is interrupted
        except OSError as error:
            raise RingshmError(f"--plot {self._file!r} could not be written: {error.strerror}") from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(part)

    def _figure(self) -> Figure:
        points = self.points
        figure = Figure(figsize=(10, 10), layout="constrained")
        messages, nbytes, use, waiting = figure.subplots(4, 1, sharex=True)
        seconds = [point.time - points[0].time for point in points]
        rates = [rates_between(*pair) for pair in pairwise(points)]

        def rate(axes: Axes, name: str, label: str, linestyle: str = "-") -> None:
            values = [getattr(rate, name) for rate in rates]
            axes.stairs(values, seconds, baseline=None, label=label, linestyle=linestyle)

        def count(axes: Axes, values: list[float], label: str, linestyle: str = "-") -> None:
            axes.plot(seconds, values, linestyle, label=label, drawstyle="steps-post")

        waiting_receivers = [float(point.waiting_receivers) for point in points]
        if self._borrows:
            rate(messages, "sent", "published")
            rate(nbytes, "sent_nbytes", "published")
            count(use, [point.fill * self._borrows for point in points], "held by readers")
            use.axhline(self._borrows, color="black", linestyle=":", label=f"borrows={self._borrows}")
            use.set_ylabel("versions held")
            count(waiting, [float(point.receivers) for point in points], "attached")
            count(waiting, waiting_receivers, "wait for a version", "--")
            waiting.set_ylabel("readers")
        else:
            for axes, name in ((messages, "sent"), (nbytes, "sent_nbytes")):
                rate(axes, name, "sent")
                rate(axes, name.replace("sent", "received"), "received", "--")
            count(use, [point.fill for point in points], "fill")
            use.set(ylabel="slots not free", ylim=(0, 1.02))
            use.yaxis.set_major_formatter(PercentFormatter(1))
            count(waiting, [float(point.waiting_senders) for point in points], "for space")
            count(waiting, waiting_receivers, "for a message", "--")
            waiting.set_ylabel("threads that wait")
        messages.set_ylabel("versions/s" if self._borrows else "messages/s")
        messages.yaxis.set_major_formatter(EngFormatter())
        nbytes.set_ylabel("payload, bytes/s")
        nbytes.yaxis.set_major_formatter(EngFormatter("B"))
        waiting.set_xlabel(f"seconds since {self._began}")
        for axes in (use, waiting) if self._borrows else (waiting,):
            axes.yaxis.get_major_locator().set_params(integer=True)
        for axes in figure.axes:
            axes.set_ylim(bottom=0)
            axes.grid(True, alpha=0.3)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        # a name may hold what matplotlib takes for a formula
        figure.suptitle(f"{printable(self._name)}: {self._what}", parse_math=False)
        return figure

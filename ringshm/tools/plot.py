"""`ringshm top NAME --plot FILE`: a channel over time, drawn by matplotlib without a display."""

from __future__ import annotations

import contextlib
import io
import os
import time
from itertools import pairwise

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
        self._counted = True
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
            self._nonce, self._counted = channel.nonce, not layout.pin_cells
            self._what = f"{layout.capacity} slots of {layout.slot_size:,} bytes"
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
        seconds = [point.time - points[0].time for point in points]
        rates = [rates_between(*pair) for pair in pairwise(points)]
        figure = Figure(figsize=(10, 10), layout="constrained")
        messages, nbytes, fill, waiting = figure.subplots(4, 1, sharex=True)
        sent = "sent" if self._counted else "published"
        for axes, ends in (
            (messages, (("sent", sent), ("received", "received"))),
            (nbytes, (("sent_nbytes", sent), ("received_nbytes", "received"))),
        ):
            for at, (name, label) in enumerate(ends if self._counted else ends[:1]):
                values = [getattr(rate, name) for rate in rates]
                axes.stairs(values, seconds, baseline=None, label=label, linestyle="-" if not at else "--")
        messages.set_ylabel("messages/s")
        messages.yaxis.set_major_formatter(EngFormatter())
        nbytes.set_ylabel("payload, bytes/s")
        nbytes.yaxis.set_major_formatter(EngFormatter("B"))
        fill.plot(seconds, [point.fill for point in points], drawstyle="steps-post")
        fill.set(ylabel="slots not free" if self._counted else "versions held", ylim=(0, 1.02))
        fill.yaxis.set_major_formatter(PercentFormatter(1))
        waiting.plot(seconds, [point.waiting_senders for point in points], label="for space", drawstyle="steps-post")
        what = "for a message" if self._counted else "for a version"
        receivers = [point.waiting_receivers for point in points]
        waiting.plot(seconds, receivers, "--", label=what, drawstyle="steps-post")
        waiting.set(ylabel="threads that wait", xlabel=f"seconds since {self._began}")
        waiting.yaxis.get_major_locator().set_params(integer=True)
        for axes in (messages, nbytes, waiting):
            axes.set_ylim(bottom=0)
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        for axes in figure.axes:
            axes.grid(True, alpha=0.3)
        # a name may hold what matplotlib takes for a formula
        figure.suptitle(f"{printable(self._name)}: {self._what}", parse_math=False)
        return figure

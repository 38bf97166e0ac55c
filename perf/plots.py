"""Draws measurements: throughput and speed-up over payload size, latencies, scaling over senders and receivers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .measure import Measurement
from .round_trip import GRID

_BASELINE = "ringshm"
_SIZE = (9.0, 5.0)  # Inches.


def _runs(measurement: Measurement) -> list[float]:
    return [run for run in measurement.runs if run is not None]


def _style(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour for each name, the same in every panel of a plot; ringshm's is the first, floors are dashed."""
    ordered = list(dict.fromkeys(names))
    return {
        name: {
            "color": f"C{index}",
            "linestyle": "--" if name.startswith("floor") else "-",
            "linewidth": 2.5 if name.startswith(_BASELINE) else 1.2,
        }
        for index, name in enumerate(sorted(ordered, key=lambda name: name != _BASELINE))
    }


def _over(
    axes: Any, rows: list[Measurement], x: Callable[[Measurement], float], y: Callable[[Measurement], list[float]]
) -> None:
    """A line for each contender, through the medians; the bars reach from the least run to the greatest."""
    for name, style in _style(row.contender for row in rows).items():
        points = sorted((x(row), sorted(values)) for row in rows if row.contender == name and (values := y(row)))
        if points:
            middle = [median(values) for _, values in points]
            spread = [
                [at - values[0] for at, (_, values) in zip(middle, points, strict=True)],
                [values[-1] - at for at, (_, values) in zip(middle, points, strict=True)],
            ]
            axes.errorbar([at for at, _ in points], middle, yerr=spread, label=name, marker="o", capsize=2, **style)
    axes.grid(True, which="major", alpha=0.3)


def _throughput(rows: list[Measurement]) -> Figure | None:
    copies = [row for row in rows if row.question == "throughput" and "nbytes" in row.at]
    in_place = [row for row in rows if row.question == "throughput" and "nbytes in place" in row.at]
    if not copies:
        return None
    figure = Figure(figsize=(2 * _SIZE[0] * 0.75, _SIZE[1]), layout="constrained")
    for axes, title, key, some in zip(
        figure.subplots(1, 2, sharey=True), ("owned copies", "in place"), ("nbytes", "nbytes in place"),
        (copies, in_place), strict=True,
    ):  # fmt: skip
        _over(axes, some, lambda row, key=key: row.at[key], _runs)  # type: ignore[misc]
        axes.set(xscale="log", yscale="log", title=title, xlabel="bytes of a message")
        if some:
            axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("messages/s, one sender, one receiver")
    return figure


def _speed_up(rows: list[Measurement]) -> Figure | None:
    copies = [row for row in rows if row.question == "throughput" and "nbytes" in row.at]
    ours = {row.at["nbytes"]: row for row in copies if row.contender == _BASELINE and row.runs}

    def times(row: Measurement) -> list[float]:
        both = zip(ours[row.at["nbytes"]].runs, row.runs, strict=True)
        return [mine / theirs for mine, theirs in both if mine and theirs]

    others = [row for row in copies if row.contender != _BASELINE and row.at["nbytes"] in ours and row.runs]
    if not others:
        return None
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    _over(axes, others, lambda row: row.at["nbytes"], times)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="bytes of a message", ylabel="ringshm is faster by, times")
    axes.legend(fontsize="small", ncols=2)
    return figure


def _latency(rows: list[Measurement]) -> Figure | None:
    some = [row for row in rows if row.question == "round_trip" and row.quantiles and row.at["nbytes"] == 64]
    if not some:
        return None
    cases = list(dict.fromkeys(row.case for row in some))
    styles = _style(row.contender for row in some)
    figure = Figure(figsize=(_SIZE[0] * 0.75 * len(cases), _SIZE[1]), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), sharey=True, squeeze=False)[0], cases, strict=True):
        for row in some:
            if row.case == case:
                curve = [median(values) for values in zip(*row.quantiles, strict=True)]
                axes.plot(curve, GRID, label=row.contender, **styles[row.contender])
        axes.set(xscale="log", title=case, xlabel="round trip, us")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("% of round trips that took no longer")
    return figure


def _scaling(rows: list[Measurement]) -> Figure | None:
    some = [row for row in rows if row.question == "table" and row.metric == "messages/s"]
    if not some:
        return None
    shapes = list(dict.fromkeys((row.at["senders"], row.at["receivers"]) for row in some))
    figure = Figure(figsize=(2 * _SIZE[0] * 0.75, _SIZE[1]), layout="constrained")
    for batches, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        mine = [row for row in some if row.at["batches"] == batches]
        _over(axes, mine, lambda row: shapes.index((row.at["senders"], row.at["receivers"])), _runs)
        axes.set_xticks(range(len(shapes)), [f"{senders}x{receivers}" for senders, receivers in shapes])
        axes.set(title="put and get_many" if batches else "put and get", xlabel="senders x receivers")
        axes.legend(fontsize="small")
    figure.axes[0].set(ylabel="small messages/s", ylim=(0, None))
    return figure


def draw(measurements: list[Measurement], directory: Path, title: dict[str, str]) -> list[Path]:
    """Write a plot for each question that was asked and has one; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    plots = {"throughput": _throughput, "speed_up": _speed_up, "latency": _latency, "scaling": _scaling}
    for name, plot in plots.items():
        if figure := plot(measurements):
            figure.suptitle(f"ringshm {title['commit']}, {title['processor']}, {title['Python']}", fontsize="small")
            path = directory / f"{name}.svg"
            with matplotlib.rc_context({"svg.hashsalt": "ringshm", "svg.fonttype": "none"}):
                figure.savefig(path, metadata={"Date": None})
            written.append(path)
    return written

"""Draws measurements: throughput and speed-up over payload size, latencies, scaling over senders and receivers.

A plot shows ringshm, the floors, and the few others that come closest; the report has all. Bars of error reach from the
least run to the greatest. `python -m perf.plots figures.json plots` draws those of a run that `--json` has kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from .measure import Measurement, advantages
from .round_trip import GRID

_BASELINE = "ringshm"
_MOST_OTHERS = 3
_SIZE = (7.0, 4.5)  # Inches, of a panel.
_ROOM = {"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.5}  # Of a name that lies on lines.
_DODGE = 0.06  # Decades, or units, from one contender's points to the next one's, so that bars of error stand apart, if
_MOST_DODGE = 0.15  # the last one's are not so far from the first one's.

_STEPPERS = (
    _BASELINE, "SyncVectorEnv", "AsyncVectorEnv", "SubprocVecEnv", "ParallelEnv", "PufferLib Multiprocessing",
    "EnvPool (C++)",
)  # fmt: skip

_Runs = Callable[[Measurement], list[float]]


def _runs(measurement: Measurement) -> list[float]:
    return [run for run in measurement.runs if run is not None]


def _is_ours(name: str) -> bool:
    return name.startswith(_BASELINE)


def _few(rows: list[Measurement]) -> list[str]:
    """The contenders to show: ours, the floors, and the others that come closest to ringshm where both were timed."""
    baseline = {(row.case, row.metric): row for row in rows if row.contender == _BASELINE}
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ours = baseline.get((row.case, row.metric))
        if ours and not row.contender.startswith((_BASELINE, "floor")):
            ratios.setdefault(row.contender, []).extend(advantages(ours, row))
    others = sorted((name for name in ratios if ratios[name]), key=lambda name: median(ratios[name]))[:_MOST_OTHERS]
    names = dict.fromkeys(row.contender for row in rows if _runs(row))
    return [name for name in names if _is_ours(name) or name.startswith("floor") or name in others]


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """A colour for each name, the same in every panel of a plot; ringshm's is the first, floors are dashed."""
    return {
        name: {
            "color": f"C{index}",
            "linestyle": "--" if name.startswith("floor") else "-",
            "linewidth": 2.5 if _is_ours(name) else 1.5,
        }
        for index, name in enumerate(sorted(names, key=lambda name: name != _BASELINE))
    }


def _spread(values: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """The medians, and how far the least and the greatest are from them."""
    middle = [median(some) for some in values]
    pairs = list(zip(middle, values, strict=True))
    return middle, [[at - min(some) for at, some in pairs], [max(some) - at for at, some in pairs]]


def _over_sizes(axes: Any, rows: list[Measurement], key: str, y: _Runs, styles: dict[str, dict[str, Any]]) -> None:
    """A line for each contender over the bytes of a message, named at its end."""
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    _lines(axes, rows, key, y, styles, "size of a message")


def _lines(
    axes: Any, rows: list[Measurement], key: str, y: _Runs, styles: dict[str, dict[str, Any]], label: str
) -> None:
    """A line for each contender, named at its end."""
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, which="major", alpha=0.3)
    ends, dodge = [], min(_DODGE, _MOST_DODGE / len(styles))
    for index, (name, style) in enumerate(styles.items()):
        points = sorted((row.at[key], values) for row in rows if row.contender == name and (values := y(row)))
        if points:
            sizes = [nbytes * 10 ** (dodge * index) for nbytes, _ in points]
            middle, error = _spread([values for _, values in points])
            axes.errorbar(sizes, middle, yerr=error, marker="o", markersize=4, capsize=3, elinewidth=1, **style)
            ends.append((sizes[-1], middle[-1], name, style["color"]))
    if ends:
        least, most = axes.get_xlim()
        axes.set_xlim(least, most * (most / least) ** 0.25)  # Room for the names.
    _name_ends(axes, ends)


def _name_ends(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Names at the ends of lines; one that would lie on another moves up."""
    axes.figure.draw_without_rendering()  # Only then is it known where on the page a point lies.
    points = axes.figure.dpi / 72
    taken: list[tuple[float, float]] = []
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        left, bottom = axes.transData.transform((x, y))
        height = bottom
        while any(abs(left - other) < 90 * points and abs(height - level) < 11 * points for other, level in taken):
            height += points
        taken.append((left, height))
        axes.annotate(
            name, (x, y), xytext=(8, (height - bottom) / points), textcoords="offset points", color=color,
            va="center", fontsize="small", annotation_clip=False, bbox=_ROOM,
        )  # fmt: skip


def _throughput(rows: list[Measurement]) -> Figure | None:
    some = [row for row in rows if row.question == "throughput"]
    panels = {"owned copies": "nbytes", "in place": "nbytes in place"}
    panels = {title: key for title, key in panels.items() if any(key in row.at and _runs(row) for row in some)}
    if "owned copies" not in panels:
        return None
    figure = Figure(figsize=(_SIZE[0] * len(panels), _SIZE[1]), layout="constrained")
    subplots = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, key) in zip(subplots, panels.items(), strict=True):
        mine = [row for row in some if key in row.at]
        axes.set_title(title)
        _over_sizes(axes, mine, key, _runs, _styles(_few(mine)))
    figure.axes[0].set_ylabel("messages/s, one sender, one receiver")
    return figure


def _speed_up(rows: list[Measurement]) -> Figure | None:
    copies = [row for row in rows if row.question == "throughput" and "nbytes" in row.at]
    ours = {row.at["nbytes"]: row for row in copies if row.contender == _BASELINE and row.runs}

    def times(row: Measurement) -> list[float]:
        return advantages(ours[row.at["nbytes"]], row)

    others = [row for row in copies if row.contender != _BASELINE and row.at["nbytes"] in ours and row.runs]
    if not others:
        return None
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="black", linewidth=1)
    axes.set_ylabel("ringshm is faster by, times")
    _over_sizes(axes, others, "nbytes", times, _styles([_BASELINE, *_few(copies)]))
    return figure


def _latency(rows: list[Measurement]) -> Figure | None:
    some = [row for row in rows if row.question == "round_trip" and row.quantiles and row.at["nbytes"] == 64]
    if not some:
        return None
    cases = list(dict.fromkeys(row.case for row in some))
    styles = _styles(_few(some))
    figure = Figure(figsize=(_SIZE[0] * len(cases), _SIZE[1]), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), sharey=True, squeeze=False)[0], cases, strict=True):
        axes.set(xscale="log", title=case, xlabel="round trip, us")
        axes.grid(True, alpha=0.3)
        mine = [row for row in some if row.case == case and row.contender in styles]
        for number, row in enumerate(mine):
            style = styles[row.contender]
            curve = [median(values) for values in zip(*row.quantiles, strict=True)]
            axes.plot(curve, GRID, **style)
            at = len(GRID) * (number + 1) // (len(mine) + 2)  # Each name at a height of its own.
            axes.annotate(
                row.contender, (curve[at], GRID[at]), xytext=(6, 0), textcoords="offset points",
                color=style["color"], fontsize="small", va="center", bbox=_ROOM,
            )  # fmt: skip
    figure.axes[0].set_ylabel("% of round trips that took no longer")
    return figure


def _scaling(rows: list[Measurement]) -> Figure | None:
    some = [row for row in rows if row.question == "table" and row.metric == "messages/s" and _runs(row)]
    if not some:
        return None
    shapes = list(dict.fromkeys((row.at["senders"], row.at["receivers"]) for row in some))
    styles = _styles(_few(some))
    figure = Figure(figsize=(_SIZE[0] * 2, _SIZE[1]), layout="constrained")
    for batches, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        mine = [row for row in some if row.at["batches"] == batches]
        names = [name for name in styles if any(row.contender == name for row in mine)]
        width = 0.8 / max(1, len(names))
        for index, name in enumerate(names):
            bars = [row for row in mine if row.contender == name]
            left = [shapes.index((row.at["senders"], row.at["receivers"])) + width * index for row in bars]
            middle, error = _spread([_runs(row) for row in bars])
            color = styles[name]["color"]
            axes.bar(left, middle, width * 0.9, yerr=error, label=name, color=color, capsize=3)
        middles = [position + width * (len(names) - 1) / 2 for position in range(len(shapes))]
        axes.set_xticks(middles, [f"{senders} x {receivers}" for senders, receivers in shapes])
        axes.set(title="put and get_many" if batches else "put and get", xlabel="senders x receivers")
        axes.grid(True, axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, ncols=len(names), loc="upper left")
    figure.axes[0].set(ylabel="small messages/s", ylim=(0, 1.1 * figure.axes[0].get_ylim()[1]))
    figure.axes[0].yaxis.set_major_formatter("{x:,.0f}")
    return figure


def _vector_env(rows: list[Measurement]) -> Figure | None:
    some = [row for row in rows if row.question == "vector_env" and _runs(row) and row.contender in _STEPPERS]
    panels = [
        (game, metric)
        for metric in ("steps/s", "steps/s beside a load")
        for game in dict.fromkeys(row.case.rpartition(" ")[2] for row in some)
    ]
    if not panels:
        return None
    figure = Figure(figsize=(_SIZE[0] * 2, _SIZE[1] * len(panels) / 2), layout="constrained")
    styles = _styles([name for name in _STEPPERS if any(row.contender == name for row in some)])
    for axes, (game, metric) in zip(figure.subplots(2, len(panels) // 2, squeeze=False).flat, panels, strict=True):
        mine = [row for row in some if row.case.endswith(game) and row.metric == metric]
        axes.set(title=f"{game}, {metric}")
        _lines(axes, mine, "environments", _runs, styles, "environments")
        counts = sorted({row.at["environments"] for row in mine})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    return figure


def draw(measurements: list[Measurement], directory: Path, title: dict[str, str]) -> list[Path]:
    """Write a plot for each question that was asked and has one; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    plots = {
        "throughput": _throughput, "speed_up": _speed_up, "latency": _latency, "scaling": _scaling,
        "vector_env": _vector_env,
    }  # fmt: skip
    for name, plot in plots.items():
        if figure := plot(measurements):
            figure.suptitle(f"ringshm {title['commit']}, {title['processor']}, {title['Python']}", fontsize="small")
            path = directory / f"{name}.svg"
            with matplotlib.rc_context({"svg.hashsalt": "ringshm", "svg.fonttype": "none"}):
                figure.savefig(path, metadata={"Date": None})
            written.append(path)
    return written


def main(figures: str, directory: str) -> None:
    """Draw what `--json` has kept."""
    kept = json.loads(Path(figures).read_text())
    for path in draw([Measurement(**row) for row in kept["measurements"]], Path(directory), kept["header"]):
        print(f"wrote {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Shows measurements as tables: medians, their spread, and how they compare with ringshm; and as JSON."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ringshm

from . import targets
from .contenders import Contender
from .measure import Measurement, advantages

_BASELINE = "ringshm"
_FLOORS = ("floor", "actors alone")  # Compared with, but no contenders.


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def busy_cores(seconds: float = 0.5) -> str:
    """How many cores work on something else. With none to spare, both ends share one: spinning is lost."""

    def ticks() -> tuple[int, int]:
        user, nice, system, idle, iowait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        return user + nice + system + sum(rest), idle + iowait

    try:
        before = ticks()
        time.sleep(seconds)
        after = ticks()
    except (OSError, ValueError):
        return "unknown"
    busy, idle = after[0] - before[0], after[1] - before[1]
    return f"{busy / max(1, busy + idle) * (os.cpu_count() or 1):.1f} of {os.cpu_count()} cores"


def compiled_path() -> str:
    """Whether ringshm's compiled path is in use, and why not."""
    return f"not in use: {ringshm.accelerated}" if ringshm.accelerated else "in use"


def header(contenders: list[Contender], missing: dict[str, str]) -> dict[str, str]:
    """Where, when and with what the measurements were made."""
    usable = len(os.sched_getaffinity(0))
    changed = " with local changes" if _git("status", "--porcelain") else ""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores ({usable} usable)",
        "busy before": busy_cores(),
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiled path": compiled_path(),
        "commit": (_git("rev-parse", "--short", "HEAD") or "none") + changed,
        "start method": "fork, for everyone",
        **{other.name: f"{other.version()}; bounded by {other.bounded}" for other in contenders},
        **{name: f"skipped: {reason}" for name, reason in missing.items()},
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _spread(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{_number(ordered[0])} .. {_number(ordered[-1])}" if len(ordered) > 1 else ""


def _present(measurement: Measurement) -> list[float]:
    return [run for run in measurement.runs if run is not None]


def _beside(rows: list[Measurement]) -> list[Measurement]:
    """Those that are not compared while others of the same case are: they get a line, not a row."""
    compared = any(row.higher_is_better is not None for row in rows)
    return [row for row in rows if compared and row.higher_is_better is None]


def _print_detail(console: Console, rows: list[Measurement]) -> None:
    for contender, group in groupby(_beside(rows), key=lambda row: row.contender):
        parts = ", ".join(f"{row.metric} {_number(median(runs))}" for row in group if (runs := _present(row)))
        if parts:
            console.print(f"  [dim]{contender}: {escape(parts)}[/dim]", highlight=False)
    for row in rows:
        largest = sorted(row.detail.items(), key=lambda item: -item[1])[:12]
        if largest:
            parts = ", ".join(f"{name} {_number(value)}" for name, value in largest)
            console.print(f"  [dim]{row.contender}, {row.metric}: {escape(parts)}[/dim]", highlight=False)


def show(console: Console, title: dict[str, str], measurements: list[Measurement]) -> None:
    """Print the header, a table for each case and metric, and a list of where ringshm loses."""
    for name, value in title.items():
        console.print(f"[bold]{name:>16}[/bold]  {escape(value)}", highlight=False)
    losses: list[str] = []
    compared = 0
    for (question, case), group in groupby(measurements, key=lambda m: (m.question, m.case)):
        rows = list(group)
        table = Table(title=f"\n{question}: {case}", title_justify="left", title_style="bold")
        table.add_column("contender")
        table.add_column("metric")
        for column in ["median", "min .. max", "ringshm better by", "min .. max"]:
            table.add_column(column, justify="right")
        for row in [row for row in rows if row not in _beside(rows)]:
            runs = _present(row)
            same = (m for m in rows if m.contender == _BASELINE and m.metric == row.metric and m is not row)
            ours = next(same, None)
            ratios = advantages(ours, row) if ours else []
            cells = [_number(median(runs)), _spread(runs)] if runs else ["-", ""]
            if ratios:
                times = median(ratios)
                compared += 1
                color = "green" if times >= 1 else "red"
                cells += [f"[{color}]{times:.2f}x[/{color}]", _spread(ratios)]
                if times < 1 and not row.contender.startswith((_BASELINE, *_FLOORS)):
                    losses.append(f"{question}, {case}, {row.metric}: {row.contender}, {times:.2f}x")
            table.add_row(row.contender, row.metric, *cells)
        console.print(table)
        for note in dict.fromkeys(f"{row.contender}: {row.note}" for row in rows if row.note):
            console.print(f"  [red]{escape(note)}[/red]", highlight=False)
        _print_detail(console, rows)
    console.print("\n[bold]Where ringshm loses[/bold] (its median advantage is below 1):")
    for loss in losses or [f"nowhere, in {compared} comparisons"]:
        console.print(f"  {loss}", highlight=False)
    _show_targets(console, targets.answers(measurements))


def _show_targets(console: Console, answers: list[targets.Answer]) -> None:
    """A table of what was asked for, and what was got."""
    if not answers:
        return
    title = "\nAsked and got: how many times as good as the other"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("question", "case", "beside"):
        table.add_column(column)
    for column in ("asked", "got", "min .. max"):
        table.add_column(column, justify="right")
    for question, group in groupby(answers, key=lambda answer: answer.target.question):
        table.add_section()
        for number, answer in enumerate(group):
            target, got = answer.target, answer.got
            case = answer.case if target.ours == _BASELINE else f"{target.ours}: {answer.case}"
            case += f", {target.metric}" if target.metric.startswith("p") else ""  # Of several that are compared.
            color = {True: "green", False: "red", None: "default"}[answer.reached]
            table.add_row(
                "" if number else question,
                case,
                answer.other,
                f"{target.asked:.2f}x" if target.asked is not None else "",
                f"[{color}]{got:.2f}x[/{color}]" if got is not None else "-",
                _spread(answer.ratios) or answer.why_none,
            )
    console.print(table)
    asked = [answer for answer in answers if answer.reached is not None]
    console.print(f"{sum(bool(answer.reached) for answer in asked)} of {len(asked)} reached", highlight=False)


def as_json(title: dict[str, str], measurements: list[Measurement]) -> dict[str, Any]:
    """Everything, every run included."""
    return {
        "header": title,
        "measurements": [asdict(measurement) for measurement in measurements],
        "targets": [asdict(answer) | {"got": answer.got} for answer in targets.answers(measurements)],
    }

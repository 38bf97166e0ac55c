"""The command line, ``python -m perf``: which questions to ask, how often, and where the answers go; or the soak."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import (
    counts,
    idle,
    in_place,
    killed,
    memory,
    one_process,
    pipeline,
    ray_channel,
    ray_latest,
    report,
    round_trip,
    slow_reset,
    soak,
    table,
    targets,
    threads,
    throughput,
    top,
    vector_env,
)
from .contenders import Contender, everyone, installed
from .measure import Measurement, Options

_QUESTIONS = {
    "throughput": throughput,
    "one_process": one_process,
    "in_place": in_place,
    "round_trip": round_trip,
    "idle": idle,
    "table": table,
    "threads": threads,
    "pipeline": pipeline,
    "vector_env": vector_env,
    "slow_reset": slow_reset,
    "ray_channel": ray_channel,
    "ray_latest": ray_latest,
    "killed": killed,
    "counts": counts,
    "memory": memory,
    "top": top,
    "targets": targets,
}
_ALL = [name for name in _QUESTIONS if name != "targets"]  # That is a part of the others.


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m perf", description="Measure ringshm against others.",
        epilog="python -m perf soak --help: whether it stays whole while workers are killed.",
    )  # fmt: skip
    parser.add_argument("questions", nargs="*", help=f"of {', '.join(_QUESTIONS)}; default: all but targets")
    parser.add_argument("--quick", action="store_true", help="three short runs of fewer cases: a smoke test")
    parser.add_argument("--only", metavar="NAMES", help="contenders, as in ringshm,mp.Queue; default: all")
    parser.add_argument("--runs", type=int, help="runs of each timing (default 7)")
    parser.add_argument("--seconds", type=float, help=f"that one timing shall take (default {Options.seconds})")
    parser.add_argument(
        "--patience",
        type=float,
        default=Options.patience,
        metavar="SECONDS",
        help="leave out whose runs of one very large size would take longer (default %(default)s)",
    )
    parser.add_argument(
        "--pin",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="where there is one sender and one receiver, each on a core of its own, for everyone",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run there")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="draw plots there (needs matplotlib)")
    arguments = parser.parse_args()
    if unknown := set(arguments.questions) - set(_QUESTIONS):
        parser.error(f"no such question: {', '.join(sorted(unknown))}; there are {', '.join(_QUESTIONS)}")
    if arguments.runs is not None and arguments.runs < 1:
        parser.error("--runs takes a positive number")
    names = {contender.name for contender in everyone()}
    if unknown := set(arguments.only.split(",") if arguments.only else ()) - names:
        parser.error(f"no such contender: {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    if arguments.seconds is not None and arguments.seconds <= 0:
        parser.error("--seconds takes a positive number")
    if arguments.plots and find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib, which is not installed")
    return arguments


def _installed(only: str | None = None) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that are there, of those named; and those that are not, with the reason."""
    return installed(one for one in everyone() if not only or one.name in only.split(","))


def main() -> int:
    """Measure, show, and write; returns 1 where a contender failed, or the soak."""
    if sys.argv[1:2] == ["soak"]:
        return soak.main(sys.argv[2:])
    arguments = _parse()
    options = Options(
        arguments.runs or (3 if arguments.quick else Options.runs),
        arguments.seconds or (0.05 if arguments.quick else Options.seconds),
        pin=arguments.pin, quick=arguments.quick, patience=arguments.patience,
    )  # fmt: skip
    began = time.monotonic()
    contenders, missing = _installed(arguments.only)
    console = Console(width=None if sys.stdout.isatty() else 120)
    title = report.header(contenders, missing)
    title["cores"] = "one for each end, 1 to 1" if arguments.pin else "as the scheduler likes: see each spread"
    title["runs"] = f"{options.runs} of each timing, of about {options.seconds} s"
    measurements: list[Measurement] = []
    questions = {name: _QUESTIONS[name] for name in arguments.questions or _ALL}
    columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")]
    with Progress(*columns, console=console, transient=True) as progress:
        total = sum(question.steps(contenders, options) for question in questions.values())
        task = progress.add_task("", total=total)

        def step(description: str) -> None:
            progress.update(task, advance=1, description=description)

        for question in questions.values():
            measurements += question.measure(contenders, replace(options, step=step))
            if arguments.json:  # What there is, should a later question be interrupted.
                arguments.json.write_text(json.dumps(report.as_json(title, measurements), indent=1))
    title["busy after"] = report.busy_cores()
    title["took"] = f"{time.monotonic() - began:.0f} s"
    report.show(console, title, measurements)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(title, measurements), indent=1))
    if arguments.plots:
        from . import plots  # matplotlib is not needed without

        for path in plots.draw(measurements, arguments.plots, title):
            console.print(f"wrote {path}", highlight=False)
    return int(any(measurement.note and not measurement.left_out for measurement in measurements))


if __name__ == "__main__":
    sys.exit(main())

"""The command line, ``python -m perf``: which questions to ask, how often, and where the answers go; or the soak."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import counts, in_place, report, round_trip, soak, throughput
from .contenders import Contender, everyone
from .measure import Measurement, Options

_QUESTIONS = {"throughput": throughput, "round_trip": round_trip, "in_place": in_place, "counts": counts}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m perf", description="Measure ringshm against others.",
        epilog="python -m perf soak --help: whether it stays whole while workers are killed.",
    )  # fmt: skip
    parser.add_argument("questions", nargs="*", help=f"of {', '.join(_QUESTIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="three short runs: a smoke test")
    parser.add_argument("--runs", type=int, help="runs of each timing (default 7)")
    parser.add_argument("--pin", action="store_true", help="each end on a core of its own, for everyone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run there")
    arguments = parser.parse_args()
    if unknown := set(arguments.questions) - set(_QUESTIONS):
        parser.error(f"no such question: {', '.join(sorted(unknown))}; there are {', '.join(_QUESTIONS)}")
    if arguments.runs is not None and arguments.runs < 1:
        parser.error("--runs takes a positive number")
    return arguments


def _installed() -> tuple[list[Contender], dict[str, str]]:
    present: list[Contender] = []
    missing: dict[str, str] = {}
    for contender in everyone():
        try:
            contender.version()
        except ImportError as error:
            missing[contender.name] = str(error)
        else:
            present.append(contender)
    return present, missing


def main() -> int:
    """Measure, show, and write; returns 1 where a contender failed, or the soak."""
    if sys.argv[1:2] == ["soak"]:
        return soak.main(sys.argv[2:])
    arguments = _parse()
    runs = arguments.runs or (3 if arguments.quick else 7)
    seconds = 0.12 if arguments.quick else 0.5
    contenders, missing = _installed()
    console = Console(width=None if sys.stdout.isatty() else 120)
    title = report.header(contenders, missing)
    title["cores"] = "one for each end (--pin)" if arguments.pin else "as the scheduler likes: see each spread"
    measurements: list[Measurement] = []
    questions = {name: _QUESTIONS[name] for name in arguments.questions or _QUESTIONS}
    columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")]
    with Progress(*columns, console=console, transient=True) as progress:
        total = sum(question.steps(contenders, Options(runs)) for question in questions.values())
        task = progress.add_task("", total=total)

        def step(description: str) -> None:
            progress.update(task, advance=1, description=description)

        for question in questions.values():
            measurements += question.measure(contenders, Options(runs, seconds, step, arguments.pin))
    title["busy after"] = report.busy_cores()
    report.show(console, title, measurements)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(title, measurements), indent=1))
    return int(any(measurement.note for measurement in measurements))


if __name__ == "__main__":
    sys.exit(main())

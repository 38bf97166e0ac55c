"""What was asked of ringshm, and what it does: how many times as fast as others it shall be, case by case.

As a question, `targets` asks the other questions for the cases and contenders that the ratios need, and for nothing
else. Whatever was asked, the report then has a table of the ratios that were measured, beside those asked for. Each is
of contenders that take turns in one run: its median and its spread over the rounds. Only from 100 MB on do the runs of
a contender follow one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import median

from . import in_place, one_process, pipeline, round_trip, table, throughput
from .contenders import Contender
from .measure import WAY_METRIC, Case, Measurement, Options, advantages

_ANYBODY = "the best of the others"
_QUESTIONS = [throughput, one_process, in_place, table, round_trip, pipeline]
_QUICK = [throughput, one_process, in_place, table, round_trip]


@dataclass(frozen=True)
class Target:
    """In a case, by a metric, `ours` shall be at least `asked` times as good as `other`; below 1, it may be worse.

    `case` is how the case's name begins. Where `asked` is None, the ratio is only shown.
    """

    question: str
    case: str
    metric: str
    other: str
    asked: float | None
    ours: str = "ringshm"

    def is_for(self, question: str, case: str) -> bool:
        """Whether that is its case."""
        return question == self.question and case.startswith(self.case)

    def needs(self, name: str) -> bool:
        """Whether it compares that contender."""
        return name in (self.ours, self.other) or self.other == _ANYBODY


def _targets() -> Iterator[Target]:
    queue, fifo, pair, pipe = "mp.Queue", "faster-fifo", "py-sharedmemory", "mp.Pipe (bytes)"
    floor = "floor: np.copyto"
    throughputs: dict[str, dict[str, float | None]] = {
        "dict": {queue: 7, fifo: 6},
        "64 B bytes": {queue: 15, fifo: 15},
        "1 KB array": {queue: 20, fifo: 12, pair: 80},
        "10 KB array": {queue: 18, fifo: 12, pair: 70},
        "100 KB array": {fifo: 3.5, pair: 20, floor: None},
        "1 MB array": {fifo: 10, pair: 7, floor: None},
        "10 MB array": {pair: 2, floor: 1 / 1.3},
        "100 MB array": {pair: 2.5, floor: 1 / 1.3},
    }
    for case, asked in throughputs.items():
        for other, times in asked.items():
            yield Target("throughput", f"{case},", "messages/s", other, times)
    for shape in ("1 x 10", "10 x 1", "3 x 20", "20 x 3", "20 x 20"):
        yield Target("table", f"{shape}, put and get,", "messages/s", queue, 3.5)
        yield Target("table", f"{shape}, put and get,", "messages/s", fifo, 2)
        yield Target("table", f"{shape}, put and get_many", "messages/s", fifo, 1.5)
    for case, times in {"64 bytes": 1 / 2, "dict": 1 / 1.1, "100 messages of 64 bytes": 1 / 2}.items():
        yield Target("one_process", f"{case},", WAY_METRIC, "cloudtoid", times)
    for size in ("1 KB", "1 MB"):
        for how in ("untyped", "typed"):
            yield Target("in_place", f"loan and borrow of {size}, {how}", WAY_METRIC, "iceoryx2", 1)
            yield Target("in_place", f"loan and borrow of {size}, {how}", WAY_METRIC, "kickmsg", None)
    yield Target("in_place", "get_batch(32)", WAY_METRIC, "np.copyto, field by field", 1 / 1.15)
    alone, crowded = "64 B, 2 processes", "64 B, 8 processes on 2 cores"
    yield Target("round_trip", alone, "p50 us", pipe, 10)
    yield Target("round_trip", alone, "p99 us", pipe, 1)
    yield Target("round_trip", alone, "p50 us", "iceoryx2 (bytes)", 2)
    yield Target("round_trip", alone, "p50 us", "cloudtoid (polling)", 1 / 3, "ringshm (spin)")
    for ours, case in (("ringshm (block)", alone), ("ringshm", crowded), ("ringshm (block)", crowded)):
        for metric in ("p50 us", "p99 us"):
            yield Target("round_trip", case, metric, pipe, 1, ours)
    for actors in ("1 actor ", "4 actors "):
        yield Target("pipeline", actors, "frames/s", _ANYBODY, 1)
        yield Target("pipeline", actors, "frames/s", "actors alone", 0.97)
        yield Target("pipeline", actors, "frames/s", "actors alone", 0.97, "ringshm, in place")


TARGETS = list(_targets())


@dataclass(frozen=True)
class Answer:
    """What was got for a target in one case: ratios, run by run; none, and the reason, where nobody was compared."""

    target: Target
    case: str
    other: str
    ratios: list[float] = field(default_factory=list)
    why_none: str = ""

    @property
    def got(self) -> float | None:
        """The median of the ratios."""
        return median(self.ratios) if self.ratios else None

    @property
    def reached(self) -> bool | None:
        """Whether it is what was asked for; None where nothing was."""
        if self.target.asked is None:
            return None
        return self.got is not None and self.got >= self.target.asked


def answers(measurements: list[Measurement]) -> list[Answer]:
    """Those for the targets whose cases were measured."""
    result = []
    for target in TARGETS:
        rows = [row for row in measurements if row.metric == target.metric and target.is_for(row.question, row.case)]
        ours = next((row for row in rows if row.contender == target.ours), None)
        if ours:
            result.append(_answer(target, ours, [row for row in rows if row.case == ours.case]))
    return result


def _answer(target: Target, ours: Measurement, rows: list[Measurement]) -> Answer:
    if target.other == _ANYBODY:
        floors = ("floor", "actors alone", "ringshm")
        others = [row for row in rows if not row.contender.startswith(floors)]
    else:
        others = [row for row in rows if row.contender == target.other]
    compared = [Answer(target, ours.case, row.contender, advantages(ours, row)) for row in others]
    if compared := [answer for answer in compared if answer.ratios]:
        return min(compared, key=lambda answer: answer.got or 0)
    notes = [row.note for row in (ours, *others) if row.note]
    return Answer(target, ours.case, target.other, why_none=notes[0] if notes else "not there to compare with")


def _wanted(case: Case, name: str) -> bool:
    return any(target.is_for(case.question, case.name) and target.needs(name) for target in TARGETS)


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``, at most."""
    questions = _QUICK if options.quick else _QUESTIONS
    return sum(question.steps(contenders, replace(options, wanted=_wanted)) for question in questions)


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Ask the other questions for what the targets need."""
    chosen, questions = replace(options, wanted=_wanted), _QUICK if options.quick else _QUESTIONS
    return [row for question in questions for row in question.measure(contenders, chosen)]

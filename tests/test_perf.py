"""The benchmark finds out contenders that are wrong, reports what it could not time, and its counts add up."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkContext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.workers import may_fork, shm_files

from ringshm.segment import layout

console = pytest.importorskip("rich.console")

from perf import crowd, in_place, one_process, report, round_trip, table, targets, throughput  # noqa: E402
from perf.__main__ import _installed  # noqa: E402
from perf.contenders import (  # noqa: E402
    Contender,
    Pair,
    Receiver,
    Sender,
    everyone,
    iceoryx,
    kickmsg,
    mp_queue,
    mp_simple_queue,
    ringshm_channel,
)  # fmt: skip
from perf.measure import (  # noqa: E402
    ARRAYS,
    BYTES,
    DICT,
    Case,
    Measurement,
    Options,
    Payload,
    Timing,
    advantages,
    alternate,
    repeated,
    ways_in_turn,
)  # fmt: skip
from perf.workers import CONTEXT, Failed, isolated  # noqa: E402

pytestmark = may_fork

ROOT = Path(__file__).resolve().parent.parent
RINGSHM = ringshm_channel.CONTENDERS[0]
LIMIT = 3.0  # Seconds until a check gives up.

Put = Callable[[Any], object]

# --- contenders that are wrong


def faulty(wrong: Callable[[Put], Put]) -> Contender:
    """A queue that works, but for what `wrong` makes of its `put`."""

    def make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
        pair = mp_simple_queue.CONTENDER.make(capacity, largest_nbytes, context)
        return replace(pair, sender=lambda: Sender(wrong(pair.sender().put)))

    return Contender("faulty", make=make)


def loses(put: Put) -> Put:
    return lambda message: None if message and message["a"] == 7 else put(message)


def doubles(put: Put) -> Put:
    return lambda message: [put(message) for _ in range(2 if message and message["a"] == 7 else 1)]


def swaps(put: Put) -> Put:
    held: list[Any] = []

    def late(message: Any) -> None:
        if message and message["a"] == 7:
            held.append(message)
            return
        put(message)
        while held:
            put(held.pop())

    return late


def alters(put: Put) -> Put:
    return lambda message: put({**message, "b": 34} if message and message["a"] == 7 else message)


def replaces(put: Put) -> Put:
    """One is lost and another comes twice: the counts alone are right."""
    return lambda message: put({**message, "a": 6} if message and message["a"] == 7 else message)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (loses, "2003 messages sent, 2002 received"), (doubles, "2003 messages sent, 2004 received"),
        (swaps, "out of order"), (alters, "message 7 arrived wrong"), (replaces, "too often: {6: 2}"),
    ],
)  # fmt: skip
def test_check_rejects_a_contender_that(wrong: Callable[[Put], Put], reason: str) -> None:
    with pytest.raises(Failed, match=reason):
        crowd.check(faulty(wrong), DICT, False, LIMIT)


def test_check_rejects_an_array_that_lies_where_the_next_one_will() -> None:
    def make(capacity: int, largest_nbytes: int, context: ForkContext) -> Pair:
        pair = mp_simple_queue.CONTENDER.make(capacity, largest_nbytes, context)

        def receiver() -> Receiver:
            get, out = pair.receiver().get, ARRAYS[1].make(0)

            def into_the_same() -> Any:
                if (message := get()) is None:
                    return None
                out[:] = message
                return out

            return Receiver(into_the_same)

        return replace(pair, receiver=receiver)

    with pytest.raises(Failed, match="too often"):
        crowd.check(Contender("faulty", make=make), ARRAYS[1], False, LIMIT)


@pytest.mark.parametrize(("senders", "receivers"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("batches", [False, True])
def test_check_passes_ringshm(senders: int, receivers: int, batches: bool) -> None:
    crowd.check(RINGSHM, DICT, batches, 20, senders, receivers)


@pytest.mark.parametrize("payload", ARRAYS[:6], ids=lambda payload: payload.name)
def test_room_for_the_longest_pickle_is_made(payload: Payload) -> None:
    crowd.check(RINGSHM, payload, False, 20)


def test_check_passes_in_place() -> None:
    for payload in throughput._IN_PLACE[:2]:
        crowd.check(ringshm_channel.IN_PLACE, payload, False, 20)
    in_place._check(Options(), in_place._TYPED)


@pytest.mark.parametrize("payload", [DICT, BYTES, ARRAYS[1]], ids=lambda payload: payload.name)
@pytest.mark.parametrize("name", ["ringshm", "faster-fifo", "cloudtoid", "mp.Queue", "py-sharedmemory"])
def test_contenders_hold_as_many_messages_as_they_are_given_room_for(name: str, payload: Payload) -> None:
    contender = next(contender for contender in everyone() if contender.name == name)
    if contender not in _installed()[0]:
        pytest.skip(f"{name} is not installed")
    pair, board = payload.pair(contender), crowd.Board(1, 1)

    def fill() -> None:
        put, message = pair.sender().put, payload.longest()
        while True:
            put(message)
            board.sent[0] += 1

    sender = CONTEXT.Process(target=fill, daemon=True)
    sender.start()
    try:
        assert crowd._await(lambda: board.sent[0] >= payload.capacity, 30), f"it held {board.sent[0]}"
        assert not crowd._await(lambda: board.sent[0] > payload.capacity, 0.2), f"it held {board.sent[0]}"
    finally:
        sender.kill()
        sender.join()
        pair.close()


def test_the_window_begins_when_everybody_has_taken_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that starts late is waited for: what it costs to start is not part of the rate."""
    monkeypatch.setattr(crowd, "_FIRST", 60.0)
    board = crowd.Board(1, 2)
    barrier, seen = CONTEXT.Barrier(2), CONTEXT.Event()

    def sample() -> None:
        crowd._sample(board, barrier, 0.0, 0.01)
        seen.set()

    sampler = CONTEXT.Process(target=sample, daemon=True)
    sampler.start()
    try:
        barrier.wait(LIMIT)
        board.sent[0] = board.received[0] = 1
        assert not seen.wait(0.1) and not board.stopped[0]
        board.received[1] = 1
        assert seen.wait(30) and board.stopped[0]
    finally:
        sampler.kill()
        sampler.join()


# --- in one process


def test_ways_take_turns_and_only_those_that_are_wanted() -> None:
    calls: list[str] = []

    @contextmanager
    def make() -> Iterator[dict[str, Any]]:
        yield {name: lambda count, name=name: calls.append(name) or 1e-6 * ord(name) for name in "abc"}

    options = Options(runs=3, seconds=0.001, wanted=lambda case, name: name != "b")
    rows = ways_in_turn(Case("q", "case"), make, options)
    assert [(row.contender, row.runs) for row in rows] == [("a", [97.0] * 3), ("c", [99.0] * 3)]
    with make() as ways:
        assert calls == [] and ways["a"](1) == 97e-6  # Those above were called in another process.


def test_ways_that_fail_are_reported() -> None:
    @contextmanager
    def make() -> Iterator[dict[str, Any]]:
        yield {"ringshm": repeated(lambda: 1 / 0)}

    (row,) = ways_in_turn(Case("q", "case"), make, Options(runs=1))
    assert row.runs == [] and row.note == "not timed: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("adapter", [ringshm_channel, iceoryx, kickmsg], ids=["ringshm", "iceoryx2", "kickmsg"])
def test_what_is_compared_in_place_reads_what_it_has_written(adapter: Any, typed: bool) -> None:
    pytest.importorskip({iceoryx: "iceoryx2", kickmsg: "kickmsg"}.get(adapter, "ringshm"))

    def pass_some() -> None:
        with adapter.in_place(1000, typed) as once:
            for _ in range(20):
                once()

    before = shm_files()
    isolated(pass_some, LIMIT)
    assert shm_files() == before


# --- turns


def count_calls(contender: Contender, count: int, runs: int) -> list[Timing]:
    if contender.name == "hangs":
        time.sleep(60)
    if contender.name == "raises":
        raise ValueError("broken")
    return [Timing(count / 1000, {"messages/s": 1000.0})] * runs


def test_contenders_that_fail_or_hang_are_reported_and_the_others_timed() -> None:
    contenders = [replace(RINGSHM, name=name) for name in ("ringshm", "hangs", "raises", "is wrong")]

    def check(contender: Contender) -> None:
        if contender.name == "is wrong":
            raise Failed("message 3 arrived wrong")

    steps: list[str] = []
    options = Options(runs=2, seconds=0.02, step=steps.append, margin=-11.0)  # They get some grace on top.
    measured = alternate(Case("q", "case"), contenders, options, check, count_calls, {"messages/s": True})
    assert [(row.contender, row.runs) for row in measured] == [
        ("ringshm", [1000.0, 1000.0]),
        *((name, [None, None]) for name in ("hangs", "raises", "is wrong")),
    ]
    notes = ["", *(f"not timed: {why}" for why in ("no result after 4 s: worker [", "ValueError: broken"))]
    assert [row.note[:40] for row in measured] == [*notes, "not timed: message 3 arrived wrong"]
    assert len(steps) == 4 * 3


def test_contenders_take_turns() -> None:
    steps: list[str] = []
    contenders = [replace(RINGSHM, name=name) for name in "abc"]
    options = Options(runs=3, seconds=0.02, step=steps.append)
    alternate(Case("q", "case"), contenders, options, lambda _: None, count_calls, {"messages/s": True})
    assert [step.split()[1][0] for step in steps[3:]] == [*"abc", *"bca", *"cab"]


def test_contenders_that_are_not_installed_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Contender("absent", module="no_such_module", make=mp_queue.CONTENDER.make)
    monkeypatch.setattr("perf.__main__.everyone", lambda: [absent, RINGSHM])
    assert _installed() == ([RINGSHM], {"absent": "No module named 'no_such_module'"})


def test_each_contender_can_be_named_in_a_list() -> None:
    names = [contender.name for contender in everyone()]
    assert len(set(names)) == len(names) and not [name for name in names if "," in name]


def test_sizes_that_do_not_fit_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "/dev/shm has" in throughput._no_room(Payload("huge", 4, 10**15))
    assert throughput._no_room(ARRAYS[0]) == ""
    monkeypatch.setattr(throughput, "_no_room", lambda _: "no room")
    measured = throughput.measure([RINGSHM], Options(runs=1))
    assert {(row.note, row.left_out) for row in measured} == {("left out: no room", True)}
    assert len(measured) == len([DICT, BYTES]) + len(ARRAYS) + len(throughput._IN_PLACE)


# --- counts


@pytest.mark.parametrize("contender", [RINGSHM, mp_queue.CONTENDER], ids=lambda contender: contender.name)
def test_counts_of_senders_and_receivers_add_up(contender: Contender) -> None:
    board, pair = crowd.Board(3, 4), DICT.pair(contender)
    sources = [partial(board.until_stopped, DICT.make(index)) for index in range(3)]
    try:
        rate = crowd.window(board, pair, sources, 0.2, 20)
    finally:
        pair.close()
    assert sum(board.sent) == sum(board.received) >= rate * 0.2
    assert all(board.sender_ended) and all(board.receiver_ended)


def test_table_tells_the_fewest_the_median_and_the_most() -> None:
    (timing,) = table.time(2, 3, True, Options(seconds=0.1), RINGSHM, 0, 1)
    values = timing.values
    for who in ("sender", "receiver"):
        assert values[f"fewest per {who}"] <= values[f"median per {who}"] <= values[f"most per {who}"]
    assert values["fewest per sender"] + values["most per sender"] >= values["most per receiver"]


# --- reports and plots


def made_up() -> list[Measurement]:
    """Rows such as each plot is made of, in which ringshm is twice as fast as "other", and half as fast as "better"."""
    rows = []
    factors = {"ringshm": 1.0, "other": 0.5, "better": 2.0}
    for name, factor in factors.items():
        for axis in ("nbytes", "nbytes in place"):
            for nbytes in (10, 1000, 10**6):
                rates: list[float | None] = [factor * 1e9 / (nbytes + 1000 + wobble) for wobble in (0, 1, 2)]
                where = {axis: nbytes}
                rows.append(Measurement("throughput", f"{nbytes} {axis}", name, "messages/s", True, rates, at=where))
        at = {"nbytes": 64, "processes": 2}
        quantiles = [[factor * share for share in range(1, 112)]] * 3
        trips: list[float | None] = [1 / factor] * 3
        rows.append(Measurement("round_trip", "64 B", name, "p50 us", False, trips, quantiles=quantiles, at=at))
        for batches in (0, 1):
            where = {"senders": 1, "receivers": 10, "batches": batches}
            rows.append(Measurement("table", f"1 x 10 {batches}", name, "messages/s", True, [factor] * 3, at=where))
    failed = Measurement("throughput", "10 nbytes", "broken", "messages/s", True, [None] * 3, "hung", at={"nbytes": 10})
    absent = Measurement("throughput", "10 nbytes", "slow", "messages/s", True, note="left out", at={"nbytes": 10})
    alone = Measurement(
        "throughput", "1000000000 nbytes", "ringshm", "messages/s", True, note="left out", at={"nbytes": 10**9}
    )
    return sorted([*rows, failed, absent, alone], key=lambda row: (row.question, row.case))


def test_report_tells_ratios_with_their_spread_failures_and_losses() -> None:
    text = io.StringIO()
    report.show(console.Console(file=text, width=160), {"commit": "abc"}, made_up())
    shown = text.getvalue()
    row = next(line for line in shown.splitlines() if "other" in line and "2.00x" in line)
    assert "2 .. 2" in row
    assert "broken: hung" in shown and "slow: left out" in shown
    losses = shown.split("Where ringshm loses")[1]
    assert "better, 0.50x" in losses and "other" not in losses


def test_report_says_whether_the_compiled_path_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for accelerated, said in (("", "in use"), ("RINGSHM_PURE is set", "not in use: RINGSHM_PURE is set")):
        monkeypatch.setattr("ringshm.accelerated", accelerated)
        assert report.header([], {})["compiled path"] == said


# --- targets


def test_each_target_is_for_a_case_that_a_question_has_and_for_contenders_that_it_compares() -> None:
    options = Options(wanted=targets._wanted)
    cases = [
        *((case, [other.name for other in some]) for case, _, some in throughput._plan(everyone(), options)),
        *((case, [other.name for other in some]) for case, *_, some in table._plan(everyone(), options)),
        *((case, round_trip._NAMES) for case, _, _ in round_trip._plan(options)),
        *((case, None) for case, _ in [*in_place._cases(everyone(), options), *one_process._plan(everyone(), options)]),
    ]
    for target in targets.TARGETS:
        if target.question == "pipeline" or "8 processes" in target.case:
            continue  # Their cases are called after the machine's cores.
        (names,) = [names for case, names in cases if target.is_for(case.question, case.name)]
        assert names is None or {target.ours, target.other} <= set(names), target
    for case, names in cases:
        for name in names or []:
            assert targets._wanted(case, name) or case.question == "round_trip"


def test_targets_tell_what_was_got_beside_what_was_asked_for() -> None:
    def row(contender: str, runs: list[float | None], case: str = "dict, capacity 1000") -> Measurement:
        return Measurement("throughput", case, contender, "messages/s", True, runs)

    rows = [row("ringshm", [80.0, 70.0, 90.0]), row("mp.Queue", [10.0, None, 10.0]), row("faster-fifo", [40.0] * 3)]
    above, below = targets.answers(rows)
    assert (above.other, above.ratios, above.got, above.reached) == ("mp.Queue", [8.0, 9.0], 8.5, True)
    assert (below.other, below.got, below.reached) == ("faster-fifo", 2.0, False)
    text = io.StringIO()
    report.show(console.Console(file=text, width=160), {"commit": "abc"}, rows)
    asked = text.getvalue().split("Asked and got")[1]
    assert re.search(r"mp.Queue +│ +7.00x │ +8.50x │ +8 .. 9 ", asked) and re.search(r"6.00x │ +2.00x", asked)
    assert "1 of 2 reached" in asked
    (first, _) = report.as_json({}, rows)["targets"]
    assert first["got"] == 8.5 and first["target"]["asked"] == 7


def test_targets_say_why_there_is_nothing_to_compare_with() -> None:
    ours = Measurement("throughput", "dict, ...", "ringshm", "messages/s", True, [1.0])
    hung = Measurement("throughput", "dict, ...", "mp.Queue", "messages/s", True, [None], "not timed: it hung")
    assert [answer.why_none for answer in targets.answers([ours, hung])] == [
        "not timed: it hung", "not there to compare with",
    ]  # fmt: skip
    assert targets.answers([hung]) == []


def test_the_best_of_the_others_is_the_one_to_be_ahead_of() -> None:
    def row(contender: str, rate: float) -> Measurement:
        return Measurement("pipeline", "1 actor and a learner", contender, "frames/s", True, [rate, rate])

    rates = {"ringshm": 9.0, "mp.Queue": 6.0, "pyzmq": 10.0, "actors alone": 12.0, "ringshm, in place": 11.0}
    best, alone, _ = targets.answers([row(name, rate) for name, rate in rates.items()])
    assert (best.other, best.ratios, best.reached) == ("pyzmq", [0.9, 0.9], False)
    assert (alone.other, alone.got) == ("actors alone", 0.75)


def test_less_is_better_where_time_is_measured() -> None:
    ours, theirs = (
        Measurement("q", "case", name, "us", False, [us, us]) for name, us in (("ringshm", 2.0), ("b", 3.0))
    )
    assert advantages(ours, theirs) == [1.5, 1.5]


def test_a_plot_shows_the_few_that_come_closest_and_names_each_line_once(tmp_path: Path) -> None:
    plots = pytest.importorskip("perf.plots")
    rows = made_up()
    for row in made_up():
        if row.contender == "other" and row.question == "throughput":
            rows += [
                dataclasses.replace(row, contender=f"slow {k}", runs=[run and run / (k + 2) for run in row.runs])
                for k in range(9)
            ]
    title = {"commit": "abc", "processor": "a processor", "Python": "CPython"}
    kept = tmp_path / "figures.json"
    kept.write_text(json.dumps(report.as_json(title, rows)))
    plots.main(str(kept), str(tmp_path))
    texts = re.findall(r"<text .*?>(.*?)</text>", (tmp_path / "speed_up.svg").read_text())
    assert [texts.count(name) for name in ("better", "other", "slow 0", "slow 1", "slow 8")] == [1, 1, 1, 0, 0]
    assert "ringshm abc, a processor, CPython" in texts


def test_plots_are_written(tmp_path: Path) -> None:
    plots = pytest.importorskip("perf.plots")
    title = {"commit": "abc", "processor": "a processor", "Python": "CPython"}
    written = plots.draw(made_up(), tmp_path / "plots", title)
    assert [path.name for path in written] == ["throughput.svg", "speed_up.svg", "latency.svg", "scaling.svg"]
    for path in written:
        drawn = path.read_text()
        assert "<svg" in drawn
        assert "other" in drawn
    assert plots.draw([], tmp_path, title) == []


def test_the_picture_shows_each_state_of_a_slot_and_the_one_of_the_readme_is_it(tmp_path: Path) -> None:
    picture = pytest.importorskip("perf.picture")

    def words(path: Path) -> list[str]:
        """What is written in it: its letters are paths, and matplotlib tells the text beside them."""
        ElementTree.parse(path)
        return re.findall("<!-- (.*?) -->", path.read_text(), re.DOTALL)

    drawn, again = picture.draw(tmp_path / "ring.svg"), picture.draw(tmp_path / "again.svg")
    assert drawn.read_bytes() == again.read_bytes()
    for state in layout.STATES:
        assert words(drawn).count(state.upper()) >= 2  # once in the moment that is shown, once among the states
    assert words(picture.FILE) == words(drawn), "draw it anew: python -m perf.picture"


# --- the command

_SECONDS = 300  # A question takes up to 45 s alone, and beside other tests four times as long.


def perf(tmp_path: Path, *arguments: str) -> tuple[dict[tuple[str, str, str], Any], str]:
    """Run it: its measurements by question, contender and metric, and its output; /dev/shm is left as it was."""
    figures, before = tmp_path / "figures.json", shm_files()
    command = [sys.executable, "-m", "perf", "--quick", "--json", str(figures), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_SECONDS - 10, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert shm_files() == before
    rows = json.loads(figures.read_text())["measurements"]
    return {(row["question"], row["contender"], row["metric"]): row for row in rows}, done.stdout


@pytest.mark.slow(seconds=_SECONDS)
def test_throughput_compares_every_contender_that_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots = tmp_path / "plots"
    compared = [other for other in _installed()[0] if throughput._takes_part(other, ARRAYS[4]) and not other.heavy]
    names = [contender.name for contender in compared]
    some = ["--seconds", "0.02", "--only", ",".join(names)]
    rows, output = perf(tmp_path, "throughput", *some, "--plots", str(plots))
    assert {"ringshm", "mp.Queue", "mp.SimpleQueue", "mp.Pipe", "floor: np.copyto"} <= set(names)
    for name in names:
        row = rows["throughput", name, "messages/s"]
        assert len(row["runs"]) == 3 and all(run > 0 for run in row["runs"])
        lines = output.split("Asked and got")[0].splitlines()
        shown = [line for line in lines if f"{name} " in line and "x │" in line]
        assert name == "ringshm" or (shown and all(line.count(" .. ") == 2 for line in shown))  # Two spreads.
    assert {path.name for path in plots.iterdir()} == {"throughput.svg", "speed_up.svg"}


@pytest.mark.slow(seconds=_SECONDS)
def test_targets_are_measured_and_shown(tmp_path: Path) -> None:
    only = ["--seconds", "0.02", "--runs", "1", "--only", "ringshm,ringshm (spin),ringshm (block),mp.Queue"]
    rows, output = perf(tmp_path, "targets", *only)
    asked = output.split("Asked and got")[1]
    assert "mp.Queue" in asked and "not there to compare with" in asked
    answers = json.loads((tmp_path / "figures.json").read_text())["targets"]
    assert {answer["target"]["question"] for answer in answers} == {
        "throughput", "table", "one_process", "in_place", "round_trip",
    }  # fmt: skip
    assert rows["one_process", "ringshm", "us"]["runs"][0] > 0


@pytest.mark.slow(seconds=_SECONDS)
def test_each_other_question_is_answered(tmp_path: Path) -> None:
    questions = ["round_trip", "idle", "table", "memory", "pipeline", "top"]
    rows, _ = perf(
        tmp_path, *questions, "--seconds", "0.02", "--runs", "1", "--only", "ringshm,ringshm (spin),mp.Queue"
    )
    for name in ("ringshm", "mp.Queue"):
        assert rows["round_trip", name, "p50 us"]["runs"][0] > 0
        assert rows["idle", name, "% of a core"]["runs"][0] > 0
        assert rows["table", name, "messages/s"]["runs"][0] >= 0  # In so short a window there may be none.
        assert rows["memory", name, "messages"]["runs"][0] > 0
        for who in ("sender", "receiver"):
            shares = [rows["table", name, f"{share} per {who}"]["runs"][0] for share in ("fewest", "median", "most")]
            assert shares == sorted(shares)
    for name in ("ringshm", "ringshm beside top"):
        assert rows["top", name, "messages/s"]["runs"][0] > 0
    for name in ("top, 1 channels", "top, 20 channels"):
        assert rows["top", name, "% of a core"]["runs"][0] > 0
    alone = rows["pipeline", "actors alone", "frames/s"]
    assert alone["runs"] or "not timed" in alone["note"]


@pytest.mark.slow(seconds=_SECONDS)
def test_each_question_about_vectorised_environments_is_answered(tmp_path: Path) -> None:
    rows, _ = perf(tmp_path, "vector_env", "slow_reset", "--seconds", "0.02", "--runs", "1")
    for name in ("ringshm", "AsyncVectorEnv", "SyncVectorEnv"):
        for metric in ("steps/s", "steps/s beside a load", "processor s/1M steps"):
            assert rows["vector_env", name, metric]["runs"][0] > 0
    for name in ("ringshm", "AsyncVectorEnv"):
        assert 0 < rows["slow_reset", name, "% of the ceiling"]["runs"][0] <= 100


@pytest.mark.slow(seconds=_SECONDS)
def test_what_becomes_of_vectorised_environments_whose_worker_is_killed_is_told(tmp_path: Path) -> None:
    rows, _ = perf(tmp_path, "killed", "--runs", "1")
    for name in ("ringshm", "AsyncVectorEnv"):
        told, again = (rows["killed", name, metric] for metric in ("s until told", "s until it goes on"))
        hangs = name != "ringshm" and "hangs: " in told["note"]  # it may, but ours must not
        assert hangs or 0 < told["runs"][0] < again["runs"][0]

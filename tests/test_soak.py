"""The soak finds nothing wrong, and would find it: fed with made-up logs, its ledger reports each fault."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perf.ledger import CALL, END, GOT, INTERRUPTED, STARTED, TAKEN, TORN, Ledger, Verdict, record

ROOT = Path(__file__).resolve().parent.parent
SENDER, RECEIVER, OTHER = 1, 2, 3
MS = 1_000_000


def put(number: int, count: int = 1, sent: int | None = 1, at: int = 0) -> bytes:
    """What a sender notes of a put; one that did not return has `sent=None`."""
    records = [record(CALL, SENDER, number, at, count)]
    if sent is not None:
        records.append(record(END, SENDER, number, at, sent))
    return b"".join(records)


def get(*numbers: int, at: int = MS, returned: bool = True, limit: int = 1) -> bytes:
    """What a receiver notes of a get of these messages, each sent 1 ms before."""
    records = [record(CALL, 0, 0, at, limit), *(record(TAKEN, SENDER, number, at, 0) for number in numbers)]
    if returned:
        records += [record(GOT, SENDER, number, at, at - MS) for number in numbers]
        records.append(record(END, 0, 0, at, len(numbers)))
    return b"".join(records)


def account(
    logs: dict[int, bytes], gone: dict[int, tuple[int, int]] | None = None, sent: int | None = None
) -> tuple[Ledger, Verdict]:
    """The verdict on such logs; those in `gone` were signalled and gone at such times."""
    ledger = Ledger(0)
    for worker, log in logs.items():
        ledger.read(worker, record(STARTED, 0, 0, 0, 0) + log)
    for worker in logs:
        ledger.ended(worker, *(gone or {}).get(worker, (0, 0)))
    return ledger, ledger.verdict(ledger.sent if sent is None else sent)


def faults(verdict: Verdict) -> dict[str, int]:
    names = ("lost", "duplicated", "torn", "disordered", "unreturned")
    return {name: value for name in names if (value := getattr(verdict, name))}


def test_ledger_finds_nothing_where_nothing_is_wrong() -> None:
    sends = put(0) + put(1, count=3, sent=2) + put(3, sent=0) + put(3)  # of three, two fitted in time; then Full
    _, verdict = account({SENDER: sends, RECEIVER: get(0) + get() + get(2, 3, limit=2), OTHER: get(1)})
    assert (verdict.sent, verdict.received) == (4, 4)
    assert not faults(verdict)
    assert not verdict.examples


def test_ledger_reports_a_lost_message() -> None:
    _, verdict = account({SENDER: put(0) + put(1) + put(2), RECEIVER: get(0) + get(2)})
    assert faults(verdict) == {"lost": 1}
    assert f"lost: {(SENDER, 1)}" in verdict.examples


def test_ledger_reports_messages_of_which_only_the_channel_knows() -> None:
    _, verdict = account({SENDER: put(0), RECEIVER: get(0)}, sent=3)
    assert faults(verdict) == {"lost": 2}


@pytest.mark.parametrize("second", [RECEIVER, OTHER])
def test_ledger_reports_a_message_received_twice(second: int) -> None:
    logs = {SENDER: put(0), RECEIVER: get(0), OTHER: b""}
    logs[second] += get(0)
    assert faults(account(logs)[1]) == {"duplicated": 1}


def test_ledger_reports_a_message_that_its_put_had_not_sent() -> None:
    _, verdict = account({SENDER: put(0, sent=0), RECEIVER: get(0)}, sent=1)
    assert faults(verdict) == {"duplicated": 1}


def test_ledger_reports_a_torn_message() -> None:
    _, verdict = account({SENDER: put(0), RECEIVER: get(0) + record(TORN, SENDER, 0, 0, 0)})
    assert faults(verdict) == {"torn": 1}


def test_ledger_reports_disorder_within_one_receiver_only() -> None:
    assert faults(account({SENDER: put(0, 2, 2), RECEIVER: get(1) + get(0)})[1]) == {"disordered": 1}
    assert not faults(account({SENDER: put(0, 2, 2), RECEIVER: get(1), OTHER: get(0)})[1])


@pytest.mark.parametrize(
    ("signalled", "gone", "explained"),
    [(10, 12, True), (2, 3, False), (30, 31, False)],
    ids=["while it was on its way", "before it was sent", "after it was received"],
)
def test_ledger_lets_a_death_explain_disorder_only(signalled: int, gone: int, explained: bool) -> None:
    late = b"".join([get(1, at=19 * MS), record(CALL, 0, 0, 19 * MS, 1), record(TAKEN, SENDER, 0, 20 * MS, 0)])
    late += record(GOT, SENDER, 0, 20 * MS, 9 * MS) + record(END, 0, 0, 20 * MS, 1)
    logs = {SENDER: put(0, 2, 2), RECEIVER: late, OTHER: get(returned=False)}
    _, verdict = account(logs, {OTHER: (signalled * MS, gone * MS)})
    assert faults(verdict) == ({} if explained else {"disordered": 1})


def test_ledger_lets_a_death_explain_no_more_than_its_call_may_have_taken() -> None:
    late = get(2, at=19 * MS) + get(0, at=20 * MS) + get(1, at=20 * MS)
    for limit, disordered in ((1, 1), (2, 0)):
        logs = {SENDER: put(0, 3, 3), RECEIVER: late, OTHER: get(returned=False, limit=limit)}
        assert account(logs, {OTHER: (19 * MS, 20 * MS)})[1].disordered == disordered


def test_ledger_doubts_what_a_receiver_was_decoding_when_it_died() -> None:
    _, verdict = account({SENDER: put(0, 2, 2), RECEIVER: get(0, returned=False), OTHER: get(1)})
    assert verdict.in_doubt_receiving == 1
    assert not faults(verdict)


def test_ledger_counts_what_another_received_after_a_death() -> None:
    _, verdict = account({SENDER: put(0), RECEIVER: get(0, returned=False), OTHER: get(0)})
    assert (verdict.taken_again, verdict.in_doubt_receiving) == (1, 0)
    assert not faults(verdict)


def test_ledger_does_not_excuse_a_loss_by_a_call_that_returned() -> None:
    empty_handed = get(0, returned=False) + record(END, 0, 0, 0, 0)
    _, verdict = account({SENDER: put(0), RECEIVER: empty_handed})
    assert faults(verdict) == {"lost": 1, "unreturned": 1}


def test_ledger_lets_the_next_call_return_what_an_interrupted_one_could_not() -> None:
    interrupted = get(0, returned=False) + record(INTERRUPTED, 0, 0, 0, 0)
    returned = record(CALL, 0, 0, 0, 1) + record(GOT, SENDER, 0, 0, 0) + record(END, 0, 0, 0, 1)
    assert account({SENDER: put(0), RECEIVER: interrupted})[1].in_doubt_receiving == 1
    assert account({SENDER: put(0), RECEIVER: interrupted + returned})[1].in_doubt_receiving == 0


def test_ledger_doubts_what_a_sender_was_putting_when_it_died() -> None:
    _, verdict = account({SENDER: put(0) + put(1, count=3, sent=None), RECEIVER: get(0) + get(1)}, sent=2)
    assert (verdict.sent, verdict.received, verdict.in_doubt_sending) == (1, 2, 2)
    assert not faults(verdict)


def test_stalls_leave_out_the_time_in_which_somebody_was_stopped() -> None:
    ledger = Ledger(0)
    ledger.someone_stopped(100 * MS)
    ledger.nobody_stopped(400 * MS)
    gets = b"".join(get(number, at=at * MS) for number, at in enumerate((50, 500, 700)))
    ledger.read(RECEIVER, record(STARTED, 0, 0, 0, 0) + gets)
    assert ledger.longest_stall() == 0.2
    assert ledger.longest_silence(750 * MS) == pytest.approx(0.2, abs=0.02)
    assert ledger.waiting(1500 * MS) == [(RECEIVER, 0.8)]
    ledger.someone_stopped(900 * MS)
    assert ledger.waiting(1500 * MS) == [(RECEIVER, 0.2)]
    ledger.nobody_stopped(1200 * MS)
    assert ledger.silence(1500 * MS) == 0.5
    assert ledger.longest_silence(1500 * MS) == pytest.approx(0.5, abs=0.03)  # on both sides of the stop
    ledger.ended(RECEIVER, 1500 * MS, 1501 * MS)
    assert ledger.longest_stall() == 0.5


# --- the soak itself


def soak(tmp_path: Path, minutes: str, during: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str, Any]:
    """Run a small soak: its exit status, what it wrote, and its figures."""
    pytest.importorskip("rich")
    figures = tmp_path / "figures.json"
    options = ["--minutes", minutes, "--senders", "5", "--receivers", "5", "--seed", "3", "--json", str(figures)]
    program = subprocess.Popen(
        [sys.executable, "-m", "perf", "soak", *options],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with program:
        during(program)
        output = program.communicate()[0]
    return program.returncode, output, json.loads(figures.read_text()) if figures.exists() else None


@pytest.mark.slow(seconds=180)
def test_nothing_is_lost_while_workers_are_killed_and_stopped(tmp_path: Path) -> None:
    status, output, figures = soak(tmp_path, "0.2", lambda _: None)
    assert status == 0, output
    assert [figures[name] for name in ("lost", "duplicated", "torn", "disordered", "unreturned")] == [0] * 5
    assert figures["failures"] == []
    assert figures["received"] > 100
    assert all(figures[name] for name in ("kills", "stops_checked", "terms", "deaths")), output
    assert figures["redelivered"] + figures["recoveries"] > 0, output  # some died at a bad moment
    assert "lost (must be 0)" in output


def test_ctrl_c_ends_a_soak_with_its_table(tmp_path: Path) -> None:
    def press(program: subprocess.Popen[str]) -> None:
        assert program.stdout is not None
        while " sent" not in program.stdout.readline():
            assert program.poll() is None
        os.kill(program.pid, signal.SIGINT)

    status, output, figures = soak(tmp_path, "60", press)
    assert status == 0, output
    assert "lost (must be 0)" in output
    assert figures["seconds"] < 600

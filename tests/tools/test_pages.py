"""What a person reads of made-up channels, folded to the terminal's width, against text written by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest

from ringshm.ring.diagnosis import Finding, Process
from ringshm.ring.stats import (
    ChannelStats,
    Death,
    HeldVersion,
    LatestStats,
    OnTheirWay,
    ParticipantStats,
    SegmentStats,
    SlotStats,
)
from ringshm.segment.layout import Layout
from ringshm.tools.pages import Line, Page, Row, show_counts, show_findings, show_participants
from ringshm.tools.text import broken, cells, folded, in_columns

COMMON: dict[str, Any] = {
    "waiting_receivers": 0, "waits": 0, "recoveries": 0, "recovering": False, "on_their_way": (), "reaped": 0,
    "deaths": (), "last_sender_gone": None, "last_receiver_gone": None, "participants": (),
}  # fmt: skip
CHANNEL = ChannelStats(
    **COMMON, sent=1_234_567, sent_nbytes=987654321, received=1_234_560, received_nbytes=987650000, withdrawn=0,
    dropped=3, redelivered=1, capacity=8, free=1, ready=4, pieces=0, slots=(), waiting_senders=2, shut_down=False,
    keep_open=False,
)  # fmt: skip
LATEST = LatestStats(**COMMON, version=1500, nbytes=4096, borrows=4, held=())


def person(pid: int, **changes: Any) -> ParticipantStats:
    one = ParticipantStats(pid, True, 0, 0, 0, False, "", (), None, 0, attached=100.0)
    return dataclasses.replace(one, **changes)


class Shown(Page):
    """A page of a width, which keeps its lines."""

    def __init__(self, width: int | None = 80, height: int | None = None) -> None:
        super().__init__()
        self.width, self.height = width, height
        self.lines: list[str] = []

    def put(self, lines: Iterable[Line]) -> None:
        self.lines += [line[0] for line in lines]


def in_full(stats: SegmentStats, processes: dict[int, Process], **options: Any) -> str:
    page = Shown(**options)
    show_counts(page, stats)
    show_participants(page, stats, processes)
    return "\n" + "\n".join(page.lines) + "\n"


# --- a channel in full


def test_a_channel_is_shown_with_words_in_full_within_80_columns() -> None:
    stats = dataclasses.replace(
        CHANNEL, waits=17,
        slots=(SlotStats(3, "reading", 812, True, 5.0), SlotStats(0, "kept", 815, True, 70.0),
               SlotStats(4, "reading", 812, True, 2.0)),
        participants=(
            person(811, undecided=1),
            person(812, receivers=1, called=5.0),
            person(813, senders=1, waiting_for="space", called=0.3, attached=7200.0),
            person(815, senders=2, receivers=1, called=1.0, holds=("receivers",)),
        ),
    )  # fmt: skip
    processes = {pid: Process("python", "S") for pid in (811, 812, 813)}
    assert in_full(stats, processes) == """
messages  1,234,567 sent (941.9 MiB), 1,234,560 received (941.9 MiB), 3 dropped,
          1 redelivered
slots     1 of 8 free, 4 ready, 3 in use
          815 keeps views of slot 0 for 1.2 min
          812 is reading slots 3, 4 for 5.0 s
waiting   2 senders, 0 receivers; calls had to wait 17 times
pid  process     state  handles              waits for  last call  attached
815  (not seen)  alive  2 senders, receiver                 1.0 s   1.7 min
  holds the receivers' mutex
811  python      alive  undecided                                   1.7 min
812  python      alive  receiver                            5.0 s   1.7 min
813  python      alive  sender               space          0.3 s     2.0 h
"""  # fmt: skip


def test_a_latest_is_shown_as_publisher_readers_and_versions() -> None:
    stats = dataclasses.replace(
        LATEST, waiting_receivers=1, waits=1, held=(HeldVersion(1498, 21, True), HeldVersion(1499, 21, True)),
        participants=(person(20, senders=1, called=0.2), person(21, receivers=1, called=9.0)),
    )  # fmt: skip
    assert in_full(stats, {20: Process("learner", "S"), 21: Process("actor", "T")}) == """
newest    version 1,500, 4 KiB
held      2 of the 4 versions that readers may hold at once
          21 holds versions 1498, 1499
waiting   1 reader; calls had to wait 1 time
pid  process  state    handles    last call  attached
 21  actor    stopped  reader         9.0 s   1.7 min
 20  learner  alive    publisher      0.2 s   1.7 min
"""  # fmt: skip


def test_the_dead_and_what_is_on_its_way_are_shown() -> None:
    stats = dataclasses.replace(
        CHANNEL, recoveries=1, reaped=2, deaths=(Death(807, 3.0, 1, 0, 2), Death(808, 90.0, 0, 1, 0)),
        on_their_way=(OnTheirWay("sender", 5, 900, True, 2.0, "train.py:12"),),
        participants=(person(809, alive=False, senders=1),),
    )  # fmt: skip
    assert in_full(stats, {}).endswith("""
repairs   2 participants died, mutexes recovered 1 time
coming    a handle of process 900, which was started 2.0 s ago at train.py:12
          and has not attached yet
pid  state  handles  attached
809  dead   sender    1.7 min
died      807, found 3.0 s ago; handles: sender; 2 slots given back
          808, found 1.5 min ago; handles: receiver; 0 slots given back
""")


def test_where_there_are_many_a_terminal_gets_as_many_as_leave_the_first_lines_there() -> None:
    people = tuple(person(pid, senders=1) for pid in range(100, 160))
    dead = person(160, alive=False, senders=1)
    stats = dataclasses.replace(CHANNEL, participants=(*people, dead))
    shown = in_full(stats, {}, height=24).splitlines()
    assert shown[5:8] == ["pid  process     state  handles  attached", "160              dead   sender    1.7 min",
                          "100  (not seen)  alive  sender    1.7 min"]  # fmt: skip
    assert shown[-1] == "    53 more: `ringshm stats NAME | less`"
    assert len(in_full(stats, {}).splitlines()) == len(shown) - 9 + 61


def test_findings_are_folded_below_their_mark() -> None:
    page = Shown(width=40)
    findings = [Finding(True, "the ring is full: 4 of 4 slots hold messages that wait"), Finding(False, "it moves")]
    show_findings(page, "rollouts", Layout(4, 65536, 8), True, findings)
    assert page.lines == [
        "rollouts: live, 4 slots of 64 KiB, 268",
        "KiB of shared memory",
        "  ! the ring is full: 4 of 4 slots hold",
        "    messages that wait",
        "  - it moves",
    ]


# --- text


TABLE = [["name", "slots", "fill"], ["rollouts", "8 x 64 KiB", "88%"], ["a-much-longer-name-of-30-cells", "4", "0%"]]


def test_columns_stand_below_each_other() -> None:
    assert in_columns(TABLE, [1, 2]) == [
        ["name                                 slots  fill"],
        ["rollouts                        8 x 64 KiB   88%"],
        ["a-much-longer-name-of-30-cells           4    0%"],
    ]


def test_a_name_that_is_too_long_has_lines_of_its_own() -> None:
    assert in_columns(TABLE, [1, 2], 28) == [
        ["name           slots  fill"],
        ["rollouts  8 x 64 KiB   88%"],
        ["a-much-longer-name-of-30-cells", "                   4    0%"],
    ]


def test_columns_that_are_too_many_share_lines() -> None:
    assert in_columns(TABLE, [1, 2], 16) == [
        ["name", "       slots", "  fill"],
        ["rollouts", "  8 x 64 KiB", "   88%"],
        ["a-much-longer-name-of-30-cells", "           4", "    0%"],
    ]


def test_no_line_is_wider_than_the_terminal_unless_it_is_one_word_and_no_word_is_lost() -> None:
    text = "who waits for what, in a-word-that-is-longer-than-a-line 経験再生バッファ and e\u0301 more"
    for width in range(10, 60):
        lines = folded(text, width, "  ! ", "    ")
        assert all(cells(line) <= width or " " not in line[4:] for line in lines)
        assert " ".join(line[4:] for line in lines) == text
        pieces = broken(text, width)
        assert "".join(pieces) == text
        assert max(map(cells, pieces)) <= width and all(cells(piece) >= width - 1 for piece in pieces[:-1])


def test_a_command_is_not_broken() -> None:
    text = "it is stopped. `kill -CONT 21678` lets it go on, `kill -KILL 21678` ends it"
    assert folded(text, 40) == [
        "it is stopped. `kill -CONT 21678` lets",
        "it go on, `kill -KILL 21678` ends it",
    ]
    assert folded(text, 30) == [
        "it is stopped.",
        "`kill -CONT 21678` lets it go",
        "on, `kill -KILL 21678` ends it",
    ]


@pytest.mark.parametrize(("text", "width"), [("abc", 3), ("経験", 4), ("e\u0301", 1), ("a\u20dd", 1), ("", 0)])
def test_cells_are_those_of_a_terminal(text: str, width: int) -> None:
    assert cells(text) == width


def test_lines_below_a_row_are_folded_and_empty_columns_left_out() -> None:
    page = Shown(width=20)
    page.table(["pid", "holds", "for"], [Row(["7", "", "2 s"], below=[("the senders' mutex, and more", "note")])], [0])
    assert page.lines == ["pid  for", "  7  2 s", "  the senders'", "    mutex, and more"]

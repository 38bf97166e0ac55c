"""The command line: `python -m ringshm`, or `ringshm`.

Parse, look, print. What is found out is found out elsewhere (leftovers, diagnosis, doctor); here it becomes text: rich
tables on a terminal where rich is installed, aligned text otherwise, JSON on request. Nothing here joins a channel or
writes into it.

Exit status: 0; 1 if something is wrong (no such channel; `doctor` found what fails or wants changing); 2 for usage.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from . import doctor, leftovers, top
from .diagnosis import diagnose, process_of
from .doctor import in_bytes
from .errors import RingshmError
from .leftovers import SegmentFile
from .pages import Page, age, print_json, printable, show_counts, show_findings
from .participants import Participants
from .sampler import SHORTEST_INTERVAL
from .segment import Header, Segment
from .stats import ChannelStats, LatestStats, SegmentStats, take_any_stats

_LONGEST = 1e6  # seconds, some 11 days: less than the longest that `time.sleep` takes
_BETWEEN_LOOKS = 0.2  # seconds: four slices, in which survivors notice a death

_DESCRIPTION = """\
What there is of ringshm in shared memory, and why it stands still.

  ringshm ls            every channel of this user: alive or dead, how full, who is attached
  ringshm stats NAME    why NAME is stuck, in sentences; who holds which slot or lock, since when; who died
  ringshm top           all of that live: rates, fill over time, who waits and who holds; --plot draws it
  ringshm doctor        what this host's shared memory allows, and what to change
  ringshm clean         remove what dead processes left

Looking disturbs nobody: no command attaches to a channel, takes a lock that others wait for, or writes into it,
but `clean`, which removes what only dead processes have used. Each takes --json."""

_LS = """\
List the channels of this user, by name.

A channel is live while a process that uses it lives, stopped ones included, whichever version of ringshm it has and
whichever pid namespace it is in: the kernel says so, by the record locks on the channel's file. A dead channel is
removed by the next creation of its name, or by `ringshm clean`.

  ready     messages that wait to be received        fill    share of the slots that are not free
  senders, receivers    processes attached in that role; one that has done neither yet is in neither
  sent      messages; of a Latest, which has no queue, the newest version"""

_STATS = """\
Say why a channel stands still, and show what it holds.

First come sentences, the most telling first, from two looks 0.2 s apart: who holds a mutex or a slot for too long (and
whether it is stopped), whether the ring is full or empty and who waits for what, who is missing, who has died. Then
the counts, the slots in use, the participants and the last deaths. Works for a channel of the dead, too."""

_TOP = """\
Show what all channels of this user do, or those of some names, until Ctrl-C: those that stand still first, then the
busiest. With one NAME, all there is to say of it. Without a terminal, lines for each look.

  sent/s, received/s    messages since the look before; of a Latest, whose reads are not counted, versions
  bytes/s               their payloads; of a Latest, versions times the size of the newest
  fill                  share of the slots that are not free; of a Latest, of the versions that readers may hold
  waiting, reading ...  pids of those who wait and of those who hold slots, the longest first; what was dropped,
                        delivered again, withdrawn, recovered, and who has died and is not reaped

The counters are in the segment in any case. To look takes no entry and no lock and writes nothing, and between two
looks nothing of a channel is open: a `top` that is killed leaves nothing.

--plot records one channel until Ctrl-C, until it has gone, or for --seconds, and then draws messages and bytes per
second, fill and waiting threads over time."""

_DOCTOR = """\
Check what ringshm needs of this host, and say what to change.

Size, kind and permissions of /dev/shm, what can be done there (tried on a file that is gone afterwards), limits of
this process and its control group, what dead processes left, systemd's RemoveIPC, processor and cores.
ok: fine. warn: works, within the limits that are named. fail: channels cannot be made or used.
The exit status is 1 if anything is not ok."""

_CLEAN = """\
Remove what only dead processes have left, and say what: channels, channels whose creator was killed while it made
them, semaphores and FIFOs without a channel. What a live process uses or is just making stays, of this version of
ringshm or another, as do files of other users and files that are no channels. Safe at any time, also from several
processes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    options = _parser().parse_args(argv)
    if sys.stdout is None:  # it was closed before
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    with contextlib.suppress(AttributeError):  # not a TextIOWrapper: somebody captures it
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at exit goes nowhere
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (RingshmError, OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        print(f"ringshm: {printable(text)}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    def add(
        name: str, run: Any, summary: str, description: str, json: str = "print one JSON document, for programs"
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help=json)
        command.set_defaults(run=run)
        return command

    parser = argparse.ArgumentParser(
        prog="ringshm", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add("ls", _ls, "list the channels of this user", _LS)
    stats = add("stats", _stats, "say why a channel is stuck, and what it holds", _STATS)
    stats.add_argument("name", metavar="NAME", help="the channel's name, as `ringshm ls` shows it")
    lines = "print one JSON document for each look, on a line of its own"
    watch = add("top", _top, "show live what all channels do, or draw what one did", _TOP, lines)
    watch.add_argument("names", metavar="NAME", nargs="*", help="only these channels")
    for option, default, text in (
        ("--interval", 1.0, "from one look to the next (default %(default)s)"),
        ("--seconds", None, "for so long; default: until Ctrl-C"),
    ):
        watch.add_argument(option, metavar="SECONDS", type=_seconds, default=default, help=text)
    watch.add_argument("--plot", metavar="FILE.png", help="record, and draw at the end (needs matplotlib)")
    watch.set_defaults(wrong_usage=watch.error)
    add("doctor", _doctor, "check what ringshm needs of this host", _DOCTOR)
    clean = add("clean", _clean, "remove what dead processes left", _CLEAN)
    clean.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return parser


# --- ls


def _ls(options: argparse.Namespace) -> int:
    found = leftovers.look()
    looks = [(segment, _observe(segment)) for segment in found.segments]
    if options.json:
        channels = [
            {
                **dataclasses.asdict(segment),
                "capacity": look and look[0].layout.capacity,
                "slot_size": look and look[0].layout.slot_size,
                "stats": look and dataclasses.asdict(look[1]),
            }
            for segment, look in looks
        ]
        print_json({"channels": channels, "orphans": found.orphans, "foreign": found.foreign})
        return 0
    page = Page()
    if looks:
        header = ["name", "state", "slots", "memory", "ready", "fill", "senders", "receivers", "sent", "age"]
        page.table(header, [_row(segment, look) for segment, look in looks], right=range(2, len(header)))
    else:
        page.line("no channels of this user")
    for segment in found.segments:
        if segment.wrong:
            page.line(segment.wrong, "warn")
    if found.dead or found.orphans:
        page.line(f"{_left(found)} left by dead processes: `ringshm clean`", "warn")
    if found.foreign:
        page.line(f"{found.foreign} files of other users")
    return 0


def _observe(segment: SegmentFile) -> tuple[Segment, SegmentStats] | None:
    """A look into a channel, if it has a name and this version can read it."""
    if segment.wrong or not segment.named:
        return None
    try:
        observed = Segment.observe(segment.name)
    except RingshmError:  # another version's, or just gone
        return None
    return observed, take_any_stats(observed, Participants(observed))


def _row(segment: SegmentFile, look: tuple[Segment, SegmentStats] | None) -> list[str]:
    if segment.wrong:
        state = "no channel"
    else:
        state = "live" if segment.live else "dead"
        if not segment.named:
            state += ", being made" if segment.live else ", unfinished"
        elif look is None:
            state += f", layout version {segment.version}"
    row = [segment.name, state, "", in_bytes(segment.size), "", "", "", "", "", age(segment.age)]
    if look is not None:
        layout, stats = look[0].layout, look[1]
        living = [person for person in stats.participants if person.alive]
        row[2] = f"{layout.capacity} x {in_bytes(layout.slot_size)}"
        row[6:8] = [
            str(sum(bool(person.senders) for person in living)),
            str(sum(bool(person.receivers) for person in living)),
        ]
        if isinstance(stats, ChannelStats):
            row[4:6] = [str(stats.ready), f"{stats.fill:.0%}"]
            row[8] = str(stats.sent)
        elif isinstance(stats, LatestStats):
            row[8] = str(stats.version)
    return row


# --- stats


def _stats(options: argparse.Namespace) -> int:
    name = options.name
    segment = leftovers.observe(name)
    participants = Participants(segment)
    before = take_any_stats(segment, participants)
    time.sleep(_BETWEEN_LOOKS)
    after = take_any_stats(segment, participants)
    live = Header(segment.file, name).live
    pids = {person.pid for person in after.participants if person.alive}
    seen = {pid: process_of(pid, segment.file.identity) for pid in sorted(pids)}
    processes = {pid: process for pid, process in seen.items() if process is not None}
    findings = diagnose(before, after, processes)
    if options.json:
        print_json(
            {
                "name": name,
                "live": live,
                "capacity": segment.layout.capacity,
                "slot_size": segment.layout.slot_size,
                "memory": segment.layout.total_size,
                "options": dataclasses.asdict(segment.options),
                "findings": [dataclasses.asdict(finding) for finding in findings],
                "processes": {pid: dataclasses.asdict(process) for pid, process in processes.items()},
                "stats": dataclasses.asdict(after),
            }
        )
        return 0
    page = Page()
    show_findings(page, name, segment.layout, live, findings)
    show_counts(page, after, processes)
    return 0


# --- top


def _seconds(text: str) -> float:
    """A time that one can wait."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not SHORTEST_INTERVAL <= seconds <= _LONGEST:
        wrong = f"{text!r} is no time: give seconds, from {SHORTEST_INTERVAL:g} to {_LONGEST:.0f}"
        raise argparse.ArgumentTypeError(wrong)
    return seconds


def _top(options: argparse.Namespace) -> int:
    if options.plot is not None and len(options.names) != 1:
        options.wrong_usage(f"--plot draws one channel: give one NAME, not {len(options.names)}")
    top.run(options.names, options.interval, options.seconds, options.plot, options.json)
    return 0


# --- doctor and clean


def _doctor(options: argparse.Namespace) -> int:
    checks = list(doctor.examine())
    status = int(any(check.level != doctor.OK for check in checks))
    if options.json:
        print_json({"checks": [dataclasses.asdict(check) for check in checks]})
        return status
    page = Page()
    for check in checks:
        page.line(f"{check.level:4}  {check.subject}: {check.found}", check.level)
        if check.remedy:
            page.line(f"      {check.remedy}")
    return status


def _clean(options: argparse.Namespace) -> int:
    if options.dry_run:
        found = leftovers.look()
        segments, orphans = found.dead, found.orphans
    else:
        segments, orphans = leftovers.clean()
    if options.json:
        removed = {"segments": [dataclasses.asdict(segment) for segment in segments], "orphans": orphans}
        print_json({"dry_run": options.dry_run, **removed})
        return 0
    page = Page()
    verb = "would remove" if options.dry_run else "removed"
    for segment in segments:
        page.line(f"{verb} {segment.path} and its semaphores ({in_bytes(segment.size)})")
    for path in orphans:
        page.line(f"{verb} {path}")
    if not segments and not orphans:
        page.line("nothing to remove")
    return 0


def _left(found: leftovers.Leftovers) -> str:
    wakes = sum("ringshm-wake" in path for path in found.orphans)
    parts = [(len(found.dead), "segment"), (len(found.orphans) - wakes, "semaphore"), (wakes, "FIFO")]
    return " and ".join(f"{number} {what}{'s' * (number > 1)}" for number, what in parts if number)

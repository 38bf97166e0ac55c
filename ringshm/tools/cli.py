"""The command line: `python -m ringshm`, or `ringshm`.

Parse, look, print. leftovers, diagnosis and doctor find out what is the case. Here it becomes text, folded to the
terminal's width, or JSON on request. No command joins a channel; only `clean` changes anything.

Exit status: 0; 1 if something is wrong (there is no such channel; `doctor` found something to change); 2 for usage.
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

from ..errors import RingshmError
from ..ring.diagnosis import count, diagnose, listed, process_of
from ..ring.participants import Participants
from ..ring.stats import ChannelStats, LatestStats, SegmentStats, take_any_stats
from ..segment import fifos, ledger
from ..segment.files import Segment
from . import doctor, leftovers, top
from .leftovers import SegmentFile
from .pages import Page, Row, print_json, show_counts, show_findings, show_participants
from .sampler import SHORTEST_INTERVAL
from .text import age, folded, in_bytes, printable

_LONGEST = 1e6  # seconds, some 11 days: less than the longest that `time.sleep` takes
_BETWEEN_LOOKS = 0.2  # seconds: four slices of a wait, time enough for survivors to notice a death

_DESCRIPTION = """\
Show the channels of ringshm in shared memory, and say why they stand still.

  ringshm ls            every channel of this user: live or dead, how full,
                        which processes are attached
  ringshm stats NAME    why NAME is stuck, in sentences; who holds which slot
                        or lock, since when; who died
  ringshm top           all of that live: rates, fill over time, who waits and
                        who holds; --plot draws it
  ringshm doctor        what this host's shared memory allows, what to change
  ringshm clean         remove what dead processes left

Looking disturbs no process: no command attaches to a channel, writes into it,
or takes a lock that others wait for. Only `clean` changes anything: it removes
the files that only dead processes have used. Each command takes --json."""

_LS = """\
List the channels of this user, by name.

A channel is live while a process that uses it lives, even if it is stopped, has
another version of ringshm or is in another pid namespace: the kernel says so,
by the record locks on the channel's file. The next creation of its name removes
a dead channel, and so does `ringshm clean`.

  ready    messages that wait to be received
  fill     share of the slots that are not free
  sent     messages; of a Latest, which has no queue, the newest version

Below stand the pids of the processes that send and that receive, of those that
have done neither yet, and of those that died and are not reaped.

A ring that ringshm.ray keeps for another node's channel is called
CHANNEL.up-at-PLACE.X (its senders here), CHANNEL.down-at-PLACE.X (its receivers
here) or CHANNEL.copy-at-PLACE.X (a Latest); `ringshm.ray.status()` shows all."""

_STATS = """\
Say why a channel stands still, and show what it holds.

First come sentences, the most telling first, from two looks 0.2 s apart: which
process holds a mutex or a slot for too long (and whether it is stopped),
whether the ring is full or empty, which processes wait for what, which side is
missing, which processes have died. ! marks what keeps the channel from moving.
Then come the counts, the slots in use, the participants and the last deaths. A
dead channel can be looked at, too.

  handles     open handles by role; an undecided one may still send
  waits for   message, space, version (of a Latest), or event: in `flush` or
              `wait_for_peers`
  last call   how long ago its latest call that sends or receives began
  attached    how long ago it attached

A process without a name is of another pid namespace or user."""

_COLUMNS = "\n".join(
    line for title, text in top.COLUMNS for line in folded(f"{title}: {text}", 79, first="  ", rest="    ")
)
_TOP = f"""\
Show what all channels of this user do, or those of some names, until `q` or
Ctrl-C: those that stand still first, then the busiest. With one NAME, show
everything about it. `?` explains the columns. Without a terminal, print lines
for each look.

{_COLUMNS}

A look takes no entry and no lock, and writes nothing. Between two looks no
channel is open: a `top` that is killed leaves nothing behind.

--plot records one channel until `q` or Ctrl-C, until it has gone, or for
--seconds, and then draws messages and bytes per second, fill and waiting
threads over time; of a Latest, versions, and the versions held and the readers
in place of the fill."""

_DOCTOR = """\
Check what ringshm needs of this host, and say what to change.

It looks at the size, kind and permissions of /dev/shm, at what can be done
there (it tries, and removes the file again), at limits of this process and its
control group, at files that dead processes left, at systemd's RemoveIPC, at
processor and cores.
ok: fine. warn: works, within the limits that are named. fail: channels cannot
be made or used. The exit status is 1 if anything is not ok."""

_CLEAN = """\
Remove the files that dead processes have left, and list them: channels,
channels whose creator was killed while it made them, semaphores and FIFOs
without a channel. Everything that a live process uses or is making stays,
whatever its version of ringshm; so do files of other users and files that are
no channels. Safe at any time, also from several processes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    options = _parser().parse_args(argv)
    if sys.stdout is None:  # it was closed before
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    with contextlib.suppress(AttributeError):  # not a TextIOWrapper: a program captures it
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
        ours = isinstance(error, RingshmError) and isinstance(error, OSError) and error.strerror
        text = ours or str(error)
        print(f"ringshm: {printable(text)}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    def add(
        name: str, run: Any, summary: str, description: str, json: str = "print one JSON document, for programs"
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=description, formatter_class=as_written)
        command.add_argument("--json", action="store_true", help=json)
        command.set_defaults(run=run)
        return command

    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="ringshm", description=_DESCRIPTION, formatter_class=as_written)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add("ls", _ls, "list the channels of this user", _LS)
    stats = add("stats", _stats, "say why a channel is stuck, and what it holds", _STATS)
    stats.add_argument("name", metavar="NAME", help="the channel's name, as `ringshm ls` shows it")
    lines = "print one JSON document for each look, on a line of its own"
    watch = add("top", _top, "show live what all channels do, or draw what one did", _TOP, lines)
    watch.add_argument("names", metavar="NAME", nargs="*", help="only these channels")
    interval = "from one look to the next (default %(default)s)"
    watch.add_argument("--interval", metavar="SECONDS", type=_seconds, default=1.0, help=interval)
    watch.add_argument("--seconds", metavar="SECONDS", type=_seconds, help="for so long; default: until q or Ctrl-C")
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
        header = ["name", "state", "slots", "memory", "ready", "fill", "sent", "age"]
        page.table(header, [_row(segment, look) for segment, look in looks], right=range(2, len(header)))
    else:
        page.line("no channels of this user")
    if found.dead or found.orphans:
        page.line(f"{_left(found)} left by dead processes: `ringshm clean`", "warn")
    if found.foreign:
        page.line(f"{count(found.foreign, 'file')} of other users")
    return 0


def _observe(segment: SegmentFile) -> tuple[Segment, SegmentStats] | None:
    """A look into a channel, if it has its name and this version can read it."""
    if segment.wrong or not segment.named:
        return None
    try:
        observed = Segment.observe(segment.name)
    except RingshmError:  # another version's, or just gone
        return None
    return observed, take_any_stats(observed, Participants(observed))


def _row(segment: SegmentFile, look: tuple[Segment, SegmentStats] | None) -> Row:
    state = "no channel" if segment.wrong else "live" if segment.live else "dead"
    row = [segment.name, state, "", in_bytes(segment.size), "", "", "", age(segment.age)]
    if segment.wrong:
        return Row(row, "warn", [(segment.wrong, "warn")])
    below = ""
    if not segment.named:
        below = "being made" if segment.live else "its creator was killed while it made it"
    elif look is None:
        below = f"layout version {segment.version}: only that version of ringshm can look into it"
    else:
        layout, stats = look[0].layout, look[1]
        below = _attached(stats)
        row[2] = f"{layout.capacity} x {in_bytes(layout.slot_size)}"
        if isinstance(stats, ChannelStats):
            row[4:7] = [str(stats.ready), f"{stats.fill:.0%}", str(stats.sent)]
        elif isinstance(stats, LatestStats):
            row[6] = str(stats.version)
    return Row(row, "note" if segment.live else "dead", [(below, "note")] if below else [])


def _attached(stats: SegmentStats) -> str:
    """The pids of the participants, by role."""
    latest = isinstance(stats, LatestStats)
    living = [person for person in stats.participants if person.alive]
    roles = {
        "publishers" if latest else "senders": [person for person in living if person.senders],
        "readers" if latest else "receivers": [person for person in living if person.receivers],
        "neither yet": [person for person in living if not (person.senders or person.receivers)],
        "dead": stats.dead,
    }
    parts = [f"{role}: {listed(person.pid for person in people)}" for role, people in roles.items() if people]
    return "; ".join(["Latest"] * latest + parts)


# --- stats


def _stats(options: argparse.Namespace) -> int:
    name = options.name
    segment = leftovers.observe(name)
    participants = Participants(segment)
    before = take_any_stats(segment, participants)
    time.sleep(_BETWEEN_LOOKS)
    after = take_any_stats(segment, participants)
    live = segment.file.used_elsewhere
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
    page.line("")
    show_counts(page, after)
    page.line("")
    show_participants(page, after, processes)
    return 0


# --- top


def _seconds(text: str) -> float:
    """A time that can be waited for."""
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
        page.line(f"{check.subject}: {check.found}", check.level, f"{check.level:4}  ", " " * 6)
        if check.remedy:
            page.line(check.remedy, first=" " * 6, rest=" " * 6)
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
    wakes = sum(fifos.PREFIX in path for path in found.orphans)
    ledgers = sum(ledger.PREFIX in path for path in found.orphans)
    semaphores = len(found.orphans) - wakes - ledgers
    parts = [(len(found.dead), "segment"), (semaphores, "semaphore"), (wakes, "FIFO"), (ledgers, "ledger")]
    return " and ".join(count(number, thing) for number, thing in parts if number)

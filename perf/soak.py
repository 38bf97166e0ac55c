"""Does anything get lost, doubled, torn or stuck while workers are killed and stopped at random?

`python -m perf soak --minutes 5`: senders and receivers by the dozen over one small ring. A killer sends SIGKILL,
SIGSTOP (and SIGCONT a little later) and SIGTERM at random moments, half of them to any worker, half to one just seen
to hold a slot or a mutex, and starts a new one for each that died. Half of the workers end by SIGTERM as by SIGKILL; in
the others its handler raises SystemExit inside the call. Some run no compiled code (--pure). Every message is numbered
and bears a pattern; perf.ledger says how it is accounted for. At the end the channel is drained and must be as new.

A stall is the time from one message that a worker moved to its next, or to the signal that ended it, less the time in
which any worker was stopped: a stopped process may hold a mutex or every slot, and is not taken for dead. It includes
the wait for a turn, a message, space and a core, so it is an upper bound. A silence is a time in which nobody received
anything, less stops. More than 30 s of either is a hang: the soak then ends, with all stacks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import queue
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic_ns
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ringshm import Channel, ChannelStats

from . import ledger
from .ledger import Ledger, Verdict
from .report import compiled_path
from .soak_workers import SIGNALS, SLOT_SIZE, Orders, is_large, log_to, work
from .workers import CONTEXT

_HANG_SECONDS = 30.0
_REPORT_SECONDS = 5.0  # Between two lines where the output is no terminal.
_READ_SECONDS = 0.25  # Between two looks at the logs.
_PAUSE_SECONDS = 0.12  # Mean, between two signals.
_LONGEST_STOP = 0.5


# --- the supervisor


@dataclass
class _Worker:
    """One worker, as the supervisor sees it."""

    orders: Orders
    process: Any
    read: int = 0  # Bytes of its log.
    signalled_at: int = 0  # When it was first told to die.
    continue_at: float | None = None  # While it is stopped.

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def tell(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended: then its pid may be another's."""
        if self.process.exitcode is None:
            os.kill(self.pid, number)


@dataclass
class _Soak:
    options: argparse.Namespace
    channel: Channel
    folder: Path
    workers: dict[int, _Worker] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self._chance = random.Random(self.options.seed)
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self._began = monotonic_ns()
        self._next_number = 1
        self.ledger = Ledger(self._began, is_large)
        self.sure_deaths = self.possible_deaths = 0

    @property
    def elapsed(self) -> float:
        return (monotonic_ns() - self._began) / 1e9

    # --- workers

    def start(self, sends: bool) -> None:
        number = self._next_number
        self._next_number += 1
        traps = self._chance.random() < 0.5
        pure = self._chance.random() < self.options.pure
        seed = self._chance.getrandbits(63)
        orders = Orders(number, sends, traps, pure, self.folder, seed, self._shared)
        process = CONTEXT.Process(target=work, args=(orders, self.channel, os.getpid()))
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.workers[number] = _Worker(orders, process)

    def read(self, worker: _Worker) -> None:
        """Read what its log has grown by."""
        with contextlib.suppress(FileNotFoundError), worker.orders.log.open("rb") as log:
            log.seek(worker.read)
            data = log.read()
            data = data[: len(data) // ledger.RECORD_NBYTES * ledger.RECORD_NBYTES]
            worker.read += len(data)
            self.ledger.read(worker.orders.number, data)

    def collect(self, restart: bool) -> None:
        """Bury the workers that have ended."""
        for number, worker in list(self.workers.items()):
            status = worker.process.exitcode
            if status is None:
                continue
            gone_at = monotonic_ns()
            self.read(worker)
            seen = self.ledger.workers.get(number)
            started, leaving = (seen.started, seen.leaving) if seen else (False, False)
            if status < 0:
                self.counts["deaths"] += 1
                self.possible_deaths += 1
                self.sure_deaths += started and not leaving
                if -status not in (signal.SIGKILL, signal.SIGTERM):
                    self.failures.append(f"worker {number} died of signal {-status}")
            else:
                self.counts["exits"] += 1
            if status > 0:
                self.failures.append(f"worker {number} failed:\n{worker.orders.errors.read_text()}")
            self.ledger.ended(number, worker.signalled_at or gone_at, gone_at)
            if worker.continue_at is not None:
                self._no_longer_stopped(worker)
            del self.workers[number]
            worker.process.close()
            for path in (worker.orders.log, worker.orders.errors):
                path.unlink(missing_ok=True)
            if restart:
                self.start(worker.orders.sends)

    # --- signals

    def signal_somebody(self) -> None:
        """A signal at random, to a worker that has begun."""
        begun = [worker for worker in self.workers.values() if self._begun(worker)]
        if not begun:
            return
        victim = self._aim() if self._chance.random() < 0.5 else self._chance.choice(begun)
        action = self._chance.random()
        if action < 0.42:
            self._end(victim, signal.SIGKILL)
        elif action < 0.68:
            self._end(victim, signal.SIGTERM)
        elif action < 0.98:
            if victim.continue_at is None:
                self._stop(victim)
        else:  # a whole side at once
            for worker in begun:
                if worker.orders.sends == victim.orders.sends:
                    self._end(worker, signal.SIGKILL)

    def _aim(self) -> _Worker:
        """A worker that was just seen to hold a slot or a mutex; any, if none is seen in a hundred looks."""
        by_pid = {worker.pid: worker for worker in self.workers.values() if self._begun(worker)}
        for _ in range(100):
            stats = self.channel.stats()
            holders = {slot.pid for slot in stats.slots} | {person.pid for person in stats.participants if person.holds}
            if found := sorted(holders & by_pid.keys()):
                return by_pid[self._chance.choice(found)]
        return self._chance.choice(list(by_pid.values()))

    def _begun(self, worker: _Worker) -> bool:
        seen = self.ledger.workers.get(worker.orders.number)
        return seen is not None and seen.started

    def _end(self, worker: _Worker, number: signal.Signals) -> None:
        worker.signalled_at = worker.signalled_at or monotonic_ns()
        self.counts[number.name] += 1
        worker.tell(number)

    def _stop(self, worker: _Worker) -> None:
        if not any(other.continue_at is not None for other in self.workers.values()):
            self.ledger.someone_stopped(monotonic_ns())
        worker.continue_at = self.elapsed + self._chance.uniform(0.01, _LONGEST_STOP)
        self.counts["SIGSTOP"] += 1
        worker.tell(signal.SIGSTOP)

    def continue_some(self, everybody: bool = False) -> None:
        """End the stops whose time is up, and see that nobody took them for deaths."""
        for worker in self.workers.values():
            if worker.continue_at is not None and (everybody or worker.continue_at <= self.elapsed):
                if _state(worker.pid) == "T":
                    self.read(worker)
                    people = {person.pid: person for person in self.channel.stats().participants}
                    leaving = self.ledger.workers[worker.orders.number].leaving
                    if not leaving and not (worker.pid in people and people[worker.pid].alive):
                        self.failures.append(f"stopped process {worker.pid} was taken for dead")
                    self.counts["stops checked"] += 1
                worker.tell(signal.SIGCONT)
                self._no_longer_stopped(worker)

    def _no_longer_stopped(self, worker: _Worker) -> None:
        worker.continue_at = None
        if not any(other.continue_at is not None for other in self.workers.values()):
            self.ledger.nobody_stopped(monotonic_ns())

    # --- the course of it

    def watch(self) -> None:
        """Read all logs; look who hangs."""
        for worker in self.workers.values():
            self.read(worker)
        now = monotonic_ns()
        if hanging := [(number, t) for number, t in self.ledger.waiting(now) if t > _HANG_SECONDS]:
            self.failures += [f"worker {number} has moved no message for {t:.0f} s" for number, t in hanging]
        if self.ledger.silence(now) > _HANG_SECONDS:  # Nobody may live long enough to be seen to hang.
            self.failures.append(f"nobody has received anything for {_HANG_SECONDS:.0f} s")
        if self.failures:
            self.dump_stacks()

    def dump_stacks(self) -> None:
        """Add everybody's stack to the failures."""
        self.continue_some(everybody=True)
        for worker in self.workers.values():
            worker.tell(signal.SIGUSR1)
        time.sleep(0.5)
        self.failures.append(f"{self.channel.stats()}")
        for number, worker in self.workers.items():
            role = "sender" if worker.orders.sends else "receiver"
            stack = worker.orders.errors.read_text() or "(answers no signal)"
            self.failures.append(f"{role} {number}, process {worker.pid}, {_state(worker.pid)}:\n{stack}")

    def mayhem(self, report: Callable[[], None]) -> None:
        """Run until the time is up, somebody presses Ctrl-C, or something fails."""
        for sends, count in ((True, self.options.senders), (False, self.options.receivers)):
            for _ in range(count):
                self.start(sends)
        look_at = signal_at = 0.0
        while self.elapsed < self.options.minutes * 60 and not self.interrupted and not self.failures:
            stops = [worker.continue_at for worker in self.workers.values() if worker.continue_at is not None]
            pause = max(0.0, min([look_at, signal_at, *stops]) - self.elapsed)
            wait([worker.process.sentinel for worker in self.workers.values()], pause)
            self.collect(restart=True)
            self.continue_some()
            if self.elapsed >= signal_at:
                self.signal_somebody()
                signal_at = self.elapsed + self._chance.expovariate(1 / _PAUSE_SECONDS)
            if self.elapsed >= look_at:
                self.watch()
                report()
                look_at = self.elapsed + _READ_SECONDS
        self.continue_some(everybody=True)

    def finish(self) -> None:
        """Let the senders finish; then end the receivers by SIGTERM, whatever they are doing."""
        self._shared[0] = 1
        self._await(lambda worker: worker.orders.sends)
        for worker in self.workers.values():
            self._end(worker, signal.SIGTERM)
        self._await(lambda worker: True)

    def _await(self, which: Callable[[_Worker], bool]) -> None:
        give_up = self.elapsed + _HANG_SECONDS
        while waited := [worker for worker in self.workers.values() if which(worker)]:
            if self.failures or self.elapsed > give_up:
                if not self.failures:
                    self.failures.append(f"{len(waited)} workers did not end within {_HANG_SECONDS:.0f} s")
                    self.dump_stacks()
                self.kill_all()
                return
            wait([worker.process.sentinel for worker in self.workers.values()], _READ_SECONDS)
            self.collect(restart=False)

    def kill_all(self) -> None:
        """SIGKILL to whoever is left."""
        for worker in self.workers.values():
            worker.signalled_at = worker.signalled_at or monotonic_ns()
            worker.process.kill()
            worker.process.join()
        self.collect(restart=False)

    def drain(self) -> ChannelStats:
        """Receive what is left, and see that the channel is as new; its figures before that."""
        number, path = self._next_number, self.folder / "supervisor.log"
        log = log_to(path)
        give_up = self.elapsed + _HANG_SECONDS
        while True:
            log.note(ledger.CALL, 0, 0, 1)
            try:
                messages = [self.channel.get(timeout=0.2)]
            except queue.Empty:
                messages = []
            log.note_got(messages)
            stats = self.channel.stats()
            if not messages and (stats.free == self.options.capacity or self.elapsed > give_up):
                break
        self.ledger.read(number, path.read_bytes())
        self.ledger.ended(number, 0, 0)
        self._check(stats)
        capacity = 0
        with contextlib.suppress(queue.Full):
            while capacity <= self.options.capacity:
                self.channel.put_nowait(capacity)
                capacity += 1
        back = [self.channel.get_nowait() for _ in range(self.channel.qsize())]
        if back != list(range(self.options.capacity)):
            self.failures.append(f"in the end {back} fit, of a capacity of {self.options.capacity}")
        return stats

    def _check(self, stats: ChannelStats) -> None:
        """What the channel says of itself, at rest."""
        others = [person for person in stats.participants if person.pid != os.getpid()]
        expectations = {
            f"{len(others)} others are attached": not others,
            f"{stats.free} slots are free": stats.free == stats.capacity,
            f"{self.channel.qsize()} messages wait": self.channel.qsize() == 0,
            f"{stats.dropped} messages were dropped": stats.dropped == 0,
            f"{stats.sent} were sent, {stats.received} received": stats.sent == stats.received,
            f"{stats.withdrawn} were taken back, in {self.ledger.unfinished} calls that did not send all": (
                stats.withdrawn <= self.ledger.unfinished
            ),
            f"{stats.reaped} were reaped, of {self.sure_deaths} to {self.possible_deaths} that died": (
                self.sure_deaths <= stats.reaped <= self.possible_deaths
            ),
        }
        self.failures += [f"in the end {text}" for text, holds in expectations.items() if not holds]


def _state(pid: int) -> str:
    """R, S, T (stopped), Z, …, as the kernel says."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "gone"


# --- the report


def _progress(soak: _Soak) -> dict[str, str]:
    counts, seconds = soak.counts, soak.elapsed
    stats = soak.channel.stats()
    return {
        "elapsed": f"{seconds:.0f} of {soak.options.minutes * 60:.0f} s",
        "received": f"{soak.ledger.received:,} of {soak.ledger.sent:,} sent, {soak.ledger.received / seconds:,.0f}/s",
        "signals": ", ".join(f"{counts[name]} {name}" for name in ("SIGKILL", "SIGSTOP", "SIGTERM")),
        "recoveries": f"{stats.recoveries}, {stats.redelivered} redelivered",
        "longest stall": f"{soak.ledger.longest_stall():.2f} s",
    }


class _Report:
    """A table that renews itself, or where there is no terminal a line every few seconds."""

    def __init__(self, soak: _Soak, console: Console, live: Live) -> None:
        self._soak = soak
        self._console = console
        self._live = live
        self._line_at = 0.0

    def __call__(self) -> None:
        if self._console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for name, value in _progress(self._soak).items():
                table.add_row(name, value)
            self._live.update(table, refresh=True)
        elif self._soak.elapsed >= self._line_at:
            self._line_at = self._soak.elapsed + _REPORT_SECONDS
            print(" · ".join(f"{name} {value}" for name, value in _progress(self._soak).items()), flush=True)


def _result(soak: _Soak, stats: ChannelStats, verdict: Verdict, silence: float) -> dict[str, Any]:
    """The figures of the final table."""
    figures = asdict(verdict)
    figures.pop("examples")
    return {
        "seconds": round(soak.elapsed, 1),
        **figures,
        "redelivered": stats.redelivered,
        "longest_stall": soak.ledger.longest_stall(),
        "p99_stall": soak.ledger.p99_stall(),
        "longest_silence": silence,
        "deaths": soak.counts["deaths"],
        "exits": soak.counts["exits"],
        "kills": soak.counts["SIGKILL"],
        "terms": soak.counts["SIGTERM"],
        "stops": soak.counts["SIGSTOP"],
        "stops_checked": soak.counts["stops checked"],
        "recoveries": stats.recoveries,
        "taken_back": stats.withdrawn,
        "reaped": stats.reaped,
    }


_ROWS = {
    "sent": "sent: put returned",
    "taken_back": "larger than a slot, and taken back: no time left, or their sender was killed or interrupted",
    "received": "received",
    "redelivered": "redelivered: their receiver was killed, by the channel's count",
    "taken_again": "received after another had begun to decode them and was killed or interrupted",
    "in_doubt_sending": "in doubt: sender killed or interrupted inside put, never seen",
    "in_doubt_receiving": "in doubt: receiver killed or interrupted around the return of get",
    "lost": "lost (must be 0)",
    "duplicated": "duplicated without a redelivery (must be 0)",
    "torn": "torn (must be 0)",
    "disordered": "out of order without a redelivery (must be 0)",
    "unreturned": "decoded by a call that returned without them (must be 0)",
    "longest_stall": "longest stall of a worker, stops left out, s",
    "p99_stall": "99 % of stalls, s",
    "longest_silence": "longest time in which nobody received, stops left out, s",
    "deaths": "deaths",
    "exits": "exits",
    "kills": "SIGKILL sent",
    "terms": "SIGTERM sent",
    "stops": "SIGSTOP sent",
    "stops_checked": "workers seen stopped, and not taken for dead",
    "recoveries": "recoveries of the mutexes",
    "reaped": "reaped",
    "seconds": "seconds",
}
_MUST_BE_ZERO = ("lost", "duplicated", "torn", "disordered", "unreturned")


def _show(console: Console, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    title = f"{options.senders} + {options.receivers} workers, capacity {options.capacity}, seed {options.seed}"
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key, label in _ROWS.items():
        value = figures[key]
        text = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
        table.add_row(label, f"[bold red]{text}[/]" if key in _MUST_BE_ZERO and value else text)
    console.print(table)


# --- the command line


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf soak", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default 1); Ctrl-C ends it earlier")
    parser.add_argument("--senders", type=int, default=12)
    parser.add_argument("--receivers", type=int, default=12)
    parser.add_argument("--capacity", type=int, default=4, help="slots of the ring (default 4)")
    text = "share of the workers that run no compiled code (default 0.4)"
    parser.add_argument("--pure", type=float, default=0.4, metavar="SHARE", help=text)
    parser.add_argument("--seed", type=int, help="of what the killer does (default: a new one, which is shown)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(argv)
    if min(options.senders, options.receivers, options.capacity) < 1 or options.minutes <= 0:
        parser.error("--minutes, --senders, --receivers and --capacity take positive numbers")
    if options.seed is None:
        options.seed = random.randrange(1 << 32)
    return options


def _files(name: str) -> set[str]:
    return {file for file in os.listdir("/dev/shm") if name in file}


def main(argv: Sequence[str]) -> int:
    """Soak, and show what became of it; returns 1 if anything was lost, doubled, torn or stuck."""
    options = _parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"seed {options.seed}; compiled path: {compiled_path()}", highlight=False)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    people = 2 * (options.senders + options.receivers) + 8
    channel = Channel(
        options.capacity, SLOT_SIZE, keep_open=True, max_deliveries=255, max_participants=people
    )  # fmt: skip
    soak = _Soak(options, channel, folder)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        soak.interrupted = True
        signal.signal(signum, previous[signum])  # the second time it ends the program

    previous: dict[int, Any] = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # No thread that refreshes: workers are forked.
        with channel, Live(console=console, auto_refresh=False, transient=True) as live:
            soak.mayhem(_Report(soak, console, live))
            silence = soak.ledger.longest_silence(monotonic_ns())
            soak.finish()
            stats = soak.drain()
            verdict = soak.ledger.verdict(stats.sent)
        if left := _files(channel.name):
            soak.failures.append(f"/dev/shm still holds {sorted(left)}")
    finally:
        soak.kill_all()
        shutil.rmtree(folder)
        for number, handler in previous.items():
            signal.signal(number, handler)
    figures = _result(soak, stats, verdict, silence)
    _show(console, options, figures)
    for text in (*soak.failures, *verdict.examples):
        print(text, file=sys.stderr)
    failed = bool(soak.failures or verdict.examples or any(figures[key] for key in _MUST_BE_ZERO))
    if options.json:
        arguments = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"options": arguments, **figures, "failures": soak.failures}, indent=1))
    return int(failed)

"""What does it cost a channel that ``ringshm top`` watches it, and what does ``top`` itself take?

Messages per second from one sender to one receiver, with and without a ``ringshm top --interval 0.5`` beside them, on a
terminal of its own and with its first screen drawn. Then the processor time of ``top``, as a share of a core, while
those work, and with 1 and 20 channels at which a receiver waits.
"""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import threading
import time as clock
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import throughput
from .contenders import Contender, Receiver
from .measure import ARRAYS, DICT, Case, Measurement, Metrics, Options, Payload, Timing, alternate
from .measure import steps as steps_of
from .workers import CONTEXT, Failed

_INTERVAL = "0.5"  # Seconds from one look to the next.
_LONGER = 25  # How many times as long as another timing one takes, so that there are some looks in it.
_WATCHED = "ringshm beside top"
_RATE: Metrics = {"messages/s": True, "% of a core": None}
_SHARE: Metrics = {"% of a core": False}
_PAYLOADS = [DICT, *(array for array in ARRAYS if array.nbytes == 1_000_000)]


@contextlib.contextmanager
def _top() -> Iterator[int]:
    """Run ``ringshm top``, from its second screen on; its pid."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "ringshm", "top", "--interval", _INTERVAL]
    environment = dict(os.environ, TERM="xterm", LINES="50", COLUMNS="120", PYTHONUTF8="1")
    process = subprocess.Popen(
        command, env=environment, stdin=terminal, stdout=terminal, stderr=terminal,
        cwd=Path(__file__).parent.parent, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    drawn = threading.Event()
    reader = threading.Thread(target=_read, args=(controller, drawn))
    reader.start()
    try:
        drawn.wait()
        if process.poll() is not None:
            raise Failed(f"top ended with {process.returncode}")
        yield process.pid
    finally:
        process.terminate()
        process.wait()
        reader.join()
        os.close(controller)


def _read(controller: int, drawn: threading.Event) -> None:
    screens = 0
    with contextlib.suppress(OSError):  # EIO: it has ended.
        while data := os.read(controller, 65536):
            screens += data.count(b"\x1b[H")
            if screens >= 2:
                drawn.set()
    drawn.set()


def _seconds_of(pid: int) -> float:
    """Processor time of the one thread that a process has that works."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _beside(payload: Payload, options: Options, contender: Contender, count: int, runs: int) -> list[Timing]:
    if contender.name != _WATCHED:
        return throughput.time(payload, options, contender, count, runs)
    timings = []
    for _ in range(runs):
        with _top() as pid:
            began, before = clock.perf_counter(), _seconds_of(pid)
            (timing,) = throughput.time(payload, options, contender, count, 1)
            share = (_seconds_of(pid) - before) / (clock.perf_counter() - began)
        timings.append(replace(timing, values={**timing.values, "% of a core": 100 * share}))
    return timings


def _alone(options: Options, contender: Contender, count: int, runs: int) -> list[Timing]:
    """The share that it takes with so many channels, each with a process that waits."""
    pairs = [DICT.pair(contender) for _ in range(int(contender.name.split()[1]))]
    waiting = CONTEXT.Process(target=_wait, args=([pair.receiver for pair in pairs],), daemon=True)
    waiting.start()
    try:
        return [_share(options.seconds) for _ in range(runs)]
    finally:
        waiting.kill()
        waiting.join()
        for pair in pairs:
            pair.close()


def _wait(receivers: list[Callable[[], Receiver]]) -> None:
    threads = [threading.Thread(target=receiver().get) for receiver in receivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _share(seconds: float) -> Timing:
    """The share of a core that it takes, over some looks at least."""
    with _top() as pid:
        began, before = clock.perf_counter(), _seconds_of(pid)
        clock.sleep(max(seconds, 4 * float(_INTERVAL)))
        share = (_seconds_of(pid) - before) / (clock.perf_counter() - began)
    return Timing(seconds, {"% of a core": 100 * share})


def _plan(contenders: list[Contender], options: Options) -> tuple[list[Contender], list[Contender]]:
    """With and without ``top``; and with how many channels."""
    ours = [contender for contender in contenders if contender.name == "ringshm"]
    beside = [*ours, *(replace(contender, name=_WATCHED) for contender in ours)]
    return beside, [replace(contender, name=f"top, {count} channels") for contender in ours for count in (1, 20)]


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    beside, alone = _plan(contenders, options)
    return len(_PAYLOADS) * steps_of(beside, options) + steps_of(alone, options)


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Watch."""
    options = replace(options, seconds=_LONGER * options.seconds, step=options.step)
    beside, alone = _plan(contenders, options)
    result: list[Measurement] = []
    for payload in _PAYLOADS:
        check, run = partial(throughput._check, payload, options.limit), partial(_beside, payload, options)
        case = Case("top", f"{payload.name}, one sender, one receiver, looked at every {_INTERVAL} s")
        result += alternate(case, beside, options, check, run, _RATE)
    case = Case("top", f"top itself, a look every {_INTERVAL} s, a receiver waits at each channel")
    return result + alternate(case, alone, options, lambda _: None, partial(_alone, options), _SHARE, count=1)

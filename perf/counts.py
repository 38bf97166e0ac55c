"""What does one message cost in things that can be counted exactly, whatever else the machine does?

- system calls of a put and a get in one process, uncontended: the difference between two runs of a program
  under strace that differ only in the number of messages, so that starting and stopping cancel out;
- minor page faults of the sender and of the receiver, once warm;
- bytecodes and calls into C of a put and of a get, in ringshm's own code, by function.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from .contenders import Contender, Pair, everyone
from .measure import ARRAYS, DICT, Measurement, Options, Payload, counted
from .workers import CONTEXT, Failed, run_workers


def _pairs(name: str, method: str, count: int) -> None:
    """Send and receive so many small dicts in this process; what runs under strace."""
    contender = next(contender for contender in everyone() if contender.name == name)
    pair = DICT.pair(contender)
    receiver, sender = pair.receiver(), pair.sender()
    put, get, message = sender.put, getattr(receiver, method), DICT.make(0)
    for _ in range(count):
        put(message)
        get()
    receiver.finish()
    sender.finish()
    pair.close()


def _traced_calls(name: str, method: str, count: int, limit: float) -> Counter[str]:
    if shutil.which("strace") is None:
        raise Failed("strace is not installed")
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder, "summary")
        program = [sys.executable, "-m", "perf.counts", name, method, str(count)]
        command = ["strace", "-f", "-c", "-U", "calls,name", "-o", str(summary), *program]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=Path(__file__).parent.parent, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # strace and what it traces: a session of our own.
            process.communicate()
            raise Failed(f"no result under strace after {limit:.0f} s") from None
        if process.returncode:
            raise Failed((output.strip().splitlines() or ["strace failed"])[-1])
        rows = re.findall(r"^\s*(\d+)\s+(\w+)$", summary.read_text(), re.MULTILINE)
        return Counter({call: int(calls) for calls, call in rows if call != "total"})


def _system_calls(name: str, method: str, limit: float) -> dict[str, float]:
    few, more = 1000, 3000
    before = _traced_calls(name, method, few, limit)
    after = _traced_calls(name, method, more, limit)
    difference = {call: (after[call] - before[call]) / (more - few) for call in after}
    return {call: value for call, value in difference.items() if value}


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _send(pair: Pair, message: Any, count: int, barrier: Any) -> float:
    sender = pair.sender()
    barrier.wait()  # Both ends are open.
    for _ in range(count):
        sender.put(message)
    barrier.wait()
    before = _faults()
    for _ in range(count):
        sender.put(message)
    sender.finish()
    return (_faults() - before) / count


def _receive(pair: Pair, count: int, barrier: Any) -> float:
    receiver = pair.receiver()
    barrier.wait()
    for _ in range(count):
        receiver.get()
    barrier.wait()
    before = _faults()
    for _ in range(count):
        receiver.get()
    after = _faults()
    receiver.finish()
    return (after - before) / count


def _page_faults(contender: Contender, payload: Payload, count: int, limit: float) -> dict[str, float]:
    pair, barrier = payload.pair(contender), CONTEXT.Barrier(2)
    try:
        send = partial(_send, pair, payload.make(0), count, barrier)
        sender, receiver = run_workers([send, partial(_receive, pair, count, barrier)], limit)
    finally:
        pair.close()
    return {"sender": sender, "receiver": receiver}


def _tracers(folder: str, counts: Counter[tuple[str, str]]) -> tuple[Callable[..., Any], Callable[..., None]]:
    """A trace function that counts bytecodes run in `folder`, a profile function for its calls into C."""

    def label(frame: FrameType) -> str:
        name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
        return f"{Path(frame.f_code.co_filename).stem}.{name}"

    def inner(frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            counts["bytecodes", label(frame)] += 1
        return inner

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(folder):
            return None
        counts["calls", label(frame)] += 1
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return inner

    def profile(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and frame.f_code.co_filename.startswith(folder):
            counts["C calls", str(getattr(function, "__qualname__", function))] += 1

    return trace, profile


def _own(contender: Contender, payload: Payload, operation: str, kind: str) -> dict[str, float]:
    """How much of a kind one put or one get of ringshm takes, by function, once warm."""
    folder = str(Path(sys.modules[str(contender.module)].__file__ or "").parent)
    pair, message, times = payload.pair(contender), payload.make(0), 30
    counts: Counter[tuple[str, str]] = Counter()
    sender, receiver = pair.sender(), pair.receiver()
    trace, profile = _tracers(folder, counts)

    def run(name: str, call: Callable[[], object], counting: bool) -> None:
        if counting and name == operation:
            if kind == "C calls":
                sys.setprofile(profile)
            else:
                sys.settrace(trace)
        call()
        sys.settrace(None)
        sys.setprofile(None)

    for turn in range(2 * times):
        run("put", partial(sender.put, message), turn >= times)
        run("get", receiver.get, turn >= times)
    pair.close()
    return {function: value / times for (which, function), value in counts.items() if which == kind}


def _methods(contender: Contender) -> list[str]:
    """`get` for all, and `get_nowait` for ringshm, whose documentation promises no system calls."""
    return ["get", "get_nowait"] if contender.name == "ringshm" else ["get"]


def _plan(contenders: list[Contender], limit: float) -> Iterator[tuple[str, str, str, Callable[..., Any]]]:
    """Case, contender, metric and counter of everything that is counted."""
    standard = [other for other in contenders if other.is_queue and not other.heavy]
    for contender in standard:
        for method in _methods(contender):
            count = partial(_system_calls, contender.name, method, limit)
            who = f"{contender.name} put+{method}"
            yield "uncontended, one process, dict", who, "system calls/message", count
    for payload in [DICT, *(array for array in ARRAYS if array.nbytes in (100_000, 1_000_000))]:
        for contender in standard:
            faults = partial(_page_faults, contender, payload, 2000 if payload is DICT else 200, limit)
            yield f"two processes, {payload.name}", contender.name, "page faults/message", faults
    for payload in [DICT, *(array for array in ARRAYS if array.nbytes == 1000)]:
        for contender in standard:
            if contender.name == "ringshm":
                for operation in ["put", "get"]:
                    for kind in ["bytecodes", "calls", "C calls"]:
                        counter = partial(_own, contender, payload, operation, kind)
                        yield f"ringshm's own code, {payload.name}", "ringshm", f"{kind}/{operation}", counter


def steps(contenders: list[Contender], options: Options) -> int:
    """How many times `measure` will call ``options.step``."""
    return len(list(_plan(contenders, options.limit)))


def measure(contenders: list[Contender], options: Options) -> list[Measurement]:
    """Count system calls and page faults for everybody, bytecodes for ringshm."""
    result = []
    for case, who, metric, count in _plan(contenders, options.limit):
        options.step(f"{metric}: {who}, {case}")
        result.append(counted("counts", case, who, metric, 2 * options.limit, count))
    return result


if __name__ == "__main__":
    _pairs(sys.argv[1], sys.argv[2], int(sys.argv[3]))

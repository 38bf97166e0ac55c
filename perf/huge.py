"""An array of nearly half of the memory, through a ring of 64 MB: `python -m perf.huge --gigabytes 10`.

The sender holds the array and the receiver its copy; there is no room for a third. `multiprocessing.Queue` and
py-sharedmemory are asked for a smaller one, beside ringshm, in processes that may have little more than the array.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from ringshm import Channel

from .contenders import Pair, Receiver, Sender, everyone
from .workers import CONTEXT, Failed, isolated, run_workers

_CAPACITY, _SLOT_SIZE = 64, 1_000_000
_LIMITED_NBYTES = 1_000_000_000
_SPARE = 1.5  # Times the array: so much a process may map beside what it has mapped already.
_PART = 1 << 20


def _limit(nbytes: int) -> None:
    """Let this process map so much more."""
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + nbytes, mapped + nbytes))


def _peak() -> float:
    """The most memory that this process has had resident, in bytes, with the shared memory that it has touched."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _send(open_sender: Callable[[], Sender], nbytes: int, spare: int) -> tuple[float, float]:
    if spare:
        _limit(spare)
    array, sender = np.arange(nbytes // 8), open_sender()
    begin = time.perf_counter()
    sender.put(array)
    sender.finish()
    return time.perf_counter() - begin, _peak()


def _receive(open_receiver: Callable[[], Receiver], nbytes: int, spare: int) -> tuple[float, float]:
    if spare:
        _limit(spare)
    receiver = open_receiver()
    array = receiver.get()
    peak = _peak()
    for begin in range(0, nbytes // 8, _PART):
        part = array[begin : begin + _PART]
        if part[0] != begin or (np.diff(part) != 1).any():
            raise Failed(f"the array arrived wrong, from item {begin} on")
    receiver.finish()
    return 0.0, peak


def _pass(make: Callable[[], Pair], nbytes: int, spare: int, limit: float) -> str:
    """Send one array; what that took, in words."""
    pair = make()
    try:
        (seconds, sent), (_, received) = run_workers(
            [partial(_send, pair.sender, nbytes, spare), partial(_receive, pair.receiver, nbytes, spare)], limit
        )
    finally:
        pair.close()
    return (
        f"{seconds:.1f} s, {nbytes / seconds / 1e9:.2f} GB/s; most memory resident, shared memory included: "
        f"sender {sent / 1e9:.2f} GB, receiver {received / 1e9:.2f} GB"
    )


def _stream() -> Pair:
    channel = Channel(_CAPACITY, _SLOT_SIZE)
    sender, receiver = channel.sender(), channel.receiver()
    return Pair(lambda: Sender(sender.put), lambda: Receiver(receiver.get), channel.close)


def _show(name: str, make: Callable[[], Pair], nbytes: int, spare: int = 0) -> None:
    limit = 60.0 if spare else 300.0
    try:
        told = isolated(partial(_pass, make, nbytes, spare, limit), limit + 20.0)
    except Failed as failure:
        told = f"fails: {failure}"
    print(f"  {name}: {told}", flush=True)


def main() -> int:
    """Pass the arrays, and show what it took."""
    parser = argparse.ArgumentParser(prog="python -m perf.huge", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the array (default 10)")
    nbytes = int(parser.parse_args().gigabytes * 1e9) // 8 * 8
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    ring = _CAPACITY * _SLOT_SIZE // 1_000_000
    print(f"{nbytes / 1e9:.1f} GB through a ring of {ring} MB, on a machine of {memory / 1e9:.1f} GB:", flush=True)
    _show("ringshm", _stream, nbytes)
    print(f"{_LIMITED_NBYTES / 1e9:.1f} GB, where each process may map {_SPARE} times as much beside:", flush=True)
    _show("ringshm", _stream, _LIMITED_NBYTES, int(_SPARE * _LIMITED_NBYTES))
    for contender in everyone():
        if contender.name in ("mp.Queue", "py-sharedmemory"):
            make = partial(contender.make, 1, _LIMITED_NBYTES + 4096, CONTEXT)
            _show(contender.name, make, _LIMITED_NBYTES, int(_SPARE * _LIMITED_NBYTES))
    return 0


if __name__ == "__main__":
    sys.exit(main())

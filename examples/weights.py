"""A policy of 100 MB for eight readers: it lies in shared memory once, and each reads it there.

The learner publishes versions; every reader waits for the next one in the kernel, and borrows it: no copy, whatever its
size. The publisher never waits for a reader; here it does wait until all have reported, to show how long that takes.

    python examples/weights.py --megabytes 100 --readers 8 --versions 5

It prints how long a `publish` takes (one copy), how long until all readers have the version, and what memory it takes.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from children import children

import ringshm


def follow(reader: int, weights: ringshm.Latest, reports: ringshm.Channel) -> None:
    """A reader's process: look at each version where it lies, and say when."""
    version = 0
    ends = (ringshm.EndOfChannel, ringshm.BrokenChannel, ringshm.ChannelClosed, ringshm.ChannelNotFound)
    with contextlib.suppress(*ends), weights, reports.sender() as sender:
        while True:
            with weights.borrow(newer_than=version) as newest:
                version = newest.version
                seen, layer = time.monotonic(), newest["layer"]
                assert layer[0] == layer[-1] == version
                del layer
            sender.put((reader, version, seen))


def shared_memory() -> tuple[float, float]:
    """What this process has mapped of /dev/shm, and its share of that, in MB, as the kernel counts."""
    resident = share = 0.0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name:  # a mapping: addresses, permissions, offset, device, inode, path
            inside = len(rest) > 4 and rest[4].startswith("/dev/shm/")
        elif inside and name == "Rss:":
            resident += int(rest[0]) / 1e3
        elif inside and name == "Pss:":
            share += int(rest[0]) / 1e3
    return resident, share


def check(readers: Sequence[BaseProcess]) -> None:
    """Raise RuntimeError if one has died: the others would go on, but its report is waited for."""
    for process in readers:
        if not process.is_alive():
            raise RuntimeError(f"reader {process.pid} has died: exit code {process.exitcode}")


def next_report(reports: ringshm.Channel, readers: Sequence[BaseProcess]) -> tuple[int, int, float]:
    """A reader's report; RuntimeError if one has died."""
    while True:
        try:
            report: tuple[int, int, float] = reports.get(timeout=0.5)
            return report
        except queue.Empty:
            check(readers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(description="One large policy, many readers, no copies.")
    parser.add_argument("--megabytes", type=int, default=100, metavar="MB")
    parser.add_argument("--readers", type=int, default=8, metavar="N")
    parser.add_argument("--versions", type=int, default=5, metavar="N")
    args = parser.parse_args(argv)
    if min(args.megabytes, args.readers, args.versions) < 1:
        parser.error("--megabytes, --readers and --versions must be at least 1")
    policy = np.empty(args.megabytes * 250_000, np.float32)
    publishes, arrivals = [], []
    try:
        with (
            ringshm.Latest(spec={"layer": (np.float32, len(policy))}, readers=args.readers, borrows=2) as weights,
            ringshm.Channel(2 * args.readers, 1024) as reports,
            children(follow, [(reader, weights, reports) for reader in range(args.readers)]) as readers,
        ):
            while not weights.wait_for_peers(receivers=args.readers, timeout=0.5):
                check(readers)
            for version in range(1, args.versions + 1):
                policy[:] = version
                began = time.monotonic()
                weights.publish({"layer": policy})
                publishes.append(time.monotonic() - began)
                seen = [next_report(reports, readers) for _ in range(args.readers)]
                assert sorted(seen)[0][:2] == (0, version)
                arrivals.append(max(when for _, _, when in seen) - began)
            resident, share = shared_memory()
            weights.close()  # no publisher is left: the readers, who wait for the next version, get EndOfChannel
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    print(
        f"{args.versions} versions of {args.megabytes} MB: publish {np.median(publishes) * 1e3:.1f} ms, "
        f"{args.readers} readers see it {np.median(arrivals) * 1e3:.1f} ms after it began; {resident:,.0f} MB of "
        f"shared memory, of which this process's share is {share:,.0f} MB"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A camera, and who looks at its pictures: a controller at every one, a detector at the newest whenever it has time.

The camera publishes frames of 640 x 480 and waits for nobody. The controller (2 ms a frame) and the detector (100 ms)
borrow the newest frame where it lies; the detector skips those that it has no time for, and never sees an old one. If
no frame comes for 0.2 s, the controller stops the robot. Kill the camera: another takes its place, and the robot moves
on.

    python examples/camera.py --frames 300 --fps 60

It prints how many frames each has seen, and how old they were.
"""

from __future__ import annotations

import argparse
import functools
import queue
import signal
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from children import end, replaced, start

import ringshm

FRAME = {"image": (np.uint8, (480, 640, 3)), "taken": np.float64, "is_last": np.bool_}
LOOKS = {"controller": 0.002, "detector": 0.1}  # seconds that one takes
STALE_SECONDS = 0.2


class Seen(NamedTuple):
    """What a process has seen."""

    name: str
    frames: int
    milliseconds: float  # the median age of a frame when it was there
    stops: int  # how often no frame came for some time


def film(frames: ringshm.Latest, count: int, fps: float) -> None:
    """The camera's process; another goes on where one has died."""
    rng, picture = np.random.default_rng(), np.zeros((480, 640, 3), np.uint8)
    with frames:
        for left in reversed(range(count - frames.version)):
            row, column = rng.integers(470), rng.integers(630)
            picture[...] = 0
            picture[row : row + 10, column : column + 10] = 255  # what is to be found
            frames.publish({"image": picture, "taken": time.monotonic(), "is_last": not left})
            time.sleep(1 / fps)


def look(name: str, frames: ringshm.Latest, reports: ringshm.Sender) -> None:
    """A consumer's process: look at the newest frame, again and again."""
    version, ages, stops, has_ended = 0, [], 0, False
    frames.read()  # wait for the first one, however long the camera takes to start
    with frames, reports:
        while not has_ended:
            try:
                with frames.borrow(newer_than=version, timeout=STALE_SECONDS) as frame:
                    version, has_ended = frame.version, bool(frame["is_last"])
                    ages.append(time.monotonic() - float(frame["taken"]))
                    assert frame["image"].max() == 255
                    time.sleep(LOOKS[name])
            except queue.Empty as error:
                if not stops:
                    print(f"{name}: {error}", flush=True)
                stops += 1
        reports.put(Seen(name, len(ages), float(np.median(ages)) * 1e3, stops))


def watch(count: int, fps: float) -> list[Seen]:
    """Have the camera take so many frames; what the others have seen."""
    with (
        ringshm.Latest(spec=FRAME, borrows=len(LOOKS)) as frames,
        ringshm.Channel(len(LOOKS), "1KiB", keep_open=True) as reports,
    ):
        seen: dict[str, Seen] = {}
        makers = {"camera": functools.partial(start, film, frames, count, fps)}
        makers |= {name: functools.partial(start, look, name, frames, reports.sender()) for name in LOOKS}
        processes = {name: make() for name, make in makers.items()}
        try:
            while len(seen) < len(LOOKS):
                try:
                    report = reports.get(timeout=0.1)
                    seen[report.name] = report
                except queue.Empty:
                    for name in processes.keys() - seen.keys():
                        if name != "camera" or frames.version < count:
                            processes[name] = replaced(processes[name], makers[name], name)
        except BaseException:
            for process in processes.values():
                process.kill()
            raise
        finally:
            end(processes.values())
    return [seen[name] for name in LOOKS]


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(description="One camera, a fast and a slow process that look at its frames.")
    parser.add_argument("--frames", type=int, default=300, metavar="N", help="that the camera takes (default: 300)")
    parser.add_argument("--fps", type=float, default=60, metavar="N", help="frames per second (default: 60)")
    args = parser.parse_args(argv)
    if args.frames < 1 or args.fps <= 0:
        parser.error("--frames must be at least 1, and --fps more than 0")
    try:
        seen = watch(args.frames, args.fps)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    for name, frames, milliseconds, stops in seen:
        print(f"{name}: {frames} of {args.frames} frames, {milliseconds:.1f} ms old; stopped {stops} times")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

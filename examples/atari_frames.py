"""Atari frames without a copy: emulators write them into slots of shared memory, the learner reads them there.

Each actor runs ale-py's Pong and takes a loan for each frame: the emulator renders straight into the slot. The learner
borrows batches of them and looks at every frame where it lies. Between them, no byte of a frame is copied.

    python examples/atari_frames.py --actors 2 --frames 2000
    python examples/atari_frames.py --copy                  the same by put and get, which copy each frame twice

It prints the frames per second, and the bytes that were copied per frame between emulator and learner.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Sequence

import numpy as np
from ale_py import ALEInterface, LoggerMode, roms
from children import children

import ringshm

BATCH = 8
FRAME = {
    "screen": (np.uint8, (210, 160, 3)),
    "reward": np.float32,
    "over": np.bool_,
    "actor": np.int64,
}


def act(actor: int, count: int, copy: bool, frames: ringshm.Channel) -> None:
    """An actor's process: play Pong at random, send each frame."""
    ALEInterface.setLoggerMode(LoggerMode.Error)
    emulator = ALEInterface()
    emulator.setInt("random_seed", actor)
    emulator.loadROM(str(roms.get_rom_path("pong")))
    actions = emulator.getMinimalActionSet()
    rng = np.random.default_rng(actor)
    screen = np.empty((210, 160, 3), np.uint8)
    ends = (ringshm.BrokenChannel, ringshm.ChannelClosed, ringshm.ChannelNotFound)
    with contextlib.suppress(*ends), frames.sender() as sender:
        frames.close()
        for _ in range(count):
            reward = emulator.act(actions[rng.integers(len(actions))])
            over = emulator.game_over()
            if copy:
                emulator.getScreenRGB(screen)
                sender.put({"screen": screen, "reward": reward, "over": over, "actor": actor})
            else:
                with sender.loan() as slot:
                    emulator.getScreenRGB(slot["screen"])
                    slot["reward"], slot["over"], slot["actor"] = reward, over, actor
            if over:
                emulator.reset_game()


def borrow_batch(frames: ringshm.Channel) -> list[float]:
    """The brightness of up to BATCH frames, read where they lie."""
    with contextlib.ExitStack() as borrowed:  # all slots are given back when the block ends
        messages = [borrowed.enter_context(frames.borrow())]
        while len(messages) < BATCH and not frames.empty():
            messages.append(borrowed.enter_context(frames.borrow()))
        return [float(message["screen"].mean()) for message in messages]


def copy_batch(frames: ringshm.Channel) -> list[float]:
    """The same of a stacked copy."""
    batch = frames.get_batch(BATCH, min=1)
    return [float(screen.mean()) for screen in batch["screen"]]


def learn(frames: ringshm.Channel, copy: bool) -> tuple[int, float, float]:
    """Look at all frames, in batches: how many there were, their mean brightness, and the seconds that it took."""
    brightness: list[float] = []
    began = 0.0
    with contextlib.suppress(ringshm.EndOfChannel):  # the last actor has ended
        while True:
            brightness += (copy_batch if copy else borrow_batch)(frames)
            began = began or time.monotonic()
    return len(brightness), sum(brightness) / max(len(brightness), 1), time.monotonic() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(description="Real Atari frames from actors to a learner, without a copy.")
    parser.add_argument("--actors", type=int, default=2, metavar="N")
    parser.add_argument("--frames", type=int, default=2000, metavar="N", help="of each actor (default: 2000)")
    parser.add_argument("--copy", action="store_true", help="by put and get_batch instead")
    args = parser.parse_args(argv)
    if args.actors < 1 or args.frames < 1:
        parser.error("--actors and --frames must be at least 1")
    try:
        with (
            ringshm.Channel(4 * BATCH, spec=FRAME) as frames,
            children(act, [(actor, args.frames, args.copy, frames) for actor in range(args.actors)]),
        ):
            count, brightness, seconds = learn(frames, args.copy)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    copied = 2 * 210 * 160 * 3 if args.copy else 0  # into the slot and out of it, or not at all
    print(
        f"{count:,} frames of 210x160x3 from {args.actors} actors, {count / seconds:,.0f} frames per second, "
        f"{copied:,} bytes copied per frame (mean brightness {brightness:.1f})"
    )
    return 0 if count == args.actors * args.frames else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""An inference server in asyncio: actors send observations, one process batches them, runs the policy, answers each.

The requests share one channel. The server awaits what is there, up to one of each actor, in one stacked copy. Each
actor has a channel of its own for the answers. Meanwhile the same event loop awaits what the actors tell of themselves,
through a third channel; a server of yours may answer HTTP there.

    python examples/inference_server.py --actors 4 --requests 2000

It prints percentiles of the round trip, from an actor's observation to its action, and how large the batches were.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import queue
import signal
import sys
import time
from collections.abc import Sequence

import numpy as np
from children import children
from numpy.typing import NDArray

import ringshm

OBSERVATION = (np.float32, (84,))
REQUEST = {"actor": np.int64, "observation": OBSERVATION}
ANSWER = {"action": np.int64, "value": np.float32}
PATIENCE = 0.001  # seconds that a request waits for others to share its batch; an event loop counts in milliseconds


def act(actor: int, count: int, requests: ringshm.Channel, answers: ringshm.Channel, times: ringshm.Channel) -> None:
    """An actor's process: ask for actions, one at a time; in the end, tell how long each took."""
    rng = np.random.default_rng(actor)
    seconds = np.empty(count)
    ends = (ringshm.BrokenChannel, ringshm.ChannelClosed, ringshm.EndOfChannel, ringshm.ChannelNotFound)
    with contextlib.suppress(*ends):
        for k in range(count):
            observation = rng.random(84, np.float32)
            began = time.perf_counter()
            requests.put({"actor": actor, "observation": observation})
            answer = answers.get()
            seconds[k] = time.perf_counter() - began
            assert answer["action"] == observation.argmax() % 6
        times.put(seconds)


async def serve(requests: ringshm.Channel, answers: Sequence[ringshm.Channel]) -> list[int]:
    """Answer until all actors have ended; the sizes of the batches."""
    policy = np.tile(np.eye(6, dtype=np.float32), (14, 1))  # (84, 6): the action is the largest entry's number, mod 6
    sizes: list[int] = []
    idle = True
    while True:
        try:
            if idle:  # sleep until a request comes
                batch = await requests.aget_batch(1)
            else:
                batch = await requests.aget_batch(len(answers), min=1, timeout=PATIENCE)
        except queue.Empty:
            idle = True
            continue
        except ringshm.EndOfChannel:
            return sizes
        idle = False
        observations: NDArray[np.float32] = batch["observation"]
        largest = observations == observations.max(axis=1, keepdims=True)
        actions = (largest @ policy).argmax(axis=1)
        for actor, action, value in zip(batch["actor"], actions, observations.mean(axis=1), strict=True):
            with contextlib.suppress(ringshm.BrokenChannel):  # it has died meanwhile
                await answers[actor].aput({"action": action, "value": value})
        sizes.append(len(actions))


async def collect(times: ringshm.Channel) -> list[NDArray[np.float64]]:
    """What each actor tells when it has done."""
    return [seconds async for seconds in times]


async def run(
    requests: ringshm.Channel, answers: Sequence[ringshm.Channel], times: ringshm.Channel
) -> tuple[list[int], list[NDArray[np.float64]]]:
    """Serve and collect side by side, in one thread."""
    return await asyncio.gather(serve(requests, answers), collect(times))


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(description="Round trips through a server that batches requests.")
    parser.add_argument("--actors", type=int, default=4, metavar="N")
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="of each actor (default: 2000)")
    args = parser.parse_args(argv)
    if args.actors < 1 or args.requests < 1:
        parser.error("--actors and --requests must be at least 1")
    try:
        with contextlib.ExitStack() as channels:
            requests = channels.enter_context(ringshm.Channel(2 * args.actors, spec=REQUEST))
            times = channels.enter_context(ringshm.Channel(args.actors, 8 * args.requests))
            answers = [channels.enter_context(ringshm.Channel(2, spec=ANSWER)) for _ in range(args.actors)]
            arguments = [(k, args.requests, requests, answers[k], times) for k in range(args.actors)]
            with children(act, arguments):
                sizes, told = asyncio.run(run(requests, answers, times))
                seconds = np.concatenate(told)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    p50, p90, p99 = np.percentile(seconds, [50, 90, 99]) * 1e6
    print(
        f"{len(seconds):,} round trips of {args.actors} actors: p50 {p50:,.0f} us, p90 {p90:,.0f} us, "
        f"p99 {p99:,.0f} us; batches of {np.mean(sizes):.1f} on average"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

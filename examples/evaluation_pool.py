"""Workers evaluate the newest policy, and the learner waits for none of them.

The learner (the cross-entropy method, on CartPole) publishes its policy after each update. Each worker reads the newest
one, plays some episodes with it, and reports; versions that come meanwhile are skipped. Kill a worker: another takes
its place, and no more is lost than what it was playing.

    python examples/evaluation_pool.py --workers 2 --seed 0

It ends when a worker has seen a policy reach a mean return of 475 (`--score`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import queue
import signal
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from children import end, replaced, start
from numpy.typing import NDArray

import ringshm

WEIGHTS = {"layer": (np.float32, 4)}  # what the learner publishes
EPISODES = 5  # that a worker plays with a policy
REPORT = {"version": np.int64, "returns": (np.float32, EPISODES)}
POPULATION, ELITE = 16, 4


def play(env: Any, layer: NDArray[np.float32], seed: int) -> float:
    """An episode; its return."""
    observation, _ = env.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(int(observation @ layer > 0))
        total += reward
        over = terminated or truncated
    return total


def evaluate(worker: int, weights: ringshm.Latest, reports: ringshm.Sender) -> None:
    """A worker's process: play with the newest policy, report, wait for a newer one; until no learner is left."""
    env, seeds, version = gymnasium.make("CartPole-v1"), itertools.count(10_000 * (worker + 1)), 0
    ends = (ringshm.EndOfChannel, ringshm.BrokenChannel, ringshm.ChannelClosed, ringshm.ChannelNotFound)
    with contextlib.suppress(*ends), weights, reports:
        while True:
            version, policy = weights.read(newer_than=version)
            returns = [play(env, policy["layer"], next(seeds)) for _ in range(EPISODES)]
            reports.put({"version": version, "returns": returns})


def improve(env: Any, mean: NDArray[Any], spread: NDArray[Any], rng: np.random.Generator) -> None:
    """An update: play with policies near the mean, and move to those that were best."""
    policies = rng.normal(mean, spread, (POPULATION, 4)).astype(np.float32)
    returns = [play(env, policy, int(rng.integers(10_000))) for policy in policies]
    best = policies[np.argsort(returns)[-ELITE:]]
    mean[...], spread[...] = best.mean(axis=0), best.std(axis=0) + 0.05


def learn(weights: ringshm.Latest, reports: ringshm.Channel, count: int, score: float, seed: int) -> tuple[int, int]:
    """Publish policies until one has that score; the number of that version, and how many there were."""
    rng, env = np.random.default_rng(seed), gymnasium.make("CartPole-v1")
    mean, spread = np.zeros(4), np.ones(4)
    makers = [functools.partial(start, evaluate, worker, weights, reports.sender()) for worker in range(count)]
    workers = [make() for make in makers]
    try:
        while True:
            improve(env, mean, spread, rng)
            newest = weights.publish({"layer": mean})
            workers = [replaced(worker, make, "worker") for worker, make in zip(workers, makers, strict=True)]
            with contextlib.suppress(queue.Empty):
                for report in reports.get_many(2 * count, timeout=0):
                    version, average = int(report["version"]), report["returns"].mean()
                    print(f"version {version} of {newest}: mean return {average:.1f}", flush=True)
                    if average >= score:
                        return version, newest
    finally:
        weights.close()  # a worker that waits for the next version gets EndOfChannel,
        reports.close()  # and one that reports BrokenChannel
        end(workers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(description="A pool of workers evaluates the newest policy.")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--score", type=float, default=475, metavar="R", help="default: 475; 500 is the most")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    args = parser.parse_args(argv)
    if args.workers < 1 or args.seed < 0:
        parser.error("--workers must be at least 1, and --seed at least 0")
    try:
        with (
            ringshm.Latest(spec=WEIGHTS) as weights,
            # stays open though all workers have died
            ringshm.Channel(2 * args.workers, spec=REPORT, keep_open=True) as reports,
        ):
            version, newest = learn(weights, reports, args.workers, args.score, args.seed)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"reached: version {version}, while the learner was at version {newest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

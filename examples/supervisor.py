"""Workers are killed at random and others take their places; every task is done, and nothing is done unseen twice.

A worker borrows a task and answers within the block: a task whose worker dies in it was not received, and goes to
another worker, with a `delivery_count` of 2. `keep_open=True` keeps both channels open while all workers may be down.

    python examples/supervisor.py --workers 3 --tasks 500 --seed 0

It prints how many workers were killed, how many tasks came again, and exits with 0 if none was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.context import SpawnProcess

from children import end, start

import ringshm

WORK = 2e-3  # seconds that a task takes
BETWEEN_KILLS = 40  # answers, on average
DELIVERIES = 100  # a task that has killed so many workers would be dropped


def work(tasks: ringshm.Receiver, answers: ringshm.Sender) -> None:
    """A worker's process."""
    ends = (ringshm.EndOfChannel, ringshm.BrokenChannel, ringshm.ChannelClosed, ringshm.ChannelNotFound)
    with contextlib.suppress(*ends), tasks, answers:
        while True:
            with tasks.borrow() as task:
                time.sleep(WORK)
                answers.put((task.value, task.delivery_count))


class Supervisor:
    """Keeps so many workers running, and kills one now and then."""

    def __init__(self, count: int, seed: int) -> None:
        self.tasks = ringshm.Channel(2 * count, 1024, keep_open=True, max_deliveries=DELIVERIES)
        self.answers = ringshm.Channel(2 * count, 1024, keep_open=True)
        self.workers: list[SpawnProcess] = []
        self.count = count
        self.killed = 0
        self.random = random.Random(seed)
        self.next_kill = BETWEEN_KILLS

    def __enter__(self) -> Supervisor:
        return self

    def tend(self, answered: int) -> None:
        """Start workers for those that are gone; kill one if so many answers have come that it is time."""
        self.workers = [worker for worker in self.workers if worker.is_alive()]
        while len(self.workers) < self.count:
            self.workers.append(start(work, self.tasks.receiver(), self.answers.sender()))
        if answered >= self.next_kill:
            os.kill(self.random.choice(self.workers).pid or 0, signal.SIGKILL)
            self.killed += 1
            self.next_kill = answered + self.random.randint(1, 2 * BETWEEN_KILLS)

    def __exit__(self, *exc_info: object) -> None:
        with self.tasks, self.answers:
            self.tasks.shutdown(immediate=True)
            self.answers.shutdown(immediate=True)
            end(self.workers)


def run(count: int, supervisor: Supervisor) -> Counter[int]:
    """Have so many tasks done; how often each was answered."""
    answered: Counter[int] = Counter()
    put = 0
    while len(answered) < count:
        supervisor.tend(len(answered))
        with contextlib.suppress(queue.Full):
            while put < count:
                supervisor.tasks.put_nowait(put)
                put += 1
        with contextlib.suppress(queue.Empty):
            for task, deliveries in supervisor.answers.get_many(count, timeout=0.05):
                answered[task] += 1
                if answered[task] > 1:  # its first worker died between its answer and the end of its block
                    assert deliveries > 1, f"task {task} was done twice without a word"
    return answered


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(description="Tasks are done though workers are killed all the time.")
    parser.add_argument("--workers", type=int, default=3, metavar="N")
    parser.add_argument("--tasks", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of who is killed, and when")
    args = parser.parse_args(argv)
    if args.workers < 1 or args.tasks < 1:
        parser.error("--workers and --tasks must be at least 1")
    try:
        with Supervisor(args.workers, args.seed) as supervisor:
            answered = run(args.tasks, supervisor)
            stats = supervisor.tasks.stats()
            killed = supervisor.killed
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    lost = sorted(set(range(args.tasks)) - set(answered))
    twice = sum(times > 1 for times in answered.values())
    print(
        f"{args.tasks:,} tasks, {killed} workers killed: {stats.redelivered} tasks came again, {twice} of them had "
        f"been answered before, {stats.dropped} dropped, {len(lost)} lost"
    )
    return 1 if lost or stats.dropped else 0


if __name__ == "__main__":
    raise SystemExit(main())

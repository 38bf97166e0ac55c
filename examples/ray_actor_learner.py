"""`actor_learner.py` on a Ray cluster: actors on all nodes play CartPole-v1 and teach a learner.

The algorithm, TRAJECTORY and WEIGHTS are those of `actor_learner.py`. Its channel and its `Latest` are those of
`ringshm.ray` here, whose handles go to Ray actors on any node: on the learner's own they write into its ring and read
its slot; elsewhere into a ring of their node, whose relay brings what is in it, and weights come to each node once.

    python examples/ray_actor_learner.py --actors 8                # on the cluster that this machine belongs to
    RAY_ADDRESS=local python examples/ray_actor_learner.py         # on a Ray of one node, which it starts

It ends when the last 100 episodes returned 475 on average (exit 0), or after `--max-seconds` (exit 1). Meanwhile, kill
an actor: Ray starts it again, with the handles that it had, and nothing but the rate changes.

As a user of ringshm, look at `Actor`, and at `train`: where the handles are made, handed over and closed.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import signal
import sys
from collections.abc import Sequence
from typing import Any

import actor_learner
import numpy as np
import ray
from actor_learner import (
    BATCH_STEPS,
    CAPACITY,
    SOLVED,
    TRAJECTORY,
    WEIGHTS,
    Learner,
    Progress,
    Trajectory,
    act,
    unstack,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ringshm.ray

# The other nodes need not have this folder: what an actor needs of that file goes along with it.
ray.cloudpickle.register_pickle_by_value(actor_learner)


class Actor:
    """Plays, on whichever node. If Ray starts it again, it unpickles its handles once more."""

    def __init__(self, weights: Any, trajectories: Any) -> None:
        self.weights, self.trajectories = weights, trajectories

    def act(self, seed: np.random.SeedSequence) -> str:
        """Play until the learner has ended the stream; the node that it was on."""
        act(seed, self.weights, self.trajectories)
        return str(ray.get_runtime_context().get_node_id())


#: Started again by Ray however often it dies, and what it was doing is done again.
RemoteActor: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(Actor)


def start(count: int, seed: int, weights: Any, trajectories: Any) -> list[Any]:
    """So many actors, on all nodes by turns; what `act` will return."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    playing = []
    for k, one in enumerate(np.random.SeedSequence(seed).spawn(count)):
        where = NodeAffinitySchedulingStrategy(nodes[k % len(nodes)], soft=True)
        # one sender for each actor; the weights themselves for any number of them
        actor = RemoteActor.options(scheduling_strategy=where).remote(weights, trajectories.sender())
        playing.append(actor.act.remote(one))
    return playing


def train(args: argparse.Namespace, progress: Progress) -> bool:
    """Learn until CartPole is solved (True) or the time is up (False)."""
    learner = Learner(args.seed)
    batch: list[Trajectory] = []
    fill, solved = 0.0, False
    with (
        ringshm.ray.Channel(CAPACITY, spec=TRAJECTORY) as trajectories,
        ringshm.ray.Latest(spec=WEIGHTS, borrows=args.actors) as weights,
        progress.live or contextlib.nullcontext(),
    ):
        playing = start(args.actors, args.seed, weights, trajectories)
        version = weights.publish(dict(zip(WEIGHTS, learner.policy, strict=True)))
        while not solved and progress.seconds() < args.max_seconds:
            progress.show()
            fill = max(fill, trajectories.qsize() / CAPACITY)
            with contextlib.suppress(queue.Empty):
                batch += unstack(trajectories.get_batch(CAPACITY, min=1, timeout=0.1))
            if sum(len(t.actions) for t in batch) < BATCH_STEPS:
                continue
            solved = progress.add(batch, fill, version, args.score)
            learner.update(batch)
            version = weights.publish(dict(zip(WEIGHTS, learner.policy, strict=True)))
            batch, fill = [], 0.0
        trajectories.shutdown(immediate=True)  # whoever waits there, or comes later, is told at once, on all nodes
        ended, late = ray.wait(playing, num_returns=len(playing), timeout=30)
        print(
            f"{len(ended)} actors ended, on {len(set(ray.get(ended)))} nodes; {len(late)} had not started", flush=True
        )
    return solved


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(description="Solve CartPole-v1 with actors on all nodes of a Ray cluster.")
    parser.add_argument("--actors", type=int, default=2, metavar="N", help="how many, over all nodes (default: 2)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all random numbers (default: 0)")
    parser.add_argument("--score", type=float, default=SOLVED, metavar="R", help="mean return to reach (default: 475)")
    parser.add_argument("--max-seconds", type=float, default=300, metavar="T", help="give up then (default: 300)")
    args = parser.parse_args(argv)
    if args.actors < 1:
        parser.error("--actors must be at least 1")
    if args.seed < 0:
        parser.error("--seed must not be negative")
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    progress = Progress()
    try:
        solved = train(args, progress)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    now = progress.history[-1]
    print(
        f"{'solved' if solved else 'not solved'}: mean return {now.mean_return:.1f} over the last 100 of "
        f"{len(progress.returns):,} episodes, {now.steps:,} steps, {progress.seconds():.1f} s (seed {args.seed})"
    )
    return 0 if solved else 1


if __name__ == "__main__":
    raise SystemExit(main())

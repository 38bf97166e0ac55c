"""A policy learns CartPole from partial batches: nobody waits for the slowest environment.

`recv` gives the first environments that are ready, the policy acts for them, and `send` steps them on. Each environment
has an unroll of its own; the learner takes those that are whole. The policy has moved on meanwhile, so it weighs them
as IMPALA does (V-trace). One reset in twenty takes 50 ms here, as of a game that loads a level: the others go on. A
worker that is killed ends the program, which says which environment it stepped.

    python examples/impala.py --envs 8 --batch-size 2 --seed 0

It ends when the last 20 episodes have returned 195 on average (`--score`): CartPole-v0 was solved then.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ringshm.gymnasium import RingVectorEnv

UNROLL, UNROLLS = 32, 4  # steps of one environment; unrolls that the learner takes at once
DISCOUNT, RATE = 0.98, 0.05


class SlowResets(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Some resets take long."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, after a while."""
        observation, info = super().reset(seed=seed, options=options)
        if self.np_random.random() < 0.05:
            time.sleep(0.05)
        return observation, info


def make() -> Any:
    """An environment; workers call it."""
    return SlowResets(gymnasium.make("CartPole-v1"))


class Step(NamedTuple):
    """What became of an action."""

    features: NDArray[Any]
    action: int
    chance: float  # with which it was chosen
    reward: float
    terminated: bool
    truncated: bool
    after: NDArray[Any]  # the features that followed


def features(observations: NDArray[Any]) -> NDArray[Any]:
    """What policy and value are linear in, of shape `(n, 15)`: a constant, the observations, and their products."""
    scaled = observations / np.array([2.4, 2.0, 0.2, 2.0])
    rows, columns = np.triu_indices(4)
    return np.hstack([np.ones((len(scaled), 1)), scaled, scaled[:, rows] * scaled[:, columns]])


class Learner:
    """A policy and a value, linear in the features."""

    def __init__(self, seed: int) -> None:
        self.policy, self.value = np.zeros(15), np.zeros(15)
        self.rng = np.random.default_rng(seed)
        self.unrolls: list[list[Step]] = []

    def right(self, x: NDArray[Any]) -> NDArray[Any]:
        """The chance of action 1."""
        return 1 / (1 + np.exp(-x @ self.policy))

    def act(self, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Actions, and the chance of each."""
        right = self.right(x)
        actions = (self.rng.random(len(x)) < right).astype(np.int64)
        return actions, np.where(actions == 1, right, 1 - right)

    def take(self, unroll: list[Step]) -> None:
        """Learn from an unroll, when there are enough."""
        self.unrolls.append(unroll)
        if len(self.unrolls) == UNROLLS:
            for each in self.unrolls:
                self.learn(each)
            self.unrolls.clear()

    def learn(self, unroll: list[Step]) -> None:
        """V-trace (Espeholt et al., 2018, arXiv 1802.01561, equation 1), backwards."""
        x, after = np.array([step.features for step in unroll]), np.array([step.after for step in unroll])
        actions, chances, rewards, terminated, truncated = (
            np.array(column) for column in zip(*(step[1:6] for step in unroll), strict=True)
        )
        right = self.right(x)
        weights = np.minimum(1, np.where(actions == 1, right, 1 - right) / chances)
        values, next_values = x @ self.value, np.where(terminated, 0, after @ self.value)
        errors = weights * (rewards + DISCOUNT * next_values - values)
        targets, carried = np.empty(len(unroll)), 0.0
        advantages = np.empty(len(unroll))
        for t in reversed(range(len(unroll))):
            carried = 0.0 if terminated[t] or truncated[t] else carried
            advantages[t] = errors[t] + weights[t] * DISCOUNT * carried
            carried = errors[t] + DISCOUNT * weights[t] * carried
            targets[t] = values[t] + carried
        self.value += RATE * x.T @ (targets - values) / len(unroll)
        self.policy += RATE * x.T @ ((actions - right) * advantages) / len(unroll)


def learn(envs: RingVectorEnv, score: float, seed: int, steps: int) -> tuple[int, float]:
    """Learn until it has that score, or so many steps are over; how many were made, and the mean return."""
    learner = Learner(seed)
    unrolls: list[list[Step]] = [[] for _ in range(envs.num_envs)]
    pending: list[Any] = [None] * envs.num_envs  # features, action and chance of the action that an environment has
    totals, returns = np.zeros(envs.num_envs), collections.deque([0.0], maxlen=20)
    envs.async_reset(seed=seed)
    made = 0
    while made < steps:
        observations, rewards, terminations, truncations, infos = envs.recv()
        x, ids = features(observations), infos["env_id"]
        for i, after, reward, terminated, truncated in zip(ids, x, rewards, terminations, truncations, strict=True):
            if pending[i] is None:  # it was reset
                continue
            made += 1
            before, action, chance = pending[i]
            unrolls[i].append(Step(before, action, chance, float(reward), bool(terminated), bool(truncated), after))
            totals[i] += reward
            if terminated or truncated:
                returns.append(totals[i])
                totals[i] = 0
            if len(unrolls[i]) == UNROLL:
                learner.take(unrolls[i])
                unrolls[i] = []
        actions, chances = learner.act(x)
        for row, i in enumerate(ids):
            over = terminations[row] or truncations[row]  # then the next action resets it
            pending[i] = None if over else (x[row], actions[row], chances[row])
        envs.send(actions, ids)
        if len(returns) == 20 and np.mean(returns) >= score:
            break
    return made, float(np.mean(returns))


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(description="A policy learns from the environments that are ready first.")
    parser.add_argument("--envs", type=int, default=8, metavar="N")
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="environments that `recv` gives")
    parser.add_argument("--score", type=float, default=195, metavar="R", help="default: 195; 500 is the most")
    parser.add_argument("--steps", type=int, default=400_000, metavar="N", help="when to give up (default: 400,000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    args = parser.parse_args(argv)
    if not 1 <= args.batch_size <= args.envs or args.steps < 1 or args.seed < 0:
        parser.error("--batch-size must be 1 to --envs, --steps at least 1, and --seed at least 0")
    try:
        envs = RingVectorEnv([make] * args.envs, batch_size=args.batch_size, context="spawn")
        with contextlib.closing(envs):
            began = time.monotonic()
            steps, mean = learn(envs, args.score, args.seed, args.steps)
            seconds = time.monotonic() - began
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    solved = "solved" if mean >= args.score else "not solved"
    rate = f"{steps / seconds:,.0f} a second"
    print(f"{solved}: mean return {mean:.1f} over the last 20 episodes, {steps:,} steps, {rate}")
    return 0 if mean >= args.score else 1


if __name__ == "__main__":
    raise SystemExit(main())
